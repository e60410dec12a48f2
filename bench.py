"""Measures a config: training speed, where the time goes, memory, start-up time and generation.

    python bench.py config/train_shakespeare_char.py
    python bench.py config/train_gpt2.py --batch_size=4 --gradient_accumulation_steps=1
    python bench.py config/train_shakespeare_char.py --growth=growth.png
    python bench.py config/train_gpt2.py --plan
    git clone https://github.com/karpathy/nanoGPT
    python bench.py config/train_shakespeare_char.py --vs_nanogpt=nanoGPT

It accepts every key of train.py except --budget and --params. It compiles the model if train.py
would, for a run of max_iters steps. --vs_nanogpt also measures nanoGPT's code, alternating with
nibGPT's, with the same model and batch. --growth measures how speed and memory change with width,
depth, context and batch. --plan measures nothing, and prints what the whole run would take.
"""

import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import math
import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

import configurator
import train
from benchmarks import growth as growing
from benchmarks import measure
from benchmarks.contestant import Contestant
from benchmarks.measure import in_fresh_process
from benchmarks.nanogpt import start_training
from benchmarks.plan import describe_plan
from model import GPT
from nib.errors import UserError, run_script, warn
from nib.machine.compiling import has_compiler, pick_compile
from nib.machine.device import ShapesOnly, peak_memory, pick_device, pick_dtype
from nib.machine.memory import check_memory
from nib.machine.ranks import Ranks
from nib.machine.rates import measure_flops
from nib.report.history import show_seconds
from nib.run.checks import check_config, pick_model, reject_plan, settle_schedule
from nib.schema import check_range, is_auto
from nib.tokens.dataset import SCRIPTS, TokenDataset, is_prepared, open_dataset
from nib.tokens.find import Unavailable, open_or_prepare

# benchmark
rounds: int = 5  # rounds of measurements
steps: int = 10  # training steps per round
prompt_tokens: int = 32  # length of the prompt for generation
new_tokens: int = 100  # tokens to generate per round; 0: no generation
startup: bool = True  # also run train.py: the time to its first step, the overhead of its loop
vs_nanogpt: str = ''  # path of a clone of karpathy/nanoGPT to compare with
growth: str = ''  # measure growth instead, and plot it to this file (.png, .svg, .pdf)
result: str = ''  # also write the table to this file
plan: bool = False  # measure nothing; print memory, FLOPs, time and cost of the whole run
devices: str = 'H100,A100,RTX 4090,RTX 3090'  # plan: names of GPUs, separated by commas
processes: int = 1  # plan: processes that share the run, each with a device of its own
mfu: float = 0.4  # plan: assumed share of a device's peak rate
price_per_hour: float = 0.0  # plan: price of a device in your currency; 0: show no cost

VOCAB_SIZE = 50257  # of the random tokens that replace a missing dataset


def main(argv):
    values = read_config(argv)
    check_range(values, 'rounds', 'steps', 'prompt_tokens', least=1)
    check_range(values, 'new_tokens', 'price_per_hour', least=0)
    if plan and (growth or vs_nanogpt):
        raise UserError('--plan measures nothing: leave out --growth and --vs_nanogpt')
    if result and (Path(result).is_dir() or not Path(result).absolute().parent.is_dir()):
        raise UserError(f'--result={result}: name a file in an existing folder')
    draw = None
    if plan:
        table = describe_config_plan(values)
    elif growth:
        table, draw = measure_growth(values)
    else:
        table = measure_config(values)
    measure.publish(table, result)
    if draw:
        draw()


def read_config(argv) -> dict:
    """Returns the values of all keys, and assigns them to this module's globals."""
    values, origins = configurator.configure(
        __file__, argv, settle={'device': pick_device}, base='train.py'
    )
    if is_auto(origins['batch_size']):
        raise UserError(
            '--batch_size=auto: use a number here; train.py prints the one that it chooses'
        )
    if values['init_from'] != 'scratch':
        warn(
            f'init_from is {values["init_from"]!r} ({origins["init_from"]}), which bench.py '
            f"ignores: it measures a new model of the config's shape"
        )
    values['dtype'], _ = pick_dtype(values['dtype'], values['device'])
    reject_plan(values, origins)
    check_range(values, 'processes', least=1)
    values['ranks'] = values['processes'] if values['plan'] else 1
    check_config(values, world_size=values['ranks'])
    values = settle_schedule(values)  # so that a run of a few steps keeps the config's schedule
    globals().update(values)
    return values


def settle_compile(values, vocab_size: int) -> dict:
    """Returns the values with the choice of train.py in place of --compile=auto.

    Raises UserError if the model is impossible.
    """
    with ShapesOnly():
        model = GPT(pick_model(values, vocab_size))
    compiled, _ = pick_compile(values, model)
    return values | {'compile': compiled}


def as_flags(values, **changes) -> list[str]:
    """Returns the command-line flags that set train.py's keys to these values."""
    values = values | changes
    return [f'--{key}={values[key]}' for key in configurator.read_block(train.__file__).defaults]


def describe_config_plan(values) -> str:
    """Returns the plan of a run. A dataset that is not prepared has the vocabulary of GPT-2."""
    if not 0 < mfu <= 1:
        raise UserError(f'mfu is {mfu}: it must be more than 0 and at most 1')
    folder = Path(values['data_dir'] or SCRIPTS) / values['dataset']
    vocab_size = VOCAB_SIZE
    if is_prepared(folder):
        vocab_size = open_dataset(folder, values['block_size'], values['vocab_size']).vocab_size
    else:
        warn(f'{folder} is not prepared: assuming a vocabulary of {VOCAB_SIZE:,}')
    values = settle_compile(values, vocab_size)
    names = [name.strip() for name in devices.split(',') if name.strip()]
    return describe_plan(values, vocab_size, names, mfu, price_per_hour)


# -- one config ------------------------------------------------------------------------------------


def measure_config(values) -> str:
    """Returns the table of a config's speed, the parts of its step, and its memory."""
    check_memory(pick_model(values, vocab_size=1), values)
    with tempfile.TemporaryDirectory() as scratch:
        data = find_data(values, Path(scratch))
        values = settle_compile(values, data.vocab_size)
        contestants: dict[str, measure.Worker | Contestant] = {}
        if vs_nanogpt:
            contestants['nanoGPT'] = start_training(values, data, vs_nanogpt)
        contestants['nibGPT'] = ours = Contestant(values, data, announce)
        measured: dict[str, list] = {name: [] for name in contestants}
        for turn in range(rounds):
            for name, contestant in contestants.items():
                figures = contestant.round()
                measured[name].append(figures)
                warn(f'round {turn + 1}, {name}: {figures["tokens/s"]:,.0f} tokens/s')
        if startup:
            measure_startup(values, data, Path(scratch) / 'run', measured['nibGPT'])
    return describe_config(values, data, ours) + '\n' + measure.make_table(measured)


def announce(first_step: float):
    """Says what will be measured, and how long that may take. first_step: its seconds."""
    n_steps = rounds * (steps + steps // 3) * (2 if vs_nanogpt else 1) + 3 * steps * startup
    warn(
        f'measuring {count_rounds()}{", then runs of train.py" * startup}: about '
        f'{show_seconds(n_steps * first_step)} of steps (the first one took {first_step:.2g} s)'
    )


def count_rounds() -> str:
    """Returns how many rounds and steps are measured, and of what."""
    turns = ', alternating' if vs_nanogpt else ''
    return f'{rounds} round{"s" * (rounds > 1)} of {steps} steps{turns}'


def measure_startup(values, data, out_dir: Path, measured: list[dict[str, float]]):
    """Adds to the figures of each round what runs of train.py itself show."""
    run = as_flags(
        values,
        dataset=data.name,
        data_dir=data.folder.parent,
        out_dir=out_dir,
        overwrite=True,
        init_from='scratch',
        eval_only=False,
        wandb_log=False,
        tensorboard=False,
        sample_tokens=0,
    )
    measured[0] |= in_fresh_process('bench.time_run', [*run, f'--steps={steps}'])
    for figures in measured:
        figures['import torch, s'] = measure.time_import()
        figures['command to first step, s'] = measure.time_startup(run)


def describe_config(values, data, ours: Contestant) -> str:
    """Returns the lines above the table."""
    batch = f'{values["gradient_accumulation_steps"]} x {values["batch_size"]}'
    nanogpt = ''
    if vs_nanogpt and values['device'] == 'cpu':
        nanogpt = '; nanoGPT in float32, as on any CPU'
    return (
        f'{count_rounds()}; {measure.describe_machine(values["device"])}\n'
        f'{ours.raw_model.num_params() / 1e6:.2f}M parameters, {ours.tokens:,} tokens per step '
        f'({batch} x {values["block_size"]}), {values["dtype"]}, '
        f'compile {"on" if values["compile"] else "off"}, {data.name}{nanogpt}\n'
    )


def find_data(values, scratch: Path) -> TokenDataset:
    """Returns the config's dataset, and prepares it like train.py if necessary.

    If it is not available, warns and returns random tokens.
    """
    vocab_size = min(values['vocab_size'] or VOCAB_SIZE, 1 << 16)
    try:
        return open_or_prepare(values, Ranks(), warn)
    except Unavailable as error:
        warn(
            f'*** MEASURING RANDOM TOKENS with a vocabulary of {vocab_size:,}. The embedding and '
            f"the head do not have the sizes of this config's dataset: {error} ***"
        )
    folder = scratch / 'random tokens'
    folder.mkdir()
    for name in ('train.bin', 'val.bin'):
        tokens = np.random.default_rng(0).integers(
            vocab_size, size=64 * values['block_size'] + 1, dtype=np.uint16
        )
        tokens.tofile(folder / name)
    return open_dataset(folder, values['block_size'], vocab_size)


# -- a run of train.py -----------------------------------------------------------------------------


class Done(Exception):
    """The run has been timed."""


def time_run(argv) -> dict[str, float]:
    """Measures what train.py does besides its training steps.

    That is the loop itself, checkpoints, evaluations, and the doctor's check-up. train.py's main
    runs for 3 * steps steps, and saves and evaluates after each third.
    """
    values = read_config(argv)
    clock = measure.LapClock(values['device'])
    train_step, evaluate = train.train_step, train.evaluate
    n_batches = 2  # of each split in an evaluation
    done, between = 0, 'loop'

    def timed_step(training, micro_batches, step):
        nonlocal done, between
        if done == 3 * steps:
            raise Done
        clock.lap(between)
        between = 'loop'
        losses = measure.timed_step(train_step, training, micro_batches, step, clock)
        done += 1
        if done == 1:
            clock.seconds.clear()  # the first step is slower than the others
        return losses

    def timed_evaluate(*arguments):
        nonlocal between
        clock.lap('checkpoint')
        loss = evaluate(*arguments)
        clock.lap('evaluation')
        between = 'check-up'  # the doctor's, before the next step
        return loss

    train.train_step, train.evaluate = timed_step, timed_evaluate
    flags = [flag for flag in argv if not flag.startswith('--steps=')]
    log_interval = min(values['log_interval'], steps)
    with suppress(Done):
        train.main(
            [
                *flags,
                f'--max_iters={3 * steps + 1}',
                f'--eval_interval={steps}',
                f'--eval_iters={n_batches}',
                f'--log_interval={log_interval}',
            ]
        )
    added = sum(clock.seconds[part] for part in ('data', 'checks', 'loop'))
    step = added + sum(clock.seconds[part] for part in ('forward', 'backward', 'optimizer'))
    return {
        'ms loop and logging': 1000 * clock.seconds['loop'] / (done - 1),
        '% data, checks, loop, logging': 100 * added / step,
        'ms that a checkpoint blocks': 1000 * clock.seconds['checkpoint'] / 3,
        'ms evaluation, a batch': 1000 * clock.seconds['evaluation'] / (3 * 2 * n_batches),
        "ms doctor's check-up after it": 1000 * clock.seconds['check-up'] / 3,
    }


# -- growth ----------------------------------------------------------------------------------------


def measure_growth(values) -> tuple[str, Callable]:
    """Returns the table of speed and memory along each axis, and the function that draws it.

    On each axis, one size of the model or the batch is 1/8, 1/4, 1/2, 1, 2, ... of its value in
    this config, if that is an integer, until a step is slow or the memory is full.
    """
    growing.check_picture(growth)
    values['compile'] = values['compile'] is True and has_compiler()  # auto: these runs are short
    measured = growing.measure(
        values, lambda sizes: in_fresh_process('bench.measure_point', as_flags(values, **sizes))
    )
    what = (
        f'{values["n_layer"]} layers, {values["n_embd"]} wide, context {values["block_size"]}, '
        f'batch {values["batch_size"]}, and one of these changed; {values["dtype"]}, '
        f'compile {"on" if values["compile"] else "off"}'
    )
    machine = measure.describe_machine(values['device'])
    return (
        f'{what}\n{machine}\n\n{growing.make_table(measured)}',
        lambda: growing.draw(measured, growth, f'{what}\n{machine}', values),
    )


def measure_point(argv) -> dict[str, float]:
    """Measures the speed and the peak memory of a config's training steps.

    growing.LIMIT is the speed if nothing but the FLOPs took time, at the rate of a large matrix
    product.
    """
    values = read_config(argv)
    before = peak_memory(values['device']) or math.nan
    with tempfile.TemporaryDirectory() as scratch:
        ours, times = Contestant(values, find_data(values, Path(scratch))), []
        while len(times) < 3 or sum(times) < 1:
            times.append(ours.time_steps(1))
        rate = ours.peak or measure_flops(values['device'], values['dtype'])
    seconds = statistics.median(times)
    return {
        'M parameters': ours.raw_model.num_params() / 1e6,
        'MFLOP/token': ours.training.flops_per_token / 1e6,
        growing.STEP: 1000 * seconds,
        growing.SPEED: ours.tokens / seconds,
        growing.LIMIT: rate / ours.training.flops_per_token,
        growing.SHARE: 100 * ours.tokens * ours.training.flops_per_token / seconds / rate,
        growing.MEMORY: (ours.memory or math.nan) / 1e6,
        growing.BEFORE: before / 1e6,
    }


if __name__ == '__main__':
    run_script(main)
