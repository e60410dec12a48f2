"""Charts as data. nib/report/page.js draws them on the page, nib/report/pngs.py as PNGs.

There is no chart library on the page: with plotly 7.1, the same 14 charts of a run with 10,000 log
lines are 7.5 MB instead of 0.3 MB and take 5 to 7 s instead of 0.3 s to open (Chromium, 2 cores).
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

import numpy as np

BUCKETS = 500  # for a long series; each keeps its lowest and its highest value
CHART_BUCKETS = 5000  # for all series of a chart, so that a page of many runs does not become large
TREND_BUCKETS = 200  # for the medians of a long, noisy series
NOISY = 10.0  # a series is noisy if its changes add up to more than this multiple of its range
FEW = 60  # a line with at most this many values may have a dot at each
SPARSE = 3  # a line with at most this many values always has dots
TINY = 1e-290  # ratios of smaller values overflow
DECADES = 12  # at most, on a logarithmic axis
TICKS = 5  # approximate number on an axis
WIDE_RANGE = 10.0  # an axis is logarithmic if the largest value exceeds this many medians
INITIAL_DROP = 0.1  # part of the steps that does not count for the range of a falling curve's chart
# Similar to the colors of Okabe and Ito (2008), for a white and a dark background. They differ for
# people with any form of color blindness, and a run's series also have different dashes. The last
# color is neutral.
LIGHT = ('#0072b2', '#e06000', '#005040', '#c4708c', '#5a3f0c', '#5b5f66')
DARK = ('#56b4e9', '#f18a30', '#0b8d62', '#f6b7b8', '#f5ef66', '#a7adb5')
NEUTRAL = 5
SEVERITY_COLORS = {'critical': '#c0182b', 'warning': '#a35f00', 'note': '#3d6ea8'}
DASHES = {'line': '', 'dots': '', 'dashed': '6 4', 'dotted': '1.5 4', 'mixed': '9 3 2 3'}


@dataclass(frozen=True)
class Series:
    name: str
    steps: Sequence[int]
    values: Sequence[float | None]  # None: not finite
    color: int = 0
    look: str = 'line'  # a key of DASHES; 'dots' draws no line
    pale: bool = False  # drawn faintly, in the background
    dotted: bool = False  # a dot at each value if there are few
    run: str = ''  # the run's name, in a chart of several runs

    @property
    def label(self) -> str:
        return f'{self.run}: {self.name}' if self.run else self.name

    def drawn(self, buckets: int = BUCKETS) -> list['Series']:
        """Returns the series to draw: this one, or for a long series its extremes.

        The extremes of a noisy series are pale, with its medians drawn over them.
        """
        dotted = len(self.steps) <= (FEW if self.dotted else SPARSE)
        series = replace(self, dotted=dotted)
        if len(self.steps) <= 2 * buckets:
            return [series]
        peaks = series.chosen(buckets, lambda n: (0 * n, n - 1))
        finite = [value for value in peaks.values if value is not None]
        climbed = sum(abs(after - before) for before, after in pairwise(finite))
        if self.look == 'dots' or not finite or climbed <= NOISY * (max(finite) - min(finite)):
            return [peaks]
        trend = series.chosen(min(buckets, TREND_BUCKETS), lambda n: (n // 2,))
        return [
            replace(peaks, look='line', pale=True),
            replace(trend, name=f'{self.name}, medians', pale=False),
        ]

    def chosen(self, buckets: int, ranks: Callable) -> 'Series':
        """Returns the series reduced to some values of each bucket.

        ranks: takes the number of finite values in each bucket, and returns the ranks of those to
        keep, 0 for the lowest. A bucket with values that are not finite also keeps the first of
        them.
        """
        values = np.array(self.values, dtype=float)  # None becomes NaN
        borders = np.arange(buckets + 1) * len(values) // buckets
        starts, sizes = borders[:-1], np.diff(borders)
        order = np.lexsort((values, np.repeat(np.arange(buckets), sizes)))  # NaN last, in order
        finite = np.add.reduceat(np.isfinite(values), starts, dtype=int)
        kept = [order[(starts + rank)[finite > 0]] for rank in ranks(finite)]
        kept.append(order[(starts + finite)[finite < sizes]])
        indices = np.unique(np.concatenate(kept)).tolist()
        steps = [self.steps[index] for index in indices]
        return replace(self, steps=steps, values=[self.values[index] for index in indices])


@dataclass(frozen=True)
class Mark:
    """A highlighted point."""

    step: int
    value: float
    label: str  # in the legend; '' in a chart of several runs
    color: int = 0
    run: str = ''


@dataclass(frozen=True)
class Flag:
    """A finding on the time axis."""

    step: int
    number: int
    severity: str  # one of SEVERITIES
    name: str
    run: str = ''


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
    falls: bool = False  # the values fall fast in the beginning, which the axis leaves out

    def drawn(self) -> list[Series]:
        """Returns the series to draw, of which there may be several for a long series."""
        buckets = min(BUCKETS, max(FEW, CHART_BUCKETS // max(1, len(self.series))))
        return [part for series in self.series for part in series.drawn(buckets)]

    def axis(self) -> 'Axis':
        """Returns the vertical axis."""
        ends: dict[str, float] = {}  # run -> its last step, as a short run has a short initial drop
        for series in self.series:
            ends[series.run] = max(ends.get(series.run, 0), *series.steps, 0)
        start = INITIAL_DROP if self.falls else 0
        drawn = [
            value
            for series in self.series
            for step, value in zip(series.steps, series.values)
            if value is not None and math.isfinite(value)
            # Of two points, both count: otherwise, their line would come from out of sight.
            if len(series.steps) < 3 or step >= start * ends[series.run]
        ]
        others = [mark.value for mark in self.marks]
        others += [self.level[0]] if self.level else []
        others += self.band or ()
        values = np.sort(np.array(drawn + others, dtype=float))
        log = self.log
        if log is None:
            positive = len(values) > 0 and values[0] > 0
            log = bool(positive and values[-1] > WIDE_RANGE * values[len(values) // 2])
        if log:
            values = values[values > TINY]
        if not len(values):
            values = np.array([1.0, 10.0] if log else [0.0, 1.0])
        low, high = float(values[0]), float(values[-1])
        if log:
            low = max(low, high / 10**DECADES)
            room = (high / low) ** 0.05 if high > 1.001 * low else 2.0
            return Axis(low / room, high * room, log=True)
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


def text(content) -> str:
    """Escapes content for HTML and replaces control characters, which HTML does not allow."""
    return escape(re.sub(r'[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]', '\ufffd', str(content)))


# -- a page's chart --------------------------------------------------------------------------------


def to_html(chart: Chart) -> str:
    """Returns a figure element with the chart's data as JSON, which page.js draws."""
    title = text(chart.title)
    return (
        f'<figure class="chart" id="{chart.key}">'
        f'<figcaption>{title} <small>{text(chart.unit)}</small></figcaption>'
        f'<ul class="legend"></ul>'
        f'<div class="plot" role="img" aria-label="{text(describe(chart))}"></div>'
        f'<details class="data" id="{chart.key}-data"><summary>{title}: values</summary></details>'
        f'<script type="application/json">{to_json(chart_data(chart))}</script></figure>'
    )


def describe(chart: Chart) -> str:
    """Returns what a chart shows in words, for those who do not see it."""
    sentences = [f'{chart.title}, {chart.unit}'.removesuffix(', ')]
    for series in chart.series:
        values = [value for value in series.values if value is not None]
        steps = [step for step, value in zip(series.steps, series.values) if value is not None]
        if values and series.look != 'dots':
            sentences.append(
                f'{series.label}: {show_number(values[0])} at step {steps[0]:,}, '
                f'{show_number(values[-1])} at step {steps[-1]:,}, '
                f'between {show_number(min(values))} and {show_number(max(values))}'
            )
    return '. '.join(sentences)


def chart_data(chart: Chart) -> dict:
    """Returns what page.js needs to draw a chart, as JSON."""
    return {
        'series': [series_data(one) for one in chart.drawn()],
        'marks': [
            [mark.run, mark.step, mark.value, mark.label, mark.color] for mark in chart.marks
        ],
        'band': chart.band,
        'level': chart.level,
        'log': chart.axis().log,
        'fromZero': chart.from_zero,
        'initialDrop': INITIAL_DROP if chart.falls else 0,
    }


def series_data(series: Series) -> dict:
    rounded = [None if value is None else float(f'{value:.6g}') for value in series.values]
    return {
        'name': series.name,
        'run': series.run,
        'color': series.color % len(LIGHT),
        'dashes': DASHES[series.look],
        'line': series.look != 'dots',
        'dots': series.dotted or series.look == 'dots',
        'pale': series.pale,
        'steps': list(series.steps),
        'values': rounded,
    }


def to_json(data) -> str:
    """Returns JSON that is safe inside a script element: no text in it can close the element."""
    return json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')
