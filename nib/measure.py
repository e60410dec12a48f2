"""What the benchmarks share: a machine's description and a table of medians with their spread."""
import os
import platform
import statistics
from collections.abc import Mapping, Sequence


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
