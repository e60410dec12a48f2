"""A sweep trains every combination, goes on after a failed run, and continues where it stopped."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import SMALL_RUN, full_disk
from processes import PATIENCE, Started

import sweep
from nib.errors import UserError
from nib.files import FolderLock
from nib.machine.signals import name_signal
from nib.machine.threads import available_cores
from nib.report import page


def test_the_product_of_all_values():
    found = dict(sweep.combinations(['config/x.py', '--learning_rate=1e-4,1e-3', '--seed=1,2']))
    assert list(found) == [
        'learning_rate=1e-4_seed=1',
        'learning_rate=1e-4_seed=2',
        'learning_rate=1e-3_seed=1',
        'learning_rate=1e-3_seed=2',
    ]
    assert found['learning_rate=1e-4_seed=2'] == ['config/x.py', '--learning_rate=1e-4', '--seed=2']


def test_commas_separate_values_but_not_the_parts_of_an_existing_path(tmp_path):
    path = tmp_path / 'a,b'
    path.mkdir()
    found = dict(sweep.combinations([f'--data_dir={path}', '--dataset=my text, other']))
    assert list(found) == ['dataset=my_text', 'dataset=other']
    assert found['dataset=other'] == [f'--data_dir={path}', '--dataset=other']


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--seed=1'], 'nothing to sweep'),
        (['--seed=1,2', '--sweep_dir='], 'sweep_dir is empty: set it with --sweep_dir=NAME'),
        (['--seed', '1,2'], 'several values, with = and commas, as in --seed=1,2'),
        (['--seed=1,1'], 'seed=1: two runs would be the same'),
        (['--learning_rate=1e-3,0.001'], 'two runs would be the same'),
        (['--seed=1,2', '--seed=3,4'], 'two runs would be the same'),
        (['--seed=1,'], '--seed'),
        (['--seed=1,2', '--init_from=resume'], '--sweep_dir'),
        (['--seed=1,2', '--init-from', 'resume'], '--sweep_dir'),
        (['--seed=1,2', '--out-dir=x'], '--sweep_dir'),
        (['--seed=1,2', '--jobs=0'], '--jobs=0'),
        (['--seed=1,2', '--jobs'], '--jobs'),
        (['--seed=1,2', '--out_dir=x'], '--sweep_dir'),
        (['--seed=1,2', '--jobs=1000'], '--jobs=1000'),
        (['--seed=1,2', '--jobs=x'], '--jobs'),
        (['--seed=1,x'], '--seed'),
        (['--sead=1,2'], 'did you mean --seed'),
    ],
)
def test_bad_input_is_one_line_before_the_first_run(tmp_path, run_main, flags, said):
    done = run_main('sweep.py', f'--sweep_dir={tmp_path / "sweep"}', *flags)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / 'sweep').exists()


def test_a_full_disk_names_the_file(tmp_path, run_main):
    flags = [f'--wandb_run_name={"long" * 999}', '--seed=1,2', f'--sweep_dir={tmp_path}']
    with full_disk(2000):  # enough for what is printed
        done = run_main('sweep.py', *flags)
    assert done.returncode == 2 and done.stderr.startswith(f'error: {tmp_path / "seed=1.log"}: ')


@pytest.mark.parametrize(
    'device, visible, environments',
    [
        ('auto', '', [{'CUDA_VISIBLE_DEVICES': '0'}, {'CUDA_VISIBLE_DEVICES': '1'}]),
        ('auto', '4,7,8', [{'CUDA_VISIBLE_DEVICES': '4'}, {'CUDA_VISIBLE_DEVICES': '7'}]),
        ('cpu', '', [{'OMP_NUM_THREADS': '4'}] * 2),
    ],
)
def test_each_job_has_its_own_gpu_or_its_share_of_the_cores(
    monkeypatch, device, visible, environments
):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setattr(sweep, 'available_cores', lambda: 8)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(sweep, 'jobs', 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert sweep.find_environments(device) == environments
    monkeypatch.setenv('OMP_NUM_THREADS', '3')  # the user's own number stays
    assert {e.get('OMP_NUM_THREADS', '3') for e in sweep.find_environments(device)} == {'3'}


def test_no_run_outlives_an_error_of_the_sweep(monkeypatch):
    def fail(seconds):
        raise OSError('the log cannot be written')

    before = signal.getsignal(signal.SIGTERM)
    process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])
    training = sweep.Sweep([])
    training.active.append((process, None, {}, 0.0))
    monkeypatch.setattr(sweep.time, 'sleep', fail)
    try:
        with pytest.raises(OSError, match='the log'):
            training.train_all([])
        assert process.poll() is not None and signal.getsignal(signal.SIGTERM) == before
    finally:
        process.kill()
        process.wait()


SWEEP = 'import sweep; from nib.errors import run_script; run_script(sweep.main)'


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='Windows has no signals between processes')
def test_a_stopped_sweep_leaves_no_run_behind_and_continues(tmp_path, data_dir):
    folder = tmp_path / 'sweep'
    flags = [*SMALL_RUN, f'--data_dir={data_dir}', f'--sweep_dir={folder}', '--seed=1,2,3']
    jobs = min(2, available_cores())

    def start(name, *more):
        return Started(tmp_path / name, SWEEP, *flags, *more)

    def steps(number):
        saved = [int(path.name[5:]) for path in folder.glob(f'seed={number}/step-*')]
        return max(saved, default=-1)

    def log(number):
        return (folder / f'seed={number}.log').read_text()

    for number, active in ((signal.SIGTERM, jobs), (signal.SIGINT, 1)):
        before = [steps(seed) for seed in (1, 2)]
        started = start(number.name, '--max_iters=100000', f'--jobs={active}')
        until = time.monotonic() + PATIENCE
        while min(steps(seed) - before[seed - 1] for seed in range(1, active + 1)) < 10:
            assert time.monotonic() < until and started.process.is_alive(), started.stderr
            time.sleep(0.1)
        started.send(number)  # and not to its runs, unlike Ctrl-C in a terminal
        assert started.end() == 128 + number
        said = started.stdout.splitlines()
        assert said[-1].startswith(f'stopped by {name_signal(number)}: 0 of 3 runs are finished')
        assert len(said) == 3, said
        for seed in range(1, active + 1):
            assert f'stopped by {name_signal(number)} after step' in log(seed)
        assert not (folder / 'seed=3').exists()
    assert log(1).count('resuming from') == 1
    longer = f'--max_iters={max(steps(1), steps(2)) + 10}'
    ended = start('to the end', longer, f'--jobs={jobs}')
    assert ended.end() == 0
    assert len(re.findall(r'seed=\d: best validation loss', ended.stdout)) == 3
    # No run holds its lock any more, and each has gone on from where it was.
    assert log(1).count('resuming from') == 2 and 'resuming from' not in log(3)


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failed_run_and_continues(
    tmp_path, run_main, data_dir, monkeypatch
):
    folder = tmp_path / 'sweep'
    flags = [*SMALL_RUN[:-1], f'--data_dir={data_dir}', f'--sweep_dir={folder}']
    flags.append('--learning_rate=1e30,1e-2')
    done = run_main('sweep.py', *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'learning_rate=1e30: exit code' in done.stdout
    assert 'learning_rate=1e-2: best validation loss' in done.stdout
    table = done.stdout[done.stdout.index('best loss') :]
    losses = [
        record['loss/val']
        for line in (folder / 'learning_rate=1e-2' / 'metrics.jsonl').read_text().splitlines()
        if 'loss/val' in (record := json.loads(line))
    ]
    assert f'{min(losses):.4f}' in table and 'verdict' in table and 'min_lr' not in table
    assert 'learning_rate=1e30' in (folder / 'comparison.html').read_text()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(page, 'build_page', lambda *_: signal.raise_signal(signal.SIGINT))
        again = run_main('sweep.py', *flags)
    assert 'learning_rate=1e-2: already finished' in again.stdout and again.returncode == 130
    line = 'stopped by Ctrl-C (SIGINT): the runs have ended; repeat the command to compare them'
    assert again.stdout.splitlines()[-1] == line
    again = run_main('sweep.py', *flags)
    assert 'learning_rate=1e-2: already finished' in again.stdout and again.returncode == 1
    ended = 'learning_rate=1e30: has already ended, exit code 3; to train it again, add --overwrite'
    assert ended in again.stdout
    shutil.rmtree(folder / 'learning_rate=1e30')
    again = run_main('sweep.py', *flags)
    assert 'already ended' not in again.stdout and 'learning_rate=1e30: exit code 3' in again.stdout
    more = run_main('sweep.py', *flags, '--max_bad_steps=5')  # another value
    assert 'already ended' not in more.stdout
    changed = run_main('sweep.py', *flags, '--weight_decay=0.25')
    assert changed.returncode == 2 and not changed.stdout
    assert 'trained with weight_decay 0.1, but this command says 0.25' in changed.stderr
    changed = run_main('sweep.py', *flags, '--weight_decay=0.25', '--overwrite')
    assert 'learning_rate=1e-2: best validation loss' in changed.stdout
    config = json.loads((folder / 'learning_rate=1e-2/config.json').read_text())['config']
    assert config['weight_decay'] == 0.25
    again = run_main('sweep.py', *flags, '--weight_decay=0.25')
    assert 'learning_rate=1e-2: already finished' in again.stdout


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--seed=1,2', '--eval_only'], '--eval_only trains nothing: leave it out'),
        (['--seed=1,2', '--budget=7s', '--max_iters=4'], '--budget sets the number of steps'),
        (['--learning_rate=1e-3,nan'], 'learning_rate is nan'),
        ([f'--wandb_run_name={"x" * 201},y'], 'xxx... is too long for the name of a folder'),
        (['--seed=1,2', '--out_dir=x'], 'set for each run; use --sweep_dir'),
    ],
)
def test_what_no_run_could_do_is_an_error_before_the_first(tmp_path, run_main, flags, said):
    done = run_main('sweep.py', *flags, f'--sweep_dir={tmp_path / "sweep"}')
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / 'sweep').exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path, run_main):
    lock = FolderLock(tmp_path)
    assert lock.take()
    lock.sign()
    done = run_main('sweep.py', '--seed=1,2', f'--sweep_dir={tmp_path}')
    lock.release(remove=True)
    assert done.returncode == 2 and f'still active (host {socket.gethostname()}' in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_failed_run_is_named_below_the_table(tmp_path, run_main, data_dir):
    flags = [*SMALL_RUN, f'--data_dir={data_dir}', f'--sweep_dir={tmp_path / "sweep"}']
    done = run_main('sweep.py', *flags, '--max_iters=2', '--n_head=1,3')
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == 'failed: n_head=3'


def test_config_files_see_the_device_of_the_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, 'sweep_dir', str(tmp_path))
    config = tmp_path / 'x.py'
    config.write_text("warmup_iters = 0\nmax_iters = 40 if device == 'auto' else 20")
    runs = sweep.plan([str(config), '--seed=1,2', '--device=auto'])
    assert all(run.values['max_iters'] == 20 for run in runs)


def test_only_keys_that_matter_may_not_change(tmp_path):
    values = {'overwrite': False, 'seed': 1, 'init_from': 'scratch'}
    values |= {'max_iters': 10, 'log_interval': 10, 'device': 'cpu'}
    run = sweep.Planned(tmp_path / 'a', [], values)
    (tmp_path / 'a' / 'step-00000010').mkdir(parents=True)
    sweep.check_unchanged(run)  # of a version that left no record
    run.record.write_text(json.dumps(values))
    later = values | {'max_iters': 20, 'log_interval': 5, 'device': 'cuda', 'new_key': 1}
    sweep.check_unchanged(sweep.Planned(run.folder, [], later))
    for key, now in (('seed', 2), ('init_from', 'gpt2')):
        said = f'trained with {key} {values[key]!r}, but this command says {now!r}'
        with pytest.raises(UserError, match=said):
            sweep.check_unchanged(sweep.Planned(run.folder, [], values | {key: now}))


@pytest.mark.parametrize('exit_code', [0, 1, 2, 3])
def test_a_run_that_could_not_overwrite_another_leaves_its_record(tmp_path, monkeypatch, exit_code):
    values = {'overwrite': True, 'max_iters': 10, 'seed': 2, 'budget': '', 'params': ''}
    run = sweep.Planned(tmp_path / 'a', [], values)
    (tmp_path / 'a' / 'step-00000010').mkdir(parents=True)
    run.record.write_text('{"seed": 1}')
    process = subprocess.CompletedProcess([], exit_code)
    monkeypatch.setattr(sweep.subprocess, 'Popen', lambda *_, **__: process)
    training = sweep.Sweep([{}])
    training.start(run)
    assert json.loads(run.record.read_text()) == {'seed': 1}
    training.end(*training.active.pop())
    failed = exit_code in (1, 2)  # perhaps before it began: a broken model, or an impossible value
    assert training.failed == [run] * failed
    assert json.loads(run.record.read_text())['seed'] == (1 if failed else 2)


@pytest.mark.parametrize(
    'overwrite, then', [(False, 'repeat the command to continue'), (True, 'would begin again')]
)
def test_a_stopped_sweep_says_what_the_same_command_does(tmp_path, capsys, overwrite, then):
    run = sweep.Planned(tmp_path / 'a', [], {'overwrite': overwrite})
    assert sweep.end([run], signal.SIGINT, []) == 130
    assert capsys.readouterr().out.endswith(f'{then}\n')


def test_a_planned_run_has_finished_after_the_steps_of_its_plan(tmp_path, capsys):
    values = {'max_iters': 600000, 'budget': '', 'params': '300k', 'overwrite': False}
    (tmp_path / 'config.json').write_text(json.dumps({'config': values | {'max_iters': 20}}))
    for step, finished in ((10, False), (20, True)):
        record = {'step': step, 'loss/val_whole': 1.0}
        (tmp_path / 'metrics.jsonl').write_text(json.dumps(record) + '\n')
        assert sweep.is_finished(sweep.Planned(tmp_path, [], values)) == finished
    for failed, n_finished in (False, 1), (True, 0):  # another run, perhaps before it began
        run = sweep.Planned(tmp_path, [], values)
        sweep.end([run], signal.SIGINT, [run] * failed)
        assert f': {n_finished} of 1 runs are finished' in capsys.readouterr().out
    assert not sweep.is_finished(sweep.Planned(tmp_path, [], values | {'params': ''}))
