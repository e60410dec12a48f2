"""How torch's threads wait for each other, and how many cores they may use.

Scripts import this module first, because torch reads these environment variables when it is loaded.
It does not import torch.
"""

import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

# How often a waiting thread looks again before it sleeps. In libgomp, the OpenMP of torch's wheels
# for Linux, the default is 300,000, which takes milliseconds. If another process has the core of
# one thread, the others spend that time at every barrier. docs/speed.md has the measurements.
SPINS = 1500


def bound_spinning(environ: MutableMapping[str, str]):
    """Lets the threads of libgomp sleep soon while they wait, unless the user has decided that.

    The count is in x86's PAUSE instructions. On other processors, a spin is much shorter.
    """
    if not environ.keys() & {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'}:
        environ['GOMP_SPINCOUNT'] = str(SPINS)


def available_cores(root: Path = Path('/')) -> int:
    """Returns how many cores this process may use, at least 1.

    On Linux, this respects its affinity and the CPU quota of its cgroup, such as a container's.

    root: folder with proc/ and sys/.
    """
    if hasattr(os, 'sched_getaffinity'):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        cores = os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas(root))]))


def seconds_without_core() -> float | None:
    """Returns how long this thread could run but had no core, since it started; None if unknown.

    Threads of other processes had the cores, or the quota of the cgroup was used up. Only Linux
    measures it. Waiting for a disk, a GPU or other threads does not count.
    """
    with suppress(OSError, ValueError, IndexError):
        return int(Path('/proc/thread-self/schedstat').read_text().split()[1]) / 1e9
    return None


def _quotas(root: Path) -> Iterator[float]:
    """Yields the CPU quotas of this process's cgroup and of those that contain it, in cores."""
    with suppress(OSError):
        for line in (root / 'proc/self/cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            if controllers and 'cpu' not in controllers.split(','):
                continue
            # In a container, the path may be the one outside. Then only the top folder exists.
            base = root / 'sys/fs/cgroup' / ('cpu' if controllers else '')
            for part in (path, *map(str, PurePosixPath(path).parents)):
                folder = base / part.lstrip('/')
                with suppress(OSError, ValueError, ZeroDivisionError):
                    if controllers:  # version 1
                        quota = int((folder / 'cpu.cfs_quota_us').read_text())
                        period = int((folder / 'cpu.cfs_period_us').read_text())
                    else:  # version 2: 'max 100000' is no limit
                        quota, period = map(int, (folder / 'cpu.max').read_text().split())
                    if quota > 0:
                        yield quota / period


if 'torch' not in sys.modules:
    bound_spinning(os.environ)
