"""nib/budget.py: --budget and --params plan a run."""

import json
import math
import time

import pytest
import torch
from conftest import ROOT

from benchmarks import scaling
from configurator import read_block
from nib.budget import (
    LAW,
    MIN_STEPS,
    WIDTHS,
    Law,
    Planner,
    parse_count,
    parse_duration,
    tokens_per_step,
)
from nib.errors import UserError
from nib.tokens.dataset import open_dataset


@pytest.mark.parametrize(
    ('text', 'seconds'), [('90s', 90), ('10m', 600), ('1.5h', 5400), ('2d', 172_800)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ('text', 'number'), [('5000', 5000), ('300k', 3e5), ('10M', 1e7), ('1.5B', 1.5e9)]
)
def test_counts(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize('text', ['', '90', '0s', '-1m', '10 m', '10min', 'm', 'nan', '1e3s'])
def test_what_is_no_duration_is_named(text):
    with pytest.raises(UserError, match=f'--budget={text}: .* 90s, 10m or 2h'):
        parse_duration(text)


@pytest.mark.parametrize('text', ['0', '10X', '10m', 'big', '1e6', '-3M'])
def test_what_is_no_count_is_named(text):
    with pytest.raises(UserError, match=f'--params={text}: .* 300k, 10M or 1.5B'):
        parse_count(text)


# -- the law ---------------------------------------------------------------------------------------


def test_the_law_is_the_formula():
    law = Law(A=400.0, alpha=0.5, B=100.0, beta=0.25)
    # 400 / 10^2 + 100 / 10^2
    assert law.loss(10**4, 10**8) == pytest.approx(5.0)
    # Two epochs of 10^8 tokens: 10^8 (1 + 15.4 (1 - e^(-1/15.4))) are worth 1.968 * 10^8 new ones.
    assert law.loss(10**4, 2e8, unique=10**8) == pytest.approx(4 + 100 / 1.9682e8**0.25, rel=1e-5)


def test_best_tokens_minimize_the_loss_for_as_many_flops():
    n = 1e6
    tokens = LAW.best_tokens(n)
    losses = [LAW.loss(n * factor, tokens / factor) for factor in (0.9, 1.0, 1.1)]
    assert losses[1] < min(losses[0], losses[2])


def test_repeated_tokens_are_worth_less_but_never_harm():
    worth = [LAW.worth(epochs * 1e6, 1e6) for epochs in (0.5, 1, 2, 4, 16, 64, 1000)]
    assert worth[:2] == [5e5, 1e6]
    assert worth == sorted(worth) and worth[3] > 3.6e6 and worth[-1] < 16.5e6


@pytest.mark.slow
def test_the_constants_are_those_that_the_recorded_runs_give():
    runs = json.loads((ROOT / scaling.result).read_text())
    fitted, floors, factors = scaling.fit([run for run in runs if run['fitted']])
    assert fitted.alpha == pytest.approx(LAW.alpha, abs=0.002)
    assert fitted.beta == pytest.approx(LAW.beta, abs=0.002)
    ratio = fitted.A / fitted.B
    assert ratio == pytest.approx(LAW.A / LAW.B, rel=0.02)
    # Runs of twice the time, which were not fitted.
    for run in runs:
        if run['seconds'] == 40 and run['n_layer'] == 2 and run['n_embd'] in (128, 192):
            name = run['dataset']
            law = floors[name] + factors[name] * fitted.loss(run['parameters'], run['tokens'])
            assert law == pytest.approx(run['loss'], abs=0.03), run


# -- the plan --------------------------------------------------------------------------------------


class Machine:
    """A machine with a known speed: a step takes 1 ms per layer and the time of its FLOPs."""

    def __init__(self, flops_per_second):
        self.rate, self.measured = flops_per_second, []

    def measure(self, config, data, seconds, compiled=False):
        self.measured.append(config['n_embd'])
        flops = 6 * 12 * config['n_layer'] * config['n_embd'] ** 2 * tokens_per_step(config)
        step = 0.001 * config['n_layer'] + flops / self.rate
        return step, step / 3


@pytest.fixture
def planner(data_dir):
    config = {**read_block(str(ROOT / 'train.py')).defaults, 'device': 'cpu', 'dtype': 'float32'}
    return lambda **fixed: Planner(config | fixed, fixed, open_dataset(data_dir / 'tiny', 64))


def predicted(planner, keys) -> float:
    tokens = keys['max_iters'] * tokens_per_step(keys)
    return LAW.loss(planner.count(keys, embeddings=False), tokens, len(planner.data.train))


def test_a_longer_time_and_a_faster_machine_give_a_lower_predicted_loss(planner):
    plan = planner()
    widths, losses = [], []
    for seconds, rate in ((10, 1e10), (30, 1e10), (120, 1e10), (600, 1e10), (600, 1e12)):
        keys = plan.for_time(time.perf_counter() + seconds, WIDTHS[:8], Machine(rate))
        widths.append(keys['n_embd'])
        losses.append(predicted(plan, keys))
    assert losses == sorted(losses, reverse=True) and widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_the_chosen_width_has_the_lowest_predicted_loss_of_all(planner):
    plan, ends = planner(), time.perf_counter() + 60
    chosen = plan.for_time(ends, WIDTHS[:8], Machine(1e12))
    alone = [predicted(plan, plan.for_time(ends, [w], Machine(1e12))) for w in WIDTHS[:8]]
    assert predicted(plan, chosen) <= min(alone) * 1.01


def test_the_planned_steps_and_evaluations_fill_the_time(planner):
    plan, machine = planner(sample_tokens=0), Machine(1e11)
    keys = plan.for_time(time.perf_counter() + 100, [128], machine)
    step, batch = machine.measure(keys, None, 1)
    evaluations = 2 * 5 * keys['eval_iters'] * batch  # at step 0 and after each quarter
    assert keys['max_iters'] / keys['eval_interval'] == pytest.approx(4, abs=0.01)
    assert keys['max_iters'] * step + evaluations == pytest.approx(98, rel=0.02)


def test_too_short_a_budget_says_what_is_enough(planner):
    with pytest.raises(UserError, match=f'too short for {MIN_STEPS} steps .* --budget='):
        planner().for_time(time.perf_counter() + 1, [128], Machine(1e7))


def test_keys_of_the_user_are_kept_and_the_others_fit_them(planner):
    plan = planner(n_layer=5, batch_size=3, optimizer='adamw')
    keys = plan.for_time(time.perf_counter() + 60, WIDTHS[:8], Machine(1e11))
    assert (keys['n_layer'], keys['batch_size'], keys['optimizer']) == (5, 3, 'adamw')
    assert keys['n_embd'] % keys['n_head'] == 0


def test_params_choose_the_nearest_size_and_its_tokens(planner):
    plan = planner()
    keys = plan.for_size(3e6)
    assert plan.count(keys, embeddings=True) == pytest.approx(3e6, rel=0.5)
    larger = plan.for_size(3e8)
    assert larger['n_embd'] > keys['n_embd'] and larger['learning_rate'] < keys['learning_rate']
    # A text of 18,000 tokens is read 16 times at most.
    read = keys['max_iters'] * tokens_per_step(keys)
    assert read <= max(17 * len(plan.data.train), MIN_STEPS * tokens_per_step(keys))


# -- train.py --------------------------------------------------------------------------------------

SHORT = ['--n_embd=32', '--batch_size=4', '--block_size=16', '--max_iters=20', '--eval_iters=1']
SHORT = ['train.py', '--dataset=tiny', '--device=cpu', '--dtype=float32', '--no-report', *SHORT]


def saved(out_dir) -> dict:
    return json.loads((out_dir / 'config.json').read_text())


def test_a_run_records_its_plan_and_keeps_it_when_resumed(data_dir, tmp_path, run_main):
    torch.manual_seed(0)
    file = tmp_path / 'own.py'
    file.write_text('n_layer = 3\nlearning_rate = 0.5\nn_head = 4\nwarmup_iters = 0\n')
    run = [str(file), '--params=30k', f'--out_dir={tmp_path / "run"}', f'--data_dir={data_dir}']
    run += SHORT[1:]
    done = run_main('train.py', *run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('plan for params 30k: n_layer 2, n_embd 32') == 1
    config, origins = saved(tmp_path / 'run')['config'], saved(tmp_path / 'run')['origins']
    # The plan wins over the file, and the command line over the plan.
    assert (config['n_layer'], config['learning_rate'], config['optimizer']) == (2, 0.015, 'muon')
    assert (config['batch_size'], config['max_iters'], config['params']) == (4, 20, '30k')
    assert (origins['n_layer'], origins['batch_size']) == ('planned', 'command line')

    run.remove('--max_iters=20')
    for flags in (run, run[1:], [f'--out_dir={tmp_path / "run"}', f'--data_dir={data_dir}']):
        done = run_main('train.py', *flags, '--init_from=resume', '--max_iters=22')
        assert done.returncode == 0, done.stderr
        assert 'plan for' not in done.stdout
        again = saved(tmp_path / 'run')
        same = ('n_layer', 'n_head', 'learning_rate', 'eval_interval', 'params')
        assert {key: again['config'][key] for key in same} == {key: config[key] for key in same}
        assert again['origins']['n_layer'] == 'planned'

    done = run_main('train.py', *run, '--init_from=resume', '--params=1M')
    assert done.returncode == 2 and 'was begun with params' in done.stderr


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--budget=soon'], '--budget=soon: expected a time such as 90s'),
        (['--params=many'], '--params=many: expected a number'),
        (
            ['--budget=1m', '--max_iters=5', '--warmup_iters=0'],
            '--budget sets the number of steps: leave out',
        ),
        (['--params=30k', '--n_head=5'], 'n_embd 32 is not divisible by n_head 5'),
        (['--params=30k', '--warmup_iters=500', '--max_iters=9'], 'warmup_iters 500 is greater'),
    ],
)
def test_an_impossible_plan_is_one_line(flags, message, data_dir, tmp_path, run_main):
    common = ['--dataset=tiny', '--device=cpu', f'--data_dir={data_dir}', '--block_size=16']
    done = run_main('train.py', *common, f'--out_dir={tmp_path / "run"}', *flags)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count('\n') == 1 and not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_run_ends_when_its_budget_is_over(data_dir, tmp_path, run_main):
    started = time.perf_counter()
    flags = ['--dataset=tiny', '--device=cpu', f'--data_dir={data_dir}', '--block_size=16']
    done = run_main('train.py', *flags, f'--out_dir={tmp_path / "run"}', '--budget=12s')
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started == pytest.approx(12, rel=0.5)  # beside other tests
    assert math.isfinite(saved(tmp_path / 'run')['config']['learning_rate'])
