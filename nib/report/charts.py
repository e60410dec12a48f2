"""A chart as data, and as HTML with SVG for a page; nib/report/pngs.py draws it as a PNG.

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
TREND_BUCKETS = 200  # of its medians
NOISY = 10.0  # times its whole range that such a series rises and falls
FEW = 60  # so many dots can be told apart on a line
SPARSE = 3  # so few values would be missed without dots
TINY = 1e-290  # below it, quotients of values are no numbers any more
DECADES = 12  # at most, on a logarithmic axis
TICKS = 5  # about so many on an axis
WIDE_RANGE = 10.0  # the largest value in medians, from which on an axis is logarithmic
BADGE = 0.06  # share of a chart's width that a finding's number takes, on a phone
# Near those of Okabe and Ito (2008), on white and on a dark ground: people with any of the colour blindnesses tell them apart,
# and a run's series differ in their dashes too. The last one is neutral.
LIGHT = ('#0072b2', '#e06000', '#005040', '#c4708c', '#5a3f0c', '#5b5f66')
DARK = ('#56b4e9', '#f18a30', '#0b8d62', '#f6b7b8', '#f5ef66', '#a7adb5')
NEUTRAL = 5
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
    dotted: bool = False  # a dot at each value, where they are few
    run: str = ''  # whose it is, in a chart of several

    @property
    def label(self) -> str:
        return f'{self.run}: {self.name}' if self.run else self.name

    def drawn(self) -> list['Series']:
        """The series itself; or of a long one its peaks and troughs, with its medians before them where it is noisy."""
        series = replace(
            self, dotted=self.dotted and len(self.steps) <= FEW or len(self.steps) <= SPARSE
        )
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
        """Of each bucket the values that choose takes of the finite ones, given in order of size, and a gap where it has one."""
        kept, values = set(), self.values
        for start, end in pairwise(
            bucket * len(values) // buckets for bucket in range(buckets + 1)
        ):
            finite = sorted(
                (index for index in range(start, end) if values[index] is not None),
                key=values.__getitem__,
            )
            kept |= choose(finite) if finite else set()
            if len(finite) < end - start:
                kept.add(next(index for index in range(start, end) if values[index] is None))
        kept = sorted(kept)
        return replace(
            self,
            steps=[self.steps[index] for index in kept],
            values=[values[index] for index in kept],
        )


@dataclass(frozen=True)
class Mark:
    """A point that stands out."""

    step: int
    value: float
    label: str  # in the legend; '' where there are several
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
        values += (
            [mark.value for mark in self.marks]
            + ([self.level[0]] if self.level else [])
            + list(self.band or ())
        )
        log = self.log
        if log is None:
            log = (
                bool(values)
                and min(values) > 0
                and max(values) > WIDE_RANGE * sorted(values)[len(values) // 2]
            )
        if log:
            values = [value for value in values if value > TINY]
        low, high = (min(values), max(values)) if values else (1.0, 10.0) if log else (0.0, 1.0)
        if log:
            low = max(low, high / 10**DECADES)
            room = (high / low) ** 0.05 if high > 1.001 * low else 2.0
            return Axis(low / room, high * room, log=True)
        low = min(low, 0.0) if self.from_zero else low
        size = max(abs(low), abs(high))
        room = (
            0.06 * (high - low)
            if high - low > max(1e-9 * size, TINY)
            else 0.1 * size
            if size > TINY
            else 1.0
        )
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
                ticks = [
                    factor * 10.0**decade
                    for decade in decades
                    if decade % every == 0
                    for factor in factors
                ]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) >= 3:
                    return ticks
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
        width = max(1.0, width) if whole else width
        first = math.ceil(self.low / width - 1e-9)
        return [
            round(index * width, 12 - math.floor(math.log10(width)))
            for index in range(first, first + 3 * TICKS)
            if index * width <= self.high + 1e-9 * width
        ]


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    shown: str  # 'series', 'band', 'level', 'ring' or 'gap'
    label: str
    series: Series | None = None  # one that looks like it


def legend(chart: Chart, series: Sequence[Series]) -> list[Key]:
    """Several runs are told apart by their colours, and what is drawn of each by its looks."""
    keys = (
        [Key('band', f'healthy: {show_number(chart.band[0])} to {show_number(chart.band[1])}')]
        if chart.band
        else []
    )
    keys += [Key('level', chart.level[1])] if chart.level else []
    runs, names = (
        {getattr(one, part): one for one in reversed(series)} for part in ('run', 'name')
    )
    if len(runs) > 1:
        keys += [
            Key('series', run, Series(run, (), (), one.colour))
            for run, one in reversed(runs.items())
        ]
        keys += [
            Key('series', name, replace(one, colour=NEUTRAL))
            for name, one in reversed(names.items())
            if len(names) > 1
        ]
    else:
        keys += [Key('series', one.label, one) for one in series]
    keys += [
        Key('ring', mark.label, Series('', (), (), mark.colour))
        for mark in chart.marks
        if mark.label
    ]
    keys += (
        [Key('ring', 'best', Series('', (), (), NEUTRAL))]
        if any(not mark.label for mark in chart.marks)
        else []
    )
    keys += (
        [Key('gap', 'not finite')]
        if any(value is None for one in series for value in one.values)
        else []
    )
    return keys if len(keys) > 1 else []


def time_axis(charts: Sequence[Chart]) -> Axis:
    """One for all charts, so that what happened together stands one above the other."""
    steps = [
        step
        for chart in charts
        for series in chart.series
        for step in (*series.steps[:1], *series.steps[-1:])
    ]
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    low = 0 if low < 0.02 * high else low
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


# -- a page's chart --------------------------------------------------------------------------------


def to_html(chart: Chart, time: Axis, flags: Sequence[Flag]) -> str:
    """A figure: its legend, its plot, and its values as JSON for the script that shows those under the pointer."""
    axis, series = chart.axis(), [drawn for one in chart.series for drawn in one.drawn()]

    def x(step):  # in the SVG's units, a thousand on each side
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
        points = [
            (x(step), None if value is None else y(value))
            for step, value in zip(one.steps, one.values)
        ]
        parts.append(draw_series(one, points))
        if gaps := [(left, 0) for left, height in points if height is None]:
            parts.append(f'<path class="gap" d="{draw_dots(gaps)}"/>')
    for mark in chart.marks:
        place = draw_dots([(x(mark.step), y(mark.value))])
        parts.append(
            f'<path class="c{mark.colour % len(LIGHT)} ring" d="{place}"/><path class="hole" d="{place}"/>'
        )
    rows = badge_rows([time.share(flag.step) for flag in flags])
    labels += [
        f'<a class="badge {flag.severity}" href="#finding-{flag.number}" title="{escape(flag.name)}" '
        f'style="left:{x(flag.step) / 10:g}%;top:{-20 * (row + 1)}px">{flag.number}</a>'
        for flag, row in zip(flags, rows)
    ]
    keys = ''.join(
        f'<li><svg class="key" viewBox="0 0 24 10">{draw_key(key)}</svg>{escape(key.label)}</li>'
        for key in legend(chart, series)
    )
    data = {
        'time': [time.low, time.high],
        'flags': [[flag.step, f'{flag.number} {flag.name}', flag.severity] for flag in flags],
        'series': [
            {
                'name': one.label,
                'colour': one.colour % len(LIGHT),
                'dots': one.look == 'dots',
                'steps': list(one.steps),
                'values': [
                    None if value is None else float(f'{value:.6g}') for value in one.values
                ],
            }
            for one in series
        ],
    }
    return (
        f'<figure class="chart" id="{chart.key}">'
        f'<figcaption>{escape(chart.title)} <small>{escape(chart.unit)}</small></figcaption>'
        f'<ul class="legend" style="margin-bottom:{20 * (max(rows, default=-1) + 1) + 8}px">{keys}</ul><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(chart.title)} by step">'
        f'{"".join(parts)}</svg>{"".join(labels)}<div class="cursor"></div><div class="tip"></div></div>'
        f'<script type="application/json">{to_json(data)}</script></figure>'
    )


def to_json(data) -> str:
    """JSON that may stand in a page: no text in it can end its script element."""
    return json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')


def draw_series(series: Series, points: Sequence[tuple[float, float | None]]) -> str:
    """A line with its dashes, dots, or both."""
    colour, drawn = f'c{series.colour % len(LIGHT)}', ''
    if series.look != 'dots':
        dashes = f' stroke-dasharray="{DASHES[series.look]}"' if DASHES[series.look] else ''
        drawn += f'<path class="{colour}{" pale" if series.pale else ""}"{dashes} d="{draw_line(points)}"/>'
    if series.look == 'dots' or series.dotted:
        drawn += f'<path class="{colour} {"dot" if len(points) <= 3 * FEW else "small dot"}" d="{draw_dots(points)}"/>'
    return drawn


def draw_key(key: Key) -> str:
    if key.shown == 'series':
        return draw_series(
            replace(key.series, dotted=False),
            [(12, 5)] if key.series.look == 'dots' else [(0, 5), (24, 5)],
        )
    if key.shown == 'ring':
        return f'<path class="c{key.series.colour % len(LIGHT)} ring" d="M12 5h0"/><path class="hole" d="M12 5h0"/>'
    return {
        'band': '<rect class="band" width="24" height="10"/>',
        'level': '<path class="level" d="M0 5H24"/>',
        'gap': '<path class="gap" d="M12 5h0"/>',
    }[key.shown]


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
        ends[row : row + 1] = [place + BADGE]
        rows.append(row)
    return rows
