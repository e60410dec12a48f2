"""A run as one page: its charts show the records, whatever they are, and all text is escaped."""

import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from itertools import accumulate, pairwise

import numpy as np
import pytest
from conftest import ROOT, records, run_script
from hypothesis import given
from hypothesis import strategies as st
from processes import PATIENCE

import configurator
from nib.doctor import health
from nib.report import charts, curves, history
from nib.report import page as pages
from nib.report.charts import Chart, Series, badge_rows, show_number
from nib.report.compare import compare
from nib.report.page import SAMPLES, build_page, write_report

DEFAULTS = configurator.read_block(str(ROOT / 'train.py')).defaults
VOID = {'meta', 'link', 'br', 'hr', 'img', 'input', 'wbr'}
FINDING = {
    'severity': 'warning',
    'evidence': 'the update ratio of attention is 0.02',
    'causes': ['learning_rate is too high', 'beta2'],
    'changes': ['learning_rate = 0.0003', 'beta2 = 0.99'],
}


class Page(HTMLParser):
    """A page as a browser reads it: properly nested elements, text, and the charts' values."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.scripts, self.shown, self.charts = [], [], [], '', {}
        self.feed(source)
        self.close()
        assert self.open == []
        ids = [attributes['id'] for _, attributes in self.elements if 'id' in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'figure':
            self.figure = dict(attributes).get('id')

    def handle_startendtag(self, tag, attributes):
        self.elements.append(
            (tag, {**dict(attributes), 'figure': self.figure if 'figure' in self.open else None})
        )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ['script']:
            self.scripts.append(data)
            if 'form' in self.open:
                self.flags = json.loads(data)['flags']
            if 'figure' in self.open:
                self.charts[self.figure] = json.loads(data)
        elif self.open[-1:] != ['style']:
            self.shown += data

    def values(self, chart) -> dict[str, dict]:
        return {
            f'{series["run"]}: {series["name"]}' if series['run'] else series['name']: dict(
                zip(series['steps'], series['values'])
            )
            for series in self.charts[chart]['series']
        }

    def of_class(self, name) -> list[dict]:
        return [attributes for _, attributes in self.elements if attributes.get('class') == name]


def write_run(folder, lines, config=None):
    """A run's folder with these records, or raw lines of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.jsonl').write_bytes(
        b''.join(
            line if isinstance(line, bytes) else json.dumps(line).encode() + b'\n' for line in lines
        )
    )
    if config is not None:
        (folder / 'config.json').write_text(json.dumps({'config': config, 'origins': {}}))
    return folder


def page_of(*folders, watching=False) -> Page:
    return Page(build_page(history.read_runs(folders), DEFAULTS, watching))


def full_records(steps=40):
    """Records of every name that a run may write."""
    lines = []
    for step in range(steps + 1):
        if step:
            lines.append(
                {
                    'step': step,
                    'loss/step': 4 - step / 20,
                    'grad_norm': 1 + math.sin(step),
                    'learning_rate': 1e-3 / step,
                    'mfu': 0.4,
                    'tokens_per_second': 1000.0 + step,
                    'peak_memory': 3_000_000 + step,
                    'clipped': (step % 3) / 2,
                    'noise_scale': 2.0 * step,
                    **{
                        f'update_ratio/{group}': step / 1e4
                        for group in ('embedding', 'attention', 'mlp', 'head')
                    },
                }
            )
        if step % 10 == 0:
            lines.append(
                {
                    'step': step,
                    'loss/train': 4 - step / 21,
                    'loss/val': 4 - step / 20 + (step / 40) ** 3,
                    'bits_per_byte/val': 1.5,
                    'seconds/evaluation': 0.1,
                    'sample': f'text of step {step}',
                    'dead_units': step / 100,
                    'attention_logit': 3.0 + step,
                    'attention_entropy': 0.5,
                    'activation_std': 1.25,
                }
            )
    return lines


# -- what the page shows ---------------------------------------------------------------------------


def test_every_chart_holds_its_records(tmp_path):
    page = page_of(write_run(tmp_path / 'run', full_records(), {'grad_clip': 1.0}))

    def recorded(name, factor=1.0):
        return {
            line['step']: pytest.approx(factor * line[name], rel=1e-5)
            for line in records(tmp_path / 'run')
            if name in line
        }

    groups = ('embedding', 'attention', 'mlp', 'head')
    clipped = {step: norm for step, norm in recorded('grad_norm').items() if math.sin(step) > 0}
    expected = {
        'loss': {
            "a step's batch": recorded('loss/step'),
            'training': recorded('loss/train'),
            'validation': recorded('loss/val'),
        },
        'learning_rate': {'learning rate': recorded('learning_rate')},
        'gradient_norm': {'gradient norm': recorded('grad_norm'), 'clipped': clipped},
        'clipped': {'clipped steps': recorded('clipped', 100)},
        'update_ratios': {group: recorded(f'update_ratio/{group}') for group in groups},
        'throughput': {'tokens/s': recorded('tokens_per_second')},
        'mfu': {'MFU': recorded('mfu', 100)},
        'memory': {'memory': recorded('peak_memory', 1e-6)},
        'noise_scale': {'noise scale': recorded('noise_scale')},
        'units': {
            'dead units, in the worst layer': recorded('dead_units', 100),
            'attention entropy, relative to its maximum': recorded('attention_entropy', 100),
        },
        'attention_logit': {'largest logit': recorded('attention_logit')},
        'activations': {'largest of all layers': recorded('activation_std')},
    }
    assert set(page.charts) == set(expected)
    for chart, series in expected.items():
        assert page.values(chart) == series, chart


def test_the_best_validation_loss_is_marked(tmp_path):
    losses = {0: 4.0, 10: 2.5, 20: 2.25, 40: None, 50: 3.0}
    page = page_of(
        write_run(
            tmp_path / 'run', [{'step': step, 'loss/val': loss} for step, loss in losses.items()]
        )
    )
    assert page.charts['loss']['marks'] == [['', 20, 2.25, 'best 2.2500 at step 20', 0]]
    (label,) = [
        attributes['aria-label']
        for _, attributes in page.elements
        if attributes.get('class') == 'plot'
    ]
    said = 'validation: 4 at step 0, 3 at step 50, between 2.25 and 4'
    assert label == f'Loss, nats per token. {said}'


def test_no_dot_of_a_clipped_step_lies_below_the_limit(tmp_path):
    """The share of clipped steps since the last line has a chart of its own."""
    norms, shares = {10: 0.5, 20: 1.5, 30: 0.9}, {10: 0.2, 20: 1.0, 30: 0.0}
    lines = [{'step': step, 'grad_norm': norms[step], 'clipped': shares[step]} for step in norms]
    page = page_of(write_run(tmp_path / 'run', lines, {'grad_clip': 1.0}))
    assert page.values('gradient_norm')['clipped'] == {20: 1.5}
    assert page.charts['gradient_norm']['level'] == [1.0, 'grad_clip 1']
    assert page.values('clipped') == {'clipped steps': {10: 20.0, 20: 100.0, 30: 0.0}}


def test_unknown_metrics_have_charts(tmp_path):
    lines = [{'step': 1, 'reward': 2.0, 'eval/arc': 0.5, 'eval/boolq': 0.25, 'time': 3.0}]
    page = page_of(write_run(tmp_path / 'run', lines))
    shown = [page.values(chart) for chart in page.charts]
    assert shown == [{'reward': {1: 2.0}}, {'arc': {1: 0.5}, 'boolq': {1: 0.25}}]


def test_the_axis_of_the_loss_ignores_the_first_fall():
    steps = range(0, 1001, 10)
    losses = [4.0 if step < 90 else 2.3 + step / 1e5 for step in steps]
    series = (Series('validation', steps, losses),)
    axis = Chart('loss', 'Loss', '', series, falls=True).axis()
    assert 2.29 < axis.low < axis.high < 2.32
    assert Chart('loss', 'Loss', '', series).axis().high > 4


def test_findings_stand_at_their_steps_and_say_what_to_change(tmp_path):
    lines = [{'step': step, 'loss/step': 2.0} for step in range(401)]
    lines += [
        {'step': 100, 'finding/lr_too_high': FINDING},
        {'step': 300, 'finding/odd': 'of no known form'},
        {'step': 304, 'finding/not_finite': 'critical: loss is NaN.'},
        {'step': 400, 'verdict': '3 findings: see below'},
    ]
    page = page_of(write_run(tmp_path / 'run', lines))
    assert page.flags == [
        ['', 100, 2, 'lr_too_high', 'warning'],
        ['', 300, 3, 'odd', 'note'],
        ['', 304, 1, 'not_finite', 'critical'],
    ]
    assert [
        attributes['id']
        for tag, attributes in page.elements
        if attributes.get('class', '').startswith('finding ')
    ] == ['finding-1', 'finding-2', 'finding-3']
    assert re.findall('not_finite|lr_too_high|odd', page.shown)[-3:] == [
        'not_finite',
        'lr_too_high',
        'odd',
    ]  # the gravest first
    for shown in (
        'the update ratio of attention is 0.02',
        'learning_rate is too high',
        'learning_rate = 0.0003',
        'beta2 = 0.99',
        'of no known form',
        'loss is NaN.',
        '3 findings: see below',
    ):
        assert page.shown.count(shown) == 1, shown
    assert page.of_class('verdict critical')  # the colour of the worst
    (found,) = [
        one for one in history.read_run(tmp_path / 'run').findings() if one.name == 'lr_too_high'
    ]
    assert (found.severity, found.evidence) == ('warning', 'the update ratio of attention is 0.02')
    assert found.causes == ('learning_rate is too high', 'beta2') and found.changes == (
        'learning_rate = 0.0003',
        'beta2 = 0.99',
    )


def test_findings_of_older_runs_are_sentences(tmp_path):
    said = (
        'warning: the ratio is 0.02. Likely causes, the likeliest first: beta2. '
        'Change: beta2 = 0.99'
    )
    folder = write_run(tmp_path / 'run', [{'step': 100, 'finding/lr_too_high': said}])
    (found,) = history.read_run(folder).findings()
    assert (found.name, found.step, found.severity, found.evidence) == (
        'lr_too_high',
        100,
        'warning',
        said.partition(': ')[2],
    )
    assert 'the ratio is 0.02' in page_of(folder).shown


@pytest.mark.parametrize(
    'recorded',
    [{}, {'severity': 'odd', 'evidence': 3, 'causes': 'x', 'changes': [1, None]}, 'words', ''],
)
def test_a_damaged_finding_is_shown_as_far_as_it_goes(tmp_path, recorded):
    folder = write_run(tmp_path / 'run', [{'step': 100, 'finding/odd': recorded}])
    (found,) = history.read_run(folder).findings()
    assert found.severity == 'note' and page_of(folder).of_class('badge note')


def test_a_verdict_is_of_the_step_where_it_was_given(tmp_path):
    lines = [{'step': 10, 'verdict': 'healthy: all well'}]
    page = page_of(write_run(tmp_path / 'run', lines))
    assert page.of_class('verdict healthy') and 'at step 10: healthy' not in page.shown
    assert (
        'at step 10: healthy'
        in page_of(write_run(tmp_path / 'run', [*lines, {'step': 20, 'loss/step': 1.0}])).shown
    )
    assert page_of(write_run(tmp_path / 'run', [{'step': 1, 'loss/step': 1.0}])).of_class(
        'verdict unknown'
    )


def test_samples_of_the_first_and_last_evaluation_and_some_between(tmp_path):
    page = page_of(
        write_run(
            tmp_path / 'run',
            [{'step': step, 'sample': f'sample-{step}.'} for step in range(0, 1001, 50)],
        )
    )
    shown = [int(step) for step in re.findall(r'sample-(\d+)\.', page.shown)]
    assert (
        shown[0] == 0
        and shown[-1] == 1000
        and len(shown) == SAMPLES
        and sorted(set(shown)) == shown
    )


def test_config_shows_what_differs_from_the_defaults(tmp_path):
    folder = write_run(tmp_path / 'run', [])
    values = {**DEFAULTS, 'n_layer': 3, 'device': 'cpu', 'dtype': 'float32', 'ranks': 1}
    (folder / 'config.json').write_text(
        json.dumps(
            {
                'config': values,
                'origins': {
                    'n_layer': 'config/small.py:3',
                    'device': 'default (auto)',
                    'dtype': 'command line',
                },
            }
        )
    )
    source = build_page(history.read_runs([folder]), DEFAULTS)
    changed, rest = source.split('<h2>Origin')[0].split('<details id="defaults"')
    rows = {
        key: re.findall('<td.*?>(.*?)</td>', row)
        for key, row in re.findall('<tr><th scope="row">(.*?)</th>(.*?)</tr>', changed)
    }
    assert rows.keys() == {'n_layer', 'dtype'}
    assert rows['n_layer'] == [
        '<code>3</code>',
        f'<code>{DEFAULTS["n_layer"]}</code>',
        'config/small.py:3',
    ]
    assert set(re.findall('<tr><th scope="row">(.*?)</th>', rest)) == values.keys() - {
        'n_layer',
        'dtype',
    }


def test_config_shows_what_a_resumed_run_has_changed(tmp_path):
    folder = write_run(tmp_path / 'run', [])
    for changes, shown in (
        ([{'step': 2000, 'changes': {'max_iters': [10, 20], 'dtype': ['auto', 'float32']}}], True),
        ([3], False),
        ({'step': 1}, False),
        ([{'step': 1, 'changes': {'max_iters': 3}}], False),
    ):
        (folder / 'config.json').write_text(
            json.dumps({'config': {'max_iters': 20}, 'changes': changes})
        )
        line = "resumed at step 2,000 with max_iters 10 -> 20, dtype 'auto' -> 'float32'"
        assert (line in page_of(folder).shown) == shown and (
            'resumed' in page_of(folder).shown
        ) == shown


def test_several_runs_are_drawn_over_each_other(tmp_path):
    first = write_run(
        tmp_path / 'a',
        [{'step': 10, 'loss/val': 2.0}, {'step': 20, 'loss/val': 1.5}],
        {'n_layer': 2, 'seed': 1},
    )
    second = write_run(
        tmp_path / 'b',
        [{'step': 40, 'loss/val': 3.0}, {'step': 5, 'finding/plateau': FINDING}],
        {'n_layer': 4, 'seed': 1},
    )
    page = page_of(first, second)
    assert page.values('loss') == {'a: validation': {10: 2.0, 20: 1.5}, 'b: validation': {40: 3.0}}
    assert len({series['colour'] for series in page.charts['loss']['series']}) == 2
    assert page.flags == [['b', 5, 1, 'b: plateau', 'warning']]
    assert len(page.of_class('apart')) == 1
    assert [mark[:3] for mark in page.charts['loss']['marks']] == [['a', 20, 1.5], ['b', 40, 3.0]]
    copy = shutil.copytree(second, tmp_path / 'other' / 'b')
    assert set(page_of(second, copy).values('loss')) == {
        f'{second}: validation',
        f'{copy}: validation',
    }


# -- whatever the records are ----------------------------------------------------------------------


def test_nothing_in_the_files_gets_out_of_the_text(tmp_path):
    evil = (
        '</script></pre><script>alert("x")</script>'
        '<img src=https://example.com/x onerror=alert(1)>\x00\x1b[31m\ud800'
    )
    lines = [
        {
            'step': 1,
            'loss/step': 1.0,
            'sample': evil,
            'verdict': evil,
            f'finding/{evil}': evil,
            'finding/b': {
                'severity': 'critical',
                'evidence': evil,
                'causes': [evil],
                'changes': [evil],
            },
        }
    ]
    folder = write_run(tmp_path / '<b>run', lines, {'out_dir': evil, evil: 1})
    plain = page_of(
        write_run(tmp_path / 'plain', [{'step': 1, 'loss/step': 1.0}], {'out_dir': 'out'})
    )
    page = page_of(folder)
    assert [tag for tag, _ in page.elements if tag in ('script', 'img', 'b')] == [
        tag for tag, _ in plain.elements if tag in ('script', 'img', 'b')
    ]
    assert page.scripts[-1] == plain.scripts[-1]
    assert not any(name.startswith('on') for _, attributes in page.elements for name in attributes)
    assert (
        page.shown.count('alert("x")') >= 7
        and '\x00' not in page.shown
        and '\x1b' not in page.shown
    )
    assert write_report([folder], DEFAULTS, tmp_path / 'page.html') == 0
    assert Page((tmp_path / 'page.html').read_text(encoding='utf-8')).shown.count('alert("x")') >= 7


def test_the_page_needs_nothing_from_outside(tmp_path):
    folder = write_run(
        tmp_path / 'run', [*full_records(), {'step': 3, 'finding/a': FINDING}], {'n_layer': 1}
    )
    source = build_page(history.read_runs([folder]), DEFAULTS)
    source = source.replace('http://www.w3.org/2000/svg', '')  # a name, not an address
    assert not re.search(r'https?:|//[a-z]|@import|url\(', source)
    for _, attributes in Page(source).elements:
        assert attributes.get('href', '#').startswith(('#', 'data:')) and 'src' not in attributes


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    damaged = [
        b'{"step": 2, "loss/st\n',
        b'\xff\xfe\x00\n',
        b'[1, 2]\n',
        b'{"loss/step": 1}\n',
        b'{"step": true}\n',
        b'{"step": -1}\n',
        b'{"step": 1.5}\n',
        b'{"step": ' + b'9' * 40 + b'}\n',
        b'[' * 100_000 + b'\n',
        b'null\n',
        b'"step"\n',
    ]
    good = [
        {'step': 1, 'loss/step': 3.0},
        b'\n',
        b'{"step": 3, "loss/step": NaN, "grad_norm": -Infinity, "mfu": 1'
        + b'0' * 400
        + b', "clipped": [1], "x": true}\n',
        {'step': 4, 'loss/step': 2.0},
    ]
    run = history.read_run(
        write_run(tmp_path / 'run', [good[0], *damaged, *good[1:], b'{"step": 5, "lo'])
    )
    assert run.unread == len(damaged)
    assert run.numbers == {
        'loss/step': {1: 3.0, 3: None, 4: 2.0},
        'grad_norm': {3: None},
        'mfu': {3: None},
    }
    assert f'{len(damaged)} lines of' in page_of(tmp_path / 'run').shown


def test_an_empty_run_has_a_page(tmp_path):
    for folder in (
        write_run(tmp_path / 'no-lines', []),
        write_run(tmp_path / 'only-config', [], {'max_iters': 10}),
    ):
        page = page_of(folder)
        assert page.charts == {} and 'Nothing has been recorded yet' in page.shown
    (tmp_path / 'only-config' / 'metrics.jsonl').unlink()
    assert 'of 10' in page_of(tmp_path / 'only-config').shown
    (tmp_path / 'no-lines' / 'config.json').write_text('[1]')
    assert 'config.json is missing or damaged' in page_of(tmp_path / 'no-lines').shown


names = st.sampled_from(
    [
        'loss/step',
        'loss/val',
        'grad_norm',
        'learning_rate',
        'update_ratio/mlp',
        'peak_memory',
        'clipped',
        'mfu',
        'sample',
        'verdict',
        'finding/plateau',
        'step',
    ]
)
values = st.one_of(
    st.floats(),
    st.integers(),
    st.none(),
    st.text(max_size=8),
    st.booleans(),
    st.just([1]),
    st.just(FINDING),
)


@given(
    st.lists(st.dictionaries(names, values, max_size=6), max_size=8),
    st.dictionaries(st.sampled_from(['max_iters', 'grad_clip', 'optimizer', 'n_layer']), values),
)
def test_any_record_has_its_place(tmp_path_factory, lines, config):
    folder = write_run(tmp_path_factory.getbasetemp() / 'any', lines, config)
    for page in (page_of(folder), page_of(folder, folder)):
        for chart in page.charts.values():
            assert all(
                value is None or math.isfinite(value)
                for series in chart['series']
                for value in series['values']
            )


def test_a_run_of_one_record_shows_its_values_as_dots(tmp_path):
    page = page_of(
        write_run(tmp_path / 'run', [{'step': 7, 'loss/val': 2.0, 'learning_rate': 0.1}])
    )
    assert page.values('loss') == {'validation': {7: 2.0}}
    assert page.charts['learning_rate']['series'][0]['dots']


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


@given(st.lists(st.floats(0, 30) | st.just(0.0) | st.just(2000.0), max_size=3000))
def test_times_between_those_of_the_page_are_right_within_a_pixel(pauses):
    elapsed = dict(zip(range(0, 10 * len(pauses), 10), accumulate(pauses)))
    times = pages.thin(elapsed)
    assert len(times) <= 1002
    if elapsed:
        shown = np.interp(list(elapsed), list(times), list(times.values()))
        times = list(elapsed.values())
        assert np.abs(shown - times).max() <= times[-1] / 500


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


def test_a_long_run_makes_few_objects(tmp_path):
    """An object for each value would make the page of 50 runs slow: the collector visits them."""
    names = [f'update_ratio/{group}' for group in curves.GROUPS]
    names += ['loss/step', 'loss/mean', 'loss/max', 'grad_norm', 'mfu', 'noise_scale', 'clipped']
    lines = [
        {'step': step, 'time': 1e9 + step, **{name: math.sin(step) for name in names}}
        for step in range(3000)
    ]
    folder = write_run(tmp_path / 'run', lines)
    phases = []
    gc.callbacks.append(lambda phase, info: phases.append(phase))
    try:
        page_of(folder)
    finally:
        gc.callbacks.pop()
    made = phases.count('start') * gc.get_threshold()[0]
    assert made < len(lines) * len(names) / 3


# -- the parts of a chart --------------------------------------------------------------------------


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


def test_twenty_runs_look_different(tmp_path):
    folders = [
        write_run(tmp_path / f'run{i}', [{'step': 1, 'loss/step': 1.0, 'loss/val': 2.0}])
        for i in range(20)
    ]
    page = page_of(*folders)
    assert set(page.charts) == {'loss', 'loss_1'}  # several runs have a chart for each name
    for chart in page.charts.values():
        assert len({(one['colour'], one['dashes']) for one in chart['series']}) == 20


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
            row != other or place - before >= charts.BADGE - 1e-12
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


def linear(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
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


@pytest.mark.parametrize('colours, ground', [(charts.LIGHT, '#ffffff'), (charts.DARK, '#171b21')])
def test_colours_are_told_apart_by_the_colour_blind(colours, ground):
    assert ground in (ROOT / 'nib/report/page.css').read_text()
    for sight in SIGHTS.values():
        seen = [cielab(np.array(sight) @ linear(colour)) for colour in colours[: charts.NEUTRAL]]
        assert (
            min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 20
        )
    for colour in colours:  # WCAG 2.1, 1.4.11: at least 3 for what is drawn
        darker, lighter = sorted(linear(one) @ (0.2126, 0.7152, 0.0722) for one in (colour, ground))
        assert (lighter + 0.05) / (darker + 0.05) > 3


@pytest.mark.parametrize(
    'optimizers, band',
    [
        (['adamw'], health.UPDATE_RATIO),
        (['adamw', 'muon'], health.MUON_RATIO),
        (['lion'], None),
        (['adamw', 'lion'], None),
        ([[3]], None),
    ],
)
def test_the_healthy_band_is_that_of_the_examination(tmp_path, optimizers, band):
    runs = [
        history.read_run(
            write_run(
                tmp_path / str(n), [{'step': 1, 'update_ratio/mlp': 0.1}], {'optimizer': optimizer}
            )
        )
        for n, optimizer in enumerate(optimizers)
    ]
    (chart,) = [chart for chart in curves.charts_of(runs) if chart.key == 'update_ratios']
    assert chart.band == band


# -- the script ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of other tests
@pytest.mark.filterwarnings('error')
def test_report_writes_the_page_and_a_png_for_each_chart(tmp_path, run_main):
    pytest.importorskip('matplotlib')
    run = write_run(
        tmp_path / 'run',
        [
            *full_records(),
            {'step': 9, 'finding/a': FINDING},
            {'step': 10, 'loss/step': None},
            {'step': 11, 'update_ratio/mlp': 0.0, 'update_ratio/head': 1e200},
        ],
        {},
    )
    done = run_main('report.py', f'--out_dir={run}')
    assert (done.returncode, done.stderr) == (0, '') and str(run / 'report.html') in done.stdout
    drawn = {path.stem: path.read_bytes() for path in (run / 'report').iterdir()}
    assert drawn.keys() == Page((run / 'report.html').read_text()).charts.keys()
    assert all(content.startswith(b'\x89PNG') and len(content) > 5000 for content in drawn.values())
    other = write_run(tmp_path / 'other', [{'step': 1, 'loss/step': 1.0}])
    assert run_main('report.py', f'--out_dir={other},{run}').returncode == 0
    page = Page((other / 'comparison.html').read_text())
    assert any(page.values(chart).get("other: a step's batch") == {1: 1.0} for chart in page.charts)
    assert (
        run_main(
            'report.py', f'--out_dir={run}', f'--page={tmp_path}/x.html', '--no-png'
        ).returncode
        == 0
    )
    assert (tmp_path / 'x.html').exists() and not (tmp_path / 'x').exists()


@pytest.mark.parametrize('n, last', [(1, '1 trouble-0'), (30, 'and 6 more')])
def test_a_png_names_its_findings(tmp_path, monkeypatch, n, last):
    figure = pytest.importorskip('matplotlib.figure')
    legends, legend = [], figure.Figure.legend
    monkeypatch.setattr(
        figure.Figure,
        'legend',
        lambda self, *args, **options: legends.append(legend(self, *args, **options)),
    )
    lines = [{'step': step, 'loss/val': 2.0} for step in (1, 40)] + [
        {'step': 1 + i, f'finding/trouble-{i}': FINDING} for i in range(n)
    ]
    write_report([write_run(tmp_path / 'run', lines)], DEFAULTS, tmp_path / 'page.html', png=True)
    (named,) = [[label.get_text() for label in one.get_texts()] for one in legends]
    assert '1 trouble-0' in named and last in named and len(named) == 2 + n - max(0, n - 24 - 1)


def test_without_matplotlib_there_is_the_page_and_a_line(tmp_path, run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.delitem(sys.modules, 'matplotlib.figure', raising=False)
    run = write_run(tmp_path / 'run', full_records())
    done = run_main('report.py', f'--out_dir={run}')
    assert (
        done.returncode == 0
        and 'pip install matplotlib' in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    assert Page((run / 'report.html').read_text()).charts


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--out_dir=nowhere'], 'no such folder'),
        (['--out_dir=config'], 'not a run'),
        (['--out_dir=,'], 'out_dir is empty'),
        (['--out_dir={run}', '--page=x.txt'], 'must end in .html'),
        (['--out_dir={run}', '--page=no/where/x.html'], 'no/where'),
        (['--out_dir={run},nowhere'], 'nowhere'),
        (['--out_dir={run}', '--watch', '--port=99999'], 'from 0 to 65535'),
        (['--out_dir=nowhere', '--watch'], 'no such folder'),
        (['nowhere', 'config'], 'no run found'),
    ],
)
def test_bad_input_is_one_line(tmp_path, run_main, flags, said):
    run = write_run(tmp_path / 'run', [])
    done = run_main('report.py', *(flag.format(run=run) for flag in flags))
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_runs_are_named_by_folders_and_patterns(tmp_path, run_main):
    for name in ('run-10', 'run-9'):
        write_run(tmp_path / 'runs' / name, [{'step': 1, 'loss/val': 2.0}], {'n_layer': 1})
    (tmp_path / 'runs' / 'notes.txt').write_text('no run')
    runs = tmp_path / 'runs'
    for names in ([runs], [runs / '*'], sorted(runs.iterdir())):
        done = run_main('report.py', *map(str, names), '--no-png')
        assert (done.returncode, done.stdout.strip()) == (0, str(runs / 'comparison.html'))
        page = Page((runs / 'comparison.html').read_text())
        assert list(page.values('loss')) == ['run-9: validation', 'run-10: validation']
        (runs / 'comparison.html').unlink()
    assert run_main('report.py', str(runs / 'run-9'), '--no-png').returncode == 0
    assert (runs / 'run-9' / 'report.html').exists()


def test_several_runs_begin_with_a_table(tmp_path):
    rates = {'a': 1e-3, 'b': 3e-4}
    for name, rate in rates.items():
        lines = [
            {'step': 10, 'time': 100.0, 'loss/val': 3.0, 'tokens_per_second': 50.0},
            {'step': 20, 'time': 290.0, 'loss/val': 1 + rate, 'tokens_per_second': 70.0},
            {'step': 30, 'time': 300.0, 'loss/val': 2.5, 'verdict': 'healthy: all well'},
        ]
        config = {'learning_rate': rate, 'n_layer': 2, 'out_dir': name}
        write_run(tmp_path / name, lines, config)
    names, rows = compare(history.read_runs([tmp_path / name for name in rates]))
    assert names == 'run,learning_rate,best loss,final loss,tokens/s,time,steps,verdict'.split(',')
    shown = [[cell.shown for cell in row] for row in rows]
    assert shown[0] == 'a,0.001,1.0010,2.5000,60,3 min 20 s,30,healthy: all well'.split(',')
    page = page_of(*(tmp_path / name for name in rates))
    assert 'lowest at 0.0003' in page.shown  # the chart of the swept key


def test_starting_needs_neither_torch_nor_matplotlib():
    """The page appears quickly, and train.py, which imports the same modules, starts quickly."""
    code = 'import report, sys; sys.exit(bool({"torch", "matplotlib"} & set(sys.modules)))'
    done = run_script('-c', code, python=sys.executable)
    assert done.returncode == 0, done.stderr


def test_watch_follows_the_run_until_ctrl_c(tmp_path, run_main):
    run = write_run(tmp_path / 'run', [{'step': 1, 'loss/step': 3.0}])
    process = subprocess.Popen(
        [sys.executable, 'report.py', f'--out_dir={run}', '--watch', '--port=0'],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, 'PYTHONUNBUFFERED': '1'},
    )
    try:
        address = re.match(r'http://127\.0\.0\.1:\d+/', process.stdout.readline())[0]
        # urlopen() would keep the proxy that another test had set when it was first called.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def get(path=''):
            with direct.open(address + path, timeout=PATIENCE) as answer:
                assert answer.headers['Content-Type'] == 'text/html; charset=utf-8'
                return answer.read().decode()

        first = get()
        assert 'data-watching' in first and Page(first).values('loss') == {
            "a step's batch": {1: 3.0}
        }
        with open(run / 'metrics.jsonl', 'a') as file:
            file.write('{"step": 2, "loss/step": 2.0}\n')
        assert Page(get()).values('loss') == {"a step's batch": {1: 3.0, 2: 2.0}}
        with pytest.raises(urllib.error.HTTPError, match='404'):
            get('metrics.jsonl')
        taken = run_main(
            'report.py', f'--out_dir={run}', '--watch', f'--port={address.split(":")[2].strip("/")}'
        )
        assert taken.returncode == 2 and 'use another port' in taken.stderr
        shutil.move(run, tmp_path / 'away')
        with pytest.raises(urllib.error.HTTPError, match='503'):
            get()
        shutil.move(tmp_path / 'away', run)
        assert Page(get()).charts
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and errors == ''
    finally:
        process.kill()
        process.communicate()
    assert sorted(path.name for path in run.iterdir()) == ['metrics.jsonl']  # it writes nothing


# -- train.py --------------------------------------------------------------------------------------


def test_a_run_writes_its_report_at_the_end(tmp_path, train_here):
    done = train_here(tmp_path / 'run', '--sample_tokens=5')
    assert done.returncode == 0 and f'report: {tmp_path / "run" / "report.html"}' in done.stdout
    page = Page((tmp_path / 'run' / 'report.html').read_text(encoding='utf-8'))
    losses = {
        line['step']: pytest.approx(line['loss/val'], rel=1e-5)
        for line in records(tmp_path / 'run')
        if 'loss/val' in line
    }
    assert page.values('loss')['validation'] == losses and list(losses) == [0, 10, 20]
    assert train_here(tmp_path / 'without', '--no-report').returncode == 0
    assert not (tmp_path / 'without' / 'report.html').exists()


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path, train_here):
    (tmp_path / 'run' / 'report.html').mkdir(parents=True)
    done = train_here(tmp_path / 'run')
    assert done.returncode == 0 and done.stderr.count('report.html could not be written') == 1
    assert (tmp_path / 'run' / 'latest').exists()
