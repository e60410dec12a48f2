"""GPT-2 in one file: the layers, the loss, generation with a key-value cache, parameter and FLOP counts.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), on Vaswani et al. 2017.
Shapes: B sequences, T positions, C = n_embd, H = n_head, D = C / H (one head's width), V = vocab_size.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

IGNORED = -1  # a target that counts nothing towards the loss; also what generate() yields for a row that has ended


@dataclass(frozen=True)
class GPTConfig:
    """What fixes the shape of a GPT. ValueError names the field that cannot be."""
    vocab_size: int = 50257
    block_size: int = 1024  # the most positions that the model attends over
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms, as GPT-2 has them

    def __post_init__(self):
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not divisible by n_head {self.n_head}: '
                             f'try n_embd {self.n_embd // self.n_head * self.n_head or self.n_head}')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout is {self.dropout}: it must be at least 0 and less than 1')


class CausalSelfAttention(nn.Module):
    """Every position takes a weighted mean over the values of the positions up to itself, in H heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):  # x (B, T, C)
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in self.c_attn(x).split(C, dim=2))
        mask = None
        if cache is not None:
            k, v, mask = cache.update(k, v)  # (B, H, S, D) with S the positions seen so far
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers, four times as wide between them, with GELU (Hendrycks and Gimpel 2016, tanh form)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))  # (B, T, 4C) inside


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of the residual stream and added to it (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model. Parameter names are GPT-2's; the output head is the token embedding itself (tied)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.reset_parameters()

    def reset_parameters(self):
        """Normal(0, 0.02) weights and zero biases; residual projections smaller by 1/sqrt(2 * n_layer), so that the
        residual stream's variance does not grow with depth (GPT-2, section 2.3: two projections a layer)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj') else 0.02
                nn.init.normal_(module.weight, std=std)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, idx, targets=None):
        """The logits, or with targets the loss.

        idx, targets: token ids (B, T), T <= block_size; a target of -1 counts nothing.
        Returns logits (B, T, V), or the mean cross-entropy in nats per token, a float32 scalar.
        Raises ValueError when T is larger than block_size.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f'{idx.shape[1]} positions are more than block_size {self.config.block_size}')
        positions = torch.arange(idx.shape[1], device=idx.device)
        logits = self._head(self._hidden(idx, positions))
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=IGNORED)

    def _hidden(self, idx, positions, caches=None):
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    def _head(self, x):
        return F.linear(x, self.transformer.wte.weight)  # (B, T, V)

    def crop_block_size(self, block_size: int):
        """Shortens the context, keeping the first positions. ValueError when it would have to grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size {block_size} is not between 1 and the {self.config.block_size} of the model')
        self.config = GPTConfig(**{**vars(self.config), 'block_size': block_size})
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].detach().clone(),
                                                            freeze=False)

    # -- counts -------------------------------------------------------------------------------------------------

    def num_params(self, positions: bool = True) -> int:
        """Parameters in full; without the position embeddings as nanoGPT counts them."""
        total = sum(p.numel() for p in self.parameters())
        return total if positions else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> dict[str, int]:
        """Floating-point operations of one token's forward pass at full context, by layer.

        A matrix of m x n costs 2mn. Attention costs 2TC for the scores and 2TC for the weighted mean, causality not
        discounted, as in Chowdhery et al. 2022 (PaLM), appendix B. The backward pass costs twice as much again, so
        a training step is three times the sum.
        """
        C, T = self.config.n_embd, self.config.block_size
        layers = {}
        for i in range(self.config.n_layer):
            layers[f'h.{i}.attn'] = 2 * 4 * C * C + 4 * T * C
            layers[f'h.{i}.mlp'] = 2 * 8 * C * C
        layers['head'] = 2 * C * self.config.vocab_size
        return layers

    # -- generation ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
                 stop: Sequence[Sequence[int]] = ()) -> Iterator[torch.Tensor]:
        """Continues every prompt, handing out tokens as they are made.

        prompts: B sequences of token ids, of any lengths >= 1; of one longer than block_size the end is used.
        temperature: divides the logits; 0 takes the likeliest token. top_k: only the k likeliest tokens. top_p: only
        the fewest likeliest tokens that hold this much probability (Holtzman et al. 2020). seed: the same seed, prompts
        and device give the same tokens. stop: token sequences; a row ends after one of them, which is handed out too.
        Yields a tensor (B,) for each position, -1 in rows that have ended; stops early when all rows have.

        Past block_size: learned positions cannot slide, so a row whose window is full drops its oldest half, and the
        rest is read again from position 0. That costs one pass every block_size / 2 tokens.
        """
        check_sampling(prompts, max_new_tokens, temperature, top_k, top_p, self.config.vocab_size)
        was_training = self.training
        self.eval()
        try:
            device = self.transformer.wte.weight.device
            generator = torch.Generator(device)
            generator.manual_seed(seed) if seed is not None else generator.seed()
            window = Window(prompts, self.config, max_new_tokens, device)
            stops = [torch.tensor(list(tokens), device=device) for tokens in stop]
            made = torch.full((len(prompts), max(map(len, stop), default=0)), IGNORED, device=device)
            ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
            for _ in range(max_new_tokens):
                tokens = sample_tokens(self._next_logits(window), temperature, top_k, top_p, generator)  # (B,)
                yield torch.where(ended, IGNORED, tokens)
                window.append(tokens)
                if stops:
                    made = torch.cat((made, tokens[:, None]), dim=1)[:, 1:]
                    for sequence in stops:
                        ended = ended | (made[:, -len(sequence):] == sequence).all(dim=1)
                    if ended.all():
                        return
        finally:
            self.train(was_training)

    def _next_logits(self, window):
        """Logits (B, V) of the token after each row's last, computing only what the cache does not hold."""
        last = torch.tensor(window.lengths, device=window.tokens.device) - 1  # (B,)
        if window.cached:
            newest = window.tokens[window.rows, last]  # (B,)
            x = self._hidden(newest[:, None], last[:, None], window.start_decoding(last))[:, -1]
        else:  # rows of unequal length are filled up behind their end, where no earlier position looks
            longest = max(window.lengths)
            positions = torch.arange(longest, device=last.device)
            x = self._hidden(window.tokens[:, :longest], positions, window.start_reading())[window.rows, last]
        return self._head(x)


class Window:
    """The tokens that each row attends over, and one cache of keys and values a layer.

    Row b holds its tokens at slots 0 .. lengths[b] - 1; a slot's number is its position. Lengths are kept on the host,
    so that generation never waits for the device.
    """

    def __init__(self, prompts, config: GPTConfig, max_new_tokens: int, device):
        prompts = [list(prompt)[-config.block_size:] for prompt in prompts]
        self.block_size = config.block_size
        self.lengths = [len(prompt) for prompt in prompts]
        n_slots = min(config.block_size, max(self.lengths) + max_new_tokens)
        padded = [prompt + [0] * (n_slots - len(prompt)) for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device)  # (B, n_slots)
        self.rows = torch.arange(len(prompts), device=device)
        self.cached = False  # whether the caches hold everything but each row's last token
        self.caches = [KVCache(n_slots) for _ in range(config.n_layer)]

    def append(self, tokens):
        """Adds one token (B,) to every row; a full row first drops its oldest half, and the cache must be read anew."""
        keep = self.block_size // 2
        full = [row for row, length in enumerate(self.lengths) if length == self.block_size]
        for row in full:
            self.tokens[row, :keep] = self.tokens[row, self.block_size - keep:].clone()
            self.lengths[row] = keep
        self.tokens[self.rows, torch.tensor(self.lengths, device=tokens.device)] = tokens
        self.lengths = [length + 1 for length in self.lengths]
        self.cached = not full

    def start_reading(self):
        """The caches, ready to take every position at once."""
        for cache in self.caches:
            cache.slots = None
        return self.caches

    def start_decoding(self, last):
        """The caches, ready to take one position a row at the slots `last` (B,)."""
        seen = max(self.lengths)
        mask = None
        if min(self.lengths) < seen:  # a shorter row must not look at what lies behind its end
            mask = (torch.arange(seen, device=last.device) <= last[:, None])[:, None, None, :]  # (B, 1, 1, S)
        for cache in self.caches:
            cache.slots, cache.seen, cache.mask, cache.rows = last, seen, mask, self.rows
        return self.caches


class KVCache:
    """One layer's keys and values (B, H, n_slots, D), made in the precision of the first ones it is given."""

    def __init__(self, n_slots: int):
        self.n_slots = n_slots
        self.keys = self.values = self.slots = None

    def update(self, k, v):
        """Stores k and v (B, H, T, D); returns the keys, values (B, H, S, D) and mask to attend with."""
        if self.keys is None:
            self.keys, self.values = (part.new_zeros(*part.shape[:2], self.n_slots, part.shape[3]) for part in (k, v))
        if self.slots is None:
            self.keys[:, :, :k.shape[2]] = k
            self.values[:, :, :v.shape[2]] = v
            return k, v, None
        self.keys[self.rows, :, self.slots] = k[:, :, 0]
        self.values[self.rows, :, self.slots] = v[:, :, 0]
        return self.keys[:, :, :self.seen], self.values[:, :, :self.seen], self.mask


def check_sampling(prompts, max_new_tokens, temperature, top_k, top_p, vocab_size):
    """ValueError for what generate() cannot do, naming the argument."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError('a prompt is empty: generation needs at least one token to start from')
    for id in (id for prompt in prompts for id in prompt if not 0 <= id < vocab_size):
        raise ValueError(f'the prompt holds token id {id}, but the vocabulary has {vocab_size}')
    if max_new_tokens < 0:
        raise ValueError(f'max_new_tokens is {max_new_tokens}: it must be at least 0')
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f'temperature is {temperature}: it must be 0 (greedy) or a positive number')
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k is {top_k}: it must be at least 1, or None for all tokens')
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f'top_p is {top_p}: it must be above 0 and at most 1, or None for all tokens')


def sample_tokens(logits, temperature, top_k, top_p, generator):
    """One token (B,) for each row of logits (B, V), without waiting for the device."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # the likelier tokens already hold top_p
        logits = ordered.masked_fill(beyond, -math.inf).gather(-1, order.argsort(dim=-1))
    # The largest p / Exponential(1) falls on a token with probability p, as multinomial, which would synchronise.
    probs = logits.softmax(dim=-1)
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)
