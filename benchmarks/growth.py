"""How speed and memory grow with a model's sizes: what bench.py --growth measures, its table and its picture."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import show
from nib.errors import UserError

# An axis, such as width -> its points from small to large; a point's first figure is its size on the axis.
Growth = Mapping[str, Sequence[Mapping[str, float]]]
STEP, SPEED, LIMIT, SHARE = 'ms/step', 'tokens/s', 'at matrix rate', '% of it'
MEMORY, BEFORE = 'peak memory, MB', 'before model, MB'


def measure(
    axes: Mapping[str, Sequence[str]],
    own: Mapping[str, int],
    slow: float,
    measure_point: Callable[[dict[str, int]], dict[str, float]],
) -> Growth:
    """The points along each axis, from an eighth of its own size on, each twice as large as the one before.

    axes: the sizes that change together on each, the first of which names a point. own: all sizes of the config that is on
    every axis. slow: ms; a step that takes longer is the last of its axis. measure_point: figures of the config with these
    sizes, or UserError where it has no room, which ends the axis too.
    """
    growth, own_point = {}, measure_point({})
    for axis, keys in axes.items():
        points = growth[axis] = []
        for power in range(-3, 12):
            sizes = {key: own[key] * 2.0**power for key in keys}
            if not all(size.is_integer() for size in sizes.values()):
                continue
            sizes = {key: int(size) for key, size in sizes.items()}
            size = sizes[keys[0]]
            try:
                point = own_point if power == 0 else measure_point(sizes)
            except UserError as error:
                if power < 0:
                    raise
                print(f'{axis} {size}: {error}', file=sys.stderr, flush=True)
                break
            points.append({axis: size, **point})
            print(f'{axis} {size}: {point[SPEED]:,.0f} tokens/s', file=sys.stderr, flush=True)
            if power >= 0 and point[STEP] > slow:
                break
    return growth


def make_table(growth: Growth) -> str:
    """A block of rows for each axis."""
    blocks = []
    for points in growth.values():
        rows = [points[0], *([show(figure) for figure in point.values()] for point in points)]
        blocks.append(''.join(''.join(f'{cell:>17}' for cell in row) + '\n' for row in rows))
    return '\n'.join(blocks)


def check_picture(path: str):
    """UserError where no picture can be drawn to this path, before minutes are spent on measuring."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            '--growth needs a package that is not here: pip install matplotlib'
        ) from error
    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in known or not Path(path).absolute().parent.is_dir():
        raise UserError(
            f'--growth={path}: it is a file to draw to, in a folder that is there, whose name ends in '
            + ', '.join(f'.{name}' for name in known)
        )


def draw(growth: Growth, path: str, title: str, own: Mapping[str, int], labels: Mapping[str, str]):
    """A column of panels for each axis: speed, its share of the rate of a large matrix product, and memory.

    own: where on each axis the config is that all of them go through; it gets a ring. labels: of the axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(10, 6.4), layout='constrained')
    figure.suptitle(title, fontsize=10)
    rows = figure.subplots(3, len(growth), sharex='col', sharey='row')
    for column, (axis, points) in zip(rows.T, growth.items()):
        sizes = [point[axis] for point in points]
        for panel, colour, limit, measured in zip(
            column,
            ('tab:blue', 'tab:red', 'tab:green'),
            (LIMIT, None, BEFORE),
            (SPEED, SHARE, MEMORY),
        ):
            if limit:
                label = (
                    'before the model is made'
                    if limit == BEFORE
                    else 'FLOPs alone, at the rate\nof a large matrix product'
                )
                panel.plot(
                    sizes, [point[limit] for point in points], '--', color='0.45', label=label
                )
            panel.plot(
                sizes, [point[measured] for point in points], 'o-', color=colour, markersize=4
            )
            panel.plot(
                own[axis],
                points[sizes.index(own[axis])][measured],
                'o',
                markersize=9,
                color='black',
                fillstyle='none',
            )
            panel.grid(color='0.9')
        panel.set_xscale('log', base=2)
        panel.set_xticks(sizes[::-2])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f'{size:.0f}'))
        panel.set_xlabel(labels[axis])
    names = ('tokens/s', '% of the rate of a\nlarge matrix product', 'peak memory, MB')
    for (panel, *_), name, base in zip(rows, names, (10, None, 2)):
        panel.set_ylabel(name)
        if base:
            panel.set_yscale('log', base=base)
            panel.yaxis.set_major_locator(LogLocator(base))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
    rows[1, 0].set_ylim(0, 100)
    rows[0, -1].legend(fontsize=8, loc='lower right')
    rows[2, -1].legend(fontsize=8, loc='upper left')
    figure.savefig(path, dpi=130)
