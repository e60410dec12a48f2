"""Encoding on all cores: pieces of text in, token ids out, in the same order and with few of either in memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from nib.errors import UserError
from nib.text.tokenizer import Tokenizer

SPLITS = ('train', 'val')
BATCH = 1 << 20  # characters that go to a process together
SERIAL_BATCHES = (
    4  # batches that are done before other processes are started, which takes longer than they do
)

Piece = tuple[str, str, bool]  # split, text, whether a document ends with it


@dataclass
class Encoded:
    """What a batch of pieces became."""

    pieces: int = 0
    ids: dict[str, bytes] = field(default_factory=dict)  # of each split, as they go into its bin
    n_bytes: dict[str, int] = field(default_factory=dict)  # of UTF-8 text, likewise


def encode_all(pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[Encoded]:
    """Encodes pieces in their order; the end-of-text token follows every document."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    )
    batches = batched(pieces)
    for batch in islice(batches, SERIAL_BATCHES if cores > 1 else None):
        yield encode_batch(batch, tokenizer, dtype)
    first = next(batches, None)
    if first is not None:
        yield from _in_processes(chain([first], batches), tokenizer, dtype, cores)


def batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces together, until they have BATCH characters: sending them one by one would cost more than encoding them."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(batch: list[Piece], tokenizer: Tokenizer, dtype: np.dtype) -> Encoded:
    done = Encoded(len(batch))
    for split in SPLITS:
        texts = [(text, ends) for into, text, ends in batch if into == split]
        if texts:
            done.ids[split] = tokenizer.encode_texts(texts).astype(dtype, copy=False).tobytes()
            done.n_bytes[split] = sum(
                len(text.encode('utf-8', 'surrogatepass')) for text, _ in texts
            )
    return done


def _in_processes(
    batches: Iterator[list[Piece]], tokenizer: Tokenizer, dtype: np.dtype, cores: int
) -> Iterator[Encoded]:
    # Spawned, as forking a process that has threads (torch's, tqdm's) may hang.
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context('spawn'), _start_process)
    waiting = deque()  # the pool's own map would read all batches at once
    try:
        for batch in batches:
            waiting.append(pool.submit(encode_batch, batch, tokenizer, dtype))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            'a process that encodes text was killed, perhaps as the memory ran out; what is done is kept, the '
            'same command goes on from there'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A parent that is killed cannot end its processes, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
