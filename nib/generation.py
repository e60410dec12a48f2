"""How a trained model writes: a window of tokens, a cache of keys and values, and sampling.

A model that generates is a copy of the trained one that shares its parameters. Its attention goes
through a cache, and on a CPU its matrices may be packed; all else is the code of model.py, whose
letters of shapes are used here too. check_generation() compares the copy with the model.
"""

import copy
import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, IGNORED, MLP, GPTConfig, attend, attend_by_definition, kernels_fit

# Differences that check_generation() takes for rounding, in standard deviations of the logits.
# The first is for float32, whose factors a GPU may round to 11 bits; the other for 16-bit numbers.
TOLERANCE, HALF_TOLERANCE = 0.02, 0.2


@torch.inference_mode()
def generate(model: GPT, prompts, max_new_tokens, temperature, top_k, top_p, seed, stop, compile):
    """GPT.generate(), which documents it."""
    vocab_size = model.config.vocab_size
    check_sampling(prompts, max_new_tokens, temperature, top_k, top_p, seed, vocab_size)
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
                ended = ended | (made[:, -len(sequence) :] == sequence).all(dim=1)
            if ended.all():
                return


def check_sampling(prompts, max_new_tokens, temperature, top_k, top_p, seed, vocab_size):
    """Raises ValueError, which names the argument, for what generate() cannot do."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError('a prompt is empty: generation needs at least one token to start from')
    for id in (id for prompt in prompts for id in prompt if not 0 <= id < vocab_size):
        raise ValueError(f'the prompt holds token id {id}, but the vocabulary has {vocab_size}')
    if max_new_tokens < 0:
        raise ValueError(f'max_new_tokens is {max_new_tokens}: it must be at least 0')
    if not 0.0 <= temperature < math.inf:
        raise ValueError(
            f'temperature is {temperature}: it must be 0 (greedy) or a positive number'
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k is {top_k}: it must be at least 1, or None for all tokens')
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(
            f'top_p is {top_p}: it must be above 0 and at most 1, or None for all tokens'
        )
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ValueError(f'seed is {seed}: it must be at least 0 and less than 2^63')


def sample_tokens(logits, temperature, top_k, top_p, generator):
    """Draws one token (B,) for each row of logits (B, V), without waiting for the device."""
    if temperature < 1e-5:  # float32 could not tell it from 0
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)  # (B, top_k)
    elif top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    if top_p is not None:  # a token goes if the more likely ones already hold top_p
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    # The largest p / Exponential(1) is at a token with probability p. multinomial would wait.
    noise = torch.empty_like(probs).exponential_(generator=generator)
    chosen = (probs / noise).argmax(dim=-1, keepdim=True)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


# -- the window and its caches --------------------------------------------------------------------


@dataclass
class Pass:
    """What one forward pass reads; the same for the caches of all layers."""

    slots: torch.Tensor  # (T,) of the tokens that are read
    n_seen: int  # they attend over the slots before this one
    mask: torch.Tensor | None  # (B, 1, T, n_seen), True to look; None: up to the token's own slot
    # Only for attention_scores() that no fused kernel computes. Positions are negative in padding.
    query_positions: torch.Tensor | None = None  # (B, 1, T)
    key_positions: torch.Tensor | None = None  # (B, 1, n_seen)


class Window:
    """The tokens that each row attends over, the model that reads them, and a cache for each layer.

    Tokens lie in slots. All rows end at the same slot: a shorter row has padding before it, which
    it never looks at. Lengths are kept on the host, so generation never waits for the device.
    """

    def __init__(self, model: GPT, prompts, max_new_tokens: int, compile: bool):
        config, weight = model.config, model.transformer.wte.weight
        prompts = [list(prompt)[-config.block_size :] for prompt in prompts]
        self.lengths = [len(prompt) for prompt in prompts]
        longest = max(self.lengths)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        self.tokens = torch.tensor(padded, device=weight.device)  # (B, slots in use)
        self.unread = self.tokens  # (B, T), whose keys and values the caches lack
        self.n_slots = min(config.block_size, longest + max_new_tokens)

        shape = config, len(prompts), self.n_slots, weight
        cache_type = BagCache if not compile and BagCache.pays(*shape) else KVCache
        self.caches = [cache_type(*shape) for _ in range(config.n_layer)]
        self.model = for_generation(model, packed=not compile)
        for block, cache in zip(self.model.transformer.h, self.caches, strict=True):
            block.attn.attend = cache.attend
        self.step = torch.compile(next_logits, fullgraph=True) if compile else next_logits
        # A compiled step and a CUDA graph need the same shapes in every step.
        self.is_static = compile or weight.is_cuda
        self.starts = torch.zeros(len(prompts), 1, dtype=torch.long, device=weight.device)
        self.graph = None

    def append(self, tokens):
        """Adds one token (B,) to every row.

        A full row first drops its oldest half, and then all rows must be read again.
        """
        size = self.model.config.block_size
        is_full = max(self.lengths) == size
        self.lengths = [(size // 2 if length == size else length) + 1 for length in self.lengths]
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)[:, -max(self.lengths) :]
        self.unread = self.tokens if is_full else tokens[:, None]

    def next_logits(self):
        """Logits (B, V) of the token after each row's last."""
        n_tokens, T = self.tokens.shape[1], self.unread.shape[1]
        slots = torch.arange(n_tokens - T, n_tokens, device=self.tokens.device)
        if n_tokens == T:  # each row's first slot
            lengths = torch.tensor(self.lengths, device=self.tokens.device)
            self.starts.copy_(n_tokens - lengths[:, None])
        if T == 1 and self.is_static:
            return self._static_step(self.unread, slots)
        is_padded = min(self.lengths) < n_tokens
        return self._read(self.unread, slots, n_tokens, is_padded or not kernels_fit())

    def _static_step(self, idx, slots):
        """Logits after idx (B, 1), in operations whose shapes are the same in every step."""
        if not idx.is_cuda:
            return self._read(idx, slots, self.n_slots, True)
        if self.graph is None:
            self.graph = StepGraph(
                lambda idx, slots: self._read(idx, slots, self.n_slots, True), idx, slots
            )
        return self.graph(idx, slots)

    def _read(self, idx, slots, n_seen: int, is_masked: bool):
        """Logits (B, V) after idx (B, T), whose keys and values go to the slots (T)."""
        this_pass, positions = Pass(slots, n_seen, None), slots
        if is_masked:
            positions = (slots - self.starts).clamp(min=0)  # (B, T)
            this_pass = self._masked_pass(slots, n_seen)
        for cache in self.caches:
            cache.this_pass = this_pass
        return (self.step if idx.shape[1] == 1 else next_logits)(self.model, idx, positions)

    def _masked_pass(self, slots, n_seen: int) -> Pass:
        """A pass in which rows have padding, or not all n_seen slots are in use yet."""
        keys = torch.arange(n_seen, device=slots.device)
        # Padding looks at padding: a softmax over nothing would not be a number.
        not_padding = (keys >= self.starts[..., None]) | (slots < self.starts)[..., None]
        if kernels_fit():
            return Pass(slots, n_seen, ((keys <= slots[:, None]) & not_padding)[:, None])
        is_token = ((keys <= slots[-1]) & not_padding)[:, None]
        query_positions, key_positions = ((n - self.starts)[:, None] for n in (slots, keys))
        return Pass(slots, n_seen, is_token, query_positions, key_positions)


def next_logits(model: GPT, idx, positions):
    """Logits (B, V) of the token after the last of idx (B, T)."""
    return model.logits(model.hidden_states(idx, positions)[:, -1])


class StepGraph:
    """The step from token to token as a CUDA graph: one launch instead of some 200.

    read: a function of idx (B, 1) and slots (1) that returns logits (B, V). If it cannot be
    captured, because somebody's model waits for the GPU, it is called as it is.
    """

    def __init__(self, read, idx, slots):
        self.read, self.idx, self.slots = read, idx.clone(), slots.clone()
        with torch.cuda.device(idx.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels are loaded, and compiled, before the capture
                for _ in range(2):
                    read(self.idx, self.slots)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.logits = read(self.idx, self.slots)
            except RuntimeError:
                self.graph = None

    def __call__(self, idx, slots):
        if self.graph is None:
            return self.read(idx, slots)
        self.idx.copy_(idx)
        self.slots.copy_(slots)
        self.graph.replay()
        return self.logits.clone()  # the next step writes to the same place


class KVCache:
    """One layer's keys and values (B, K, n_slots, D).

    On a CPU they are float32, in which one query attends several times as fast as in bfloat16.
    """

    this_pass: Pass  # set by Window before each forward pass

    def __init__(self, config: GPTConfig, n_rows: int, n_slots: int, weight):
        on_cpu = weight.device.type == 'cpu'
        dtype = torch.promote_types(weight.dtype, torch.float32) if on_cpu else weight.dtype
        shape = n_rows, config.kv_heads, n_slots, config.head_dim
        self.keys, self.values = (weight.new_zeros(shape, dtype=dtype) for _ in range(2))

    def attend(self, q, k, v):
        """Stores k and v (B, K, T, D) of the tokens of `this_pass`, and attends: (B, H, T, D)."""
        this = self.this_pass
        self.keys.index_copy_(2, this.slots, k.type_as(self.keys))
        self.values.index_copy_(2, this.slots, v.type_as(self.values))
        if this.mask is None and k.shape[2] > 1:
            return attend(q, k, v)
        k, v = self.keys[:, :, : this.n_seen], self.values[:, :, : this.n_seen]
        if not kernels_fit():
            y = attend_by_definition(
                q.type_as(k), k, v, this.query_positions, this.key_positions, mask=this.mask
            )
            return y.type_as(q)
        return F.scaled_dot_product_attention(
            q.type_as(k), k, v, attn_mask=this.mask, enable_gqa=q.shape[1] != k.shape[1]
        ).type_as(q)


class BagCache:
    """A large KVCache on a CPU, in which single queries attend at the speed of the memory.

    scaled_dot_product_attention reaches half of that. Both sums of attention are weighted sums of a
    table's rows, which is what embedding_bag computes. Values (B, K, blocks, 64, D) are such rows.
    Keys lie the other way, (B, K, blocks, D, 64): the scores of a block are its D rows, weighted by
    the query.
    """

    # Numbers in a layer's keys and values; with fewer, the two calls cost more than they save.
    SMALLEST = 1 << 20
    BLOCK = 64
    this_pass: Pass  # set by Window before each forward pass

    def __init__(self, config: GPTConfig, n_rows: int, n_slots: int, weight):
        blocks = n_rows, config.kv_heads, math.ceil(n_slots / self.BLOCK)
        self.keys = weight.new_zeros(*blocks, config.head_dim, self.BLOCK)
        self.values = weight.new_zeros(*blocks, self.BLOCK, config.head_dim)

    def attend(self, q, k, v):
        """As KVCache's, for a whole window or for the one token (T = 1) after those before it."""
        n_seen, mask = self.this_pass.n_seen, self.this_pass.mask
        B, H, T, D = q.shape
        used = math.ceil(n_seen / self.BLOCK)  # blocks
        if T > 1:
            padding = 0, 0, 0, used * self.BLOCK - T
            k_blocks, v_blocks = (
                F.pad(part, padding).unflatten(2, (used, self.BLOCK)) for part in (k, v)
            )
            self.keys[:, :, :used], self.values[:, :, :used] = k_blocks.transpose(3, 4), v_blocks
            if mask is None:
                return attend(q, k, v)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != H
            )
        block, slot = divmod(n_seen - 1, self.BLOCK)
        self.keys[:, :, block, :, slot], self.values[:, :, block, slot] = k[:, :, 0], v[:, :, 0]
        query = q.expand(B, H, used, D) / math.sqrt(D)
        scores = self._add_rows(self.keys, used, query).view(B, H, 1, -1)
        scores[..., n_seen:] = -math.inf
        if mask is not None:
            scores[..., :n_seen].masked_fill_(~mask, -math.inf)
        return self._add_rows(self.values, used, scores.softmax(dim=-1)).view(B, H, 1, D)

    @classmethod
    def pays(cls, config: GPTConfig, n_rows: int, n_slots: int, weight) -> bool:
        """Whether it is faster than KVCache, and computes the same."""
        if weight.device.type != 'cpu' or not kernels_fit():
            return False
        size = 2 * n_rows * config.kv_heads * n_slots * config.head_dim
        return size >= cls.SMALLEST and n_slots >= cls.BLOCK  # blocks half empty gain nothing

    @classmethod
    def _add_rows(cls, table, used, weights):
        """Sums (bags, width) of rows of table (B, K, blocks, rows, width).

        The weights are (B, H, ..., rows in a bag). A head's bags hold all rows in its used blocks.
        """
        n_heads = weights.shape[0] * weights.shape[1]
        sharing = n_heads // (table.shape[0] * table.shape[1])
        (blocks, rows, width), bag = table.shape[2:], weights.shape[-1]
        places = cls._places(n_heads, sharing, blocks * rows, used * rows)
        return F.embedding_bag(
            places.view(-1, bag),
            table.view(-1, width),
            mode='sum',
            per_sample_weights=weights.reshape(-1, bag).type_as(table),
        )

    @staticmethod
    @functools.lru_cache(maxsize=2)  # for keys and for values, the same in all layers
    def _places(n_heads, sharing, n_rows, n_used):
        """The first n_used rows (n_heads, n_used) of every head; `sharing` heads share n_rows."""
        heads, rows = (torch.arange(n, device='cpu') for n in (n_heads, n_used))
        return heads[:, None] // sharing * n_rows + rows


# -- the model that generates ---------------------------------------------------------------------


def for_generation(module: nn.Module, packed: bool):
    """A copy of the module without dropout. It shares all parameters but those that are packed."""
    if packed and isinstance(module, nn.Linear) and PackedLinear.pays(module.weight):
        return PackedLinear(module.weight, module.bias)
    if isinstance(module, nn.Dropout):
        return nn.Identity()
    twin: Any = copy.copy(module)
    twin.training = False
    twin._modules = {name: for_generation(child, packed) for name, child in module._modules.items()}
    if isinstance(module, MLP) and isinstance(twin.c_fc, PackedLinear):
        is_gelu = isinstance(module.activation, nn.GELU) and module.activation.approximate == 'tanh'
        if is_gelu:  # the packed product computes it
            twin.c_fc.then, twin.activation = ('gelu', [], 'tanh'), nn.Identity()
    if isinstance(module, GPT) and module.config.tied_head and packed:
        head = module.transformer.wte.weight
        if PackedLinear.pays(head):
            twin.lm_head = PackedLinear(head, None)
            twin.config = replace(module.config, tied_head=False)
    return twin


class PackedLinear:
    """A linear layer for a CPU with its matrix once more, in the order in which oneDNN reads it.

    A product with few rows then runs at the memory's speed; the plain matrix reaches a third of it.
    """

    SMALLEST = 1 << 17  # numbers in a float32 matrix; a call takes longer than to read fewer

    def __init__(self, weight, bias):
        rows = 16  # that the order is best for
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias
        self.multiply = torch.ops.mkldnn._linear_pointwise.default
        self.then = 'none', [], ''  # what the product ends in

    def __call__(self, x):
        return self.multiply(x, self.weight, self.bias, *self.then)

    @classmethod
    def pays(cls, weight) -> bool:
        """Whether it is faster here, and torch has its operators, which are not public."""
        mkldnn = torch.ops.mkldnn
        needed = '_reorder_linear_weight', '_linear_pointwise', '_is_mkldnn_bf16_supported'
        if weight.device.type != 'cpu' or not torch.backends.mkldnn.is_available():
            return False
        if not all(hasattr(mkldnn, name) for name in needed):
            return False
        if weight.dtype == torch.float32:
            return weight.numel() >= cls.SMALLEST
        return weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()


# -- the check ------------------------------------------------------------------------------------


@torch.inference_mode()
def check_generation(
    model: GPT, prompt: Sequence[int], n_tokens: int = 8, precision=None
) -> str | None:
    """Compares the logits that generate() takes tokens from with those of whole forward passes.

    Two rows go on greedily: one from the end of the prompt, which is taken so long that the context
    is full halfway, and one from the first half of it. precision: the context manager in which
    training runs its forward passes; the whole passes are made in it, and without it.

    Returns None if the logits agree to rounding, or a sentence if they differ.
    """
    prompt = list(prompt)[-max(1, model.config.block_size - n_tokens // 2) :]
    texts = [prompt, prompt[: max(1, len(prompt) // 2)]]
    steps, contexts = [], []  # for each token: logits (2, V), and the context of each row
    try:
        window = Window(model, texts, n_tokens, compile=False)
        for _ in range(n_tokens):
            steps.append(window.next_logits().float())
            contexts.append(
                [
                    (len(text) - length, len(text))
                    for text, length in zip(texts, window.lengths, strict=True)
                ]
            )
            tokens = steps[-1].argmax(dim=-1)
            texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
            window.append(tokens)
    except torch.OutOfMemoryError:
        return None  # the caches may need more memory than training has left
    except Exception as error:  # in code that somebody changed; it must not end a training run
        return f'generate() fails with {type(error).__name__}: {error}'
    was_training = model.training
    model.eval()
    try:
        for manager in (nullcontext(), precision or nullcontext()):
            with manager:
                whole = [
                    logits_of_whole_passes(model, text, [context[row] for context in contexts])
                    for row, text in enumerate(texts)
                ]
            if said := describe_difference(torch.stack(steps), torch.stack(whole, dim=1), contexts):
                return said
    except torch.OutOfMemoryError:
        return None
    finally:
        model.train(was_training)
    return None


def logits_of_whole_passes(model: GPT, text: list[int], contexts: list[tuple[int, int]]):
    """Logits (n, V) after each of n contexts, which are (start, end) places in the text."""
    device, logits = model.transformer.wte.weight.device, []
    for start in sorted({start for start, _ in contexts}):  # one pass for all that begin there
        ends = [end for other, end in contexts if other == start]
        idx = torch.tensor([text[start : ends[-1]]], device=device)
        logits.append(model(idx)[0, [end - start - 1 for end in ends]])
    return torch.cat(logits)


def describe_difference(actual, expected, contexts) -> str | None:
    """A sentence about the largest difference of logits (n, rows, V); None if it is rounding's."""
    is_rounded = expected.dtype in (torch.bfloat16, torch.float16)
    expected = expected.float()
    spread = expected.std(dim=-1, correction=0).clamp(min=1e-30)
    share = (actual - expected).std(dim=-1, correction=0) / spread  # (n, rows)
    if (share <= (HALF_TOLERANCE if is_rounded else TOLERANCE)).all():  # not so if one is NaN
        return None
    step, row = divmod(int(share.argmax()), share.shape[1])
    start, end = contexts[step][row]
    return (
        f'after {end - start} tokens, the logits of generate() differ from those of a whole '
        f'forward pass by {float(share[step, row]):.1%} of their standard deviation'
    )
