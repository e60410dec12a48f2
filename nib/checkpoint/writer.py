"""Writes checkpoints in the background, while training continues."""

import atexit
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from nib.checkpoint import store
from nib.checkpoint.replacing import delete_set_aside
from nib.errors import warn


class CheckpointWriter:
    """Writes a run's checkpoints one after the other, in order, and deletes old ones.

    The caller waits while the tensors are copied to the CPU, and before that, while an earlier
    checkpoint is still being written. An error is raised by the next call of any method, and
    nothing more is written until then. Python waits for the threads of an executor, so the program
    does not end before everything is written.
    """

    def __init__(self, out_dir, keep_last: int, keep_every: int = 0, start: int = 0):
        """Prepares to write to out_dir.

        start: the step that the run continues from. Newer checkpoints were skipped because they are
        damaged; they do not count as checkpoints to keep.
        """
        self.out_dir, self.keep_last, self.keep_every = out_dir, keep_last, keep_every
        self._damaged = store.steps_after(out_dir, start)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix='checkpoint')
        self._last: Future | None = None  # the last submitted work
        atexit.register(self._report)

    def save(
        self,
        step: int,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        state: dict,
    ):
        """Starts writing the checkpoint of `step`.

        The tensors may change after this call; state may not.
        """
        self.wait()  # there is only one copy at a time
        model_copy, optimizer_copy = copy_to_cpu(model), copy_to_cpu(optimizer)
        self._submit(lambda: self._save(step, model_copy, optimizer_copy, state))

    def record_evaluation(self, step: int, train_state: dict, best: bool):
        """Adds the result of an evaluation to the checkpoint of `step`.

        It is the last one saved, or the one that was resumed. best: whether it is the best so far.
        """
        self._submit(lambda: self._record_evaluation(step, train_state, best))

    def wait(self):
        """Waits until everything is on the disk. Raises UserError if that is impossible."""
        last, self._last = self._last, None
        if last:
            last.result()

    def close(self):
        """Waits like wait(), and shuts the writer down."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            atexit.unregister(self._report)

    def _save(self, step, model, optimizer, state):
        store.save(self.out_dir, step, model, optimizer, state)
        delete_set_aside(self.out_dir)
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
                previous.result()  # it is done; if it failed, this raises its error
            work()

        self._last = self._thread.submit(run)

    def _report(self):
        """Prints an error that no call has raised yet, because the program is ending."""
        if self._last and (error := self._last.exception()):
            warn(f'error: {error}')


def copy_to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to('cpu', copy=True) for name, tensor in tensors.items()}
