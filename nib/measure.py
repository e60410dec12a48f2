"""What the benchmarks share: a machine's description, a table of medians with their spread, nanoGPT to measure beside."""
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nib.errors import UserError


def describe_machine(device: str = 'cpu') -> str:
    """Processor or GPU, cores, Python and torch, on one line."""
    import torch
    name = platform.processor() or 'CPU'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            name = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), name)
    if device.startswith('cuda'):
        name = f'{torch.cuda.get_device_name(device)}, {name}'
    return f'{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}'


def make_table(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Rows of 'median (lowest to highest)' for each of one or two contestants, whose rounds stand at the same index.

    measured: contestant -> its rounds, each quantity -> figure. The ratio is that of the second to the first, round by
    round, as a machine's speed drifts; its median and spread.
    """
    names = list(measured)
    lines = [f'{"median (lowest to highest)":30}' + ''.join(f'{name:>34}' for name in names)
             + (f'{names[1] + " / " + names[0]:>28}' if len(names) == 2 else '')]
    for key in measured[names[-1]][0]:
        columns = [[turn[key] for turn in measured[name] if key in turn] for name in names]
        cells = ''.join(f'{_spread(column) if column else "":>34}' for column in columns)
        if len(names) == 2 and all(columns):
            cells += f'{_spread([second / first for first, second in zip(*columns)]):>28}'
        lines.append(f'{key:30}{cells}')
    return '\n'.join(lines) + '\n'


def _spread(figures: Sequence[float]) -> str:
    low, middle, high = (f'{figure:,.0f}' if figure >= 1000 else f'{figure:.4g}'
                         for figure in (min(figures), statistics.median(figures), max(figures)))
    return middle if low == high else f'{middle} ({low} to {high})'


class NanoGPT:
    """nanoGPT's model.py in a process of its own, which measures when it is told to.

    script: Python that runs in the clone with the job as JSON in sys.argv[1]. It prints {} when it is ready, then for each
    line of standard input a JSON object of figures.
    """

    def __init__(self, flag: str, clone: str, script: str, job: Mapping):
        if not clone or not (Path(clone) / 'model.py').exists():
            raise UserError(f'--{flag}={clone}: it is the path of a clone of karpathy/nanoGPT')
        self._process = subprocess.Popen([sys.executable, '-c', script, json.dumps(job)], cwd=clone, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer()

    def round(self, what: str = 'go') -> dict[str, float]:
        """The figures of one round of what was asked for."""
        self._process.stdin.write(what + '\n')
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        for line in self._process.stdout:
            if line.startswith('{'):  # its code prints other lines too
                return json.loads(line)
        raise UserError(f'nanoGPT ended with exit code {self._process.wait()}; what it said stands above')
