"""Shared by the benchmarks: a description of the machine, tables of medians, clocks."""

import json
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

from nib.errors import UserError, warn
from nib.files import naming
from nib.machine.device import synchronize

ROOT = Path(__file__).resolve().parent.parent


def describe_machine(device: str = 'cpu') -> str:
    """Returns a line with processor or GPU, cores, and the versions of Python and torch."""
    name = platform.processor() or 'CPU'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            name = next(
                (line.split(':')[1].strip() for line in file if line.startswith('model name')), name
            )
    if device.startswith('cuda'):
        name = f'{torch.cuda.get_device_name(device)}, {name}'
    versions = f'Python {platform.python_version()}, torch {torch.__version__}'
    return f'{name}, {os.cpu_count()} cores, {versions}'


def copy_rate(device: str, n_bytes: int) -> float:
    """Returns the bytes/s, read and written, of a copy in the device's memory, the best of five."""
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
    """Returns a table with rows of 'median (lowest to highest)' for one or two contestants.

    measured: contestant -> its rounds, each a dict from quantity to figure. With two contestants,
    the last column is the ratio of the second to the first. It is computed round by round, because
    the speed of a machine drifts.
    """
    names = list(measured)
    lines = [
        f'{"median (lowest to highest)":30}'
        + ''.join(f'{name:>34}' for name in names)
        + (f'{names[1] + " / " + names[0]:>28}' if len(names) == 2 else '')
    ]
    for key in measured[names[-1]][0]:
        columns = [[turn[key] for turn in measured[name] if key in turn] for name in names]
        cells = ''.join(f'{spread(column) if column else "":>34}' for column in columns)
        if len(names) == 2 and all(columns):
            cells += f' {spread([second / first for first, second in zip(*columns)]):>27}'
        lines.append(f'{key:30}{cells}')
    return '\n'.join(lines) + '\n'


def publish(table: str, result: str):
    """Prints a table, and also writes it to the file `result` if that is not empty."""
    print(table, end='', flush=True)
    if result:
        with naming(result):
            Path(result).write_text(table, encoding='utf-8')


def say_round(turn: int, name: str, figures: Mapping[str, float]):
    """Prints a round's figures on standard error."""
    shown = (f'{key} {show(figure)}' for key, figure in figures.items())
    warn(f'round {turn + 1}, {name}: {", ".join(shown)}')


def show(figure: float) -> str:
    """Returns the figure with four digits, or as an integer if it has more."""
    return f'{figure:,.0f}' if figure >= 1000 else f'{figure:.4g}'


def spread(figures: Sequence[float]) -> str:
    """Returns 'median (lowest to highest)'."""
    low, middle, high = map(show, (min(figures), statistics.median(figures), max(figures)))
    return middle if low == high else f'{middle} ({low} to {high})'


class LapClock:
    """Measures the parts of a step: lap() adds the time since the last lap to a part."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, part: str):
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def time_batches(self, batches):
        for batch in batches:
            self.lap('data')
            yield batch
            self.lap('backward')  # the time in the caller's loop, except for the forward pass
        self.lap('data')  # the batch that is prepared ahead


class TimedModel:
    """A model whose forward pass is timed."""

    def __init__(self, model, clock):
        self.model, self.clock, self.parameters = model, clock, model.parameters

    def __call__(self, x, y):
        self.clock.lap('data')  # seeding for dropout
        loss = self.model(x, y)
        self.clock.lap('forward')
        return loss


class TimedBadSteps:
    """A guard.BadSteps that is timed."""

    def __init__(self, bad_steps, clock):
        self.bad_steps, self.clock = bad_steps, clock

    def usable(self, loss, grad_norm):
        self.clock.lap('optimizer')
        usable = self.bad_steps.usable(loss, grad_norm)
        self.clock.lap('checks')
        return usable


def timed_step(train_step, training, micro_batches, step: int, clock: LapClock):
    """Runs train.py's train_step, times its parts, and returns its result."""
    timed = replace(
        training,
        model=TimedModel(training.model, clock),
        bad_steps=TimedBadSteps(training.bad_steps, clock),
    )
    losses = train_step(timed, clock.time_batches(micro_batches), step)
    clock.lap('optimizer')
    return losses


def run(*command, folder: str | os.PathLike = ROOT) -> str:
    """Runs a Python script in a folder; returns what it prints.

    Raises UserError with the end of its output if it fails.
    """
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise UserError(f'{command[0]} failed in {folder}: {done.stdout[-500:]}')
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    """Returns the variables of a process that imports this project from any folder."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    return {**os.environ, 'PYTHONPATH': paths, **more}


class Worker:
    """A process that measures on request, so that programs can take turns.

    script: Python code, which runs in `folder`. It prints a JSON object when it is ready, and then
    one of figures for each line of standard input.
    """

    def __init__(self, name: str, script: str, *arguments: str, folder=ROOT, variables=os.environ):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, '-c', script, *arguments],
            cwd=folder,
            env=variables,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.answer()

    def round(self, line: str = 'go') -> dict[str, float]:
        """Sends a line to the script, and returns the figures of its answer."""
        self.send(line)
        return self.answer()

    def send(self, line: str):
        print(line, file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, float]:
        """Waits for the next figures. Raises UserError if the process has ended."""
        for line in self._process.stdout:
            if line.startswith('{'):  # programs print other lines too
                return json.loads(line)
        code = self._process.wait()
        raise UserError(f'{self.name} ended with exit code {code}; see its output above')

    def close(self):
        """Ends the process, and waits for its end, so that its memory is free."""
        self._process.stdin.close()
        self._process.wait()


def in_fresh_process(function: str, argument):
    """Calls a function, such as 'bench.measure_point', in a new process; returns its result.

    argument, and the result: what JSON can hold. Raises UserError with the last line of its errors
    if it fails.
    """
    module, _, name = function.rpartition('.')
    program = (
        f'import json, sys; from nib.errors import run_script; from {module} import {name}; '
        f'run_script(lambda argv: print("\\n" + json.dumps({name}(json.loads(argv[0])))))'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, json.dumps(argument)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [f'exit code {done.returncode}']
        raise UserError(errors[-1].removeprefix('error: '))
    return json.loads(done.stdout.splitlines()[-1])


def time_startup(flags: list[str]) -> float:
    """Returns the seconds from the start of train.py to the end of its first step.

    An evaluation of one batch comes before that step.
    """
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
                run.kill()  # before it evaluates the whole validation split
                return seconds
    raise UserError(f'train.py did not reach its first step: {output[-300:]}')


def time_import() -> float:
    """Returns the seconds until a new process has imported torch."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, '-c', 'import torch; print(flush=True)'], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        return time.perf_counter() - started
