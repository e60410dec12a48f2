"""Signals that ask a run to stop, and the words about it."""

import os
import shlex
import signal
import time
from collections.abc import Sequence

FINDING = 1 << 10  # in the place of a signal's number: the doctor stops the run


def resume_command(argv: Sequence[str]) -> str:
    """What to type to go on with a run of train.py that was started with these arguments."""
    launcher, world, local = (
        'python',
        os.environ.get('WORLD_SIZE', '1'),
        os.environ.get('LOCAL_WORLD_SIZE', '1'),
    )
    if world != '1':
        launcher = (
            f'torchrun --standalone --nproc_per_node={local}'
            if world == local
            else 'torchrun (as before)'
        )
    # The later flag wins.
    extra = ['--no-overwrite'] * any(item.startswith('--overwrite') for item in argv) + [
        '--init_from=resume'
    ]
    return f'{launcher} train.py {shlex.join([item for item in argv if item not in extra] + extra)}'


def describe_stop(stop: int, step: int, saved: bool, argv: Sequence[str]) -> str:
    """What has stopped a run after a step, and how it goes on. stop: StopSignal.number."""
    by = 'the doctor' if stop == FINDING else f'signal {stop}'
    more = (
        f'which is saved; to go on: {resume_command(argv)}'
        if saved
        else 'nothing is saved yet'
        if stop == FINDING
        else 'nothing is saved yet: start again with the same command'
    )
    return f'stopped by {by} after step {step}, {more}'


class StopSignal:
    """Remembers that the user or the system asked the run to stop, so that it can finish its step and save.

    A second signal after a second's grace ends the process at once: torchrun sends every Ctrl-C twice.
    """

    def __init__(self, announced: bool):
        self.number = 0  # of the signal received, or FINDING; 0 is none
        self._since = 0.0  # when the first signal came; 0 is never
        self._announced = announced

    def listen(self):
        self._handle(self._receive)

    def ignore(self):
        """All is done: torchrun's SIGTERM to the ranks that end a moment later must not change their exit code."""
        self._handle(signal.SIG_IGN)

    @staticmethod
    def _handle(handler):
        # Ctrl-C; a machine that goes down; what clusters announce a preemption with, and Windows lacks.
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
            if number := getattr(signal, name, None):
                signal.signal(number, handler)

    def _receive(self, number, frame):
        if self._since and time.monotonic() - self._since > 1.0:
            os._exit(128 + number)
        if not self._since:
            self.number, self._since = number, time.monotonic()
            if self._announced:  # by a plain write: print could meet itself here
                os.write(
                    2,
                    f'\nsignal {number}: stopping after this step (once more: at once, without saving)\n'.encode(),
                )
