"""The doctor in runs of train.py, which obey it."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import SMALL_RUN, records
from processes import TRAIN, Started, start_on_ranks

import model
from nib.doctor.problems import PROBLEMS
from nib.errors import EXIT_FINDING
from nib.tokens import batches, find


def findings(out_dir) -> list[tuple[int, str]]:
    return [
        (record['step'], key.removeprefix('finding/'))
        for record in records(out_dir)
        for key in record
        if key.startswith('finding/')
    ]


def unshifted(monkeypatch):
    cut_windows = batches.cut_windows
    monkeypatch.setattr(
        batches, 'cut_windows', lambda *arguments: (cut_windows(*arguments)[0],) * 2
    )


def test_a_critical_finding_ends_the_run_which_can_go_on(train_here, tmp_path, monkeypatch):
    unshifted(monkeypatch)
    done = train_here(tmp_path / 'run', '--stop_on=critical')
    assert (
        done.returncode == 4
        and 'stopped by the doctor after step 1, which is saved; to resume: ' in done.stdout
    )
    assert done.stderr.count('step 1: targets_not_shifted, critical: ') == 1
    assert findings(tmp_path / 'run')[0] == (1, 'targets_not_shifted')
    (verdict,) = [record['verdict'] for record in records(tmp_path / 'run') if 'verdict' in record]
    assert f"doctor's verdict: {verdict}\n" in done.stdout and verdict.startswith(
        'critical: targets_not_shifted'
    )
    done = train_here(tmp_path / 'run', '--stop_on=critical', '--init_from=resume')
    assert done.returncode == 0 and 'resuming' in done.stdout and 'step 20:' in done.stdout
    assert done.stderr.count('targets_not_shifted') == 0 and findings(tmp_path / 'run')[0] == (
        1,
        'targets_not_shifted',
    )


def test_a_finding_is_a_warning_unless_the_config_says_stop(train_here, tmp_path, monkeypatch):
    unshifted(monkeypatch)
    done = train_here(tmp_path / 'run', '--max_iters=3')
    assert done.returncode == 0 and 'step 1: targets_not_shifted, critical: ' in done.stderr


def test_a_finding_before_the_first_step_stops_too(train_here, tmp_path, monkeypatch):
    opened = find.open_dataset
    monkeypatch.setattr(
        find, 'open_dataset', lambda *arguments: replace(data := opened(*arguments), train=data.val)
    )
    done = train_here(tmp_path / 'run', '--stop_on=critical')
    assert done.returncode == 4 and findings(tmp_path / 'run') == [(0, 'val_leaked')]
    assert 'stopped by the doctor after step 0, with nothing new to save\n' in done.stdout


def test_a_finding_of_the_last_evaluation_leaves_it_whole(train_here, tmp_path, monkeypatch):
    reset = model.GPT.reset_parameters

    def reset_closed(self):
        reset(self)
        torch.nn.init.constant_(self.transformer.h[0].mlp.c_fc.bias, -10.0)

    monkeypatch.setattr(model.GPT, 'reset_parameters', reset_closed)
    losses = []
    for stop_on, code in (('critical', 0), ('warning', 4)):
        done = train_here(
            tmp_path / stop_on,
            '--bias',
            '--max_iters=8',
            '--lr_decay_iters=8',
            '--eval_interval=8',
            '--log_interval=1000',
            f'--stop_on={stop_on}',
        )
        assert done.returncode == code and 'signal' not in done.stdout, done.stderr
        assert (8, 'dead_units') in findings(tmp_path / stop_on)
        losses += [
            record['loss/val_whole']
            for record in records(tmp_path / stop_on)
            if 'loss/val_whole' in record
        ]
    assert len(losses) == 2 and losses[0] == losses[1]


def test_a_resumed_run_says_nothing_twice(train_here, tmp_path):
    first = train_here(tmp_path / 'run', '--grad_clip=0.001')
    second = train_here(
        tmp_path / 'run',
        '--grad_clip=0.001',
        '--init_from=resume',
        '--max_iters=30',
        '--lr_decay_iters=30',
    )
    assert (first.stderr.count('all_clipped'), second.stderr.count('all_clipped')) == (1, 0)
    assert (
        'all_clipped' in second.stdout
        and [name for _, name in findings(tmp_path / 'run')].count('all_clipped') == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize('weights, names', [('scratch', ['lr_too_low']), ('{other}', [])])
def test_a_resumed_run_is_judged_by_how_it_began(run_main, data_dir, tmp_path, weights, names):
    """Cut before the doctor could tell, twice."""

    def lab(name, out_dir, *flags):
        done = run_main(
            'train.py',
            f'config/lab/{name}.py',
            *LAB_FLAGS,
            f'--data_dir={data_dir}',
            f'--out_dir={out_dir}',
            '--lr_decay_iters=40',
            *flags,
        )
        assert done.returncode == 0, done.stderr
        return done

    if weights != 'scratch':
        lab('healthy', tmp_path / 'other', '--max_iters=2')
    first = lab(
        'lr_too_low',
        tmp_path / 'run',
        '--max_iters=7',
        f'--init_from={weights.format(other=tmp_path / "other")}',
    )
    second = lab('lr_too_low', tmp_path / 'run', '--max_iters=9', '--init_from=resume')
    assert (
        "doctor's verdict: healthy" in first.stdout and "doctor's verdict: healthy" in second.stdout
    )
    third = lab('lr_too_low', tmp_path / 'run', '--max_iters=40', '--init_from=resume')
    assert [name for _, name in findings(tmp_path / 'run')] == names and (
        'lr_too_low, warning: ' in third.stderr
    ) == bool(names)
    began = json.loads((tmp_path / 'run' / 'config.json').read_text())['config']['init_from']
    assert began == weights.format(other=tmp_path / 'other')


@pytest.mark.slow
def test_two_ranks_stop_together(data_dir, tmp_path):
    flags = [
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
        '--stop_on=warning',
        '--learning_rate=1',
        '--on_nonfinite=skip',
        '--eval_interval=2',
    ]
    ranks = start_on_ranks(2, tmp_path, TRAIN, *SMALL_RUN, *flags)
    assert [rank.end() for rank in ranks] == [EXIT_FINDING] * 2, ranks[0].stderr
    said = ranks[0].stdout
    assert 'stopped by the doctor after step' in said and 'which is saved' in said
    assert said.count("doctor's verdict") == 1 and ranks[1].stdout == ''
    assert len(set(findings(tmp_path / 'run'))) == len(findings(tmp_path / 'run')) > 0


LAB_FLAGS = [
    '--dataset=tiny',
    '--no-prepare_dataset',
    '--fallback_dataset=',
    '--device=cpu',
    '--no-report',
]


@pytest.mark.parametrize(
    'name, flags',
    [
        ('healthy', ['--max_iters=120']),
        ('all_clipped', ['--max_iters=40']),
        ('lr_too_low', ['--max_iters=40']),
        ('not_finite', ['--max_iters=40']),
    ],
)
def test_the_doctor_names_what_a_config_of_the_lab_breaks(
    run_main, data_dir, tmp_path, name, flags
):
    done = run_main(
        'train.py',
        f'config/lab/{name}.py',
        *LAB_FLAGS,
        *flags,
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
    )
    assert done.returncode == (3 if name == 'not_finite' else 0), done.stderr
    found = [finding for _, finding in findings(tmp_path / 'run')]
    if name != 'healthy':
        assert found == [name]
        verdict = f'{PROBLEMS[name].severity}: {name}'
    else:
        assert found == []
        verdict = 'healthy, no findings in 120 steps'
    assert f"doctor's verdict: {verdict}\n" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wrong_initial_loss', 'val_leaked', 'generation_differs'])
def test_the_doctor_names_what_a_config_of_the_lab_breaks_in_the_code(data_dir, tmp_path, name):
    """In a process of its own, as these change the project's functions."""
    flags = [
        *LAB_FLAGS,
        '--max_iters=2',
        '--warmup_iters=1',
        '--eval_interval=1000',
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
    ]
    run = Started(tmp_path, TRAIN, f'config/lab/{name}.py', *flags)
    assert run.end() == 0 and name in run.stderr, run.stderr
    assert name in [found for _, found in findings(tmp_path / 'run')]


@pytest.mark.slow
def test_the_dead_units_of_the_lab_live_without_biases_as_the_doctor_advises(data_dir, tmp_path):
    flags = [*LAB_FLAGS, '--max_iters=4', '--warmup_iters=1', '--eval_interval=1']
    flags += [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}']
    run = Started(tmp_path, TRAIN, 'config/lab/dead_units.py', '--no-bias', *flags)
    assert run.end() == 0, run.stderr
    assert 'dead_units' not in [found for _, found in findings(tmp_path / 'run')]
