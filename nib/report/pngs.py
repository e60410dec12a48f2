"""Charts as PNGs, drawn by matplotlib, which is imported only there."""

import math
from collections.abc import Sequence

from nib.report.charts import (
    DASHES,
    LIGHT,
    NEUTRAL,
    SEVERITY_COLOURS,
    Axis,
    Chart,
    Flag,
    Key,
    Series,
    badge_rows,
    legend,
    show_number,
)

GOOD, QUIET = '#00704f', LIGHT[NEUTRAL]
HEIGHT = 4.5  # inches
COLUMNS = 3  # of the legend
NAMED = 24  # findings, so that the legend is no longer than the chart is high


def save_png(chart: Chart, time: Axis, flags: Sequence[Flag], path):
    """Draws what nib.report.charts.to_html draws. ImportError where matplotlib is missing."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a screen
    from matplotlib.lines import Line2D

    axis, series = chart.axis(), [drawn for one in chart.series for drawn in one.drawn()]
    figure = Figure(figsize=(9, HEIGHT), dpi=150, layout='constrained')
    axes = figure.subplots()
    if chart.band:
        axes.axhspan(*chart.band, color=GOOD, alpha=0.12, lw=0)
    if chart.level:
        axes.axhline(chart.level[0], color=QUIET, lw=1, ls=(0, (4, 3)))
    for one in series:
        # A logarithmic axis has no 0: such a value is at its border, as on the page.
        values = [
            math.nan if value is None else min(max(value, axis.low), axis.high)
            for value in one.values
        ]
        axes.plot(one.steps, values, clip_on=False, zorder=3, **style(one))
        if gaps := [step for step, value in zip(one.steps, one.values) if value is None]:
            axes.plot(
                gaps,
                [axis.high] * len(gaps),
                'x',
                color=SEVERITY_COLOURS['critical'],
                ms=6,
                clip_on=False,
            )
    for mark in chart.marks:
        axes.plot([mark.step], [mark.value], clip_on=False, zorder=4, **ring(mark.colour))
    rows = badge_rows([time.share(flag.step) for flag in flags])
    for flag, row in zip(flags, rows):
        colour = SEVERITY_COLOURS[flag.severity]
        axes.axvline(flag.step, color=colour, lw=1.2, ls=(0, (2, 2)))
        axes.annotate(
            str(flag.number),
            (flag.step, 1),
            (0, 8 + 15 * row),
            xycoords=('data', 'axes fraction'),
            textcoords='offset points',
            ha='center',
            va='center',
            color='white',
            fontsize=8,
            fontweight='bold',
            bbox={'boxstyle': 'round,pad=0.25', 'fc': colour, 'ec': 'none'},
            annotation_clip=False,
        )
    axes.set(
        xlim=(time.low, time.high),
        yscale='log' if axis.log else 'linear',
        ylim=(axis.low, axis.high),
        xlabel='step',
        xticks=time.ticks(whole=True),
        yticks=axis.ticks(),
    )
    for ticks in (axes.xaxis, axes.yaxis):
        ticks.set_major_formatter(lambda value, place: show_number(value))
    axes.minorticks_off()
    axes.set_title(
        f'{chart.title}, {chart.unit}'.removesuffix(', '),
        loc='left',
        fontweight='bold',
        pad=10 + 15 * (max(rows, default=-1) + 1),
    )
    axes.grid(color='#e3e6ea', lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    keys = [(proxy(key), key.label) for key in legend(chart, series)]
    keys += [
        (badge(flag), f'{flag.number} {flag.name}')
        for flag in sorted(flags, key=lambda flag: flag.number)[:NAMED]
    ]
    keys += [(Line2D([], [], ls=''), f'and {len(flags) - NAMED} more')] * (len(flags) > NAMED)
    if keys:
        figure.set_figheight(HEIGHT + 0.2 * ((len(keys) - 1) // COLUMNS))
        by_rows = [
            key for column in range(COLUMNS) for key in keys[column::COLUMNS]
        ]  # matplotlib fills column by column
        figure.legend(
            *zip(*by_rows), loc='outside lower left', frameon=False, fontsize=9, ncols=COLUMNS
        )
    figure.savefig(path)


def style(series: Series) -> dict:
    """As matplotlib's words for a line."""
    dashes = tuple(
        float(part) / 2 for part in DASHES[series.look].split()
    )  # counted in widths of the line
    dotted = series.dotted or series.look == 'dots' or len(series.steps) == 1
    return {
        'color': LIGHT[series.colour % len(LIGHT)],
        'ls': '' if series.look == 'dots' else (0, dashes) if dashes else '-',
        'lw': 0.9 if series.pale else 1.8,
        'alpha': 0.5 if series.pale else 1,
        'marker': 'o' if dotted else '',
        'ms': 4 if len(series.steps) < 200 else 2,
    }


def ring(colour: int) -> dict:
    return {
        'marker': 'o',
        'ms': 9,
        'mfc': 'white',
        'mec': LIGHT[colour % len(LIGHT)],
        'mew': 2,
        'ls': '',
    }


def badge(flag: Flag):
    """What stands for a finding in matplotlib's legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=SEVERITY_COLOURS[flag.severity], marker='s', ms=7, ls='')


def proxy(key: Key):
    """What stands for it in matplotlib's legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if key.shown == 'band':
        return Patch(color=GOOD, alpha=0.12, lw=0)
    return Line2D(
        [],
        [],
        **{
            'series': lambda: style(key.series),
            'ring': lambda: ring(key.series.colour),
            'level': lambda: {'color': QUIET, 'lw': 1, 'ls': (0, (4, 3))},
            'gap': lambda: {'color': SEVERITY_COLOURS['critical'], 'marker': 'x', 'ls': ''},
        }[key.shown](),
    )
