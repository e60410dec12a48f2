"""The output of a run: lines, the progress bar on a terminal, the records."""

import json
import math
import os
import re
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN

from nib.errors import UserError
from nib.run.console import Console
from nib.run.metrics import Metrics

ALONE = {'tensorboard': False, 'wandb_log': False}  # metrics.jsonl, and nothing else


def read(out_dir):
    """Returns the records without their times."""
    found = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    assert all(abs(record.pop('time') - time.time()) < 600 for record in found)
    return found


def test_without_a_terminal_progress_is_lines(capsys):
    console = Console(shown=True)
    console.advance(3, 10)
    console.progress(3, {'loss': '2.5000', 'lr': '1e-3'})
    console.warn('careful')
    console.close()
    said = capsys.readouterr()
    assert said.out == 'step 3: loss 2.5000, lr 1e-3\n' and said.err == 'careful\n'


def test_other_ranks_are_silent(capsys):
    console = Console(shown=False)
    console.advance(1, 10)
    console.say('a')
    console.progress(1, {'loss': '1'})
    console.warn('b')
    assert capsys.readouterr() == ('', '')


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='a pty is a Unix thing')
def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_time_left(data_dir, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    child, terminal = pty.fork()
    if child == 0:  # this process is now train.py on a terminal of its own
        os.chdir(ROOT)
        os.environ['OMP_NUM_THREADS'] = '1'
        os.execv(
            sys.executable,
            [
                sys.executable,
                'train.py',
                *SMALL_RUN,
                f'--data_dir={data_dir}',
                f'--out_dir={tmp_path / "run"}',
            ],
        )
    fcntl.ioctl(
        terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0)
    )  # 24 lines of 100 characters
    written = b''
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    text = written.decode()
    assert '20/20' in text and ', loss ' in text and 'tokens/s ' in text and ', lr ' not in text
    assert '<' in text and re.search('step/s|s/step', text)  # tqdm's [elapsed<left, rate]
    assert 'step 20: train loss' in text  # lines stand above the bar
    assert 'step 7: loss' not in text  # no line for what the bar shows


def test_records_are_json_even_of_numbers_that_are_not(tmp_path):
    metrics = Metrics(tmp_path, 0, ALONE)
    metrics.rewind(0)
    metrics.log(1, {'loss/step': 2.5, 'grad_norm': math.nan, 'noise_scale': math.inf})
    metrics.log(2, {'loss/step': torch.tensor(2.5), 'grad_norm': np.float32(0.5)})
    metrics.close()
    assert read(tmp_path) == [
        {'step': 1, 'loss/step': 2.5, 'grad_norm': None, 'noise_scale': None},
        {'step': 2, 'loss/step': 2.5, 'grad_norm': 0.5},
    ]


def test_a_resumed_run_drops_what_was_recorded_after_its_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, 0, ALONE)
    metrics.rewind(0)
    for step in range(1, 8):
        metrics.log(step, {'loss/step': float(step)})
    metrics.close()
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 8, "loss/st')  # what a crash leaves
    metrics = Metrics(tmp_path, 4, ALONE)
    metrics.rewind(4)
    metrics.log(5, {'loss/step': 50.0})
    metrics.close()
    assert [(r['step'], r['loss/step']) for r in read(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (5, 50.0),
    ]


def test_a_new_run_starts_a_new_file(tmp_path):
    for value in (1.0, 2.0):
        metrics = Metrics(tmp_path, 0, ALONE)
        metrics.rewind(0)
        metrics.log(1, {'loss/step': value})
        metrics.close()
    assert read(tmp_path) == [{'step': 1, 'loss/step': 2.0}]


@pytest.mark.parametrize('package, key', [('tensorboard', 'tensorboard'), ('wandb', 'wandb_log')])
def test_an_optional_package_that_is_missing_is_named(tmp_path, monkeypatch, package, key):
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(UserError, match=f'pip install {package}$'):
        Metrics(tmp_path, 0, ALONE | {key: True})


def test_a_setting_that_wandb_refuses_is_named(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    config = {'wandb_log': True, 'wandb_project': 5, 'wandb_run_name': ''}
    with pytest.raises(UserError, match=r'wandb cannot start \(.* project Input should be a valid'):
        Metrics(tmp_path, 0, ALONE | config)


@pytest.mark.slow
def test_a_rewind_leaves_one_curve_in_tensorboard_and_no_warnings_of_wandb(
    tmp_path, monkeypatch, capfd
):
    pytest.importorskip('wandb')
    reading = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    config = {'wandb_log': True, 'wandb_project': 'p', 'wandb_run_name': '', 'tensorboard': True}
    metrics = Metrics(tmp_path, 0, config)
    metrics.rewind(0)
    for step in (1, 2, 3, 4):
        metrics.log(step, {'loss/step': float(step)})
    metrics.rewind(2)
    for step in (3, 5):
        metrics.log(step, {'loss/step': 10.0 * step})
    assert metrics.wandb.step == 5
    metrics.close()
    events = reading.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    shown = [(event.step, event.value) for event in events.Scalars('loss/step')]
    assert shown == [(1, 1.0), (2, 2.0), (3, 30.0), (5, 50.0)]
    assert [(row['step'], row['loss/step']) for row in read(tmp_path)] == shown
    assert 'less than the current step' not in capfd.readouterr().err
