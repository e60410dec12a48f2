"""What the control groups of this process on Linux, such as a container's, leave of the machine.

A process is in one group for each kind of limit, and that group in others. All limits apply.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path('/')  # folder with proc/ and sys/


def cpu_quotas() -> Iterator[float]:
    """Yields the CPU quotas of this process's control groups, in cores."""
    for version, group in _groups('cpu'):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if version == 1:
                quota = int((group / 'cpu.cfs_quota_us').read_text())
                period = int((group / 'cpu.cfs_period_us').read_text())
            else:  # 'max 100000' is no limit
                quota, period = map(int, (group / 'cpu.max').read_text().split())
            if quota > 0:
                yield quota / period


def memory_limits() -> Iterator[tuple[int, int]]:
    """Yields the memory limits of this process's control groups, and what is used, in bytes.

    What cannot be dropped, in contrast to cached files, counts as used.
    """
    for version, group in _groups('memory'):
        limit, used = 'memory.max', 'anon'
        if version == 1:
            limit, used = 'memory.limit_in_bytes', 'total_rss'
        with suppress(OSError, ValueError, KeyError):  # 'max' means no limit
            rows = (group / 'memory.stat').read_text().splitlines()
            stat = dict(row.split() for row in rows)
            yield int((group / limit).read_text()), int(stat[used])


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Yields the version and the folder of each group that may have this limit, innermost first."""
    with suppress(OSError):
        for line in (ROOT / 'proc/self/cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            if controllers and controller not in controllers.split(','):
                continue
            base = ROOT / 'sys/fs/cgroup' / (controller if controllers else '')
            # In a container, the path may be the one outside. Then only the top folder exists.
            for part in (path, *map(str, PurePosixPath(path).parents)):
                yield (1 if controllers else 2), base / part.lstrip('/')
