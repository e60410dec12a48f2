"""Charts as data: what is drawn of a long series, axes, colors."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from nib.report import charts
from nib.report.charts import Chart, Series, show_number
from nib.report.pngs import BADGE, badge_rows


def test_the_axis_of_the_loss_ignores_the_initial_drop():
    steps = range(0, 1001, 10)
    losses = [4.0 if step < 90 else 2.3 + step / 1e5 for step in steps]
    series = (Series('validation', steps, losses),)
    axis = Chart('loss', 'Loss', '', series, falls=True).axis()
    assert 2.29 < axis.low < axis.high < 2.32
    assert Chart('loss', 'Loss', '', series).axis().high > 4


def test_a_line_of_two_points_is_in_sight():
    steps = range(0, 1001, 10)
    batches = Series('step', steps, [4.0] * 9 + [2.3] * 92)
    losses = Series('validation', (0, 1000), (4.2, 2.4))
    assert 4.2 < Chart('loss', 'Loss', '', (batches, losses), falls=True).axis().high < 4.5


def test_the_initial_drop_of_a_short_run_does_not_hide_the_run_beside_a_long_one():
    short = Series('validation', range(0, 101, 10), [5.0] + [4.0] * 10, run='short')
    long = Series('validation', range(0, 1001, 10), [5.0] * 9 + [2.0] * 92, run='long')
    axis = Chart('loss', 'Loss', '', (short, long), falls=True).axis()
    assert axis.low < 2 and 4 < axis.high < 4.5


def test_a_long_run_is_thinned_and_keeps_its_spikes():
    steps = range(0, 400_000, 10)
    noisy = [1.0 + 0.1 * math.sin(step) for step in steps]
    noisy[12_345], noisy[20_001], noisy[33_333] = 9.0, -5.0, None
    peaks, trend = Series('loss', steps, noisy).drawn()
    assert len(peaks.steps) <= 1001 and len(trend.steps) <= 201
    kept = dict(zip(peaks.steps, peaks.values))
    assert kept[123_450] == 9.0 and kept[200_010] == -5.0 and kept[333_330] is None
    assert all(noisy[step // 10] == value for step, value in kept.items())
    assert all(abs(value - 1) < 0.05 for value in trend.values if value is not None)
    (smooth,) = Series(
        'learning rate', steps, [1 - step / 400_000 for step in steps], look='dashed'
    ).drawn()
    assert smooth.steps[0] == 0 and smooth.steps[-1] == 399_990 and smooth.look == 'dashed'


@given(
    st.lists(st.none() | st.integers(-3, 3) | st.floats(-9, 9), min_size=7, max_size=40),
    st.integers(1, 7),
)
def test_a_bucket_keeps_its_extremes_its_median_and_its_first_gap(values, buckets):
    series = Series('loss', range(0, 10 * len(values), 10), values)
    ends = [bucket * len(values) // buckets for bucket in range(buckets + 1)]
    for ranks, wanted in (
        (lambda n: (0 * n, n - 1), lambda finite: [finite[0], finite[-1]]),
        (lambda n: (n // 2,), lambda finite: [finite[len(finite) // 2]]),
    ):
        kept = set()
        for start, end in pairwise(ends):
            gaps = [index for index in range(start, end) if values[index] is None]
            finite = [index for index in range(start, end) if values[index] is not None]
            kept |= {*gaps[:1], *(wanted(sorted(finite, key=values.__getitem__)) if finite else ())}
        thinned = series.chosen(buckets, ranks)
        assert thinned.steps == [10 * index for index in sorted(kept)]
        assert thinned.values == [values[index] for index in sorted(kept)]


def test_a_chart_of_many_runs_has_fewer_values_of_each():
    noisy = [math.sin(step) for step in range(3000)]
    few, many = (
        Chart(
            'a', 'A', '', tuple(Series('a', range(3000), noisy, run=str(n)) for n in range(count))
        )
        for count in (2, 50)
    )
    assert sum(len(one.steps) for one in few.drawn()) > 2 * 1000
    assert sum(len(one.steps) for one in many.drawn()) < 3.1 * charts.CHART_BUCKETS
    for one in many.drawn()[::2]:
        assert min(one.values) == min(noisy) and max(one.values) == max(noisy)


@given(st.floats(-1e290, 1e290), st.floats(0, 1e290), st.booleans())
def test_ticks_are_round_and_on_the_axis(low, room, log):
    values = (low, low + room)
    axis = Chart('a', 'A', '', (Series('a', (0, 1), values),), log=log).axis()
    assert all(0 <= axis.share(value) <= 1 for value in values)
    ticks = axis.ticks()
    assert len(ticks) <= 16 and ticks == sorted(set(ticks))
    assert all(
        axis.low - 1e-6 * abs(axis.low) <= tick <= axis.high + 1e-6 * abs(axis.high)
        for tick in ticks
    )
    if not axis.log:
        assert len(ticks) >= 2
        width = 10 ** (math.log10(ticks[1] - ticks[0]) % 1)
        assert min(abs(width - round_width) for round_width in (1, 2, 5, 10)) < 0.01
        multiples = [
            tick / (ticks[1] - ticks[0]) for tick in ticks
        ]  # the difference of large numbers has few exact digits
        assert all(
            abs(multiple - round(multiple)) < 1e-3 + 1e-15 * multiple**2 for multiple in multiples
        )


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50))
def test_the_time_axis_has_whole_steps(first, more):
    axis = charts.time_axis(
        [Chart('a', 'A', '', (Series('a', (first, first + more), (1.0, 1.0)),))]
    )
    ticks = axis.ticks(whole=True)
    assert 2 <= len(ticks) <= 16 and all(
        tick == int(tick) and axis.low <= tick <= axis.high * (1 + 1e-9) for tick in ticks
    )


def test_an_axis_is_logarithmic_where_values_are_far_apart():
    assert not Chart('a', 'A', '', (Series('a', range(4), (4.0, 3.0, 2.0, 2.0)),)).axis().log
    axis = Chart('a', 'A', '', (Series('a', range(5), (1.0, 1.0, 1.0, 1.0, 1000.0)),)).axis()
    assert axis.log and axis.share(31.62) == pytest.approx(0.5, abs=0.01)
    assert [show_number(tick) for tick in axis.ticks()] == ['1', '10', '100', '1,000']
    assert (
        not Chart('a', 'A', '', (Series('a', range(3), (0.0, 1.0, 1000.0)),)).axis().log
    )  # 0 has no logarithm


@pytest.mark.parametrize(
    'value, shown',
    [
        (0, '0'),
        (0.0006, '0.0006'),
        (6e-5, '6e-5'),
        (2.3456789, '2.346'),
        (1500, '1,500'),
        (30_000, '30k'),
        (2_500_000, '2.5M'),
        (1.2e20, '1.2e20'),
        (-12_000, '-12k'),
    ],
)
def test_numbers_are_shown_as_people_read_them(value, shown):
    assert show_number(value) == shown


@given(st.lists(st.floats(0, 1)).map(sorted))
def test_no_badge_covers_another(places):
    rows = badge_rows(places)
    for index, (place, row) in enumerate(zip(places, rows)):
        assert all(
            row != other or place - before >= BADGE - 1e-12
            for before, other in zip(places[:index], rows)
        )


# What the eye makes of linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHTS = {
    'full': [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    'no red': [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    'no green': [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    'no blue': [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(color):
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return np.array(
        [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    )


def cielab(rgb):
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ rgb.clip(0, 1)
    x, y, z = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in xyz / (0.9505, 1, 1.089)
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize('colors, ground', [(charts.LIGHT, '#ffffff'), (charts.DARK, '#171b21')])
def test_colors_are_told_apart_by_the_color_blind(colors, ground):
    assert ground in (ROOT / 'nib/report/page.css').read_text()
    for sight in SIGHTS.values():
        seen = [cielab(np.array(sight) @ linear(color)) for color in colors[: charts.NEUTRAL]]
        assert (
            min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 20
        )
    for color in colors:  # WCAG 2.1, 1.4.11: at least 3 for what is drawn
        darker, lighter = sorted(linear(one) @ (0.2126, 0.7152, 0.0722) for one in (color, ground))
        assert (lighter + 0.05) / (darker + 0.05) > 3
