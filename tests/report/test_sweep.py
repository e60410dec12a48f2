"""A sweep trains every combination, goes on after a failed run, and continues where it stopped."""

import json

import pytest
from conftest import SMALL_RUN

import sweep


def test_the_product_of_all_values():
    found = dict(sweep.combinations(['config/x.py', '--learning_rate=1e-4,1e-3', '--seed=1,2']))
    assert list(found) == [
        'learning_rate=1e-4_seed=1',
        'learning_rate=1e-4_seed=2',
        'learning_rate=1e-3_seed=1',
        'learning_rate=1e-3_seed=2',
    ]
    assert found['learning_rate=1e-4_seed=2'] == ['config/x.py', '--learning_rate=1e-4', '--seed=2']


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--seed=1'], 'nothing to sweep'),
        (['--seed=1,1'], 'given twice'),
        (['--seed=1,2', '--out_dir=x'], '--sweep_dir'),
        (['--seed=1,2', '--jobs=1000'], '--jobs=1000'),
        (['--seed=1,2', '--jobs=x'], '--jobs=x'),
        (['--seed=1,x'], '--seed'),
        (['--sead=1,2'], 'did you mean --seed'),
    ],
)
def test_bad_input_is_one_line_before_the_first_run(tmp_path, run_main, flags, said):
    done = run_main('sweep.py', f'--sweep_dir={tmp_path / "sweep"}', *flags)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / 'sweep').exists()


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failed_run_and_continues(tmp_path, run_main, data_dir):
    folder = tmp_path / 'sweep'
    flags = [*SMALL_RUN[:-1], f'--data_dir={data_dir}', f'--sweep_dir={folder}']
    flags.append('--learning_rate=1e30,1e-2')
    done = run_main('sweep.py', *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'learning_rate=1e30: exit code' in done.stdout
    assert 'learning_rate=1e-2: done in' in done.stdout
    table = done.stdout[done.stdout.index('best loss') :]
    losses = [
        record['loss/val']
        for line in (folder / 'learning_rate=1e-2' / 'metrics.jsonl').read_text().splitlines()
        if 'loss/val' in (record := json.loads(line))
    ]
    assert f'{min(losses):.4f}' in table and 'verdict' in table and 'min_lr' not in table
    assert 'learning_rate=1e30' in (folder / 'comparison.html').read_text()
    again = run_main('sweep.py', *flags)
    assert 'learning_rate=1e-2: already finished' in again.stdout and again.returncode == 1
