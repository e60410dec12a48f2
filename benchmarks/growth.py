"""Measures how speed and memory grow with a model's sizes: the work of bench.py --growth."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import show
from nib.errors import UserError, optional, warn

# Axis, such as 'width' -> its points from small to large. A point's first figure is its size.
Growth = Mapping[str, Sequence[Mapping[str, float]]]
STEP, SPEED, LIMIT, SHARE = 'ms/step', 'tokens/s', 'at matrix rate', '% of it'
MEMORY, BEFORE = 'peak memory, MB', 'before model, MB'


# The config keys that change together on each axis; the first one gives a point's size.
AXES = {
    'width': ('n_embd', 'n_head', 'n_kv_head'),
    'depth': ('n_layer',),
    'context': ('block_size',),
    'batch': ('batch_size',),
}
SLOW = 700  # ms; an axis ends with the first step that takes longer


def measure(config: Mapping, measure_point: Callable[[dict[str, int]], dict[str, float]]) -> Growth:
    """Measures along each axis, doubling the sizes, from an eighth of the config's own size.

    measure_point: returns the figures of the config with these sizes, or raises UserError if it
    does not fit into memory, which ends the axis too.
    """
    growth: dict[str, list] = {}
    own_point = measure_point({})
    for axis, keys in AXES.items():
        points = growth[axis] = []
        for power in range(-3, 12):
            scaled = {key: config[key] * 2.0**power for key in keys}
            if not all(size.is_integer() for size in scaled.values()):
                continue
            sizes = {key: int(size) for key, size in scaled.items()}
            size = sizes[keys[0]]
            try:
                point = own_point if power == 0 else measure_point(sizes)
            except UserError as error:
                if power < 0:
                    raise
                warn(f'{axis} {size}: {error}')
                break
            points.append({axis: size, **point})
            warn(f'{axis} {size}: {point[SPEED]:,.0f} tokens/s')
            if power >= 0 and point[STEP] > SLOW:
                break
    return growth


def make_table(growth: Growth) -> str:
    """Formats the figures as text, one block of rows per axis."""
    blocks = []
    for points in growth.values():
        rows = [points[0], *([show(figure) for figure in point.values()] for point in points)]
        blocks.append(''.join(''.join(f'{cell:>17}' for cell in row) + '\n' for row in rows))
    return '\n'.join(blocks)


def check_picture(path: str):
    """Raises UserError if no plot can be saved to this path, before minutes of measuring."""
    with optional('matplotlib', '--growth'):
        from matplotlib.figure import Figure
    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in known or not Path(path).absolute().parent.is_dir():
        suffixes = ', '.join(f'.{name}' for name in known)
        raise UserError(
            f'--growth={path}: expected a file in an existing folder, with a name that ends in '
            f'{suffixes}'
        )


def draw(growth: Growth, path: str, title: str, config: Mapping):
    """Plots a column of panels for each axis: speed, its share of the matrix rate, and memory.

    The config's own size on each axis is marked with a ring.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    labels = {
        'width': f'width (heads of {config["n_embd"] // config["n_head"]})',
        'depth': 'depth (layers)',
        'context': 'context (tokens)',
        'batch': 'batch (sequences)',
    }
    figure = Figure(figsize=(10, 6.4), layout='constrained')
    figure.suptitle(title, fontsize=10)
    rows = figure.subplots(3, len(growth), sharex='col', sharey='row')
    for column, (axis, points) in zip(rows.T, growth.items()):
        sizes = [point[axis] for point in points]
        own = config[AXES[axis][0]]
        own_point = points[sizes.index(own)]
        panels = (
            (SPEED, 'tab:blue', LIMIT, 'FLOPs alone, at the rate\nof a large matrix product'),
            (SHARE, 'tab:red', None, ''),
            (MEMORY, 'tab:green', BEFORE, 'before the model is created'),
        )
        for panel, (measured, color, limit, label) in zip(column, panels):
            if limit:
                limits = [point[limit] for point in points]
                panel.plot(sizes, limits, '--', color='0.45', label=label)
            figures = [point[measured] for point in points]
            panel.plot(sizes, figures, 'o-', color=color, markersize=4)
            ring = {'markersize': 9, 'color': 'black', 'fillstyle': 'none'}
            panel.plot(own, own_point[measured], 'o', **ring)
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
