"""Caches of keys and values, and the attention of new tokens to them.

benchmarks/results/generation_steps.txt compares the speed of the three caches.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model import GPTConfig, attend, attend_by_definition, kernels_fit
from nib.kernels.attention import HAS_AMX


@dataclass
class Pass:
    """What the caches need to know about a forward pass; the same for all layers."""

    slots: torch.Tensor  # (T,) slots of the tokens that are read
    n_seen: int  # the tokens attend to slots 0 to n_seen - 1
    mask: torch.Tensor | None  # (B, 1, T, n_seen), True: may attend; None: causal
    # Only if no fused kernel computes attention_scores(). Positions are negative in padding.
    query_positions: torch.Tensor | None = None  # (B, 1, T)
    key_positions: torch.Tensor | None = None  # (B, 1, n_seen)


def attend_in_window(q, k, v, mask):
    """Attends (B, H, T, D) to the keys and values (B, K, T, D) of the same tokens."""
    if mask is None:
        return attend(q, k, v)
    is_shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_shared)


class KVCache:
    """One layer's keys and values (B, K, n_slots, D).

    On a CPU they are float32: attention of a single query is several times faster than in bfloat16.
    """

    this_pass: Pass  # set by Window before each forward pass

    def __init__(self, config: GPTConfig, n_rows: int, n_slots: int, weight):
        on_cpu = weight.device.type == 'cpu'
        dtype = torch.promote_types(weight.dtype, torch.float32) if on_cpu else weight.dtype
        shape = n_rows, config.kv_heads, n_slots, config.head_width
        self.keys, self.values = (weight.new_zeros(shape, dtype=dtype) for _ in range(2))

    def attend(self, q, k, v):
        """Stores k and v (B, K, T, D) of the tokens of `this_pass`, and attends: (B, H, T, D)."""
        this = self.this_pass
        self.keys.index_copy_(2, this.slots, k.type_as(self.keys))
        self.values.index_copy_(2, this.slots, v.type_as(self.values))
        if this.mask is None and k.shape[2] > 1:
            return attend(q, k, v)
        k, v = self.keys[:, :, : this.n_seen], self.values[:, :, : this.n_seen]
        if this.query_positions is not None:
            y = attend_by_definition(
                q.type_as(k), k, v, this.query_positions, this.key_positions, mask=this.mask
            )
            return y.type_as(q)
        return F.scaled_dot_product_attention(
            q.type_as(k), k, v, attn_mask=this.mask, enable_gqa=q.shape[1] != k.shape[1]
        ).type_as(q)


class AmxCache:
    """One layer's keys and values (B, K, n_slots, D) on an Intel processor with AMX.

    A single query attends by a fused kernel in bfloat16. In float32, two batched products are
    faster, if each dimension of the keys is contiguous.
    """

    this_pass: Pass  # set by Window before each forward pass

    def __init__(self, config: GPTConfig, n_rows: int, n_slots: int, weight):
        self.values = weight.new_zeros(n_rows, config.kv_heads, n_slots, config.head_width)
        self.keys = torch.zeros_like(self.values)
        if weight.dtype == torch.float32:
            self.keys = self.keys.view(n_rows, config.kv_heads, -1, n_slots).transpose(2, 3)

    @classmethod
    def pays(cls, config: GPTConfig, n_rows: int, n_slots: int, weight) -> bool:
        """Whether this cache is faster than the others and computes the same."""
        if weight.device.type != 'cpu' or weight.dtype not in (torch.float32, torch.bfloat16):
            return False
        return kernels_fit() and HAS_AMX

    def attend(self, q, k, v):
        """Like KVCache.attend(), for a whole window or for one token (T = 1) after earlier ones."""
        n_seen, mask = self.this_pass.n_seen, self.this_pass.mask
        B, H, T, D = q.shape
        self.keys[:, :, n_seen - T : n_seen], self.values[:, :, n_seen - T : n_seen] = k, v
        if T > 1:
            return attend_in_window(q, k, v, mask)
        q = q.view(B, k.shape[1], -1, D)  # heads that share keys are queries of one head
        k, v = self.keys[:, :, :n_seen], self.values[:, :, :n_seen]
        q = q.type_as(k)  # they differ inside autocast
        if k.dtype == torch.bfloat16:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * K, ...)
            scores = torch.bmm(q / math.sqrt(D), k.transpose(1, 2))
            if mask is not None:
                scores.view(B, H, n_seen).masked_fill_(~mask[:, 0], -math.inf)
            y = torch.bmm(scores.softmax(dim=-1), v)
        return y.view(B, H, 1, D)


class BagCache:
    """A large KVCache on a CPU: a single query attends at memory bandwidth.

    scaled_dot_product_attention reaches half of that. Both matrix products of attention are
    weighted sums of the rows of a table, which is what embedding_bag computes. Values
    (B, K, blocks, 64, D) are such rows. Keys are stored transposed, (B, K, blocks, D, 64): the
    scores of a block are the sum of its D rows, weighted by the query.
    """

    # Elements in a layer's keys and values; with fewer, the two calls cost more than they save.
    SMALLEST = 1 << 20
    BLOCK = 64
    this_pass: Pass  # set by Window before each forward pass

    def __init__(self, config: GPTConfig, n_rows: int, n_slots: int, weight):
        blocks = n_rows, config.kv_heads, math.ceil(n_slots / self.BLOCK)
        self.keys = weight.new_zeros(*blocks, config.head_width, self.BLOCK)
        self.values = weight.new_zeros(*blocks, self.BLOCK, config.head_width)

    def attend(self, q, k, v):
        """Like KVCache.attend(), for a whole window or for one token (T = 1) after earlier ones."""
        n_seen, mask = self.this_pass.n_seen, self.this_pass.mask
        B, H, T, D = q.shape
        used = math.ceil(n_seen / self.BLOCK)  # blocks
        if T > 1:
            padding = 0, 0, 0, used * self.BLOCK - T
            k_blocks, v_blocks = (
                F.pad(part, padding).unflatten(2, (used, self.BLOCK)) for part in (k, v)
            )
            self.keys[:, :, :used], self.values[:, :, :used] = k_blocks.transpose(3, 4), v_blocks
            return attend_in_window(q, k, v, mask)
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
        """Whether this cache is faster than KVCache and computes the same."""
        if weight.device.type != 'cpu' or not kernels_fit():
            return False
        size = 2 * n_rows * config.kv_heads * n_slots * config.head_width
        return size >= cls.SMALLEST and n_slots >= cls.BLOCK  # not worth it for less than one block

    @classmethod
    def _add_rows(cls, table, used, weights):
        """Sums (bags, width) of rows of table (B, K, blocks, rows, width).

        The weights are (B, H, ..., rows in a bag). The bags of a head cover its used blocks.
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
