"""What the benchmarks share: a machine's description, a table of medians with their spread, clocks for the
parts of a step and for the start of a run."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nib.errors import UserError
from nib.machine.device import synchronize

ROOT = Path(__file__).resolve().parent.parent


def describe_machine(device: str = 'cpu') -> str:
    """Processor or GPU, cores, Python and torch, on one line."""
    name = platform.processor() or 'CPU'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            name = next(
                (line.split(':')[1].strip() for line in file if line.startswith('model name')), name
            )
    if device.startswith('cuda'):
        name = f'{torch.cuda.get_device_name(device)}, {name}'
    return f'{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}'


def matrix_rate(device: str, dtype: str, n: int = 2048) -> float:
    """FLOP/s that a product of n x n matrices reaches on this machine, the best of five."""
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * n**3 / min(times[1:])


def copy_rate(device: str, n_bytes: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a large copy within the device's memory, the best of five."""
    source, target = (torch.ones(n_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * n_bytes / min(times[1:])


def make_table(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Rows of 'median (lowest to highest)' for each of one or two contestants, whose rounds stand at the same index.

    measured: contestant -> its rounds, each quantity -> figure. The ratio is that of the second to the first, round by
    round, as a machine's speed drifts; its median and spread.
    """
    names = list(measured)
    lines = [
        f'{"median (lowest to highest)":30}'
        + ''.join(f'{name:>34}' for name in names)
        + (f'{names[1] + " / " + names[0]:>28}' if len(names) == 2 else '')
    ]
    for key in measured[names[-1]][0]:
        columns = [[turn[key] for turn in measured[name] if key in turn] for name in names]
        cells = ''.join(f'{_spread(column) if column else "":>34}' for column in columns)
        if len(names) == 2 and all(columns):
            cells += f'{_spread([second / first for first, second in zip(*columns)]):>28}'
        lines.append(f'{key:30}{cells}')
    return '\n'.join(lines) + '\n'


def show(figure: float) -> str:
    """Four digits, or a whole number where it has more."""
    return f'{figure:,.0f}' if figure >= 1000 else f'{figure:.4g}'


def _spread(figures: Sequence[float]) -> str:
    low, middle, high = map(show, (min(figures), statistics.median(figures), max(figures)))
    return middle if low == high else f'{middle} ({low} to {high})'


class LapClock:
    """Gives the time since it was last looked at to a part of the step."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, part: str):
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def time_batches(self, batches):
        for batch in batches:
            self.lap('data')
            yield batch
            self.lap('backward')  # what passed until the loop comes back, but for the forward pass
        self.lap('data')  # of the batch that is prepared ahead


class TimedModel:
    """A model that notes how long its forward pass takes."""

    def __init__(self, model, clock):
        self.model, self.clock, self.parameters = model, clock, model.parameters

    def __call__(self, x, y):
        self.clock.lap('data')  # dropout's seed
        loss = self.model(x, y)
        self.clock.lap('forward')
        return loss


class TimedBadSteps:
    """A guard.BadSteps that notes how long it takes."""

    def __init__(self, bad_steps, clock):
        self.bad_steps, self.clock = bad_steps, clock

    def usable(self, loss, grad_norm):
        self.clock.lap('optimizer')
        usable = self.bad_steps.usable(loss, grad_norm)
        self.clock.lap('checks')
        return usable


def timed_step(train_step, training, micro_batches, step: int, clock: LapClock):
    """train.py's train_step, whose parts the clock times as they pass it; returns what it returns."""
    timed = replace(
        training,
        model=TimedModel(training.model, clock),
        bad_steps=TimedBadSteps(training.bad_steps, clock),
    )
    losses = train_step(timed, clock.time_batches(micro_batches), step)
    clock.lap('optimizer')
    return losses


def time_startup(flags: list[str]) -> float:
    """Seconds from the command train.py to the end of its first step, with an evaluation of one batch before it."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(ROOT / 'train.py'), *flags, '--max_iters=1', '--eval_iters=1'],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        output = ''
        for line in run.stdout:
            output += line
            if line.startswith('step 1: loss'):
                seconds = time.perf_counter() - started
                run.kill()  # it would evaluate the whole validation split now
                return seconds
    raise UserError(f'train.py did not reach its first step: {output[-300:]}')


def time_import() -> float:
    """Seconds until a process that does nothing else has imported torch."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, '-c', 'import torch; print(flush=True)'], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        return time.perf_counter() - started
