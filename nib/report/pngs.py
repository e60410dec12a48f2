"""Saves charts as PNGs. Only this module needs matplotlib, and imports it when it draws."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nib.files import naming
from nib.report.charts import (
    DASHES,
    LIGHT,
    NEUTRAL,
    SEVERITY_COLORS,
    Axis,
    Chart,
    Flag,
    Series,
    show_number,
)

# matplotlib's arguments for what is drawn alike in a chart and in its legend.
BAND: dict[str, Any] = {'color': '#00704f', 'alpha': 0.12}
LEVEL: dict[str, Any] = {'color': LIGHT[NEUTRAL], 'lw': 1, 'ls': (0, (4, 3))}
GAP: dict[str, Any] = {'color': SEVERITY_COLORS['critical'], 'marker': 'x', 'ls': ''}
HEIGHT = 4.5  # inches
COLUMNS = 3  # of the legend
BADGE = 0.06  # width of a finding's number, as a fraction of a chart's width on a phone
NAMED = 24  # findings at most in the legend, which should not be taller than the chart


def save_png(chart: Chart, time: Axis, flags: Sequence[Flag], path):
    """Saves a chart as a PNG that looks like the one of nib/report/page.js.

    Raises ImportError if matplotlib cannot be imported.
    """
    from matplotlib.figure import Figure  # pyplot would keep figures and look for a display
    from matplotlib.lines import Line2D

    axis, series = chart.axis(), chart.drawn()
    figure = Figure(figsize=(9, HEIGHT), dpi=150, layout='constrained')
    axes = figure.subplots()
    if chart.band:
        axes.axhspan(*chart.band, lw=0, **BAND)
    if chart.level:
        axes.axhline(chart.level[0], **LEVEL)
    for one in series:
        # A logarithmic axis has no 0: such a value is drawn at its end, as on the page.
        values = [math.nan if value is None else max(value, axis.low) for value in one.values]
        axes.plot(one.steps, values, clip_on=chart.falls, zorder=3, **style(one))
        gaps = [step for step, value in zip(one.steps, one.values) if value is None]
        if gaps:
            axes.plot(gaps, [axis.high] * len(gaps), clip_on=False, **GAP)
    for mark in chart.marks:
        axes.plot([mark.step], [mark.value], clip_on=False, zorder=4, **ring(mark.color))
    rows = badge_rows([time.share(flag.step) for flag in flags])
    for flag, row in zip(flags, rows):
        color = SEVERITY_COLORS[flag.severity]
        axes.axvline(flag.step, color=color, lw=1.2, ls=(0, (2, 2)))
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
            bbox={'boxstyle': 'round,pad=0.25', 'fc': color, 'ec': 'none'},
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
        drawable(f'{chart.title}, {chart.unit}'.removesuffix(', ')),
        loc='left',
        fontweight='bold',
        pad=10 + 15 * (max(rows, default=-1) + 1),
    )
    axes.grid(color='#e3e6ea', lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    keys = legend(chart, series)
    for flag in sorted(flags, key=lambda flag: flag.number)[:NAMED]:
        look = {'color': SEVERITY_COLORS[flag.severity], 'marker': 's', 'ms': 7, 'ls': ''}
        keys.append((look, f'{flag.number} {flag.name}'))
    if len(flags) > NAMED:
        keys.append(({'ls': ''}, f'and {len(flags) - NAMED} more'))
    if keys:
        figure.set_figheight(HEIGHT + 0.2 * ((len(keys) - 1) // COLUMNS))
        # matplotlib fills a legend column by column; this order makes it read row by row.
        by_rows = [key for column in range(COLUMNS) for key in keys[column::COLUMNS]]
        lines = [Line2D([], [], **look) for look, _ in by_rows]
        names = [drawable(name) for _, name in by_rows]
        figure.legend(
            lines, names, loc='outside lower left', frameon=False, fontsize=9, ncols=COLUMNS
        )
    with naming(path):
        figure.savefig(path)


def drawable(text: str) -> str:
    """Returns a text without halves of characters, which matplotlib rejects."""
    return text.encode(errors='replace').decode()


def style(series: Series) -> dict:
    """Returns matplotlib's arguments for a line."""
    dashes = tuple(float(part) / 2 for part in DASHES[series.look].split())  # in line widths
    solid = '' if series.look == 'dots' else '-'
    dotted = series.dotted or series.look == 'dots' or len(series.steps) == 1
    return {
        'color': LIGHT[series.color % len(LIGHT)],
        'ls': (0, dashes) if dashes else solid,
        'lw': 0.9 if series.pale else 1.8,
        'alpha': 0.5 if series.pale else 1,
        'marker': 'o' if dotted else '',
        'ms': 4 if len(series.steps) < 200 else 2,
    }


def ring(color: int) -> dict:
    return {
        'marker': 'o',
        'ms': 9,
        'mfc': 'white',
        'mec': LIGHT[color % len(LIGHT)],
        'mew': 2,
        'ls': '',
    }


def legend(chart: Chart, series: Sequence[Series]) -> list[tuple[dict, str]]:
    """Returns the entries of a chart's legend, or none if there is only one.

    An entry is matplotlib's arguments for a line, and its name. Several runs differ in color, and
    the series of each run in look.
    """
    keys = []
    if chart.band:
        low, high = map(show_number, chart.band)
        keys.append((BAND | {'lw': 6, 'solid_capstyle': 'butt'}, f'healthy: {low} to {high}'))
    if chart.level:
        keys.append((LEVEL, chart.level[1]))
    # The first series of each run and of each name, in order.
    runs, names = {}, {}
    for one in series:
        runs.setdefault(one.run, one)
        names.setdefault(one.name, one)
    if len(runs) > 1:
        for run, one in runs.items():
            keys.append((style(Series(run, (), (), one.color)), run))
        if len(names) > 1:
            for name, one in names.items():
                keys.append((style(replace(one, color=NEUTRAL)), name))
    else:
        keys += [(style(one), one.label) for one in series]
    for mark in chart.marks:
        if mark.label:
            keys.append((ring(mark.color), mark.label))
    if any(not mark.label for mark in chart.marks):
        keys.append((ring(NEUTRAL), 'best'))
    if any(value is None for one in series for value in one.values):
        keys.append((GAP, 'not finite'))
    return keys if len(keys) > 1 else []


def badge_rows(places: Sequence[float]) -> list[int]:
    """Returns a row above the chart for each finding's number, so that no two numbers overlap.

    places: positions on the time axis from 0 to 1, sorted.
    """
    rows, ends = [], []
    for place in places:
        row = next((row for row, end in enumerate(ends) if end <= place), len(ends))
        ends[row : row + 1] = [place + BADGE]
        rows.append(row)
    return rows
