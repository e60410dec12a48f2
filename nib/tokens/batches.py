"""Batches as a pure function of (seed, split, step, micro step, rank): no state to save, and the same on 1 or 8 ranks.

Training reads every window of block_size tokens once an epoch, in an order that is computed, not stored: a Feistel
network (Luby and Rackoff 1988) is a permutation whose every value costs the same, however long the text is.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from nib.machine.ranks import Ranks
from nib.tokens.dataset import TokenDataset, check_ids

_ROUNDS = 6
_TOGETHER = 1024  # sequences whose places are computed at once: numpy takes hardly longer for them than for a batch's


def permute(positions: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(n) puts the positions, uint64. key: uint64 (6,), one a round.

    Values that fall outside range(n) go through the network again until they fall inside (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains", cycle walking).
    """
    half = np.uint64(
        max(1, ((n - 1).bit_length() + 1) // 2)
    )  # bits in each half of the network's words
    mask = np.uint64((1 << int(half)) - 1)
    values = np.array(positions, dtype=np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        walking = values[outside]
        left, right = walking >> half, walking & mask
        for round_key in key:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[outside] = left << half | right
        outside = values >= n
    return values


def _mix(words: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of the word (splitmix64's finaliser: Steele et al. 2014)."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


class BatchLoader:
    """Training batches from a memmap of token ids.

    tokens: ids, one dimension, more than block_size. micro_steps: of each rank in a step. The sequences of a step are
    numbered through over its micro steps and ranks, so their union does not depend on how many ranks share them out.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        seed: int,
        split: str,
        micro_steps: int,
        rank: int = 0,
        world_size: int = 1,
        device: str = 'cpu',
        vocab_size: int | None = None,
    ):
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed, self.split, self.micro_steps = seed, split, micro_steps
        self.rank, self.world_size = rank, world_size
        self.device, self.vocab_size = device, vocab_size
        # One window fewer than there is room for: the epochs' offsets move within that room.
        self.n_windows = max(1, (len(tokens) - block_size) // block_size)
        self._ahead = {}  # (step, micro step) -> the batch prepared for it
        self._batches_together = max(1, min(_TOGETHER, self.n_windows) // (batch_size * world_size))
        self._together, self._starts = (
            -1,
            None,
        )  # which of these groups of batches was asked for last, and its windows

    @classmethod
    def from_config(cls, config: Mapping, data: TokenDataset, ranks: Ranks, device: str):
        """Returns a loader of a dataset's training split with train.py's config."""
        return cls(
            data.train,
            block_size=config['block_size'],
            batch_size=config['batch_size'],
            seed=config['seed'],
            split='train',
            micro_steps=config['gradient_accumulation_steps'] // ranks.world_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=device,
            vocab_size=data.vocab_size,
        )

    def starts(self, step: int, micro_step: int) -> np.ndarray:
        """Offsets (batch_size,) of a batch's windows in the tokens."""
        together, row = divmod(step * self.micro_steps + micro_step, self._batches_together)
        if together != self._together:
            self._together, self._starts = (
                together,
                self._compute_starts(together * self._batches_together),
            )
        return self._starts[row]

    def _compute_starts(self, batch: int) -> np.ndarray:
        """The same of this rank's batches from this one on, as many as are computed together: (batches, batch_size)."""
        first = (batch * self.world_size + self.rank) * self.batch_size
        later = np.arange(self._batches_together, dtype=np.uint64)[:, None] * np.uint64(
            self.world_size * self.batch_size
        )
        numbers = np.uint64(first) + later + np.arange(self.batch_size, dtype=np.uint64)
        epochs, positions = numbers // self.n_windows, numbers % self.n_windows
        starts = np.empty(numbers.shape, dtype=np.int64)
        for epoch in range(int(epochs[0, 0]), int(epochs[-1, -1]) + 1):
            key = self._key(epoch)
            room = min(self.block_size, len(self.tokens) - self.n_windows * self.block_size)
            rows = epochs == epoch
            windows = permute(positions[rows], self.n_windows, key[1:]).astype(np.int64)
            starts[rows] = int(key[0]) % room + windows * self.block_size
        return starts

    def _key(self, epoch: int) -> np.ndarray:
        """Words (1 + rounds,) that fix an epoch's offset and order."""
        digest = hashlib.blake2b(
            repr((self.seed, self.split, epoch)).encode(), digest_size=8 * (1 + _ROUNDS)
        ).digest()
        return np.frombuffer(digest, dtype='<u8')

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y, int64 (batch_size, block_size) on the device; y is x one token later."""
        return cut_windows(
            self.tokens,
            self.starts(step, micro_step),
            self.block_size,
            self.device,
            self.vocab_size,
        )

    def micro_batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of a step in order. When the caller comes back for the next, it is prepared while a GPU still
        works on the one before, also over the end of the step; a CPU has no such gap to fill."""
        for micro_step in range(self.micro_steps):
            yield self._ahead.pop((step, micro_step), None) or self.batch(step, micro_step)
            following = (
                (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)
            )
            self._ahead = {following: self.batch(*following)}

    def eval_batches(self, tokens: np.ndarray, max_batches: int | None = None):
        """Returns this rank's share of an evaluation on `tokens`: eval_batches below."""
        return eval_batches(
            tokens,
            self.block_size,
            self.batch_size,
            max_batches,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            vocab_size=self.vocab_size,
        )


def eval_batches(
    tokens: np.ndarray,
    block_size: int,
    batch_size: int,
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: str = 'cpu',
    vocab_size: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of an evaluation: x and y (up to batch_size, block_size) from fixed windows.

    Without max_batches, every window of the split; its last, incomplete one is left out. With it, windows spread
    evenly over the split. All ranks together take every window once.
    """
    starts = eval_starts(len(tokens), block_size, max_batches and max_batches * batch_size)
    for first in range(rank * batch_size, len(starts), world_size * batch_size):
        yield cut_windows(
            tokens, np.array(starts[first : first + batch_size]), block_size, device, vocab_size
        )


def eval_starts(n_tokens: int, block_size: int, max_windows: int | None = None) -> Sequence[int]:
    """Offsets of windows that do not overlap: all of them, or max_windows spread evenly."""
    n = (n_tokens - 1) // block_size
    if not max_windows or max_windows >= n:
        return range(0, n * block_size, block_size)
    return np.arange(max_windows, dtype=np.int64) * n // max_windows * block_size


def cut_windows(tokens, starts, block_size, device, vocab_size=None):
    """x and y (len(starts), block_size) of the windows at starts. UserError for an id >= vocab_size."""
    windows = np.asarray(tokens)[
        starts[:, None] + np.arange(block_size + 1)
    ]  # (B, T + 1); a memmap itself is slower
    if vocab_size is not None and windows.max() >= vocab_size:
        row = int((windows >= vocab_size).any(axis=1).argmax())
        check_ids(windows[row], vocab_size, getattr(tokens, 'filename', 'tokens'), int(starts[row]))
    x, y = (torch.from_numpy(ids.astype(np.int64)) for ids in (windows[:, :-1], windows[:, 1:]))
    if str(device).startswith('cuda'):  # from pinned memory, so that nobody waits for the copy
        return tuple(ids.pin_memory().to(device, non_blocking=True) for ids in (x, y))
    return x.to(device), y.to(device)
