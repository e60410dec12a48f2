"""Charts as data and as HTML with SVG; nib/report/pngs.py draws the same charts as PNGs.

A chart on a page has no fixed width. The SVG stretches with its box while its lines keep their
width. Text is HTML, placed by percentages, so that it is readable on a phone and on a large screen.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

BUCKETS = 500  # for a long series; each keeps its lowest and its highest value
TREND_BUCKETS = 200  # for the medians of a long, noisy series
NOISY = 10.0  # a series is noisy if its changes add up to more than this multiple of its range
FEW = 60  # a line with at most this many values may have a dot at each
SPARSE = 3  # a line with at most this many values always has dots
TINY = 1e-290  # ratios of smaller values overflow
DECADES = 12  # at most, on a logarithmic axis
TICKS = 5  # approximate number on an axis
WIDE_RANGE = 10.0  # an axis is logarithmic if the largest value exceeds this many medians
BADGE = 0.06  # width of a finding's number, as a fraction of a chart's width on a phone
# Similar to the colours of Okabe and Ito (2008), for a white and a dark background. They differ for
# people with any form of colour blindness, and a run's series also have different dashes. The last
# colour is neutral.
LIGHT = ('#0072b2', '#e06000', '#005040', '#c4708c', '#5a3f0c', '#5b5f66')
DARK = ('#56b4e9', '#f18a30', '#0b8d62', '#f6b7b8', '#f5ef66', '#a7adb5')
NEUTRAL = 5
SEVERITY_COLOURS = {'critical': '#c0182b', 'warning': '#a35f00', 'note': '#3d6ea8'}
DASHES = {'line': '', 'dots': '', 'dashed': '6 4', 'dotted': '1.5 4', 'mixed': '9 3 2 3'}


@dataclass(frozen=True)
class Series:
    name: str
    steps: Sequence[int]
    values: Sequence[float | None]  # None: not finite
    colour: int = 0
    look: str = 'line'  # a key of DASHES; 'dots' draws no line
    pale: bool = False  # drawn faintly, in the background
    dotted: bool = False  # a dot at each value if there are few
    run: str = ''  # the run's name, in a chart of several runs

    @property
    def label(self) -> str:
        return f'{self.run}: {self.name}' if self.run else self.name

    def drawn(self) -> list['Series']:
        """Returns the series to draw: this one, or for a long series its extremes.

        The extremes of a noisy series are pale, with its medians drawn over them.
        """
        dotted = len(self.steps) <= (FEW if self.dotted else SPARSE)
        series = replace(self, dotted=dotted)
        if len(self.steps) <= 2 * BUCKETS:
            return [series]
        peaks = series.chosen(BUCKETS, lambda finite: {finite[0], finite[-1]})
        finite = [value for value in peaks.values if value is not None]
        climbed = sum(abs(after - before) for before, after in pairwise(finite))
        if self.look == 'dots' or not finite or climbed <= NOISY * (max(finite) - min(finite)):
            return [peaks]
        trend = series.chosen(TREND_BUCKETS, lambda finite: {finite[len(finite) // 2]})
        return [
            replace(peaks, look='line', pale=True),
            replace(trend, name=f'{self.name}, medians', pale=False),
        ]

    def chosen(self, buckets: int, choose) -> 'Series':
        """Returns the series reduced to some values of each bucket.

        choose: takes the indices of a bucket's finite values, sorted by value, and returns the set
        of those to keep. A bucket with values that are not finite also keeps the first of them.
        """
        kept, values = set(), self.values
        borders = [bucket * len(values) // buckets for bucket in range(buckets + 1)]
        for start, end in pairwise(borders):
            finite = [index for index in range(start, end) if values[index] is not None]
            finite.sort(key=values.__getitem__)
            if finite:
                kept |= choose(finite)
            if len(finite) < end - start:
                kept.add(next(index for index in range(start, end) if values[index] is None))
        steps = [self.steps[index] for index in sorted(kept)]
        return replace(self, steps=steps, values=[values[index] for index in sorted(kept)])


@dataclass(frozen=True)
class Mark:
    """A highlighted point."""

    step: int
    value: float
    label: str  # in the legend; '' in a chart of several runs
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
    key: str  # its file's name
    title: str
    unit: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    band: tuple[float, float] | None = None  # the healthy range
    level: tuple[float, str] | None = None  # a limit, and its name
    log: bool | None = None  # None: if the largest value is far above the median
    from_zero: bool = False

    def axis(self) -> 'Axis':
        """Returns the vertical axis."""
        values = [value for series in self.series for value in series.values if value is not None]
        values += [mark.value for mark in self.marks]
        values += [self.level[0]] if self.level else []
        values += self.band or ()
        log = self.log
        if log is None:
            positive = bool(values) and min(values) > 0
            log = positive and max(values) > WIDE_RANGE * sorted(values)[len(values) // 2]
        if log:
            values = [value for value in values if value > TINY]
            low, high = (min(values), max(values)) if values else (1.0, 10.0)
            low = max(low, high / 10**DECADES)
            room = (high / low) ** 0.05 if high > 1.001 * low else 2.0
            return Axis(low / room, high * room, log=True)
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        low = min(low, 0.0) if self.from_zero else low
        size = max(abs(low), abs(high))
        if high - low > max(1e-9 * size, TINY):
            room = 0.06 * (high - low)
        else:
            room = 0.1 * size if size > TINY else 1.0
        return Axis(low if self.from_zero and low == 0 else low - room, high + room)


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Returns a value's position on the axis, clipped to the range from 0 to 1."""
        if self.log:
            below, width = math.log(max(value, self.low) / self.low), math.log(self.high / self.low)
        else:
            below, width = value - self.low, self.high - self.low
        return min(1.0, max(0.0, below / width))

    def ticks(self, whole: bool = False) -> list[float]:
        """Returns round values on the axis; whole: only whole numbers."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = 1 + (len(decades) - 2) // TICKS
            for factors in ((1,), (1, 2, 5)):
                shown = [decade for decade in decades if decade % every == 0]
                ticks = [factor * 10.0**decade for decade in shown for factor in factors]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) >= 3:
                    return ticks
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
        width = max(1.0, width) if whole else width
        first = math.ceil(self.low / width - 1e-9)
        ticks = [
            round(index * width, 12 - math.floor(math.log10(width)))
            for index in range(first, first + 3 * TICKS)
            if index * width <= self.high + 1e-9 * width
        ]
        # Whole numbers are exact: one that rounding has put below the axis is not on it.
        return [tick for tick in ticks if tick >= self.low] if whole else ticks


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    shown: str  # 'series', 'band', 'level', 'ring' or 'gap'
    label: str
    series: Series | None = None  # a series with the same look


def legend(chart: Chart, series: Sequence[Series]) -> list[Key]:
    """Returns the entries of a chart's legend, or none if there is only one.

    Several runs differ in colour, and the series of each run in look.
    """
    keys = []
    if chart.band:
        low, high = map(show_number, chart.band)
        keys.append(Key('band', f'healthy: {low} to {high}'))
    if chart.level:
        keys.append(Key('level', chart.level[1]))
    # The first series of each run and of each name, in order.
    runs, names = {}, {}
    for one in series:
        runs.setdefault(one.run, one)
        names.setdefault(one.name, one)
    if len(runs) > 1:
        for run, one in runs.items():
            keys.append(Key('series', run, Series(run, (), (), one.colour)))
        if len(names) > 1:
            for name, one in names.items():
                keys.append(Key('series', name, replace(one, colour=NEUTRAL)))
    else:
        keys += [Key('series', one.label, one) for one in series]
    for mark in chart.marks:
        if mark.label:
            keys.append(Key('ring', mark.label, Series('', (), (), mark.colour)))
    if any(not mark.label for mark in chart.marks):
        keys.append(Key('ring', 'best', Series('', (), (), NEUTRAL)))
    if any(value is None for one in series for value in one.values):
        keys.append(Key('gap', 'not finite'))
    return keys if len(keys) > 1 else []


def time_axis(charts: Sequence[Chart]) -> Axis:
    """Returns one axis for all charts, so that a step has the same place in each of them."""
    steps = []
    for chart in charts:
        for series in chart.series:
            steps += [*series.steps[:1], *series.steps[-1:]]
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    low = 0 if low < 0.02 * high else low
    return Axis(low, high) if high > low else Axis(low - 1, high + 1)


def show_number(value: float) -> str:
    """Formats a number for people: 3e-6, 0.0005, 1.9, 1,500, 30k, 2.5M."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        mantissa, _, exponent = f'{value:.2e}'.partition('e')
        return f'{float(mantissa):g}e{int(exponent)}'
    for unit, name in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if size >= unit and size >= 1e4:
            return f'{value / unit:.4g}{name}'
    return f'{value:,.0f}' if size >= 1e3 else f'{value:.4g}'


# -- a page's chart --------------------------------------------------------------------------------


def to_html(chart: Chart, time: Axis, flags: Sequence[Flag]) -> str:
    """Returns a figure element: legend, plot, and the values as JSON for the tooltips' script."""
    axis, series = chart.axis(), [drawn for one in chart.series for drawn in one.drawn()]

    def x(step):  # in SVG units: the plot is 1000 wide and 1000 high
        return round(1000 * time.share(step), 1)

    def y(value):
        return round(1000 - 1000 * axis.share(value), 1)

    parts, labels = [], []
    for tick in axis.ticks():
        parts.append(f'<path class="grid" d="M0 {y(tick):g}H1000"/>')
        labels.append(f'<span class="y" style="top:{y(tick) / 10:g}%">{show_number(tick)}</span>')
    for tick in time.ticks(whole=True):
        labels.append(f'<span class="x" style="left:{x(tick) / 10:g}%">{show_number(tick)}</span>')
    if chart.band:
        low, high = map(y, chart.band)
        parts.append(f'<rect class="band" width="1000" y="{high:g}" height="{low - high:g}"/>')
    if chart.level:
        parts.append(f'<path class="level" d="M0 {y(chart.level[0]):g}H1000"/>')
    parts += [
        f'<path class="flag {flag.severity}" d="M{x(flag.step):g} 0V1000"/>' for flag in flags
    ]
    for one in series:
        heights = [None if value is None else y(value) for value in one.values]
        points = list(zip(map(x, one.steps), heights))
        parts.append(draw_series(one, points))
        if gaps := [(left, 0) for left, height in points if height is None]:
            parts.append(f'<path class="gap" d="{draw_dots(gaps)}"/>')
    for mark in chart.marks:
        place = draw_dots([(x(mark.step), y(mark.value))])
        parts.append(f'<path class="c{mark.colour % len(LIGHT)} ring" d="{place}"/>')
        parts.append(f'<path class="hole" d="{place}"/>')
    rows = badge_rows([time.share(flag.step) for flag in flags])
    for flag, row in zip(flags, rows):
        place = f'left:{x(flag.step) / 10:g}%;top:{-20 * (row + 1)}px'
        labels.append(
            f'<a class="badge {flag.severity}" href="#finding-{flag.number}" '
            f'title="{escape(flag.name)}" style="{place}">{flag.number}</a>'
        )
    keys = ''.join(
        f'<li><svg class="key" viewBox="0 0 24 10">{draw_key(key)}</svg>{escape(key.label)}</li>'
        for key in legend(chart, series)
    )
    data = {
        'time': [time.low, time.high],
        'flags': [[flag.step, f'{flag.number} {flag.name}', flag.severity] for flag in flags],
        'series': [series_data(one) for one in series],
    }
    title, room = escape(chart.title), 20 * (max(rows, default=-1) + 1) + 8
    return (
        f'<figure class="chart" id="{chart.key}">'
        f'<figcaption>{title} <small>{escape(chart.unit)}</small></figcaption>'
        f'<ul class="legend" style="margin-bottom:{room}px">{keys}</ul><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{title} by step">{"".join(parts)}</svg>{"".join(labels)}'
        f'<div class="cursor"></div><div class="tip"></div></div>'
        f'<script type="application/json">{to_json(data)}</script></figure>'
    )


def series_data(series: Series) -> dict:
    """Returns what the page's script needs of a series, as JSON."""
    rounded = [None if value is None else float(f'{value:.6g}') for value in series.values]
    return {
        'name': series.label,
        'colour': series.colour % len(LIGHT),
        'dots': series.look == 'dots',
        'steps': list(series.steps),
        'values': rounded,
    }


def to_json(data) -> str:
    """Returns JSON that is safe inside a script element: no text in it can close the element."""
    return json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')


def draw_series(series: Series, points: Sequence[tuple[float, float | None]]) -> str:
    """Returns SVG for a line with its dashes, dots, or both. points: x and y, None for a gap."""
    colour, drawn = f'c{series.colour % len(LIGHT)}', ''
    if series.look != 'dots':
        dashes = f' stroke-dasharray="{DASHES[series.look]}"' if DASHES[series.look] else ''
        pale = ' pale' if series.pale else ''
        drawn += f'<path class="{colour}{pale}"{dashes} d="{draw_line(points)}"/>'
    if series.look == 'dots' or series.dotted:
        dot = 'dot' if len(points) <= 3 * FEW else 'small dot'
        drawn += f'<path class="{colour} {dot}" d="{draw_dots(points)}"/>'
    return drawn


def draw_key(key: Key) -> str:
    """Returns SVG for a legend's entry, 24 wide and 10 high."""
    if key.shown == 'series':
        points = [(12, 5)] if key.series.look == 'dots' else [(0, 5), (24, 5)]
        return draw_series(replace(key.series, dotted=False), points)
    if key.shown == 'ring':
        ring = f'<path class="c{key.series.colour % len(LIGHT)} ring" d="M12 5h0"/>'
        return ring + '<path class="hole" d="M12 5h0"/>'
    return {
        'band': '<rect class="band" width="24" height="10"/>',
        'level': '<path class="level" d="M0 5H24"/>',
        'gap': '<path class="gap" d="M12 5h0"/>',
    }[key.shown]


def draw_line(points: Sequence[tuple[float, float | None]]) -> str:
    """Returns an SVG path through the points with gaps where y is None; a single point is a dot."""
    path, run = [], []
    for point in [*points, (0, None)]:
        if point[1] is not None:
            run.append('{:g} {:g}'.format(*point))
        elif run:
            path.append('M' + 'L'.join(run) + ('h0' if len(run) == 1 else ''))
            run = []
    return ''.join(path)


def draw_dots(points: Sequence[tuple[float, float | None]]) -> str:
    """Returns an SVG path of zero-length lines; with round caps they are dots at any stretch."""
    return ''.join(f'M{left:g} {top:g}h0' for left, top in points if top is not None)


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
