"""Encodes pieces of text on all cores, in order, with only a few of them in memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from nib.errors import UserError
from nib.machine.threads import available_cores
from nib.text.tokenizer import Tokenizer

SPLITS = ('train', 'val')
BATCH = 1 << 20  # characters sent to a process at once
SERIAL_BATCHES = 4  # encoded by this process first: starting others takes longer than that

Piece = tuple[str, str, bool]  # split, text, whether a document ends with it
# Pieces, and the split of the document that the first of them continues; '' if it begins one.
Batch = tuple[list[Piece], str]


@dataclass
class Encoded:
    """The result of encoding a batch of pieces."""

    pieces: int = 0
    ids: dict[str, bytes] = field(default_factory=dict)  # split -> bytes to append to its bin
    n_bytes: dict[str, int] = field(default_factory=dict)  # split -> bytes of UTF-8 text
    unfinished: str = ''  # as in Batch, for the piece after these


def encode_all(
    pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: np.dtype, unfinished: str = ''
) -> Generator[Encoded, None, None]:
    """Encodes pieces in order; the end-of-text token follows every document.

    unfinished: as in Batch. Raises UserError if a process that encodes is killed.
    """
    cores = available_cores()
    batches = batched(pieces, unfinished)
    for batch in islice(batches, SERIAL_BATCHES if cores > 1 else None):
        yield encode_batch(*batch, tokenizer, dtype)
    first = next(batches, None)
    if first is not None:
        yield from _in_processes(chain([first], batches), tokenizer, dtype, cores)


def batched(pieces: Iterable[Piece], unfinished: str = '') -> Iterator[Batch]:
    """Groups pieces until they have BATCH characters: sending one costs more than encoding it."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH:
            yield batch, unfinished
            batch, size, unfinished = [], 0, _unfinished(batch)
    if batch:
        yield batch, unfinished


def _unfinished(pieces: list[Piece]) -> str:
    split, _, ends = pieces[-1]
    return '' if ends else split


def encode_batch(
    pieces: list[Piece], unfinished: str, tokenizer: Tokenizer, dtype: np.dtype
) -> Encoded:
    """Encodes a batch; see Batch for the first two arguments."""
    done = Encoded(len(pieces), unfinished=_unfinished(pieces))
    for split in SPLITS:
        texts = [(text, ends) for into, text, ends in pieces if into == split]
        if texts:
            if split == unfinished:
                texts.insert(0, ('', False))  # the beginning, which is in an earlier batch
            done.ids[split] = tokenizer.encode_texts(texts).astype(dtype, copy=False).tobytes()
            done.n_bytes[split] = sum(
                len(text.encode('utf-8', 'surrogatepass')) for text, _ in texts
            )
    return done


def _in_processes(
    batches: Iterator[Batch], tokenizer: Tokenizer, dtype: np.dtype, cores: int
) -> Generator[Encoded, None, None]:
    # Forking a process that has threads (torch's, tqdm's) may hang, so processes are spawned.
    pool = ProcessPoolExecutor(
        cores, multiprocessing.get_context('spawn'), _start_process, (tokenizer, dtype)
    )
    waiting = deque()  # pool.map would read all batches at once
    try:
        for batch in batches:
            waiting.append(_submit(pool, batch))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            'a process that encodes text was killed, perhaps because memory ran out; '
            'to continue from here, repeat the command'
        ) from error
    finally:
        # If this process ended first, those that are still starting would fail with tracebacks.
        with _later(signal.SIGINT):
            pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch: Batch) -> Future:
    """Encodes a batch in the pool, which starts a process if none is idle.

    Ctrl-C reaches all processes, and this one handles it, after the new one has started.
    """
    with _later(signal.SIGINT), _blocked(signal.SIGINT):  # a new process inherits that
        return pool.submit(_encode, batch)


@contextmanager
def _blocked(number: signal.Signals):
    """Within this context, this thread and the processes that it starts do not get a signal."""
    if os.name == 'nt':  # cannot block signals
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _later(number: signal.Signals):
    """Within this context, a signal waits, also if another thread of this process gets it."""
    if threading.current_thread() is not threading.main_thread():  # only that one handles signals
        yield
        return
    came = []
    handler = signal.signal(number, lambda *_: came.append(number))
    try:
        yield
    finally:
        signal.signal(number, handler)
        if came:
            signal.raise_signal(number)


# Of a process that encodes. A tokenizer.json has megabytes, too much to send with each batch.
_sent: list = []


def _encode(batch: Batch) -> Encoded:
    return encode_batch(*batch, *_sent)


def _start_process(tokenizer: Tokenizer, dtype: np.dtype):
    _sent[:] = tokenizer, dtype
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the library's threads: each core is in use
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, nothing is inherited
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Exits with the parent process; workers of a killed parent would otherwise wait forever."""
    multiprocessing.parent_process().join()
    os._exit(1)
