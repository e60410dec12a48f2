"""Batches as a pure function of (seed, step, micro_step, rank).

There is no state to save, and the data of a step is the same for 1 and 8 ranks. Training reads
every window of block_size tokens once per epoch. Their order is computed, not stored: a Feistel
network (Luby and Rackoff 1988) is a permutation, and the cost of a value does not grow with the
text.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from nib.machine.ranks import Ranks
from nib.tokens.dataset import TokenDataset, check_ids

_ROUNDS = 6
_TOGETHER = 1024  # sequences placed at once: numpy needs little more time than for one batch


def permute(positions: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Applies a pseudo-random permutation of range(n) to positions.

    key: uint64 (6,), one word per round. Returns uint64, in the shape of positions.
    Values outside range(n) go through the network again until they are inside (cycle walking: Black
    and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits in each half of a word
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
    """Makes every bit of a word depend on all of its bits (splitmix64: Steele et al. 2014)."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


class BatchLoader:
    """Training batches from a memmap of token ids.

    tokens: ids (n,), with n > block_size. micro_steps: per rank and step. The sequences of a step
    are numbered across its micro steps and ranks, so a step trains on the same sequences for any
    number of ranks.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        seed: int,
        micro_steps: int,
        ranks: Ranks = Ranks(),
        device: str = 'cpu',
        vocab_size: int | None = None,
    ):
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed, self.micro_steps = seed, micro_steps
        self.ranks, self.device, self.vocab_size = ranks, device, vocab_size
        # One window fewer than would fit leaves room for an offset that differs between epochs.
        self.n_windows = max(1, (len(tokens) - block_size) // block_size)
        self._ahead = {}  # (step, micro step) -> the batch prepared for it
        # Offsets are computed for a group of batches at a time; the last group is kept.
        self._group_size = max(1, min(_TOGETHER, self.n_windows) // (batch_size * ranks.world_size))
        self._group = -1
        self._starts = np.empty((0, batch_size), dtype=np.int64)

    @classmethod
    def from_config(cls, config: Mapping, data: TokenDataset, ranks: Ranks, device: str):
        """Returns a loader of a dataset's training split with train.py's config."""
        return cls(
            data.train,
            block_size=config['block_size'],
            batch_size=config['batch_size'],
            seed=config['seed'],
            micro_steps=config['gradient_accumulation_steps'] // ranks.world_size,
            ranks=ranks,
            device=device,
            vocab_size=data.vocab_size,
        )

    def starts(self, step: int, micro_step: int) -> np.ndarray:
        """Returns the offsets, int64 (batch_size,), of a batch's windows in the tokens."""
        group, row = divmod(step * self.micro_steps + micro_step, self._group_size)
        if group != self._group:
            self._starts = self._compute_starts(group * self._group_size)
            self._group = group
        return self._starts[row]

    def _compute_starts(self, batch: int) -> np.ndarray:
        """Offsets (_group_size, batch_size) of this rank's batches from `batch` on."""
        first = (batch * self.ranks.world_size + self.ranks.rank) * self.batch_size
        stride = np.uint64(self.ranks.world_size * self.batch_size)
        rows = np.arange(self._group_size, dtype=np.uint64)[:, None] * stride
        numbers = np.uint64(first) + rows + np.arange(self.batch_size, dtype=np.uint64)
        return self._place(numbers.ravel()).reshape(numbers.shape)

    def _place(self, numbers: np.ndarray) -> np.ndarray:
        """Offsets, int64 (n,), of the sequences with these numbers, uint64 (n,), which increase."""
        starts = np.empty(numbers.shape, dtype=np.int64)
        room = min(self.block_size, len(self.tokens) - self.n_windows * self.block_size)
        done = 0
        while done < len(numbers):  # one epoch at a time
            epoch = int(numbers[done]) // self.n_windows
            end = int(np.searchsorted(numbers, np.uint64((epoch + 1) * self.n_windows)))
            key, positions = self._key(epoch), numbers[done:end] % np.uint64(self.n_windows)
            windows = permute(positions, self.n_windows, key[1:]).astype(np.int64)
            starts[done:end] = int(key[0]) % room + windows * self.block_size
            done = end
        return starts

    def _key(self, epoch: int) -> np.ndarray:
        """Returns uint64 (1 + _ROUNDS,): the key of an epoch's offset and those of its order."""
        digest = hashlib.blake2b(
            repr((self.seed, 'train', epoch)).encode(), digest_size=8 * (1 + _ROUNDS)
        ).digest()
        return np.frombuffer(digest, dtype='<u8')

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x and y, int64 (batch_size, block_size) on the device; y is x shifted by one."""
        return self._cut(self.tokens, self.starts(step, micro_step))

    def first_sequences(self, step: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x and y, int64 (n, block_size), of the first sequences of a step, of all ranks.

        The cost does not depend on the batch size.
        """
        first = step * self.micro_steps * self.ranks.world_size * self.batch_size
        return self._cut(self.tokens, self._place(np.uint64(first) + np.arange(n, dtype=np.uint64)))

    def _cut(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return cut_windows(tokens, starts, self.block_size, self.device, self.vocab_size)

    def micro_batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the batches of a step in order.

        The next batch, even of the next step, is prepared when the caller asks to continue, while
        a GPU is still working on the previous one. A CPU gains nothing from this.
        """
        for micro_step in range(self.micro_steps):
            yield self._ahead.pop((step, micro_step), None) or self.batch(step, micro_step)
            following = (
                (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)
            )
            self._ahead = {following: self.batch(*following)}

    def eval_batches(
        self, tokens: np.ndarray, max_batches: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields this rank's evaluation batches: x and y, int64 (<= batch_size, block_size).

        tokens: ids (n,) of a split. The windows are fixed: all of the split without its incomplete
        last one or, with max_batches, windows spread evenly over it. Together the ranks read every
        window once.
        """
        size, max_windows = self.batch_size, max_batches and max_batches * self.batch_size
        starts = eval_starts(len(tokens), self.block_size, max_windows)
        for first in range(self.ranks.rank * size, len(starts), self.ranks.world_size * size):
            yield self._cut(tokens, np.array(starts[first : first + size]))


def eval_starts(
    n_tokens: int, block_size: int, max_windows: int | None = None
) -> Sequence[int] | np.ndarray:
    """Returns offsets of windows that do not overlap: all of them, or max_windows spread evenly."""
    n = (n_tokens - 1) // block_size
    if not max_windows or max_windows >= n:
        return range(0, n * block_size, block_size)
    return np.arange(max_windows, dtype=np.int64) * n // max_windows * block_size


def cut_windows(tokens, starts, block_size, device, vocab_size=None):
    """Returns x and y, int64 (len(starts), block_size), for the windows at starts.

    Raises UserError if an id is not below vocab_size.
    """
    # Indexing a memmap itself is slower than indexing an array of it.
    windows = np.asarray(tokens)[starts[:, None] + np.arange(block_size + 1)]  # (B, T + 1)
    if vocab_size is not None and windows.max() >= vocab_size:
        row = int((windows >= vocab_size).any(axis=1).argmax())
        check_ids(windows[row], vocab_size, getattr(tokens, 'filename', 'tokens'), int(starts[row]))
    x, y = (torch.from_numpy(ids.astype(np.int64)) for ids in (windows[:, :-1], windows[:, 1:]))
    if str(device).startswith('cuda'):  # pinned memory makes the copy asynchronous
        return tuple(ids.pin_memory().to(device, non_blocking=True) for ids in (x, y))
    return x.to(device), y.to(device)
