"""How many cores this process may use, and how torch's threads wait when the cores are taken."""

import atexit
import functools
import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nib.machine.cgroup import cpu_quotas

SETTINGS = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')  # how threads wait, if the user decides it
INTERVAL = 0.25  # seconds between two checks
TAKEN = 0.05  # share of the time without a core; alone it is 0.002 at most
CALM = 8  # checks in a row that must find the cores free


def available_cores() -> int:
    """Returns how many cores this process may use, at least 1.

    On Linux, this respects its affinity and the CPU quota of its cgroup, such as a container's.
    """
    if hasattr(os, 'sched_getaffinity'):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        cores = os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, cpu_quotas())]))


def seconds_without_core(thread: int | None = None) -> float | None:
    """Returns how long a thread could run but had no core, since it started; None if unknown.

    Threads of other processes had the cores, or the quota of the cgroup was used up. Only Linux
    measures it. Waiting for a disk, a GPU or other threads does not count.

    thread: its number in the operating system; None for this thread.
    """
    with suppress(OSError, ValueError, IndexError):
        path = f'/proc/self/task/{thread or threading.get_native_id()}/schedstat'
        return int(Path(path).read_text().split()[1]) / 1e9
    return None


class Yielding:
    """Lets torch's threads yield their cores while other processes use them.

    torch's threads wait for each other after each operation. In libgomp, the OpenMP of torch's
    wheels for Linux, a waiting thread spins for milliseconds before it sleeps. That is fast if each
    thread has a core. If another process has one of the cores, it wastes the others. libgomp spins
    very briefly, however, if the process has more OpenMP threads than there are cores (GNU libgomp
    manual, GOMP_SPINCOUNT). So while `waited` shows that cores are taken, this object keeps some
    additional threads, which sleep. The work is divided among the others as before, so that no
    result changes.
    """

    def __init__(self, waited: Callable[[], float | None], interval: float = INTERVAL):
        """waited: returns the seconds without a core so far, None if unknown."""
        self._waited = waited
        self._interval = interval
        # None: no additional threads; set: they end.
        self.additional: threading.Event | None = None
        # Held during an operation of torch. If Python ended meanwhile, torch would abort.
        self._busy = threading.Lock()
        atexit.register(self._busy.acquire, timeout=10.0)

    def run(self):
        """Checks at intervals, as long as the seconds without a core are known."""
        pause, calm, before = threading.Event(), 0, self._waited()
        while before is not None:
            pause.wait(self._interval)
            now = self._waited()
            if now is None:
                break
            calm = 0 if now - before > TAKEN * self._interval else calm + 1
            before = now
            if calm == 0 and not self.additional:
                self.additional = threading.Event()
                threading.Thread(target=self._keep, args=[self.additional], daemon=True).start()
            elif calm >= CALM and self.additional:
                self.additional.set()
                self.additional = None

    def _keep(self, end: threading.Event):
        import torch  # not in the processes that prepare a dataset

        with self._busy:  # large enough for a thread on each core; this thread keeps them
            torch.zeros(1 << 20).add_(1)
        end.wait()


@functools.cache
def watch_cores():
    """Starts a thread that lets torch's threads yield their cores, once in a process.

    Call it from the thread that trains. The user's own settings have priority.
    """
    import torch

    if not os.environ.keys() & set(SETTINGS) and torch.get_num_threads() > 1:
        yielding = Yielding(functools.partial(seconds_without_core, threading.get_native_id()))
        threading.Thread(target=yielding.run, daemon=True).start()
