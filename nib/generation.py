"""How a trained model writes: a window of tokens, caches of keys and values, packed matrices for CPUs, sampling.

The letters of shapes are model.py's.
"""
import copy
import functools
import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, IGNORED, MLP, GPTConfig, attend


@torch.inference_mode()
def generate(model: GPT, prompts, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None, seed=None, stop=(), compile=False):
    """GPT.generate(), which documents it."""
    check_sampling(prompts, max_new_tokens, temperature, top_k, top_p, seed, model.config.vocab_size)
    window = Window(model, prompts, max_new_tokens, compile)
    device = window.tokens.device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    stops = [torch.tensor(list(tokens), device=device) for tokens in stop]
    made = torch.full((len(prompts), max(map(len, stop), default=0)), IGNORED, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        tokens = sample_tokens(window.next_logits(), temperature, top_k, top_p, generator)  # (B,)
        yield torch.where(ended, IGNORED, tokens)
        window.append(tokens)
        if stops:
            made = torch.cat((made, tokens[:, None]), dim=1)[:, 1:]
            for sequence in stops:
                ended = ended | (made[:, -len(sequence):] == sequence).all(dim=1)
            if ended.all():
                return


def next_logits(model: GPT, idx, positions, caches):
    """Logits (B, V) of the token after the last of idx (B, T)."""
    return model._logits(model._hidden(idx, positions, caches)[:, -1])


class Window:
    """The tokens that each row attends over, the model that reads them, and one cache of keys and values a layer.

    Tokens lie in slots. All rows end at the same slot, so that a shorter row has padding before it, which it never looks at.
    Lengths are kept on the host, so that generation never waits for the device.
    """

    def __init__(self, model: GPT, prompts, max_new_tokens: int, compile: bool):
        config, weight = model.config, model.transformer.wte.weight
        self.model = for_generation(model, packed=not compile)
        self.compile, self.step = compile, next_logits
        prompts = [list(prompt)[-config.block_size:] for prompt in prompts]
        self.lengths = [len(prompt) for prompt in prompts]
        longest = max(self.lengths)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        self.tokens = self.unread = torch.tensor(padded, device=weight.device)  # (B, slots in use)
        self.n_slots = min(config.block_size, longest + max_new_tokens)
        shape = config, len(prompts), self.n_slots, weight
        cache_type = BagCache if not compile and BagCache.pays(*shape) else KVCache
        self.caches = [cache_type(*shape) for _ in range(config.n_layer)]
        if compile:
            self.step = torch.compile(next_logits, mode='reduce-overhead', fullgraph=True)
            for cache in self.caches:  # or a CUDA graph would copy them in every step
                torch._dynamo.mark_static_address(cache.keys)
                torch._dynamo.mark_static_address(cache.values)

    def append(self, tokens):
        """Adds one token (B,) to every row; a full row first drops its oldest half, and all rows must be read again."""
        size = self.model.config.block_size
        is_full = max(self.lengths) == size
        self.lengths = [(size // 2 if length == size else length) + 1 for length in self.lengths]
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)[:, -max(self.lengths):]
        self.unread = self.tokens if is_full else tokens[:, None]  # (B, T), whose keys and values the caches lack

    def next_logits(self):
        """Logits (B, V) of the token after each row's last."""
        n_tokens, T, device = self.tokens.shape[1], self.unread.shape[1], self.tokens.device
        slots = torch.arange(n_tokens - T, n_tokens, device=device)
        if T == n_tokens:
            self.starts = n_tokens - torch.tensor(self.lengths, device=device)[:, None]  # (B, 1), each row's first slot
        is_static = self.compile and T == 1  # a compiled step needs the same shapes every time
        seen = self.n_slots if is_static else n_tokens
        positions, mask = slots, None
        if is_static or min(self.lengths) < n_tokens:
            positions = (slots - self.starts).clamp(min=0)  # (B, T)
            keys = torch.arange(seen, device=device)
            # Padding looks at padding: a softmax over nothing would not be a number.
            mask = (keys <= slots[:, None]) & ((keys >= self.starts[..., None]) | (slots < self.starts)[..., None])
            mask = mask[:, None]  # (B, 1, T, seen)
        for cache in self.caches:
            cache.slots, cache.seen, cache.mask = slots, seen, mask
        return (self.step if T == 1 else next_logits)(self.model, self.unread, positions, self.caches)


class KVCache:
    """One layer's keys and values (B, K, n_slots, D); on a CPU in float32, in which one query attends several times as fast."""

    def __init__(self, config: GPTConfig, n_rows: int, n_slots: int, weight):
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.device.type == 'cpu' else weight.dtype
        shape = n_rows, config.kv_heads, n_slots, config.head_dim
        self.keys, self.values = (weight.new_zeros(shape, dtype=dtype) for _ in range(2))

    def attend(self, q, k, v):
        """Stores k and v (B, K, T, D) at `slots`; q (B, H, T, D) attends over the slots up to its own that the mask shows it."""
        self.keys.index_copy_(2, self.slots, k.type_as(self.keys))
        self.values.index_copy_(2, self.slots, v.type_as(self.values))
        if self.mask is None and k.shape[2] > 1:
            return attend(q, k, v)
        k, v = self.keys[:, :, :self.seen], self.values[:, :, :self.seen]
        return F.scaled_dot_product_attention(q.type_as(k), k, v, attn_mask=self.mask,
                                              enable_gqa=q.shape[1] != k.shape[1]).type_as(q)


class BagCache:
    """KVCache for a large one on a CPU: a step's queries, one a row, attend at the memory's rate, of which
    scaled_dot_product_attention reaches half.

    Both of attention's sums are of rows of a table, weighted, as embedding_bag makes them. Values (B, K, blocks, 64, D) are
    such rows. Keys lie the other way, (B, K, blocks, D, 64): the scores of a block are its D rows, weighted by the query.
    """
    SMALLEST = 1 << 20  # keys' and values' numbers in a layer; with fewer the two calls' own time is more than they save
    BLOCK = 64

    def __init__(self, config: GPTConfig, n_rows: int, n_slots: int, weight):
        blocks = n_rows, config.kv_heads, math.ceil(n_slots / self.BLOCK)
        self.keys = weight.new_zeros(*blocks, config.head_dim, self.BLOCK)
        self.values = weight.new_zeros(*blocks, self.BLOCK, config.head_dim)

    def attend(self, q, k, v):
        """As KVCache's, for a whole window or for the one token (T = 1) after those before it."""
        B, H, T, D = q.shape
        used = math.ceil(self.seen / self.BLOCK)  # blocks
        if T > 1:
            k_blocks, v_blocks = (F.pad(part, (0, 0, 0, used * self.BLOCK - T)).unflatten(2, (used, self.BLOCK)) for part in (k, v))
            self.keys[:, :, :used], self.values[:, :, :used] = k_blocks.transpose(3, 4), v_blocks
            if self.mask is None:
                return attend(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=H != k.shape[1])
        block, slot = divmod(self.seen - 1, self.BLOCK)
        self.keys[:, :, block, :, slot], self.values[:, :, block, slot] = k[:, :, 0], v[:, :, 0]
        scores = self._add_rows(self.keys, used, q.expand(B, H, used, D) / math.sqrt(D)).view(B, H, 1, -1)
        scores[..., self.seen:] = -math.inf
        if self.mask is not None:
            scores[..., :self.seen].masked_fill_(~self.mask, -math.inf)
        return self._add_rows(self.values, used, scores.softmax(dim=-1)).view(B, H, 1, D)

    @classmethod
    def pays(cls, config: GPTConfig, n_rows: int, n_slots: int, weight) -> bool:
        size = 2 * n_rows * config.kv_heads * n_slots * config.head_dim
        return weight.device.type == 'cpu' and size >= cls.SMALLEST and n_slots >= cls.BLOCK  # not many rows in blocks half empty

    @classmethod
    def _add_rows(cls, table, used, weights):
        """Sums (bags, width) of rows of table (B, K, blocks, rows, width), by weights (B, H, ..., rows in a bag): each head's bags
        together hold the rows in its first used blocks."""
        n_heads, (blocks, rows, width), bag = weights.shape[0] * weights.shape[1], table.shape[2:], weights.shape[-1]
        places = cls._places(n_heads, n_heads // (table.shape[0] * table.shape[1]), blocks * rows, used * rows)
        return F.embedding_bag(places.view(-1, bag), table.view(-1, width), mode='sum',
                               per_sample_weights=weights.reshape(-1, bag).type_as(table))

    @staticmethod
    @functools.lru_cache(maxsize=2)  # keys' and values', the same in all layers
    def _places(n_heads, sharing, n_rows, n_used):
        """The first n_used rows (n_heads, n_used) of every head, in a table that has n_rows for each `sharing` heads."""
        heads, rows = (torch.arange(n, device='cpu') for n in (n_heads, n_used))
        return heads[:, None] // sharing * n_rows + rows


class PackedLinear:
    """A linear layer for generation on a CPU. Its matrix is there once more, in the order in which oneDNN reads it: then a
    product with few rows runs at the memory's speed, of which the plain matrix reaches a third."""
    SMALLEST = 1 << 17  # numbers in a float32 matrix; a call takes 10 us before it begins, in which a smaller one has been read

    def __init__(self, weight, bias):
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16), bias  # for about 16 rows
        self.multiply, self.then = torch.ops.mkldnn._linear_pointwise.default, ('none', [], '')

    def __call__(self, x):
        return self.multiply(x, self.weight, self.bias, *self.then)

    @classmethod
    def pays(cls, weight) -> bool:
        """Whether it is faster here, and torch has its operators, which are not public."""
        mkldnn = torch.ops.mkldnn
        if weight.device.type != 'cpu' or not torch.backends.mkldnn.is_available() or not all(hasattr(mkldnn, name) for name in (
                '_reorder_linear_weight', '_linear_pointwise', '_is_mkldnn_bf16_supported')):
            return False
        return (weight.dtype == torch.float32 and weight.numel() >= cls.SMALLEST
                or weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())


def for_generation(module: nn.Module, packed: bool):
    """The module once more, without dropout; it shares its parameters, but for the matrices that are packed."""
    if packed and isinstance(module, nn.Linear) and PackedLinear.pays(module.weight):
        return PackedLinear(module.weight, module.bias)
    if isinstance(module, nn.Dropout):
        return nn.Identity()
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {name: for_generation(child, packed) for name, child in module._modules.items()}
    if isinstance(module, MLP) and module.kind == 'gelu' and isinstance(twin.c_fc, PackedLinear):
        twin.c_fc.then, twin.kind = ('gelu', [], 'tanh'), 'in c_fc'
    if packed and isinstance(module, GPT) and module.config.tied_head and PackedLinear.pays(module.transformer.wte.weight):
        twin.lm_head = PackedLinear(module.transformer.wte.weight, None)
        twin.config = replace(module.config, tied_head=False)
    return twin


def check_sampling(prompts, max_new_tokens, temperature, top_k, top_p, seed, vocab_size):
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
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ValueError(f'seed is {seed}: it must be at least 0 and less than 2^63')


def sample_tokens(logits, temperature, top_k, top_p, generator):
    """One token (B,) for each row of logits (B, V), without waiting for the device."""
    if temperature < 1e-5:  # float32 could not tell it from 0
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)  # (B, top_k)
    elif top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)  # the likelier tokens already hold top_p
    # The largest p / Exponential(1) falls on a token with probability p, as multinomial, which would synchronise.
    chosen = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]
