"""A GPT in one file: the layers, the loss, generation with a key-value cache, parameter and FLOP counts.

By default it is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"); GPTConfig's choices
make it anything between that and today's models (all of them together: Qwen3, Yang et al. 2025).
Shapes: B sequences, T positions, C = n_embd, H = n_head, K = key and value heads, D = C / H (one head's width),
V = vocab_size.
"""
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -1  # a target that counts nothing towards the loss; also what generate() yields for a row that has ended
LOSS_CHUNK = 1 << 24  # logits that the loss holds at a time, in float32: 64 MiB
QUERY_BLOCK = 256  # queries that attend together in attend_in_blocks


@dataclass(frozen=True)
class GPTConfig:
    """What fixes the shape of a GPT; the defaults are GPT-2's. ValueError names the field that cannot be."""
    vocab_size: int = 50257
    block_size: int = 1024  # the most positions that the model attends over
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # key and value heads, each shared by n_head / n_kv_head query heads; 0 is n_head
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms
    position: Literal['learned', 'rotary'] = 'learned'
    rotary_base: float = 10000.0  # the larger, the slower the slowest pair of dimensions turns
    norm: Literal['layer', 'rms'] = 'layer'
    qk_norm: bool = False  # normalise queries and keys, head by head
    mlp: Literal['gelu', 'relu2', 'swiglu'] = 'gelu'
    tied_head: bool = True  # the output head is the token embedding itself
    logit_cap: float = 0.0  # logits stay within plus and minus this; 0 is no cap
    zero_init: bool = False  # residual projections begin at 0: every block begins as the identity
    recompute: bool = False  # of each block keep the input alone, and compute the rest again in the backward pass

    def __post_init__(self):
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'):
            below = 10_000 if name == 'n_layer' else 1 << 31  # more would take hours to build, or cannot be counted
            if not 1 <= getattr(self, name) < below:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be at least 1 and less than {below:,}')
        for name, kind in get_type_hints(type(self)).items():
            if get_args(kind) and getattr(self, name) not in get_args(kind):
                raise ValueError(f'{name} is {getattr(self, name)!r}: it must be one of {", ".join(get_args(kind))}')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not divisible by n_head {self.n_head}: '
                             f'try n_embd {self.n_embd // self.n_head * self.n_head or self.n_head}')
        if self.n_kv_head < 0 or self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}: '
                             f'try n_kv_head {math.gcd(self.n_head, self.n_kv_head)}')
        if self.position == 'rotary' and self.head_dim % 2:
            raise ValueError(f'n_embd / n_head is {self.head_dim}: rotary positions turn pairs of dimensions, so it must be even: '
                             f'try n_embd {self.n_head * (self.head_dim + 1)}')
        if self.position == 'rotary' and not 0.0 < self.rotary_base < math.inf:
            raise ValueError(f'rotary_base is {self.rotary_base}: it must be a positive number')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout is {self.dropout}: it must be at least 0 and less than 1')
        if not 0.0 <= self.logit_cap < math.inf:
            raise ValueError(f'logit_cap is {self.logit_cap}: it must be 0 (none) or a positive number')

    @classmethod
    def pick(cls, values: Mapping, vocab_size: int) -> 'GPTConfig':
        """The config whose fields, but for vocab_size, stand among these values."""
        return cls(vocab_size, **{field.name: values[field.name] for field in fields(cls) if field.name != 'vocab_size'})

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self) -> int:
        """4C; in SwiGLU, whose width costs three matrices instead of two, 2/3 of it, in whole multiples of 32."""
        return math.ceil(8 * self.n_embd / 3 / 32) * 32 if self.mlp == 'swiglu' else 4 * self.n_embd


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """LayerNorm (Ba et al. 2016), or RMSNorm, which leaves the mean alone (Zhang and Sennrich 2019)."""
    return nn.LayerNorm(width, bias=config.bias) if config.norm == 'layer' else RMSNorm(width, eps=1e-6)


class RMSNorm(nn.RMSNorm):
    """torch's, whose fast kernel wants its gain in the precision of x."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): dimensions i and i + D/2 of a query or key are turned by position * base^(-2i/D),
    so that the product of a query and a key depends on their distance alone."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        speeds = config.rotary_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angles = torch.arange(config.block_size, dtype=torch.float64)[:, None] * speeds  # (block_size, D/2)
        self.register_buffer('cos', angles.cos().float(), persistent=False)
        self.register_buffer('sin', angles.sin().float(), persistent=False)

    def forward(self, positions):
        """cos and sin (1, T, D/2) of positions (T), or (B, 1, T, D/2) of positions (B, T)."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def rotate(x, rotary):
    """x (B, H, T, D), turned by rotary's angles, in x's precision."""
    cos, sin = (part.type_as(x) for part in rotary)
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    """Every position takes a weighted mean over the values of the positions up to itself, in H heads.

    With fewer key and value heads, groups of query heads share them (Ainslie et al. 2023). qk_norm bounds the scores
    (Dehghani et al. 2023, section 2.1).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.n_head, config.kv_heads, config.kv_heads]
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * self.head_dim, bias=config.bias)  # query, key and value at once
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary=None, cache=None):  # x (B, T, C)
        B, T, C = x.shape
        # q (B, H, T, D), k and v (B, K, T, D)
        q, k, v = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2).split(self.heads, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = cache.attend(q, k, v) if cache else attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


def attend(q, k, v, dropout: float = 0.0):
    """Causal attention: every query of q (B, H, T, D) over the k and v (B, K, T, D) up to its own position."""
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16:
        return attend_in_blocks(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])


def attend_in_blocks(q, k, v, dropout: float = 0.0):
    """Causal attention as scaled_dot_product_attention computes it, q (B, H, T, D), k and v (B, K, T, D), for bfloat16 on a CPU:
    its matrix products run at the rate of others. The keys after a block's last query are never looked at, and of several
    blocks the probabilities are computed again in the backward pass instead of kept."""
    B, H, T, D = q.shape
    k, v = (part.repeat_interleave(H // part.shape[1], dim=1).reshape(B * H, T, D) for part in (k, v))
    q = q.reshape(B * H, T, D)
    if T <= QUERY_BLOCK:
        return attend_block(q, k, v, dropout).view(B, H, T, D)
    ends = [*range(QUERY_BLOCK, T, QUERY_BLOCK), T]
    blocks = [checkpoint(attend_block, q_block, k[:, :end], v[:, :end], dropout, use_reentrant=False)
              for q_block, end in zip(q.split(QUERY_BLOCK, dim=1), ends)]
    return torch.cat(blocks, dim=1).view(B, H, T, D)


def attend_block(q, k, v, dropout):
    """Attention of the last queries q (N, Q, D) of a context of S positions, k and v (N, S, D)."""
    Q, S, D = q.shape[1], *k.shape[1:]
    mask = torch.full((Q, S), -math.inf, dtype=q.dtype).triu(S - Q + 1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them: GELU (Hendrycks and Gimpel 2016, tanh form), squared ReLU
    (So et al. 2021), or SwiGLU, in which the first layer makes a gate too (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width * (2 if self.kind == 'swiglu' else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, mlp_width), twice as wide in SwiGLU
        if self.kind == 'gelu':
            x = F.gelu(x, approximate='tanh')
        elif self.kind == 'relu2':
            x = F.relu(x).square()
        elif self.kind != 'in c_fc':  # for_generation's twin: the product itself ends in GELU
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of the residual stream and added to it (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rotary=None, cache=None):
        x = x + self.attn(self.ln_1(x), rotary, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model. Parameter names are GPT-2's."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.n_embd)})
        if config.position == 'learned':
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.rotary = Rotary(config)
        self.transformer['drop'] = nn.Dropout(config.dropout)
        self.transformer['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer['ln_f'] = make_norm(config, config.n_embd)
        if not config.tied_head:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Normal(0, 0.02) weights and zero biases; residual projections smaller by 1/sqrt(2 * n_layer), so that the
        residual stream's variance does not grow with depth (GPT-2, section 2.3: two projections a layer)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual_std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(module.weight, std=residual_std if name.endswith('c_proj') else 0.02)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()

    def forward(self, idx, targets=None):
        """The logits, or with targets the loss.

        idx, targets: token ids (B, T), T <= block_size; a target of -1 counts nothing.
        Returns logits (B, T, V), or the mean cross-entropy in nats per token, a float32 scalar.
        Raises ValueError when T is larger than block_size.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f'{idx.shape[1]} positions are more than block_size {self.config.block_size}')
        x = self._hidden(idx, torch.arange(idx.shape[1], device=idx.device))
        if targets is None:
            return self._logits(x)
        if targets.numel() * self.config.vocab_size > LOSS_CHUNK:
            return ChunkedLoss.apply(x.flatten(0, 1), self._head_weight, targets.flatten(), self.config.logit_cap,
                                     torch.is_grad_enabled())
        return F.cross_entropy(self._logits(x).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    def _hidden(self, idx, positions, caches=None):
        x = self.transformer.wte(idx)  # (B, T, C)
        rotary = None
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(positions)
        else:
            rotary = self.rotary(positions)
        x = self.transformer.drop(x)
        recompute = self.config.recompute and torch.is_grad_enabled()
        for i, block in enumerate(self.transformer.h):
            if recompute:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    @property
    def _head_weight(self):
        return self.transformer.wte.weight if self.config.tied_head else self.lm_head.weight  # (V, C)

    def _logits(self, x):
        logits = F.linear(x, self.transformer.wte.weight) if self.config.tied_head else self.lm_head(x)  # (B, T, V)
        return soft_cap(logits, self.config.logit_cap)

    def crop_block_size(self, block_size: int):
        """Shortens the context, keeping the first positions. ValueError when it would have to grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size {block_size} is not between 1 and the {self.config.block_size} of the model')
        self.config = replace(self.config, block_size=block_size)
        if self.config.position == 'learned':
            kept = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)

    # -- counts -------------------------------------------------------------------------------------------------

    def num_params(self, positions: bool = True) -> int:
        """Parameters in full; without the position embeddings as nanoGPT counts them."""
        total = sum(p.numel() for p in self.parameters())
        return total if positions or self.config.position != 'learned' else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> dict[str, int]:
        """Floating-point operations of one token's forward pass at full context, by layer.

        A matrix of m x n costs 2mn. Attention costs 2TC for the scores and 2TC for the weighted mean, causality not
        discounted, as in Chowdhery et al. 2022 (PaLM), appendix B. The backward pass costs twice as much again, so
        a training step is three times the sum.
        """
        attention = 4 * self.config.block_size * self.config.n_embd
        layers = {}
        for i, block in enumerate(self.transformer.h):
            layers[f'h.{i}.attn'] = 2 * (block.attn.c_attn.weight.numel() + block.attn.c_proj.weight.numel()) + attention
            layers[f'h.{i}.mlp'] = 2 * (block.mlp.c_fc.weight.numel() + block.mlp.c_proj.weight.numel())
        layers['head'] = 2 * self._head_weight.numel()
        return layers

    # -- generation ---------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
                 stop: Sequence[Sequence[int]] = (), compile: bool = False) -> Iterator[torch.Tensor]:
        """Continues every prompt, handing out tokens as they are made.

        prompts: B sequences of token ids, of any lengths >= 1; of one longer than block_size the end is used.
        temperature: divides the logits; 0 takes the likeliest token. top_k: only the k likeliest tokens. top_p: only
        the fewest likeliest tokens that hold this much probability (Holtzman et al. 2020). seed: the same seed, prompts
        and device give the same tokens. stop: token sequences; a row ends after one of them, which is handed out too.
        compile: torch.compile for the step from token to token, which becomes a CUDA graph on a GPU.
        Yields a tensor (B,) for each position, -1 in rows that have ended; stops early when all rows have.

        Past block_size: a row whose window is full drops its oldest half, and the rest is read again from position 0, so
        that every token is written as the model was trained. That costs one pass every block_size / 2 tokens.
        """
        from nib.generation import generate
        return generate(self, prompts, max_new_tokens, temperature, top_k, top_p, seed, stop, compile)


def soft_cap(logits, cap):
    """Logits bent smoothly into (-cap, cap), for cap > 0 (Gemma Team 2024, section 2)."""
    return cap * torch.tanh(logits / cap) if cap else logits


class ChunkedLoss(torch.autograd.Function):
    """The mean cross-entropy of the head's logits, which are never there all at once.

    The logits of a large vocabulary are most of a small model's memory. A chunk of them gives its part of the loss and,
    as d loss / d logits = softmax(logits) - one_hot(target), its part of the gradients at once, and makes room for the next
    in the same memory: to get new pages from the system would take longer than to fill them.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, with_gradients):  # x (N, C), weight (V, C), targets (N)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        head, rows = weight.to(dtype), min(len(x), max(1, LOSS_CHUNK // len(weight)))
        logits = head.new_empty(rows, len(head))
        log_probs = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        losses = torch.empty(len(x), device=x.device)
        # Sums, not means, until backward: a mean's tiny gradients would vanish in float16.
        grad_x, grad_weight = (torch.zeros_like(t, dtype=torch.float32) for t in (x, weight)) if with_gradients else (None, None)
        for first in range(0, len(x), rows):
            chunk, target = x[first:first + rows].to(dtype, copy=True), targets[first:first + rows, None]
            logits, log_probs = logits[:len(chunk)], log_probs[:len(chunk)]
            counted = target != IGNORED
            target = target.clamp(min=0)
            torch.mm(chunk, head.t(), out=logits)
            log_probs.copy_(logits)
            if cap:
                bent = log_probs.div_(cap).tanh_().clone()  # soft_cap
                log_probs.mul_(cap)
            torch.log_softmax(log_probs, dim=-1, out=log_probs)
            losses[first:first + rows] = (log_probs.gather(1, target) * -counted.float())[:, 0]
            if with_gradients:
                grad = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
                if cap:
                    grad.mul_(bent.square_().neg_().add_(1))  # the derivative of soft_cap
                logits.copy_(grad)
                grad_x[first:first + rows] = (logits @ head) * counted
                chunk *= counted
                for total, columns in zip(grad_weight.split(4096), logits.split(4096, dim=1)):  # little by little: no large copy
                    total += columns.t() @ chunk
        n_counted = (targets != IGNORED).sum()
        ctx.save_for_backward(grad_x, grad_weight, n_counted)
        ctx.dtypes = x.dtype, weight.dtype
        return losses.sum() / n_counted

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, n_counted = ctx.saved_tensors
        scale = grad_loss / n_counted
        return grad_x.mul_(scale).to(ctx.dtypes[0]), grad_weight.mul_(scale).to(ctx.dtypes[1]), None, None, None
