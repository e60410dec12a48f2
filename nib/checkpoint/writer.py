"""Checkpoints written in the background, while training goes on."""

import atexit
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from nib.checkpoint import store


class CheckpointWriter:
    """Writes a run's checkpoints one after the other, in the order asked for, and deletes those that need not be kept.

    The caller waits while the tensors are copied to the CPU, and before that for a checkpoint still being written. An error
    comes out of the next call, whichever it is, and nothing more is written until it has. The program does not end before
    all is written: Python waits for an executor's threads.
    """

    def __init__(self, out_dir, keep_last: int, keep_every: int = 0, start: int = 0):
        """start: the step that the run goes on from. What is newer was passed over as damaged, and is none of those kept."""
        self.out_dir, self.keep_last, self.keep_every = out_dir, keep_last, keep_every
        self._damaged = store.steps_after(out_dir, start)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix='checkpoint')
        self._last: Future | None = None  # what was asked for last
        atexit.register(self._report)

    def save(
        self,
        step: int,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        state: dict,
    ):
        """Begins to write the checkpoint of `step`. The tensors may change afterwards; state may not."""
        self.wait()  # so that there is one copy at a time
        copies = [
            {name: tensor.detach().to('cpu', copy=True) for name, tensor in tensors.items()}
            for tensors in (model, optimizer)
        ]
        self._submit(lambda: self._save(step, *copies, state))

    def record_evaluation(self, step: int, train_state: dict, best: bool):
        """Writes what an evaluation told into the checkpoint of `step`: the last one saved, or the one resumed from."""
        self._submit(lambda: self._record_evaluation(step, train_state, best))

    def wait(self):
        """Returns when all that was asked for is on the disk. UserError where it cannot be."""
        last, self._last = self._last, None
        if last:
            last.result()

    def close(self):
        """wait(), and the end of this writer."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            atexit.unregister(self._report)

    def _save(self, step, model, optimizer, state):
        store.save(self.out_dir, step, model, optimizer, state)
        store.delete_set_aside(self.out_dir)
        self._damaged.discard(step)
        self._prune(step)

    def _record_evaluation(self, step, train_state, best):
        store.record_evaluation(self.out_dir, step, train_state, best)
        self._prune(step)

    def _prune(self, step):
        store.prune(self.out_dir, step, self.keep_last, self.keep_every, self._damaged)

    def _submit(self, work: Callable[[], None]):
        if self._last and self._last.done():
            self.wait()
        previous = self._last

        def run():
            if previous:
                previous.result()  # done by now; where it failed, this fails with the same error
            work()

        self._last = self._thread.submit(run)

    def _report(self):
        """An error that nobody has asked for, as the program ended for another reason."""
        if self._last and (error := self._last.exception()):
            print(f'error: {error}', file=sys.stderr)
