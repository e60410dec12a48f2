"""The context of each row, and the model that reads it with a cache for each layer."""

from typing import Any

import torch
from torch.nn import functional as F

from model import GPT, CausalSelfAttention, kernels_fit
from nib.generation.caches import AmxCache, BagCache, KVCache, Pass
from nib.generation.layers import PackedLinear, RowLinear, for_generation
from nib.kernels.attention import HAS_AMX
from nib.machine.compiling import compile_function
from nib.machine.graphs import capture, warm_up


class Window:
    """The tokens in the context of each row, the model that reads them, and a cache for each layer.

    Tokens are stored in slots. All rows end at the same slot: a shorter row is padded on the left,
    and never attends to its padding. Lengths are kept on the host, so generation never waits for
    the device.
    """

    def __init__(self, model: GPT, prompts, max_new_tokens: int, compile: bool):
        config, weight = model.config, model.transformer.wte.weight
        prompts = [list(prompt)[-config.block_size :] for prompt in prompts]
        self.lengths = [len(prompt) for prompt in prompts]
        longest = max(self.lengths)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        self.tokens = torch.tensor(padded, device=weight.device)  # (B, slots in use)
        self.n_unread = longest  # the last tokens of each row, which are not in the caches yet
        self.n_slots = min(config.block_size, longest + max_new_tokens)

        shape = config, len(prompts), self.n_slots, weight
        candidates: list[Any] = [] if compile else [AmxCache, BagCache]
        cache_type = next((kind for kind in candidates if kind.pays(*shape)), KVCache)
        linear = RowLinear if len(prompts) == 1 and HAS_AMX else PackedLinear
        self.model = for_generation(model, None if compile else linear)
        self.caches: list[Any] = []
        for name, layer in model.named_modules(remove_duplicate=False):  # a block may be repeated
            if isinstance(layer, CausalSelfAttention):
                self.caches.append(cache_type(*shape))
                self.model.get_submodule(name).attend = self.caches[-1].attend
        self.step = compile_function(next_logits, fullgraph=True) if compile else next_logits
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
        self.n_unread = self.tokens.shape[1] if is_full else 1

    def next_logits(self):
        """Logits (B, V) of the next token of each row."""
        n_tokens, T = self.tokens.shape[1], self.n_unread
        smear = self.model.config.smear  # the number of earlier tokens that are needed, too
        idx = F.pad(self.tokens, (smear, 0))[:, -T - smear :].contiguous()  # (B, smear + T)
        slots = torch.arange(n_tokens - T, n_tokens, device=self.tokens.device)
        if n_tokens == T:  # each row's first slot
            lengths = torch.tensor(self.lengths, device=self.tokens.device)
            self.starts.copy_(n_tokens - lengths[:, None])
        if T == 1 and self.is_static:
            return self._static_step(idx, slots)
        is_padded = min(self.lengths) < n_tokens
        return self._read(idx, slots, n_tokens, is_padded or not kernels_fit())

    def _static_step(self, idx, slots):
        """Logits after idx (B, smear + 1), with operations of the same shapes in every step."""
        if not idx.is_cuda:
            return self._read(idx, slots, self.n_slots, True)
        if self.graph is None:
            self.graph = StepGraph(
                lambda idx, slots: self._read(idx, slots, self.n_slots, True), idx, slots
            )
        return self.graph(idx, slots)

    def _read(self, idx, slots, n_seen: int, is_masked: bool):
        """Logits (B, V) after idx (B, smear + T); keys and values of T tokens go to slots (T)."""
        this_pass, positions = Pass(slots, n_seen, None), slots
        if is_masked:
            positions = (slots - self.starts).clamp(min=0)  # (B, T)
            this_pass = self._masked_pass(slots, n_seen)
        for cache in self.caches:
            cache.this_pass = this_pass
        return (self.step if len(slots) == 1 else next_logits)(self.model, idx, positions)

    def _masked_pass(self, slots, n_seen: int) -> Pass:
        """A pass for rows with padding, or with some of the n_seen slots not in use yet."""
        keys = torch.arange(n_seen, device=slots.device)
        # Padding attends to padding: a softmax over nothing would be NaN.
        not_padding = (keys >= self.starts[..., None]) | (slots < self.starts)[..., None]
        if kernels_fit():
            return Pass(slots, n_seen, ((keys <= slots[:, None]) & not_padding)[:, None])
        is_token = ((keys <= slots[-1]) & not_padding)[:, None]
        query_positions, key_positions = ((n - self.starts)[:, None] for n in (slots, keys))
        return Pass(slots, n_seen, is_token, query_positions, key_positions)


def next_logits(model: GPT, idx, positions):
    """Logits (B, V) of the token after the last of idx (B, smear + T), at positions (T)."""
    return model.logits(model.hidden_states(idx, positions)[:, -1])


class StepGraph:
    """The decoding step as a CUDA graph: one launch instead of about 200.

    read: a function of idx (B, smear + 1) and slots (1) that returns logits (B, V). If it cannot be
    captured, for example because a modified model synchronizes with the GPU, it is called directly.
    """

    def __init__(self, read, idx, slots):
        self.read, self.idx, self.slots = read, idx.clone(), slots.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(idx.device):
            try:
                warm_up(lambda: read(self.idx, self.slots), idx.device)
                with capture(self.graph):
                    self.logits = read(self.idx, self.slots)
            except RuntimeError:
                self.graph = None

    def __call__(self, idx, slots):
        if self.graph is None:
            return self.read(idx, slots)
        self.idx.copy_(idx)
        self.slots.copy_(slots)
        self.graph.replay()
        return self.logits.clone()  # the next step overwrites them
