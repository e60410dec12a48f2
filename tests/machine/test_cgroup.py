"""nib/machine/cgroup.py: limits of cores and memory, in files as Linux writes them."""

import os

import pytest

from nib.machine import cgroup, threads

GROUPS = {  # files below / -> cores, of 8
    'no cgroup': ({}, 8),
    'version 2, no limit': ({'proc/self/cgroup': '0::/', 'sys/fs/cgroup/cpu.max': 'max 100000'}, 8),
    'version 2, in a container': (
        {'proc/self/cgroup': '0::/', 'sys/fs/cgroup/cpu.max': '250000 100000'},
        3,
    ),
    'version 2, limited by a group above': (
        {
            'proc/self/cgroup': '0::/a/b',
            'sys/fs/cgroup/a/cpu.max': '200000 100000',
            'sys/fs/cgroup/a/b/cpu.max': 'max 100000',
        },
        2,
    ),
    'version 1': (
        {
            'proc/self/cgroup': '5:memory:/x\n4:cpu,cpuacct:/x',
            'sys/fs/cgroup/cpu/x/cpu.cfs_quota_us': '50000',
            'sys/fs/cgroup/cpu/x/cpu.cfs_period_us': '100000',
        },
        1,
    ),
    'version 1, the path of another namespace': (
        {
            'proc/self/cgroup': '4:cpuacct,cpu:/docker/1f',
            'sys/fs/cgroup/cpu/cpu.cfs_quota_us': '400000',
            'sys/fs/cgroup/cpu/cpu.cfs_period_us': '100000',
        },
        4,
    ),
    'version 1, no limit': (
        {
            'proc/self/cgroup': '4:cpu:/',
            'sys/fs/cgroup/cpu/cpu.cfs_quota_us': '-1',
            'sys/fs/cgroup/cpu/cpu.cfs_period_us': '100000',
        },
        8,
    ),
    'more than there are': ({'proc/self/cgroup': '0::/', 'sys/fs/cgroup/cpu.max': '9 1'}, 8),
    'damaged': ({'proc/self/cgroup': '0::/', 'sys/fs/cgroup/cpu.max': 'many'}, 8),
}


@pytest.mark.parametrize('files, cores', GROUPS.values(), ids=GROUPS)
def test_cores_respect_affinity_and_the_quota_of_the_cgroup(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, 'ROOT', tmp_path)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(8)), raising=False)
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + '\n')
    assert threads.available_cores() == cores


def test_cores_are_known_without_affinity(tmp_path, monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.setattr(cgroup, 'ROOT', tmp_path)
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 6)
    assert threads.available_cores() == 6
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert threads.available_cores() == 1


@pytest.mark.parametrize('version', [1, 2])
def test_the_limit_of_a_control_group_counts_what_cannot_be_dropped(tmp_path, monkeypatch, version):
    monkeypatch.setattr(cgroup, 'ROOT', tmp_path)
    assert list(cgroup.memory_limits()) == []
    own, base = tmp_path / 'proc/self/cgroup', tmp_path / 'sys/fs/cgroup'
    own.parent.mkdir(parents=True)
    own.write_text('0::/a/b\n' if version == 2 else '5:cpu,memory:/a/b\n4:pids:/a/b\n')
    base = base if version == 2 else base / 'memory'
    limit, used = ('memory.max', 'anon') if version == 2 else ('memory.limit_in_bytes', 'total_rss')
    for folder, most, now in (('a', '1000', 300), ('a/b', 'max' if version == 2 else '5000', 100)):
        (base / folder).mkdir(parents=True, exist_ok=True)
        (base / folder / limit).write_text(most + '\n')
        (base / folder / 'memory.stat').write_text(f'{used} {now}\nfile 600\n')
    assert min(limit - used for limit, used in cgroup.memory_limits()) == 700
