"""The benchmark: what it prints adds up, and it measures train.py's own step."""

import os
import re
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL_RUN, full_disk

import bench as bench_script
import configurator
import train
from benchmarks import generators, measure, planned_memory, sampling
from benchmarks.contestant import Contestant
from model import GPT, GPTConfig
from nib.errors import UserError
from nib.guard import BadSteps
from nib.machine import compiling
from nib.optim import Optimizer
from nib.text.train_bpe import train_bpe
from nib.tokens.batches import BatchLoader
from nib.tokens.dataset import open_dataset

SMALL = [flag for flag in SMALL_RUN if not flag.startswith('--dataset')]
# Stands in for a clone of nanoGPT: its interface on this project's model.
STAND_IN = """
import importlib.util
import sys
import sysconfig
import torch
sys.path.append({root!r})
spec = importlib.util.spec_from_file_location('own_model', {root!r} + '/model.py')
own = importlib.util.module_from_spec(spec)
sys.modules['own_model'] = own
spec.loader.exec_module(own)
globals().update(vars(own))  # nib.generation imports the layers from this file, named model

class GPT(own.GPT):
    def configure_optimizers(self, weight_decay, learning_rate, betas, kind):
        return torch.optim.AdamW(
            self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        return None, super().forward(idx, targets)

    def generate(self, idx, max_new_tokens, temperature, top_k):
        return list(super().generate(idx.tolist(), max_new_tokens, temperature, top_k))
"""


@pytest.fixture
def bench(run_main):
    """bench(*flags) measures the small model in this process."""
    few = ['--rounds=2', '--steps=6', '--new_tokens=8', '--prompt_tokens=4', '--no-compile']
    return lambda *flags: run_main('bench.py', *SMALL, *few, *flags)


def rows(text) -> dict[str, float]:
    """The last figure's median of every row."""
    return {
        line[:30].strip(): float(line[30:].split()[0].replace(',', ''))
        for line in text.splitlines()[4:]
        if line.strip()
    }


@pytest.mark.slow
def test_the_figures_of_a_config_add_up(bench, data_dir, tmp_path):
    done = bench(
        '--dataset=tiny',
        f'--data_dir={data_dir}',
        f'--result={tmp_path / "table.txt"}',
        '--rounds=1',
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()[0]  # before the first round
    assert re.fullmatch(
        'measuring 1 round of 6 steps, then runs of train.py: about [0-9]+ s of steps '
        r'\(the first one took [0-9.]+ s\)',
        said,
    )
    assert (tmp_path / 'table.txt').read_text() == done.stdout
    assert '128 tokens per step (2 x 4 x 16), float32, compile off, tiny' in done.stdout
    figures = rows(done.stdout)
    assert figures['tokens/s'] == pytest.approx(128 / figures['ms/step'] * 1000, rel=0.01)
    assert figures['generated tokens/s'] > 0 and figures['peak memory, MB'] > 50
    assert figures['import torch, s'] > 0 and figures['command to first step, s'] > 0
    assert 0 < figures['% data, checks, loop, logging'] < 100 and figures['ms loop and logging'] > 0
    assert figures['ms that a checkpoint blocks'] > 0 and figures['ms evaluation, a batch'] > 0
    assert figures["ms doctor's check-up after it"] > 0


def test_a_full_disk_names_the_file_of_the_table_and_the_table_is_printed(tmp_path, capsys):
    with full_disk(10), pytest.raises(OSError) as caught:
        measure.publish('a table of a few lines\n', str(tmp_path / 'table.txt'))
    assert caught.value.filename == str(tmp_path / 'table.txt')
    assert capsys.readouterr().out == 'a table of a few lines\n'


def test_the_time_of_each_part_of_a_step_is_counted_as_its_own(data_dir, monkeypatch):
    """On a clock that only these parts advance. A step has two micro steps."""
    values, _ = configurator.configure(
        str(ROOT / 'bench.py'), [*SMALL, '--dtype=float32', '--no-compile'], base='train.py'
    )
    contestant = Contestant(values, open_dataset(data_dir / 'tiny', 16))
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(measure, 'time', clock)

    def takes(seconds, owner, name):
        original = getattr(owner, name)

        def timed(*arguments, **options):
            clock.now += seconds
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, timed)

    takes(1.0, BatchLoader, 'batch')
    takes(10.0, GPT, 'forward')
    takes(100.0, torch.Tensor, 'backward')
    takes(1000.0, Optimizer, 'step')
    takes(10_000.0, BadSteps, 'usable')
    assert contestant.time_parts() == {
        'ms data': 2000.0,
        'ms forward': 20_000.0,
        'ms backward': 200_000.0,
        'ms optimizer': 1e6,
        'ms checks': 1e7,
    }


@pytest.mark.slow
def test_without_its_dataset_a_config_is_measured_on_random_tokens(bench, tmp_path):
    done = bench('config/train_gpt2.py', f'--data_dir={tmp_path}', '--no-startup', '--new_tokens=0')
    assert done.returncode == 0, done.stderr
    assert 'random tokens' in done.stdout
    assert 'MEASURING RANDOM TOKENS' in done.stderr and 'openwebtext' in done.stderr
    assert not {'generated tokens/s', 'command to first step, s'} & rows(done.stdout).keys()


@pytest.mark.slow
def test_a_missing_dataset_is_prepared_as_train_py_does(bench, tmp_path, monkeypatch):
    # A part of the library, in less time.
    part = os.path.join(sysconfig.get_paths()['stdlib'], 'json')
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': part})
    done = bench(
        '--dataset=stdlib_char',
        '--prepare_dataset',
        f'--data_dir={tmp_path}',
        '--no-startup',
        '--new_tokens=0',
    )
    assert done.returncode == 0, done.stderr
    assert (
        (tmp_path / 'stdlib_char/train.bin').exists()
        and 'stdlib_char' in done.stdout
        and 'random tokens' not in done.stdout
    )


@pytest.mark.slow
def test_beside_nanogpt_both_are_measured_in_turns(bench, data_dir, tmp_path):
    (tmp_path / 'clone').mkdir()
    (tmp_path / 'clone/model.py').write_text(STAND_IN.format(root=str(ROOT)))
    done = bench(
        '--dataset=tiny',
        f'--data_dir={data_dir}',
        '--no-startup',
        f'--vs_nanogpt={tmp_path / "clone"}',
    )
    assert done.returncode == 0, done.stderr
    assert [
        line.split(':')[0] for line in done.stderr.splitlines() if line.startswith('round')
    ] == ['round 1, nanoGPT', 'round 1, nibGPT', 'round 2, nanoGPT', 'round 2, nibGPT']
    for row in ('tokens/s', 'ms/step', 'peak memory, MB', 'generated tokens/s'):
        line = next(line for line in done.stdout.splitlines() if line.startswith(row))
        assert len(re.findall(r'\(.*?\)', line)) >= 2 or row.startswith('peak')


@pytest.mark.slow
def test_generation_beside_other_programs_is_measured_in_turns(tmp_path, run_main, monkeypatch):
    done = run_main(generators, '--dtypes=int4')
    assert done.returncode == 2 and 'choose among float32, bfloat16, int8' in done.stderr
    shape = GPTConfig(vocab_size=300, block_size=64, n_layer=1, n_head=2, n_embd=16)
    contestants = {name: generators.CONTESTANTS[name] for name in ('transformers', 'nibGPT')}
    contestants = {'missing': ('no_such_package', None, ('float32',)), **contestants}
    monkeypatch.setattr(generators, 'SHAPES', {'gpt2': shape})
    monkeypatch.setattr(generators, 'CONTESTANTS', contestants)
    done = run_main(
        generators, '--dtypes=float32', '--prompt_tokens=4', '--new_tokens=3', '--device=cpu'
    )
    assert done.returncode == 0, done.stderr
    assert 'missing is left out: no_such_package is not installed' in done.stderr
    figures = rows(f'\n{done.stdout}')  # its table begins a line earlier
    assert list(figures) == [
        f'float32: {row}' for row in ('tokens/s', 'first token, ms', 'step, ms', 'x the best other')
    ]


@pytest.mark.slow
def test_generation_beside_nanogpt_is_measured_in_turns(tmp_path, run_main, monkeypatch):
    (tmp_path / 'model.py').write_text(STAND_IN.format(root=str(ROOT)))
    shape = dict(
        vocab_size=11, block_size=16, n_layer=1, n_head=2, n_embd=16, bias=True, dropout=0.0
    )
    monkeypatch.setattr(sampling, 'JOBS', {'tiny': sampling.Job(shape, 4, 20, 10)})
    done = run_main(
        sampling,
        f'--nanogpt={tmp_path}',
        '--rounds=2',
        '--device=cpu',
        f'--result={tmp_path / "table.txt"}',
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'table.txt').read_text() == done.stdout
    assert [line.split(':')[0] for line in done.stderr.splitlines()] == ['round 1', 'round 2']
    figures = rows(done.stdout)
    assert list(figures) == [
        'tiny, float32',
        'tiny, bfloat16',
        '4 tokens, float32: 32 / 1',
        '20 tokens, float32: 32 / 1',
        '4 tokens, bfloat16: 32 / 1',
        '20 tokens, bfloat16: 32 / 1',
        'plain read, GB/s',
        'tiny, float32: %',
        'tiny, bfloat16: %',
    ]
    assert min(figures.values()) > 0
    for clone in ('', tmp_path / 'nothing'):
        done = run_main(sampling, f'--nanogpt={clone}', '--device=cpu')
        assert done.returncode == 2 and done.stderr.startswith(
            f'error: --nanogpt={clone}: expected the path of a clone'
        )


@pytest.mark.slow
def test_a_point_of_growth_is_measured_in_a_process_of_its_own(data_dir):
    values = bench_script.read_config(
        [*SMALL, '--no-compile', f'--data_dir={data_dir}', '--dataset=tiny']
    )
    room = bytearray(600_000_000)  # memory that does not belong to the point
    point = bench_script.in_fresh_process('bench.measure_point', bench_script.as_flags(values))
    assert point['tokens/s'] == pytest.approx(128 / point['ms/step'] * 1000)
    model = GPT(GPTConfig.pick(values, open_dataset(data_dir / 'tiny', 16).vocab_size))
    assert point['MFLOP/token'] == pytest.approx(3 * sum(model.flops_per_token().values()) / 1e6)
    assert point['% of it'] == pytest.approx(100 * point['tokens/s'] / point['at matrix rate'])
    assert 50 < point['before model, MB'] <= point['peak memory, MB'] < len(room) / 1e6
    with pytest.raises(UserError, match='val.bin has'):
        bench_script.in_fresh_process(
            'bench.measure_point', bench_script.as_flags(values, block_size=1_000_000)
        )


@pytest.mark.slow
def test_growth_doubles_each_size_until_a_step_is_slow_or_memory_full(
    data_dir, tmp_path, monkeypatch, run_main
):
    """With made-up figures: a step takes a second from twice the config's width on, and the machine
    has memory for less than 32 layers."""
    from matplotlib import image

    asked = []

    def measured(function, flags):
        values = dict(flag[2:].split('=', 1) for flag in flags)
        sizes = {
            key: int(values[key])
            for key in ('n_embd', 'n_head', 'n_layer', 'block_size', 'batch_size')
        }
        asked.append(tuple(sizes.values()))
        if sizes['n_layer'] == 32:
            raise UserError('the memory is full')
        return dict.fromkeys(
            [
                'M parameters',
                'MFLOP/token',
                'tokens/s',
                'at matrix rate',
                '% of it',
                'peak memory, MB',
                'before model, MB',
            ],
            7.0,
        ) | {'ms/step': 1000.0 if sizes['n_embd'] >= 64 else 1.0}

    monkeypatch.setattr(bench_script, 'in_fresh_process', measured)
    done = run_main(
        bench_script,
        *SMALL,
        '--dataset=tiny',
        f'--data_dir={data_dir}',
        '--n_embd=32',
        '--n_head=2',
        f'--growth={tmp_path / "growth.png"}',
        f'--result={tmp_path / "growth.txt"}',
    )
    assert done.returncode == 0, done.stderr
    blocks = {
        lines[0].split()[0]: [int(line.split()[0].replace(',', '')) for line in lines[1:]]
        for lines in (block.splitlines() for block in done.stdout.split('\n\n')[1:])
    }
    assert blocks == {
        'width': [16, 32, 64],
        'depth': [1, 2, 4, 8, 16],
        'context': [2**power for power in range(1, 16)],
        'batch': [2**power for power in range(14)],
    }
    assert asked[:4] == [
        (32, 2, 2, 16, 4),
        (16, 1, 2, 16, 4),
        (64, 4, 2, 16, 4),
        (32, 2, 1, 16, 4),
    ]  # heads keep their width
    assert len(asked) == len(set(asked))
    assert 'depth 32: the memory is full' in done.stderr
    assert (tmp_path / 'growth.txt').read_text() == done.stdout
    assert len(set(image.imread(tmp_path / 'growth.png').reshape(-1))) > 10


@pytest.mark.parametrize(
    'name, words',
    [
        ('growth.docx', '.png'),
        ('nowhere/growth.png', 'an existing folder'),
        ('growth.png', 'pip install matplotlib'),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_told_before_anything_is_measured(
    data_dir, tmp_path, monkeypatch, run_main, name, words
):
    monkeypatch.setattr(
        bench_script, 'in_fresh_process', lambda *arguments: pytest.fail('measured')
    )
    if 'matplotlib' in words:
        for package in ('matplotlib', 'matplotlib.figure'):  # importing it fails
            monkeypatch.setitem(sys.modules, package, None)
    done = run_main(
        bench_script,
        *SMALL,
        '--dataset=tiny',
        f'--data_dir={data_dir}',
        f'--growth={tmp_path / name}',
    )
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_table_has_medians_spreads_and_the_ratios_of_rounds():
    table = measure.make_table(
        {
            'a': [{'x': 1.0}, {'x': 2.0}, {'x': 4.0}],
            'b': [{'x': 2.0, 'y': 5.0}, {'x': 2.0}, {'x': 2000.0}],
        }
    )
    lines = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert lines['x'].split()[1:] == '2 (1 to 4) 2 (2 to 2,000) 2 (1 to 500)'.split()
    assert lines['y'].split() == ['y', '5']
    assert sys.version.split()[0] in measure.describe_machine()


@pytest.mark.slow
def test_encoding_is_compared_with_the_tokenizers_library(run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'sched_setaffinity', lambda process, cores: None, raising=False)
    monkeypatch.setenv('TOKENIZERS_PARALLELISM', 'false')
    text = 'the cat sat on the mat, and the dog sat too.\n' * 500
    (tmp_path / 'text.txt').write_text(text)
    (tmp_path / 'tokenizer.json').write_text(train_bpe([text], 270).content)
    flags = [f'--input={tmp_path / "text.txt"}', f'--tokenizer={tmp_path / "tokenizer.json"}']
    done = run_main('benchmarks/encoding.py', *flags, '--rounds=2')
    assert done.returncode == 0, done.stderr
    assert '0.0 MB of UTF-8, vocabulary 270; equal ids' in done.stdout
    assert re.search(r'^MB/s( +[\d.]+ \(.*\)){3}$', done.stdout, re.MULTILINE), done.stdout


@pytest.mark.slow
def test_a_config_with_a_warm_up_is_measured_with_its_start_up(data_dir, run_main):
    """The runs of a few steps that bench.py starts keep the schedule of the config's long run."""
    done = run_main(
        'bench.py',
        'config/train_shakespeare_char.py',
        '--dataset=tiny',
        f'--data_dir={data_dir}',
        '--device=cpu',
        '--n_layer=1',
        '--rounds=1',
        '--steps=2',
        '--new_tokens=0',
    )
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)['command to first step, s'] > 0


def test_the_plan_of_a_run_adds_up(run_main, tmp_path):
    """FLOPs, time and cost by hand; the parts of the memory are at least its peak."""
    done = run_main(
        'bench.py',
        'config/train_gpt2.py',
        '--plan',
        '--device=cpu',
        f'--data_dir={tmp_path}',
        '--devices=A100, RTX 4090',
        '--mfu=0.5',
        '--price_per_hour=2',
    )
    assert done.returncode == 0 and 'assuming a vocabulary of 50,257' in done.stderr
    cells = dict(re.findall(r'^(.+?)  +([^ ].*)$', done.stdout, re.MULTILINE))
    assert cells['parameters'] == '124,337,664'
    weights = 12 * 12 * 768**2 + 50257 * 768  # of matrices
    flops = (6 * weights + 12 * 12 * 768 * 1024) * 491_520 * 600_000
    assert float(cells['FLOPs of the run']) == pytest.approx(flops, rel=1e-3)
    hours = flops / (0.5 * 312e12) / 3600
    shown, cost = cells['  A100, 312 TFLOP/s'].split(', cost ')
    assert shown == f'{int(hours)} h {int(hours * 60) % 60} min'
    assert cells['tokens of the run'] == '294,912,000,000'
    assert float(cost.replace(',', '')) == pytest.approx(2 * hours, rel=1e-3)
    assert '  RTX 4090, 165 TFLOP/s' in cells and any('this cpu' in label for label in cells)
    megabytes = {label.strip(): value.replace(',', '') for label, value in cells.items()}
    assert int(megabytes['weights']) == int(megabytes['gradients']) == 497
    assert int(megabytes["optimizer's state"]) == 995
    assert 3000 < int(megabytes['at the peak']) < 15_000


def test_the_plan_of_several_processes_divides_time_and_optimizer(run_main, tmp_path):
    cells = []
    for changes in ([], ['--processes=4'], ['--processes=4', '--shard_optimizer']):
        flags = [*changes, '--plan', '--device=cpu', f'--data_dir={tmp_path}', '--devices=A100']
        done = run_main('bench.py', 'config/train_gpt2.py', '--price_per_hour=2', *flags)
        cells.append(dict(re.findall(r'^ *(.+?)  +([^ ].*)$', done.stdout, re.MULTILINE)))
    one, four, sharded = cells
    (hours, cost), (fewer_hours, same_cost) = (
        re.search(r'(\d+) h.*, cost (.*)', plan['A100, 312 TFLOP/s']).groups()
        for plan in (one, four)
    )
    assert int(hours) // 4 == int(fewer_hours) > 0 and cost == same_cost
    for part in ('weights', 'gradients', "optimizer's state"):
        assert four[part] == one[part]
    # One of the four has the embedding, 50,257 x 768, and nothing else.
    assert int(sharded["optimizer's state"]) == round(50257 * 768 * 2 * 4 / 1e6)


def test_a_note_says_that_other_weights_are_not_measured(capsys):
    bench_script.read_config([*SMALL])
    assert not capsys.readouterr().err
    bench_script.read_config([*SMALL, '--init_from=gpt2-xl'])
    said = "init_from is 'gpt2-xl' (command line), which bench.py ignores"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('max_iters', [1000, 10**9])
def test_the_model_is_compiled_if_the_run_of_the_config_is(max_iters, monkeypatch, data_dir):
    monkeypatch.setattr(compiling, 'HAS_AMX', True)
    monkeypatch.setattr(compiling.shutil, 'which', lambda name: name)
    values = bench_script.read_config([*SMALL, f'--max_iters={max_iters}', '--lr_decay_iters=auto'])
    assert values['compile'] == 'auto'
    assert bench_script.settle_compile(values, 97)['compile'] is (max_iters == 10**9)
    training = train.Training.set_up(values, open_dataset(data_dir / 'tiny', 16))
    per_step = training.flops_per_token * training.tokens_per_step
    assert compiling.run_flops(values, training.raw_model) == per_step * max_iters


@pytest.mark.parametrize(
    'flag, words',
    [
        ('--devices=H1000', "'H1000' is not known"),
        ('--mfu=0', 'more than 0'),
        ('--batch_size=auto', 'use a number here'),
        ('--price_per_hour=-1', 'at least 0'),
        ('--processes=7', 'is not a multiple of the number of processes, 7'),
        ('--params=10M', "params is '10M' (command line): only train.py plans runs; leave it out"),
        ('--n_head=5', 'n_embd 768 is not divisible by n_head 5'),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_on_one_line(run_main, tmp_path, flag, words):
    done = run_main('bench.py', '--plan', '--device=cpu', f'--data_dir={tmp_path}', flag)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='Linux tells the memory of a process')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_planned_memory_is_what_training_takes(dtype):
    """Trains a config without large tensors. Gaps in the heap differ from run to run, and can be as
    large as the largest tensor: with GPT-2's vocabulary, the memory of two runs can differ by a
    third. With this config, one run in ten takes a tenth more than the others. None takes less.
    """
    flags = '--n_layer=4 --n_embd=384 --n_head=6 --block_size=256 --batch_size=8 --vocab_size=5000'
    flags += f' --mlp=swiglu --no-tied_head --dtype={dtype}'
    ratios, n_right = [], 0
    while n_right < 2 and len(ratios) < 5:
        planned, measured = measure.in_fresh_process(planned_memory.MEASURE_CONFIG, flags.split())
        ratios.append(planned / measured)
        assert ratios[-1] <= 1.1, ratios
        n_right += ratios[-1] >= 0.9
    assert n_right == 2, ratios


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--plan', '--growth=a.png'], '--plan measures nothing: leave out --growth'),
        (['--plan', '--vs_nanogpt=x'], '--plan measures nothing: leave out --growth'),
        (['--result=nowhere/x.txt'], '--result=nowhere/x.txt: name a file in an existing folder'),
        (['--result=.'], '--result=.: name a file in an existing folder'),
    ],
)
def test_flags_that_would_be_lost_are_told_before_anything_is_measured(flags, said, run_main):
    done = run_main(bench_script, *SMALL, *flags)
    assert done.returncode == 2 and said in done.stderr and not done.stdout
