"""Signals that ask a run to stop, and the messages about them."""

import os
import shlex
import signal
import time
from collections.abc import Sequence

FINDING = 1 << 10  # in place of a signal's number: the doctor stops the run


def resume_command(argv: Sequence[str]) -> str:
    """Returns the command that resumes a run of train.py that was started with these arguments."""
    world = os.environ.get('WORLD_SIZE', '1')
    local = os.environ.get('LOCAL_WORLD_SIZE', '1')
    if world == '1':
        launcher = 'python'
    elif world == local:
        launcher = f'torchrun --standalone --nproc_per_node={local}'
    else:
        launcher = 'torchrun (as before)'
    extra = ['--init_from=resume']
    if any(item.startswith('--overwrite') for item in argv):
        extra.insert(0, '--no-overwrite')  # the last flag wins
    flags = [item for item in argv if item not in extra] + extra
    return f'{launcher} train.py {shlex.join(flags)}'


def describe_stop(stop: int, step: int, saved: bool, argv: Sequence[str]) -> str:
    """Returns a line about what stopped a run and how to resume it. stop: StopSignal.number."""
    by = 'the doctor' if stop == FINDING else f'signal {stop}'
    if saved:
        more = f'which is saved; to resume: {resume_command(argv)}'
    elif stop == FINDING:
        more = 'nothing is saved yet'
    else:
        more = 'nothing is saved yet: start again with the same command'
    return f'stopped by {by} after step {step}, {more}'


class StopSignal:
    """Remembers a request to stop, so that the run can finish its step and save.

    A second signal ends the process at once. Signals within the first second do not count, because
    torchrun sends every Ctrl-C twice.
    """

    def __init__(self, announced: bool):
        self.number = 0  # the signal received, or FINDING; 0: none
        self._since = 0.0  # time of the first signal; 0: none yet
        self._announced = announced

    def listen(self):
        self._handle(self._receive)

    def ignore(self):
        """Ignores signals from now on.

        When a rank has ended, torchrun sends SIGTERM to the others, which must not change their
        exit code.
        """
        self._handle(signal.SIG_IGN)

    @staticmethod
    def _handle(handler):
        # Ctrl-C; a shutdown; a preemption on a cluster (Windows does not have this one).
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
            if number := getattr(signal, name, None):
                signal.signal(number, handler)

    def _receive(self, number, frame):
        if self._since and time.monotonic() - self._since > 1.0:
            os._exit(128 + number)
        if not self._since:
            self.number, self._since = number, time.monotonic()
            if self._announced:
                line = f'signal {number}: stopping after this step (again: at once, without saving)'
                os.write(2, f'\n{line}\n'.encode())  # print is not safe in a signal handler
