"""Background writing: training does not wait, no error is lost, and good checkpoints are kept."""

import errno
import os
import sys
import threading

import pytest
import torch
from conftest import run_script
from processes import PATIENCE

from nib.checkpoint import store
from nib.checkpoint.writer import CheckpointWriter
from nib.errors import UserError


def save(writer, step, value=None, best=None):
    """Saves tensors that contain the value, and an evaluation if best is given."""
    tensors = {'w': torch.full((4, 3), float(step if value is None else value))}
    writer.save(step, tensors, {'w/exp_avg': tensors['w']}, {})
    if best is not None:
        writer.record_evaluation(step, {'evaluated': step}, best)
    return tensors['w']


def newest(out_dir):
    found, tensors = store.load(out_dir, warn=lambda line: None)
    return found.step, tensors['model']['w'].mean().item()


def steps(out_dir):
    return sorted(store.steps_after(out_dir, 0))


def damage(out_dir, step):
    (out_dir / f'step-{step:08d}' / 'model.safetensors').write_bytes(b'')


@pytest.fixture
def slow_disk(monkeypatch):
    """An event: nothing reaches the disk before it is set."""
    ready, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, 'fsync', lambda descriptor: ready.wait(PATIENCE) and fsync(descriptor))
    yield ready
    ready.set()


@pytest.fixture
def broken_disk(monkeypatch):
    """A list: while it is not empty, every write fails with an I/O error."""
    broken, fsync = [], os.fsync

    def fsync_or_fail(descriptor):
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync_or_fail)
    return broken


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow_disk):
    writer = CheckpointWriter(tmp_path, keep_last=1)
    weights = save(writer, 10, best=True)
    weights.zero_()  # the next step; the save has a copy
    assert not store.exists(tmp_path)
    slow_disk.set()
    writer.close()
    assert newest(tmp_path) == (10, 10.0)
    assert store.load(tmp_path, 'best')[0].state['train'] == {'evaluated': 10}


def test_there_is_one_copy_at_a_time(tmp_path, slow_disk):
    writer = CheckpointWriter(tmp_path, keep_last=1)
    save(writer, 10)
    second = threading.Thread(target=save, args=[writer, 20])
    second.start()
    second.join(0.1)
    assert second.is_alive()
    slow_disk.set()
    second.join()
    writer.close()
    assert newest(tmp_path) == (20, 20.0)


@pytest.mark.parametrize('call', ['save', 'record_evaluation', 'wait', 'close'])
def test_an_error_comes_out_of_the_next_call_and_only_there(tmp_path, broken_disk, call):
    writer = CheckpointWriter(tmp_path, keep_last=1)
    save(writer, 10)
    writer.wait()
    broken_disk.append(True)
    save(writer, 20)
    writer._thread.submit(lambda: None).result()  # until it has failed
    with pytest.raises(UserError, match='step 20 could not be written'):
        {
            'save': lambda: save(writer, 30),
            'record_evaluation': lambda: writer.record_evaluation(20, {}, True),
            'wait': writer.wait,
            'close': writer.close,
        }[call]()
    assert newest(tmp_path) == (10, 10.0) and not (tmp_path / 'best').exists()
    broken_disk.clear()
    writer.wait()
    if call != 'close':
        save(writer, 40)
        writer.close()
        assert newest(tmp_path) == (40, 40.0)


def test_an_evaluation_of_a_checkpoint_that_fails_is_not_recorded(tmp_path, broken_disk, slow_disk):
    """The evaluation is recorded while the save is still in progress."""
    writer = CheckpointWriter(tmp_path, keep_last=1)
    broken_disk.append(True)
    save(writer, 10, best=True)
    slow_disk.set()
    with pytest.raises(UserError, match='checkpoint of step 10'):
        writer.close()
    assert list(tmp_path.iterdir()) == []


ENDING = """
import sys, torch
from nib.checkpoint.writer import CheckpointWriter
writer = CheckpointWriter(sys.argv[1], keep_last=1)
big = {'w': torch.ones(10_000_000)}
writer.save(10, big, big, {})
raise RuntimeError('something else')
"""


@pytest.mark.slow
def test_a_program_that_fails_elsewhere_finishes_its_save_before_it_ends(tmp_path):
    done = run_script('-c', ENDING, tmp_path / 'run', python=sys.executable)
    assert done.returncode == 1 and 'something else' in done.stderr
    assert newest(tmp_path / 'run') == (10, 1.0)


@pytest.mark.slow
def test_a_program_that_fails_elsewhere_tells_of_a_failed_save_too(tmp_path):
    (tmp_path / 'run').write_text('a file is in the way')
    done = run_script('-c', ENDING, tmp_path / 'run', python=sys.executable)
    assert done.returncode == 1 and 'something else' in done.stderr
    assert 'error: the checkpoint of step 10 could not be written' in done.stderr.splitlines()[-1]


def test_retention_keeps_the_newest_the_best_and_every_so_many_steps(tmp_path):
    writer = CheckpointWriter(tmp_path, keep_last=2, keep_every=30)
    for step in range(10, 90, 10):
        save(writer, step, best=step in (10, 20))
    writer.close()
    assert steps(tmp_path) == [20, 30, 60, 70, 80]


@pytest.mark.parametrize('keep_last', [1, 2])
def test_damaged_checkpoints_never_take_the_place_of_good_ones(tmp_path, keep_last):
    """A run resumes from step 10, because later ones are damaged; its newest save always exists."""
    writer = CheckpointWriter(tmp_path, keep_last=9)
    for step in (10, 20, 25, 30):
        save(writer, step)
    writer.close()
    for step in (20, 25, 30):
        damage(tmp_path, step)
    assert newest(tmp_path) == (10, 10.0)
    writer = CheckpointWriter(tmp_path, keep_last, start=10)
    for step in (12, 14, 20, 28, 30):
        save(writer, step, value=100 + step, best=False)
        writer.wait()
        assert newest(tmp_path) == (step, 100 + step)
        good = [10, 12, 14, 20, 28, 30][: [12, 14, 20, 28, 30].index(step) + 2][-keep_last:]
        assert [kept for kept in steps(tmp_path) if kept <= step] == good
    writer.close()


def test_a_checkpoint_of_a_resumed_run_is_kept_until_another_is_whole(tmp_path, broken_disk):
    writer = CheckpointWriter(tmp_path, keep_last=1)
    save(writer, 10)
    writer.close()
    writer = CheckpointWriter(tmp_path, keep_last=1, start=10)
    broken_disk.append(True)
    save(writer, 20)
    with pytest.raises(UserError):
        writer.close()
    assert newest(tmp_path) == (10, 10.0)
