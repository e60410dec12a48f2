"""A chart as data, and the two ways to draw it: HTML with SVG for a page, or a PNG by matplotlib.

A page's chart has no fixed width: the SVG is stretched with its box (its lines keep their width), and text is HTML beside it,
placed by percentages, so that it is as readable on a phone as on a large screen.
"""
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

BUCKETS = 500  # of a long series; each keeps its lowest and its highest value
HUGE = 1e300  # beyond it, sums of values are no numbers any more
TICKS = 5  # about so many on an axis
WIDE_RANGE = 10.0  # the largest value in medians, from which on an axis is logarithmic
BADGE = 0.06  # share of a chart's width that a finding's number takes, on a phone
# Colours that people with any of the colour blindnesses tell apart: Okabe and Ito (2008), darker on white; series also differ
# in their dashes.
LIGHT = ('#0072b2', '#d55e00', '#00805e', '#b0408a', '#7a6200', '#5b5f66')
DARK = ('#56b4e9', '#ff9a4d', '#2fc79b', '#e79ac6', '#e6d34a', '#a7adb5')
SEVERITIES = ('critical', 'warning', 'note')
SEVERITY_COLOURS = {'critical': '#c0182b', 'warning': '#a35f00', 'note': '#3d6ea8'}
DASHES = {'line': '', 'dots': '', 'dashed': '6 4', 'dotted': '1.5 4', 'mixed': '9 3 2 3'}


@dataclass(frozen=True)
class Series:
    name: str
    steps: Sequence[int]
    values: Sequence[float | None]  # None where it was not finite
    colour: int = 0
    look: str = 'line'  # a key of DASHES; 'dots' draws no line
    pale: bool = False  # in the background of the others
    dotted: bool = False  # a dot at each value, which are few

    def thinned(self) -> 'Series':
        """At most about 1,000 of its values, and every peak, trough and gap among them."""
        steps, values = self.steps, self.values
        if len(steps) <= 2 * BUCKETS:
            return self
        kept = {0, len(steps) - 1}
        for start, end in pairwise(bucket * len(steps) // BUCKETS for bucket in range(BUCKETS + 1)):
            finite = [index for index in range(start, end) if values[index] is not None]
            if finite:
                kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
            if len(finite) < end - start:
                kept.add(next(index for index in range(start, end) if values[index] is None))
        return replace(self, steps=[steps[index] for index in sorted(kept)], values=[values[index] for index in sorted(kept)])


@dataclass(frozen=True)
class Mark:
    """A point that is worth a name."""
    step: int
    value: float
    label: str
    colour: int = 0


@dataclass(frozen=True)
class Flag:
    """A finding on the time axis."""
    step: int
    number: int
    severity: str  # one of SEVERITIES
    name: str


@dataclass(frozen=True)
class Chart:
    key: str  # names its file
    title: str
    unit: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    band: tuple[float, float] | None = None  # the healthy range
    level: tuple[float, str] | None = None  # a limit, and its name
    log: bool | None = None  # None: where the largest value is far from the median
    from_zero: bool = False

    def axis(self) -> 'Axis':
        """The vertical one."""
        values = [value for series in self.series for value in series.values if value is not None]
        values += [mark.value for mark in self.marks] + ([self.level[0]] if self.level else []) + list(self.band or ())
        log = self.log
        if log is None:
            log = bool(values) and min(values) > 0 and max(values) > WIDE_RANGE * sorted(values)[len(values) // 2]
        if log:
            values = [value for value in values if value > 0]
        low, high = (min(values), max(values)) if values else (1.0, 10.0) if log else (0.0, 1.0)
        if log:
            room = (high / low) ** 0.05 if high > low else 2.0
            return Axis(low / room, high * room, log=True)
        low = min(low, 0.0) if self.from_zero else low
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return Axis(low if self.from_zero and low == 0 else low - room, high + room)


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where on the axis a value is: 0 at its beginning, 1 at its end. What lies outside is at its border."""
        if self.log:
            below, width = math.log(max(value, self.low) / self.low), math.log(self.high / self.low)
        else:
            below, width = value - self.low, self.high - self.low
        return min(1.0, max(0.0, below / width))

    def ticks(self, whole: bool = False) -> list[float]:
        """Round values on the axis; whole: of whole numbers only."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = 1 + (len(decades) - 2) // TICKS
            for factors in ((1,), (1, 2, 5)):
                ticks = [factor * 10.0 ** decade for decade in decades if decade % every == 0 for factor in factors]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) >= 3:
                    return ticks
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
        width = max(1.0, width) if whole else width
        first = math.ceil(self.low / width - 1e-9)
        return [round(index * width, 12 - math.floor(math.log10(width))) for index in
                range(first, first + 3 * TICKS) if index * width <= self.high + 1e-9 * width]


def time_axis(charts: Sequence[Chart]) -> Axis:
    """One for all charts, so that what happened together stands one above the other."""
    steps = [step for chart in charts for series in chart.series for step in (*series.steps[:1], *series.steps[-1:])]
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    return Axis(low, high) if high > low else Axis(low - 1, high + 1)


def show_number(value: float) -> str:
    """A number as people read it on an axis: 3e-6, 0.0005, 1.9, 1,500, 30k, 2.5M."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        mantissa, _, exponent = f'{value:.2e}'.partition('e')
        return f'{float(mantissa):g}e{int(exponent)}'
    for unit, name in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if size >= unit and size >= 1e4:
            return f'{value / unit:.4g}{name}'
    return f'{value:,.0f}' if size >= 1e3 else f'{value:.4g}'


# -- a page's chart --------------------------------------------------------------------------------------------------

def to_html(chart: Chart, time: Axis, flags: Sequence[Flag]) -> str:
    """A figure: its legend, its plot, and its values as JSON for the script that shows those under the pointer."""
    axis, series = chart.axis(), [one.thinned() for one in chart.series]

    def x(step):  # in the SVG's units, a thousand on each side
        return round(1000 * time.share(step), 1)

    def y(value):
        return round(1000 - 1000 * axis.share(value), 1)

    parts, labels, legend = [], [], []
    for tick in axis.ticks():
        parts.append(f'<path class="grid" d="M0 {y(tick)}H1000"/>')
        labels.append(f'<span class="y" style="top:{y(tick) / 10}%">{show_number(tick)}</span>')
    for tick in time.ticks(whole=True):
        labels.append(f'<span class="x" style="left:{x(tick) / 10}%">{show_number(tick)}</span>')
    if chart.band:
        low, high = map(y, chart.band)
        parts.append(f'<rect class="band" x="0" width="1000" y="{high}" height="{round(low - high, 1)}"/>')
        legend.append('<li><svg class="key" viewBox="0 0 24 10"><rect class="band" width="24" height="10"/></svg>'
                      f'healthy: {show_number(chart.band[0])} to {show_number(chart.band[1])}</li>')
    if chart.level:
        parts.append(f'<path class="level" d="M0 {y(chart.level[0])}H1000"/>')
        legend.append(f'<li><svg class="key" viewBox="0 0 24 10"><path class="level" d="M0 5H24"/></svg>{escape(chart.level[1])}</li>')
    for flag in flags:
        parts.append(f'<path class="flag {flag.severity}" d="M{x(flag.step)} 0V1000"/>')
    for one in series:
        points = [(x(step), None if value is None else y(value)) for step, value in zip(one.steps, one.values)]
        style = f'class="c{one.colour % len(LIGHT)}{" pale" if one.pale else ""}" stroke-dasharray="{DASHES[one.look]}"'
        if one.look != 'dots':
            parts.append(f'<path {style} d="{draw_line(points)}"/>')
        if one.look == 'dots' or one.dotted:
            parts.append(f'<path class="c{one.colour % len(LIGHT)} dot" d="{draw_dots(points)}"/>')
        if any(value is None for value in one.values):
            gaps = [(left, 0) for left, height in points if height is None]
            parts.append(f'<path class="gap" d="{draw_dots(gaps)}"/>')
        key = '<path class="c{} dot" d="M12 5h0"/>' if one.look == 'dots' else f'<path {style} d="M0 5H24"/>'
        legend.append(f'<li><svg class="key" viewBox="0 0 24 10">{key.format(one.colour % len(LIGHT))}</svg>{escape(one.name)}</li>')
    if any(value is None for one in series for value in one.values):
        legend.append('<li><svg class="key" viewBox="0 0 24 10"><path class="gap" d="M12 5h0"/></svg>not finite</li>')
    for mark in chart.marks:
        parts.append(f'<path class="c{mark.colour % len(LIGHT)} ring" d="M{x(mark.step)} {y(mark.value)}h0"/>'
                     f'<path class="hole" d="M{x(mark.step)} {y(mark.value)}h0"/>')
        side = f'right:{100 - x(mark.step) / 10:.2f}%' if x(mark.step) > 500 else f'left:{x(mark.step) / 10}%'
        below = ' below' if y(mark.value) < 120 else ''
        labels.append(f'<span class="mark{below}" style="{side};top:{y(mark.value) / 10}%">{escape(mark.label)}</span>')
    rows = badge_rows([time.share(flag.step) for flag in flags])
    labels += [f'<a class="badge {flag.severity}" href="#finding-{flag.number}" title="{escape(flag.name)}" '
               f'style="left:{x(flag.step) / 10}%;top:{-20 * (row + 1)}px">{flag.number}</a>' for flag, row in zip(flags, rows)]
    data = {'time': [time.low, time.high], 'series': [
        {'name': one.name, 'colour': one.colour % len(LIGHT), 'steps': list(one.steps),
         'values': [None if value is None else float(f'{value:.6g}') for value in one.values]} for one in series],
        'flags': [[flag.step, f'{flag.number} {flag.name}', flag.severity] for flag in flags]}
    return (f'<figure class="chart" id="{chart.key}"><figcaption>{escape(chart.title)} <small>{escape(chart.unit)}</small></figcaption>'
            f'<ul class="legend">{"".join(legend) if len(legend) > 1 else ""}</ul>'
            f'<div class="plot" style="margin-top:{20 * (max(rows, default=-1) + 1) + 8}px">'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(chart.title)} by step">'
            f'{"".join(parts)}</svg>{"".join(labels)}<div class="cursor"></div><div class="tip"></div></div>'
            f'<script type="application/json">{json.dumps(data, separators=(",", ":")).replace("<", chr(92) + "u003c")}</script></figure>')


def draw_line(points: Sequence[tuple[float, float | None]]) -> str:
    """An SVG path through the points, interrupted where there is no value; a point alone is a dot."""
    path, run = [], []
    for point in [*points, (0, None)]:
        if point[1] is not None:
            run.append('{:g} {:g}'.format(*point))
        elif run:
            path.append('M' + 'L'.join(run) + ('h0' if len(run) == 1 else ''))
            run = []
    return ''.join(path)


def draw_dots(points: Sequence[tuple[float, float | None]]) -> str:
    """Lines without length: with round ends they are dots, which no stretching of the SVG makes oval."""
    return ''.join(f'M{left:g} {top:g}h0' for left, top in points if top is not None)


def badge_rows(places: Sequence[float]) -> list[int]:
    """The row of each finding's number above a chart, so that none covers another. places: 0 to 1, in order."""
    rows, ends = [], []
    for place in places:
        row = next((row for row, end in enumerate(ends) if end <= place), len(ends))
        ends[row:row + 1] = [place + BADGE]
        rows.append(row)
    return rows


# -- a PNG -----------------------------------------------------------------------------------------------------------

def save_png(chart: Chart, time: Axis, flags: Sequence[Flag], path):
    """Draws it with matplotlib. ImportError where that is missing."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a screen
    axis = chart.axis()
    figure = Figure(figsize=(9, 4.5), dpi=150, layout='constrained')
    axes = figure.subplots()
    if chart.band:
        axes.axhspan(*chart.band, color='#00805e', alpha=0.12, lw=0,
                     label=f'healthy: {show_number(chart.band[0])} to {show_number(chart.band[1])}')
    if chart.level:
        axes.axhline(chart.level[0], color='#5b5f66', lw=1, ls=(0, (4, 3)), label=chart.level[1])
    for one in (one.thinned() for one in chart.series):
        colour = LIGHT[one.colour % len(LIGHT)]
        dashes = tuple(float(part) / 2 for part in DASHES[one.look].split())  # in widths of the line
        axes.plot(one.steps, [math.nan if value is None else value for value in one.values], color=colour, label=one.name,
                  ls='' if one.look == 'dots' else (0, dashes) if dashes else '-', lw=1 if one.pale else 1.8,
                  alpha=0.45 if one.pale else 1, marker='o' if one.dotted or one.look == 'dots' or len(one.steps) == 1 else '', ms=4,
                  clip_on=False, zorder=3)
        gaps = [step for step, value in zip(one.steps, one.values) if value is None]
        if gaps:
            axes.plot(gaps, [axis.high] * len(gaps), 'x', color=SEVERITY_COLOURS['critical'], ms=6, clip_on=False,
                      label='not finite')
    for mark in chart.marks:
        left = time.share(mark.step) > 0.5
        axes.plot([mark.step], [mark.value], 'o', ms=9, mfc='white', mec=LIGHT[mark.colour % len(LIGHT)], mew=2, clip_on=False, zorder=4)
        axes.annotate(mark.label, (mark.step, mark.value), (-8 if left else 8, 8), textcoords='offset points',
                      ha='right' if left else 'left', fontsize=9, fontweight='bold', zorder=5,
                      bbox={'boxstyle': 'round,pad=0.15', 'fc': 'white', 'ec': 'none', 'alpha': 0.8})
    rows = badge_rows([time.share(flag.step) for flag in flags])
    for flag, row in zip(flags, rows):
        colour = SEVERITY_COLOURS[flag.severity]
        axes.axvline(flag.step, color=colour, lw=1.2, ls=(0, (2, 2)))
        axes.annotate(str(flag.number), (flag.step, 1), (0, 8 + 15 * row), xycoords=('data', 'axes fraction'),
                      textcoords='offset points', ha='center', va='center', color='white', fontsize=8, fontweight='bold',
                      bbox={'boxstyle': 'round,pad=0.25', 'fc': colour, 'ec': 'none'}, annotation_clip=False)
    axes.set(xlim=(time.low, time.high), yscale='log' if axis.log else 'linear', ylim=(axis.low, axis.high), xlabel='step')
    axes.set_title(f'{chart.title}, {chart.unit}'.removesuffix(', '), loc='left', fontweight='bold',
                   pad=10 + 15 * (max(rows, default=-1) + 1))
    axes.yaxis.set_major_formatter(lambda value, place: show_number(value))
    axes.grid(color='#e3e6ea', lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles))  # 'not finite' may come from each series
    if len(once) > 1:
        figure.legend(once.values(), once.keys(), loc='outside lower left', frameon=False, fontsize=9, ncols=3)
    figure.savefig(path)
