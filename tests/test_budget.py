"""nib/budget.py: --budget and --params plan a run."""

import json
import math

import pytest
import torch
from conftest import ROOT

import train
from benchmarks import scaling
from configurator import read_block
from model import GPT
from nib import budget, startup
from nib.budget import (
    BATCH,
    ENDING,
    MIN_STEPS,
    WIDTHS,
    Planner,
    parse_count,
    parse_duration,
    tokens_per_step,
)
from nib.errors import UserError
from nib.machine import compiling, stopwatch
from nib.machine.memory import USABLE, needed_memory
from nib.machine.stopwatch import Speed, Stopwatch
from nib.run.checks import check_config
from nib.scaling_law import LAW, Law
from nib.tokens.dataset import open_dataset
from nib.tokens.write import write_char_dataset


@pytest.mark.parametrize(
    ('text', 'seconds'), [('90s', 90), ('10m', 600), ('1.5h', 5400), ('2d', 172_800)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ('text', 'number'),
    [('5000', 5000), ('300k', 3e5), ('300K', 3e5), ('10M', 1e7), ('1.5B', 1.5e9)],
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
    runs = json.loads((ROOT / 'benchmarks/results/scaling.json').read_text())
    fitted, floors, factors = scaling.fit([run for run in runs if run['fitted']])
    assert fitted.alpha == pytest.approx(LAW.alpha, abs=0.002)
    assert fitted.beta == pytest.approx(LAW.beta, abs=0.002)
    ratio = fitted.A / fitted.B
    assert ratio == pytest.approx(LAW.A / LAW.B, rel=0.02)
    # Runs of twice the time with the planner's depth, batch and context, which were not fitted.
    planned = {'seconds': 40, 'n_layer': 2, 'batch_size': BATCH // 128, 'block_size': 128}
    compared = [run for run in runs if run | planned == run]
    assert len(compared) == 14
    for run in compared:
        name = run['dataset']
        law = floors[name] + factors[name] * fitted.loss(run['parameters'], run['tokens'])
        assert law == pytest.approx(run['loss'], abs=0.03), run


def test_the_recorded_runs_are_those_of_the_benchmark():
    runs = json.loads((ROOT / 'benchmarks/results/scaling.json').read_text())
    for run in runs:
        for key in scaling.MEASURED:
            del run[key]
    assert sorted(map(str, runs)) == sorted(map(str, scaling.all_runs()))


# -- the plan --------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still, except for work that a test gives a known duration."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The clock of plans, in place of the real one, which depends on what else the machine does."""
    clock = Clock()
    for module in (budget, startup, stopwatch):
        monkeypatch.setattr(module, 'time', clock)
    return clock


class Machine:
    """A machine with a known speed: a step takes 1 ms per layer and the time of its FLOPs."""

    def __init__(self, flops_per_second, compiling=0.0):
        self.rate, self.compiling, self.measured = flops_per_second, compiling, []

    def measure(self, config, data, seconds, run_steps=0):
        self.measured.append(config)
        flops = 6 * 12 * config['n_layer'] * config['n_embd'] ** 2 * tokens_per_step(config)
        step = 0.001 * config['n_layer'] + flops / self.rate
        return Speed(step, step / 3, self.compiling if run_steps else 0.0)


@pytest.fixture
def planner(data_dir, monkeypatch):
    monkeypatch.setattr(budget, 'MOST_PARAMS', math.inf)  # the text has only 18,000 tokens
    config = {**read_block(str(ROOT / 'train.py')).defaults, 'device': 'cpu', 'dtype': 'float32'}

    def make(room=math.inf, ranks=1, **fixed):
        values = config | {'ranks': ranks} | fixed
        return Planner(values, fixed, open_dataset(data_dir / 'tiny', 64), room)

    return make


def predicted(planner, keys) -> float:
    tokens = keys['max_iters'] * tokens_per_step(keys)
    return LAW.loss(planner.count(keys, embeddings=False), tokens, len(planner.data.train))


def test_a_longer_time_and_a_faster_machine_give_a_lower_predicted_loss(planner):
    plan = planner()
    widths, losses = [], []
    for seconds, rate in ((10, 1e10), (30, 1e10), (120, 1e10), (600, 1e10), (600, 1e12)):
        keys = plan.for_time(seconds, WIDTHS[:8], Machine(rate))
        widths.append(keys['n_embd'])
        losses.append(predicted(plan, keys))
    assert losses == sorted(losses, reverse=True) and widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_the_chosen_width_has_the_lowest_predicted_loss_of_all(planner):
    plan, ends = planner(), 60
    chosen = plan.for_time(ends, WIDTHS[:8], Machine(1e12))
    alone = [predicted(plan, plan.for_time(ends, [w], Machine(1e12))) for w in WIDTHS[:8]]
    assert predicted(plan, chosen) <= min(alone) * 1.01


def test_the_planned_steps_and_evaluations_fill_the_time(planner):
    plan, machine = planner(sample_tokens=0), Machine(1e11)
    keys = plan.for_time(100, [128], machine)
    step, batch, _ = machine.measure(keys, None, 1)
    evaluations = 2 * 5 * keys['eval_iters'] * batch  # at step 0 and after each quarter
    assert keys['max_iters'] / keys['eval_interval'] == pytest.approx(4, abs=0.01)
    assert keys['max_iters'] * step + evaluations == pytest.approx(98, rel=0.02)
    speed = machine.measure(keys, None, 1)
    seconds = [plan.seconds(keys, keys['max_iters'] + more, speed) for more in (0, 1)]
    assert seconds[0] <= 100 < seconds[1]


def test_a_short_text_needs_no_wide_model(planner, monkeypatch):
    """The law would go on: it only says that tokens that are read again teach little."""
    plan = planner()
    assert plan.for_time(3600, WIDTHS[:8], Machine(1e15))['n_embd'] == WIDTHS[7]
    monkeypatch.setattr(budget, 'MOST_PARAMS', 10)
    machine = Machine(1e15)
    keys = plan.for_time(3600, WIDTHS, machine)
    assert plan.count(keys, embeddings=False) <= 10 * len(plan.data.train)
    assert max(config['n_embd'] for config in machine.measured) == keys['n_embd'] < 128


def test_a_text_that_is_read_five_times_needs_dropout(planner):
    plan = planner()
    n = len(plan.data.train)
    assert [plan.shape(128, tokens)['dropout'] for tokens in (4.9 * n, 5 * n)] == [0.0, 0.1]


@pytest.mark.parametrize('seconds', [1, -1])  # a second is over when training has been imported
def test_too_short_a_budget_says_what_is_enough_without_trying_wider_models(planner, seconds):
    machine = Machine(1e7)
    with pytest.raises(UserError, match=f'too short for {MIN_STEPS} steps .* --budget='):
        planner().for_time(seconds, WIDTHS, machine)
    assert {config['n_embd'] for config in machine.measured} == {WIDTHS[0]}


def test_keys_of_the_user_are_kept_and_the_others_fit_them(planner):
    plan = planner(n_layer=5, batch_size=3, optimizer='adamw')
    keys = plan.for_time(60, WIDTHS[:8], Machine(1e11))
    assert (keys['n_layer'], keys['batch_size'], keys['optimizer']) == (5, 3, 'adamw')
    assert keys['n_embd'] % keys['n_head'] == 0


def test_params_choose_the_nearest_size_and_its_tokens(planner):
    plan = planner()
    for params in (3e4, 1e5, 2e5, 5e5, 1e6, 2e6, 3e6, 5e6, 1e8):
        keys = plan.for_size(params)
        assert 1 / 1.5 < plan.count(keys, embeddings=True) / params < 1.5
    keys = plan.for_size(3e6)
    larger = plan.for_size(3e8)
    assert larger['n_embd'] > keys['n_embd'] and larger['learning_rate'] < keys['learning_rate']
    # A text of 18,000 tokens is read 16 times at most.
    read = keys['max_iters'] * tokens_per_step(keys)
    assert read <= max(17 * len(plan.data.train), MIN_STEPS * tokens_per_step(keys))


@pytest.mark.parametrize(
    'fixed', [{}, {'gradient_accumulation_steps': 8}, {'batch_size': 6}, {'batch_size': 1}]
)
def test_what_is_measured_is_what_runs(planner, fixed):
    machine = Machine(1e11)
    plan = planner(room=1e9, **fixed)
    keys = plan.for_time(60, WIDTHS[:4], machine)
    assert fixed.items() <= keys.items()
    for name in ('batch_size', 'gradient_accumulation_steps', 'n_embd', 'block_size'):
        assert machine.measured[-1][name] == keys[name]


def test_the_memory_ends_the_search(planner):
    wide, ends = Machine(1e15), 600
    assert planner().for_time(ends, WIDTHS[:8], wide)['n_embd'] == WIDTHS[7]
    room = 1e8
    plan = planner(room=room)
    keys = plan.for_time(ends, WIDTHS[:8], Machine(1e15))
    assert keys['n_embd'] < WIDTHS[7]
    assert needed_memory(plan.model(keys), plan.config | keys) <= USABLE * room
    for refused in (
        lambda: planner(room=1e5).for_time(ends, WIDTHS, wide),
        lambda: planner(room=1e8).for_size(1e8),
    ):
        with pytest.raises(UserError, match='the memory of cpu is too small for n_embd'):
            refused()


@pytest.mark.parametrize(
    ('fixed', 'n_embd'),
    [
        ({'n_head': 6}, 96),
        ({'n_head': 12}, 96),
        ({'n_kv_head': 6}, 96),
        ({'n_embd': 208}, 208),
        ({'n_embd': 96, 'head_dim': 10}, 96),
    ],
)
def test_widths_that_the_heads_do_not_divide_are_skipped(planner, fixed, n_embd):
    plan = planner(**fixed)
    keys = plan.for_time(60, WIDTHS[:4], Machine(1e11))
    assert keys['n_embd'] == n_embd and fixed.items() <= keys.items()
    assert plan.model(keys).n_head == keys['n_head']


@pytest.mark.parametrize('fixed', [{'n_head': 7}, {'n_embd': 33}, {'n_embd': 0}, {'n_kv_head': -1}])
def test_heads_that_divide_no_width_are_refused(planner, fixed):
    with pytest.raises(UserError, match='n_embd|n_kv_head'):
        planner(**fixed).for_time(10, WIDTHS, Machine(1e9))


def test_no_size_is_planned_that_was_not_asked_for(planner):
    assert planner(n_head=12).for_size(1.24e8)['n_embd'] % 24 == 0
    for params, fixed in ((7e10, {}), (3e3, {}), (1e6, {'n_embd': 512})):
        with pytest.raises(UserError, match='the nearest model for this vocabulary has .* param'):
            planner(params='some', **fixed).for_size(params)


def test_the_schedule_is_that_of_the_users_steps(planner):
    keys = planner(max_iters=5000).for_size(1e7)
    names = ('max_iters', 'lr_decay_iters', 'warmup_iters', 'cooldown_iters', 'eval_interval')
    assert [keys[name] for name in names] == [5000, 5000, 100, 3333, 1250]
    keys = planner(lr_decay_iters=300, warmup_iters=200).for_size(1e7)
    assert (keys['lr_decay_iters'], keys['warmup_iters'], keys['cooldown_iters']) == (300, 200, 100)


def test_compilation_takes_its_time_from_the_steps(planner):
    ends = 100
    steps = [planner().for_time(ends, [128], Machine(1e11, c))['max_iters'] for c in (0.0, 49.0)]
    assert steps[1] / steps[0] == pytest.approx(0.5, rel=0.02)


def test_ranks_share_the_evaluations(planner):
    keys, speed = planner().shape(128, 1e6), Speed(0.0, 1.0)
    one, two = (planner(ranks=n).seconds(keys, 10_000, speed) for n in (1, 2))
    assert (one - ENDING) / (two - ENDING) == pytest.approx(2)
    # 10,000 steps: 5 evaluations of 100 batches of 1,000 windows each, but no more than there are.
    plan = planner(batch_size=10, block_size=100)
    windows = [(len(part) - 1) // 100 for part in (plan.data.train, plan.data.val)]
    batches = [math.ceil(n / 10) for n in windows]
    assert max(batches) < 100
    spent = plan.seconds(plan.shape(128, 1e6), 10_000, speed)
    assert spent - ENDING == pytest.approx(5 * sum(batches) + batches[1])


def test_one_process_measures_the_share_of_one_rank(planner, clock):
    plan = planner(ranks=2, gradient_accumulation_steps=4, batch_size=3, n_embd=32, block_size=16)
    config = {**plan.config, **plan.shape(32, 1e5)}
    done = []

    def step(t, micro_batches, step):
        done.append((len(list(micro_batches)), t.micro_steps, t.ranks.world_size))
        clock.now += 3.0
        return train.train_step(t, t.batches.micro_batches(step), step)

    def evaluate(model, batches, precision, ranks):
        clock.now += 8.0
        return train.evaluate(model, batches, precision, ranks)

    watch = Stopwatch(train.Training.set_up, step, evaluate)
    speed = watch.measure(config, plan.data, 0.0)
    assert done == [(2, 2, 1)] * 4
    assert speed == (3.0, 8.0 / 4, 0.0)  # four batches in an evaluation


@pytest.mark.parametrize('steps', [100, 10**9])
def test_the_plan_compiles_what_the_run_compiles(planner, monkeypatch, steps):
    monkeypatch.setattr(compiling, 'HAS_AMX', True)
    monkeypatch.setattr(compiling.shutil, 'which', lambda name: name)
    asked = []
    monkeypatch.setattr(
        train.Training, 'compile_and_distribute', lambda t, compiled, say: asked.append(compiled)
    )
    plan = planner(n_embd=32, block_size=16, batch_size=2)
    watch = Stopwatch(train.Training.set_up, train.train_step, train.evaluate)
    watch.measure({**plan.config, **plan.shape(32, 1e5)}, plan.data, 0.0, steps)
    assert asked == [steps == 10**9]


@pytest.mark.parametrize('ranks', [1, 2])
def test_the_plan_captures_cuda_graphs_only_if_the_run_does(planner, monkeypatch, ranks):
    allowed = []
    monkeypatch.setattr(
        train.Training, 'compile_and_distribute', lambda t, *args: allowed.append(t.cuda_graph)
    )
    plan = planner(n_embd=32, block_size=16, batch_size=2, gradient_accumulation_steps=2)
    watch = Stopwatch(train.Training.set_up, train.train_step, train.evaluate)
    watch.measure({**plan.config, **plan.shape(32, 1e5), 'ranks': ranks}, plan.data, 0.0)
    assert allowed == [ranks == 1]


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
    assert done.stdout.count('plan for params 30k: 28,768 parameters, n_layer 2, n_embd 32') == 1
    config, origins = saved(tmp_path / 'run')['config'], saved(tmp_path / 'run')['origins']
    # The plan wins over the file, and the command line over the plan.
    assert (config['n_layer'], config['learning_rate'], config['optimizer']) == (2, 0.015, 'muon')
    assert (config['batch_size'], config['max_iters'], config['params']) == (4, 20, '30k')
    assert (origins['n_layer'], origins['batch_size']) == ('planned', 'command line')

    run.remove('--max_iters=20')
    for flags in (run, run[1:], [f'--out_dir={tmp_path / "run"}', f'--data_dir={data_dir}']):
        done = run_main(
            'train.py', *flags, '--init_from=resume', '--max_iters=22', '--log_interval=1'
        )
        assert done.returncode == 0, done.stderr
        assert 'plan for' not in done.stdout
        again = saved(tmp_path / 'run')
        same = ('n_layer', 'n_head', 'learning_rate', 'eval_interval', 'params')
        assert {key: again['config'][key] for key in same} == {key: config[key] for key in same}
        assert again['origins']['n_layer'] == 'planned'
    logged = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
    rates = {line['step']: line['learning_rate'] for line in logged if 'learning_rate' in line}
    assert rates[21] > rates[22] > 0

    done = run_main('train.py', *run, '--init_from=resume', '--params=1M')
    assert done.returncode == 2 and 'was started with params' in done.stderr


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--budget=soon'], '--budget=soon: expected a time such as 90s'),
        (['--params=many'], '--params=many: expected a number'),
        (
            ['--budget=1m', '--max_iters=5', '--warmup_iters=0'],
            '--budget sets the number of steps: leave out',
        ),
        (['--params=30k', '--n_head=11'], 'n_embd 32 is not divisible by n_head 11'),
        (['--params=70B'], 'the nearest model for this vocabulary has'),
        (['--params=30k', '--batch_size=auto'], 'leave out --batch_size=auto'),
        (['--params=30k', '--optimizer=adamw'], 'add --learning_rate for adamw'),
        (['--params=30k', '--warmup_iters=500', '--max_iters=9'], 'warmup_iters 500 is greater'),
    ],
)
def test_an_impossible_plan_is_one_line(flags, message, data_dir, tmp_path, run_main):
    common = ['--dataset=tiny', '--device=cpu', f'--data_dir={data_dir}', '--block_size=16']
    done = run_main('train.py', *common, f'--out_dir={tmp_path / "run"}', *flags)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count('\n') == 1 and not (tmp_path / 'run').exists()


def test_what_the_plan_chooses_is_checked_after_it(tmp_path, run_main):
    write_char_dataset(tmp_path / 'short', 'A cat sees the dog. ' * 60, {'text': 'made up'})
    file = tmp_path / 'own.py'
    file.write_text('min_lr = 1e-4\ngradient_accumulation_steps = 3\nlog_interval = 1\n')
    flags = [f'--out_dir={tmp_path / "run"}', f'--data_dir={tmp_path}', '--dataset=short']
    flags += ['--params=30k', '--lr_schedule=wsd', '--learning_rate=1e-5', '--max_iters=4']
    flags += ['--min_lr=auto', '--lr_decay_iters=auto', '--device=cpu', '--no-report']
    # The warm-up and block_size are defaults: 2,000 steps, and more than the 120 tokens of val.
    done = run_main('train.py', str(file), *flags)
    assert done.returncode == 0, done.stderr
    config = saved(tmp_path / 'run')['config']
    names = ('min_lr', 'lr_decay_iters', 'gradient_accumulation_steps', 'learning_rate')
    assert [config[name] for name in names] == [0.0, 4, 1, 1e-5]
    assert config['warmup_iters'] < 4 and config['block_size'] < 120
    # A file's micro steps may not suit the processes.
    check_config(config | {'gradient_accumulation_steps': 1}, 2, planned=True)
    with pytest.raises(UserError, match='not a multiple of the number of processes'):
        check_config(config | {'gradient_accumulation_steps': 1}, 2)


@pytest.mark.slow
def test_a_run_ends_when_its_budget_is_over(data_dir, tmp_path, run_main, clock, monkeypatch):
    """The run is real. On the clock, a forward pass takes 10 ms and the time of its FLOPs."""
    forward = GPT.forward

    def timed(model, tokens, *arguments):
        flops = sum(model.flops_per_token().values()) * tokens.numel()
        passes = 3 if torch.is_grad_enabled() else 1  # a backward pass takes twice as long
        clock.now += passes * (0.01 + flops / 1e9)
        return forward(model, tokens, *arguments)

    monkeypatch.setattr(GPT, 'forward', timed)
    flags = ['--dataset=tiny', '--device=cpu', '--dtype=float32', f'--data_dir={data_dir}']
    flags += ['--block_size=16', '--eval_iters=20', '--no-compile', '--no-report']
    done = run_main('train.py', *flags, f'--out_dir={tmp_path / "run"}', '--budget=30s')
    assert done.returncode == 0, done.stderr
    assert clock.now + ENDING == pytest.approx(30, rel=0.1)
