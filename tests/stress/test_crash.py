"""A run survives whatever stops it: a kill at any moment, a full disk, a read-only disk."""

import os
import shutil
import signal
import subprocess

import pytest
from conftest import SMALL_RUN, run_script
from processes import Started

from nib.checkpoint import store


@pytest.mark.slow
def test_no_stop_and_no_kill_loses_more_than_what_was_not_saved_yet(tmp_path):
    """Interrupts every operation of a save, an evaluation and retention in three ways, then kills
    processes at 24 random moments, half of them train.py, which must end with the same weights.
    Then it stops runs by signals, with consoles that break and inside long steps."""
    memory = (
        '/dev/shm' if os.path.isdir('/dev/shm') else tmp_path
    )  # as a disk takes its time over each sync
    flags = ['--kills=24', '--stops=4', '--limit=120', f'--folder={memory}']
    done = run_script('stress/crash.py', *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith('violations: 0\n')
    cut = [
        list(map(int, line.split()[-3:]))
        for line in done.stdout.split('cut at every')[1].splitlines()[1:7]
    ]
    assert all(least > 10 for counts in cut for least in counts), done.stdout


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB, and the function that mounts it again with other options."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(options):
        return (
            subprocess.run(
                ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], capture_output=True
            ).returncode
            == 0
        )

    if not shutil.which('mount') or not mount('size=1m'):
        pytest.skip('only root can mount a disk')
    yield folder, lambda options: mount(f'remount,{options}')
    subprocess.run(['umount', folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_on_one_line_and_with_room_it_goes_on(small_disk, train_here):
    disk, remount = small_disk
    flags = ['--eval_interval=5', '--keep_every=5']
    done = train_here(disk / 'run', *flags)
    errors = [
        line for line in done.stderr.splitlines() if ', warning: ' not in line
    ]  # what the doctor has found aside
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert 'could not be written' in done.stderr and 'No space left' in done.stderr
    assert 'samples:' not in done.stdout
    found, _ = store.load(disk / 'run', warn=pytest.fail)
    assert found.step in (5, 10, 15)
    remount('size=20m')
    done = train_here(disk / 'run', *flags, '--init_from=resume', status=0)
    assert sorted(store.steps_after(disk / 'run', 0)) == [5, 10, 15, 20]
    assert [path.name for path in (disk / 'run').iterdir() if path.name.startswith('.')] == [
        '.lock'
    ]


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_is_one_line_before_the_first_step(small_disk, train_here):
    disk, remount = small_disk
    remount('ro')
    done = train_here(disk / 'run')
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert 'cannot be written' in done.stderr and 'step 1' not in done.stdout


# Its files may have 100 kB: enough for metrics, too little for a checkpoint.
CRAMPED = """
import resource, train
from nib.errors import run_script
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run_script(train.main)
"""


@pytest.mark.slow
def test_a_last_save_that_fails_is_no_success(data_dir, tmp_path):
    flags = [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}', '--max_iters=2']
    run = Started(tmp_path, CRAMPED, *SMALL_RUN, *flags)
    assert run.end() == 2 and len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert 'step 2 could not be written' in run.stderr and 'samples:' not in run.stdout
    assert not store.exists(tmp_path / 'run')


@pytest.mark.slow
def test_a_stopped_run_whose_save_fails_does_not_say_that_it_is_saved(data_dir, tmp_path):
    flags = [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}', '--max_iters=10000']
    run = Started(tmp_path, CRAMPED, *SMALL_RUN, *flags, '--eval_interval=100000')
    run.wait_for('step 2: loss')
    run.send(signal.SIGTERM)
    assert run.end() == 2 and 'could not be written' in run.stderr.splitlines()[-1]
    assert 'is saved' not in run.stdout
