"""A GPT in one file: the layers, the loss, parameter and FLOP counts.

By default it is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").
The options of GPTConfig turn it into anything between GPT-2 and today's models; some of them
together give Qwen3 (Yang et al. 2025). nib/generation/ generates text with it.

Letters in shapes:
    B sequences, T positions, V = vocab_size, C = n_embd
    H = n_head, K = key and value heads, D = the width of a head, by default C / H
    Q queries, S keys, unless a whole sequence attends to itself
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nib.kernels.attention import attend_in_blocks, is_causal_attention, share_heads
from nib.kernels.cross_entropy import IGNORED, head_cross_entropy, uses_head_kernel
from nib.kernels.elementwise import Dropout, drop_out, tanh_gelu


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2's. Raises ValueError if a field is invalid."""

    vocab_size: int = 50257
    block_size: int = 1024  # maximum number of positions in the context
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # key and value heads; groups of query heads share them; 0 is n_head
    head_dim: int = 0  # width of a head; 0 is n_embd / n_head
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms
    qkv_bias: bool = False  # of queries, keys and values, even without `bias`
    position: Literal['learned', 'rotary'] = 'learned'
    rotary_base: float = 10000.0  # larger values slow the rotation of the slowest dimensions
    rotary_scaling: tuple = ()  # slows slow rotations for a longer context: see Rotary
    norm: Literal['layer', 'rms'] = 'layer'
    norm_eps: float = 0.0  # added to the variance; 0 is 1e-5 in LayerNorm and 1e-6 in RMSNorm
    smear: int = 0  # number of previous tokens whose embeddings are mixed into each position
    qk_norm: bool = False  # normalize queries and keys, head by head
    mlp: Literal['gelu', 'gelu_erf', 'relu', 'relu2', 'swiglu'] = 'gelu'
    mlp_width: int = 0  # hidden units; 0 is 4C, and for SwiGLU two thirds of that
    tied_head: bool = True  # the output head is the token embedding itself
    logit_cap: float = 0.0  # logits stay between minus and plus this value; 0: no cap
    zero_init: bool = False  # residual projections start at 0: every block starts as the identity
    recompute: bool = False  # keep only the inputs of blocks; recompute the rest in backward

    def __post_init__(self):
        object.__setattr__(self, 'rotary_scaling', tuple(self.rotary_scaling))  # JSON has lists
        check_shape(self)

    @classmethod
    def pick(cls, values: Mapping, vocab_size: int) -> 'GPTConfig':
        """The config with this vocab_size and the other fields that `values` has."""
        names = {field.name for field in fields(cls)} & values.keys() - {'vocab_size'}
        return cls(vocab_size, **{name: values[name] for name in names})

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def mlp_units(self) -> int:
        """4C. SwiGLU, which has three matrices, has 2/3 of that, rounded up to a multiple of 32."""
        if self.mlp == 'swiglu':
            return self.mlp_width or math.ceil(8 * self.n_embd / 3 / 32) * 32
        return self.mlp_width or 4 * self.n_embd


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """LayerNorm (Ba et al. 2016), or RMSNorm, which does not center (Zhang and Sennrich 2019)."""
    if config.norm == 'layer':
        return nn.LayerNorm(width, eps=config.norm_eps or 1e-5, bias=config.bias)
    return RMSNorm(width, eps=config.norm_eps or 1e-6)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the gain cast to the dtype of x, as its fast kernel requires."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): the score of a query and a key depends on their distance.

    Dimensions i and i + D/2 of a query or key form a point, which is rotated by the angle
    position * base^(-2i/D). rotary_scaling, (factor, low, high, length), divides by `factor` the
    frequencies with fewer than `low` turns in `length` positions, and leaves those with more than
    `high` (Grattafiori et al. 2024, Llama 3).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        exponents = -torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width
        frequencies = config.rotary_base**exponents  # (D/2)
        if config.rotary_scaling:
            factor, low, high, length = config.rotary_scaling
            kept = ((frequencies * length / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            frequencies *= kept + (1 - kept) / factor
        positions = torch.arange(config.block_size, dtype=torch.float64)
        angles = positions[:, None] * frequencies  # (block_size, D/2)
        cos, sin = angles.cos().float(), angles.sin().float()
        self.register_buffer('cos', torch.cat((cos, cos), dim=-1), persistent=False)
        self.register_buffer('sin', torch.cat((-sin, sin), dim=-1), persistent=False)

    def forward(self, positions):
        """cos and sin (1, T, D) of positions (T), or (B, 1, T, D) of positions (B, T).

        sin is negative in the first half, which rotate() subtracts.
        """
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def rotate(x, rotary):
    """Rotates x (B, H, T, D) by angles whose cos and sin are in `rotary`, in the dtype of x.

    roll() swaps the two halves of D.
    """
    cos, sin = (part.type_as(x) for part in rotary)
    return x.roll(x.shape[-1] // 2, dims=-1) * sin + x * cos


class Smear(nn.Module):
    """Adds the embeddings of the previous tokens, weighted by dimension, to that of each token.

    Attention would otherwise spend a layer on finding these tokens. The weights start at 1/2.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.smear, config.n_embd))

    def forward(self, x, positions):
        """x: embeddings (B, up to n + T, C) of the last tokens, T of which are at `positions`."""
        n, T = len(self.weight), positions.shape[-1]
        x = F.pad(x, (0, 0, n + T - x.shape[1], 0))  # (B, n + T, C)
        y = x[:, n:]
        for i, weight in enumerate(self.weight, 1):
            exists = (positions >= i).unsqueeze(-1)  # nothing comes before position 0
            y = y + weight.type_as(x) * exists * x[:, n - i : -i]
        return y


class CausalSelfAttention(nn.Module):
    """In each of H heads, every position takes a weighted mean of the values up to its own.

    With fewer key and value heads, groups of query heads share them (Ainslie et al. 2023). qk_norm
    bounds the scores (Dehghani et al. 2023, section 2.1).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = D = config.head_width
        self.heads = [config.n_head, config.kv_heads, config.kv_heads]
        self.dropout = config.dropout
        # Queries, keys and values come from one matrix.
        has_bias = config.bias or config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * D, bias=has_bias)
        self.q_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.c_proj = nn.Linear(config.n_head * D, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, rotary=None):  # x (B, T, C)
        y = self.attend(*self.query_key_value(x, rotary))  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * D): the heads side by side again
        return self.resid_dropout(self.c_proj(y))

    def query_key_value(self, x, rotary=None):
        """The queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C)."""
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = heads.split(self.heads, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def attend(self, q, k, v):
        """The attention of a sequence to itself. Generation replaces it with that of a cache."""
        return attend(q, k, v, self.dropout if self.training else 0.0)


def attention_scores(q, k, query_positions, key_positions):
    """The scores (B, H, Q, S) of queries q (B, H, Q, D) for keys k (B, H, S, D), -inf where a query
    may not look at a key. Attention is the mean of the values weighted by softmax(scores).

    This is the definition of attention. To change it (a sliding window, ALiBi, another scale),
    change it here: training, generation and the doctor all follow. The fused kernels below are
    used only as long as they compute the same.

    Positions count from 0 at the start of a sequence. Their shapes are (Q) and (S), or (B, 1, Q)
    and (B, 1, S) if they differ between rows. Shorter rows are padded with negative positions.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # Vaswani et al. 2017, equation 1
    is_later = key_positions.unsqueeze(-2) > query_positions.unsqueeze(-1)  # (..., Q, S)
    return scores.masked_fill(is_later, -math.inf)


def attend(q, k, v, dropout: float = 0.0):
    """The attention (B, H, T, D) of a sequence to itself: q (B, H, T, D), k and v (B, K, T, D).

    To change attention, edit attention_scores(), not this function, which only picks a fast way to
    compute it.
    """
    if not kernels_fit():
        positions = torch.arange(q.shape[2], device=q.device)
        return attend_by_definition(q, k, v, positions, positions, dropout)
    if q.device.type == 'cpu' and (q.dtype == torch.bfloat16 or dropout):
        return attend_in_blocks(q, k, v, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


def attend_by_definition(q, k, v, query_positions, key_positions, dropout=0.0, mask=None):
    """Attention exactly as attention_scores() defines it. Keeps all scores in memory.

    q (B, H, Q, D), k and v (B, K, S, D). mask: True for keys that exist; broadcast to (B, H, Q, S).
    """
    k, v = share_heads(k, q.shape[1]), share_heads(v, q.shape[1])
    scores = attention_scores(q, k, query_positions, key_positions)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return drop_out(scores.softmax(dim=-1), dropout).type_as(v) @ v


def kernels_fit() -> bool:
    """Whether attention_scores() is causal attention, which is all the fused kernels compute."""
    return is_causal_attention(attention_scores)


class TanhGELU(nn.GELU):
    """GELU as in GPT-2: by the tanh approximation of Hendrycks and Gimpel 2016, section 2."""

    def __init__(self):
        super().__init__(approximate='tanh')

    def forward(self, x):
        return tanh_gelu(x)


class SquaredReLU(nn.Module):
    """So et al. 2021."""

    def forward(self, x):
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """The first half of the units gates the second (Shazeer 2020)."""

    def forward(self, x):
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {  # GPTConfig.mlp
    'gelu': TanhGELU,
    'gelu_erf': nn.GELU,
    'relu': nn.ReLU,
    'relu2': SquaredReLU,
    'swiglu': SwiGLU,
}


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        hidden = config.mlp_units * (2 if self.kind == 'swiglu' else 1)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.activation = ACTIVATIONS[self.kind]()
        self.c_proj = nn.Linear(config.mlp_units, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        x = self.activation(self.c_fc(x))  # (B, T, mlp_units)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention, then MLP: each reads the normalized residual stream and adds to it (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rotary=None):
        x = x + self.attn(self.ln_1(x), rotary)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model. Parameter names are GPT-2's."""

    transformer: Any  # an nn.ModuleDict, whose entries torch types as Tensor | Module
    lm_head: nn.Linear
    rotary: Rotary

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.n_embd)})
        if config.smear:
            self.transformer['smear'] = Smear(config)
        if config.position == 'learned':
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.rotary = Rotary(config)
        self.transformer['drop'] = Dropout(config.dropout)
        self.transformer['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer['ln_f'] = make_norm(config, config.n_embd)
        if not config.tied_head:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Draws weights from normal(0, 0.02) and sets biases to zero.

        The two projections of a layer into the residual stream are scaled by 1/sqrt(2 * n_layer),
        so that its variance does not grow with depth (GPT-2, section 2.3).
        """
        smaller = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=smaller if name.endswith('c_proj') else 0.02)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, Smear):
                nn.init.constant_(module.weight, 0.5)

    def forward(self, idx, targets=None):
        """Computes the logits, or the loss if targets are given.

        idx, targets: token ids (B, T), T <= block_size; targets of -1 are ignored.
        Returns logits (B, T, V), or the mean cross-entropy in nats per token, a float32 scalar.
        Raises ValueError if T is larger than block_size.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(
                f'{idx.shape[1]} positions are more than block_size {self.config.block_size}'
            )
        x = self.hidden_states(idx, torch.arange(idx.shape[1], device=idx.device))
        if targets is None:
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, C) and (N)
        if uses_head_kernel(x, self.config.vocab_size):  # faster; omit it if you change the loss
            return head_cross_entropy(x, self.head_weight, targets, self.config.logit_cap)
        return F.cross_entropy(self.logits(x).float(), targets, ignore_index=IGNORED)

    def hidden_states(self, idx, positions):
        """The residual stream (B, T, C) after the last norm, of idx (B, T) at positions (T).

        With smear, idx may begin with up to `smear` tokens more, those before the first position.
        """
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.smear:  # mix in the previous tokens
            x = self.transformer.smear(x, positions)
        rotary = None
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(positions)
        else:
            rotary = self.rotary(positions)
        x = self.transformer.drop(x)
        recompute = self.config.recompute and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = checkpoint(block, x, rotary, use_reentrant=False) if recompute else block(x, rotary)
        return self.transformer.ln_f(x)

    @property
    def head_weight(self):
        """The weight of the output head (V, C), which may be the token embedding."""
        head = self.transformer.wte if self.config.tied_head else self.lm_head
        return head.weight  # (V, C)

    def logits(self, x):
        """The logits (..., V) of hidden states x (..., C)."""
        if self.config.tied_head:
            logits = F.linear(x, self.transformer.wte.weight)  # (B, T, V)
        else:
            logits = self.lm_head(x)
        return soft_cap(logits, self.config.logit_cap)

    # -- counts -----------------------------------------------------------------------------------

    def num_params(self, positions: bool = True) -> int:
        """The number of parameters; positions=False leaves out wpe, as nanoGPT does."""
        total = sum(p.numel() for p in self.parameters())
        if positions or self.config.position != 'learned':
            return total
        return total - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> dict[str, int]:
        """Floating-point operations of one token's forward pass at full context, by layer.

        A matrix of m x n costs 2mn. Attention costs 2THD for the scores and 2THD for the weighted
        mean, not discounting causality (Chowdhery et al. 2022, PaLM, appendix B). The backward pass
        costs twice as much, so a training step costs three times the sum.
        """
        attention = 4 * self.config.block_size * self.config.n_head * self.config.head_width
        layers = {}
        for i, block in enumerate(self.transformer.h):
            for name in ('attn', 'mlp'):
                matrices = (p for p in getattr(block, name).parameters() if p.dim() >= 2)
                layers[f'h.{i}.{name}'] = 2 * sum(p.numel() for p in matrices)
            layers[f'h.{i}.attn'] += attention
        layers['head'] = 2 * self.head_weight.numel()
        return layers

    # -- generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[Sequence[int]] = (),
        compile: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Continues every prompt, yielding tokens as they are generated.

        prompts: B sequences of at least one token id; only the last block_size of each are used.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: samples from the k most likely tokens only.
        top_p: samples from the smallest set of tokens whose probabilities add up to at least this
            (Holtzman et al. 2020).
        seed: the same seed, prompts and device give the same tokens.
        stop: token sequences; a row ends after any of them, which is yielded too.
        compile: compiles the decoding step. On a GPU, the step is a CUDA graph either way.

        Yields a tensor (B,) for each new position, -1 in rows that have ended, until all rows have
        ended or max_new_tokens have been generated. Raises ValueError for invalid arguments.

        A row whose context is full drops its oldest half. The rest is read again from
        position 0, as in training; this costs one pass every block_size / 2 tokens.
        """
        from nib.generation.sampling import generate

        return generate(
            self, prompts, max_new_tokens, temperature, top_k, top_p, seed, stop, compile
        )


def soft_cap(logits, cap):
    """Logits bent smoothly into (-cap, cap), for cap > 0 (Gemma Team 2024, section 2)."""
    return cap * torch.tanh(logits / cap) if cap else logits


# -- checks of a config ---------------------------------------------------------------------------

LARGE = 1 << 31  # sizes from here on would overflow the counts
RANGES = {  # field -> the least value, and the first one that is too large
    'vocab_size': (1, LARGE),
    'block_size': (1, LARGE),
    'n_layer': (1, 10_000),  # more would take hours to build
    'n_head': (1, LARGE),
    'n_embd': (1, LARGE),
    'head_dim': (0, LARGE),
    'mlp_width': (0, LARGE),
    'smear': (0, 10),
    'dropout': (0, 1),
    'norm_eps': (0, math.inf),
    'logit_cap': (0, math.inf),
}


def check_shape(config):
    """Raises ValueError if a field of a GPTConfig is invalid, with a value to try."""
    for name, (least, below) in RANGES.items():
        value = getattr(config, name)
        if not least <= value < below:
            limit = f'less than {below:,}' if below < math.inf else 'finite'
            raise ValueError(f'{name} is {value}: it must be at least {least} and {limit}')
    for name, kind in get_type_hints(type(config)).items():
        choices, value = get_args(kind), getattr(config, name)
        if get_origin(kind) is Literal and value not in choices:
            raise ValueError(f'{name} is {value!r}: it must be one of {", ".join(choices)}')
    n_embd, n_head, n_kv_head = config.n_embd, config.n_head, config.n_kv_head
    if n_embd % n_head and not config.head_dim:
        nearest = n_embd // n_head * n_head or n_head
        raise ValueError(
            f'n_embd {n_embd} is not divisible by n_head {n_head}: try n_embd {nearest}'
        )
    if n_kv_head < 0 or n_kv_head and n_head % n_kv_head:
        shared = math.gcd(n_head, n_kv_head)
        raise ValueError(
            f'n_head {n_head} is not divisible by n_kv_head {n_kv_head}: try n_kv_head {shared}'
        )
    if config.position == 'rotary' and config.head_width % 2:
        name = 'head_dim' if config.head_dim else 'n_embd / n_head'
        raise ValueError(
            f'{name} is {config.head_width}: rotary positions turn pairs of dimensions, so it '
            f'must be even: try head_dim {config.head_width + 1}'
        )
    if config.position == 'rotary' and not 0.0 < config.rotary_base < math.inf:
        raise ValueError(f'rotary_base is {config.rotary_base}: it must be a positive number')
