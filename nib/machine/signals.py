"""Signals that ask a run to stop, and the messages about them."""

from nib.startup import in_notebook

import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from nib.files import command, script_path
from nib.machine.ranks import Ranks

FINDING = 1 << 10  # in place of a signal's number: the doctor stops the run
HANGUP = getattr(signal, 'SIGHUP', None)
# Ctrl-C; a shutdown; a preemption on a cluster; a closed terminal. Windows has the first two.
NAMES = ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP')
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def resume_command(out_dir: str, world_size: int) -> str:
    """Returns the command that resumes a run of train.py with the config of its checkpoint."""
    start = command('train.py')
    if world_size > 1:
        is_local = os.environ.get('LOCAL_WORLD_SIZE') == str(world_size)
        how = f'--standalone --nproc_per_node={world_size}' if is_local else '(as before)'
        start = f'torchrun {how} {shlex.quote(script_path("train.py"))}'
    return f'{start} --init_from=resume {shlex.quote(f"--out_dir={out_dir}")}'


def name_signal(number: int) -> str:
    """Returns the name of a signal, such as SIGTERM; 'Ctrl-C (SIGINT)' for SIGINT."""
    return 'Ctrl-C (SIGINT)' if number == signal.SIGINT else signal.Signals(number).name


def describe_stop(stop: int, step: int, resume: str) -> str:
    """Returns a line about what stopped a run and how to resume it.

    stop: StopSignal.number. resume: the command that resumes the run; empty if this process has
    saved nothing.
    """
    by = 'the doctor' if stop == FINDING else name_signal(stop)
    if resume:
        more = f'which is saved; to resume: {resume}'
    elif stop == FINDING:
        more = 'with nothing new to save'
    else:
        more = 'with nothing new to save: start again with the same command'
    return f'stopped by {by} after step {step}, {more}'


class StepCut(Exception):
    """A step ends before its last micro step, and is not applied, because the run must stop."""


class StopSignal:
    """Remembers a request to stop, so that the run can save before it ends.

    Inside `with stop:`, a signal is remembered, and a second one ends the process at once. Signals
    within the first second do not count, because torchrun sends every Ctrl-C twice.
    """

    def __init__(self, ranks: Ranks):
        self.number = 0  # the signal received, or FINDING; 0: none
        self._ranks = ranks
        self._since = 0.0  # time of the first signal; 0: none yet
        self._previous: dict = {}  # signal -> its handler outside

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only it can receive signals
            for number in SIGNALS:
                if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            # When a rank has ended, torchrun sends SIGTERM to the others, which must not change
            # their exit code. (The handler is None if it is not Python's.)
            after = signal.SIG_IGN if self._ranks.world_size > 1 else handler or signal.SIG_DFL
            signal.signal(number, after)

    def agreed(self) -> int:
        """Returns the request of any rank, so that all ranks stop together; 0: none."""
        return self._ranks.largest(self.number)

    def cut(self, micro_batches: Iterable) -> Iterator:
        """Yields the micro batches of a step. Raises StepCut before one if the run must stop.

        The first one always follows, because the loop asks before every step.
        """
        for micro_step, batch in enumerate(micro_batches):
            if micro_step and self.agreed():
                raise StepCut
            yield batch

    def cut_short(self, batches: Iterable) -> Iterator:
        """Yields this rank's batches of an evaluation, until the run must stop.

        One rank may have a batch more than another.
        """
        remaining = iter(batches)
        while True:
            batch = next(remaining, None)
            # 0: all ranks are done; 1: some are not; more: stop.
            if self._ranks.largest(2 * self.number + (batch is not None)) != 1:
                return
            if batch is not None:
                yield batch

    def _receive(self, number, frame):
        if self._since and time.monotonic() - self._since > 1.0:
            if in_notebook():  # which must survive
                raise KeyboardInterrupt
            os._exit(128 + number)
        if not self._since:
            self.number, self._since = number, time.monotonic()
            if self._ranks.is_first:
                _announce(number)


def _announce(number: int):
    """Prints a line from a signal handler, where print() is not safe, unless that would wait."""
    line = f'\n{name_signal(number)}: stopping and saving (a second signal ends the run at once)\n'
    # There is no console, or the signal came while Python wrote to it.
    with suppress(OSError, ValueError, AttributeError, RuntimeError):
        if in_notebook():  # whose cells do not show what a descriptor gets
            sys.stderr.write(line)
            return
        descriptor = sys.stderr.fileno()
        if os.name == 'nt' or select.select([], [descriptor], [], 0)[1]:
            os.write(descriptor, line.encode())
