"""A run as one page: its charts show the records, whatever they are, and all text is escaped."""

import gc
import json
import math
import re
import shutil
from itertools import accumulate

import numpy as np
import pytest
from conftest import records
from hypothesis import given
from hypothesis import strategies as st
from report_pages import DEFAULTS, FINDING, Page, full_records, page_of, write_run

from nib.doctor import health
from nib.report import curves, history
from nib.report import page as pages
from nib.report.compare import compare
from nib.report.page import SAMPLES, build_page, write_report


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
    assert page.of_class('verdict critical')  # the color of the worst
    (found,) = [
        one for one in history.read_run(tmp_path / 'run').findings if one.name == 'lr_too_high'
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
    (found,) = history.read_run(folder).findings
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
    (found,) = history.read_run(folder).findings
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
    assert len({series['color'] for series in page.charts['loss']['series']}) == 2
    assert page.flags == [['b', 5, 1, 'b: plateau', 'warning']]
    assert len(page.of_class('apart')) == 1
    assert [mark[:3] for mark in page.charts['loss']['marks']] == [['a', 20, 1.5], ['b', 40, 3.0]]
    copy = shutil.copytree(second, tmp_path / 'other' / 'b')
    assert set(page_of(second, copy).values('loss')) == {
        f'{second}: validation',
        f'{copy}: validation',
    }


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


@given(st.lists(st.floats(0, 30) | st.just(0.0) | st.just(2000.0), max_size=3000))
def test_times_between_those_of_the_page_are_right_within_a_pixel(pauses):
    elapsed = dict(zip(range(0, 10 * len(pauses), 10), accumulate(pauses)))
    times = pages.thin(elapsed)
    assert len(times) <= 1002
    if elapsed:
        shown = np.interp(list(elapsed), list(times), list(times.values()))
        times = list(elapsed.values())
        assert np.abs(shown - times).max() <= times[-1] / 500


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


def test_twenty_runs_look_different(tmp_path):
    folders = [
        write_run(tmp_path / f'run{i}', [{'step': 1, 'loss/step': 1.0, 'loss/val': 2.0}])
        for i in range(20)
    ]
    page = page_of(*folders)
    assert set(page.charts) == {'loss', 'loss_1'}  # several runs have a chart for each name
    for chart in page.charts.values():
        assert len({(one['color'], one['dashes']) for one in chart['series']}) == 20


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


def test_several_runs_begin_with_a_table(tmp_path):
    rates = {'a': 1e-3, 'b': 3e-4}
    for name, rate in rates.items():
        lines = [
            {'step': 10, 'time': 100.0, 'loss/val': 3.0, 'tokens_per_second': 50.0},
            {'step': 20, 'time': 290.0, 'loss/val': 1 + rate, 'tokens_per_second': 70.0},
            {'step': 30, 'time': 300.0, 'loss/val': 2.5, 'verdict': 'healthy: all well'},
        ]
        config = {'learning_rate': rate, 'n_layer': 2, 'out_dir': name, 'wandb_project': name}
        write_run(tmp_path / name, lines, config)
    names, rows = compare(history.read_runs([tmp_path / name for name in rates]))
    assert names == 'run,learning_rate,best loss,final loss,tokens/s,time,steps,verdict'.split(',')
    shown = [[cell.shown for cell in row] for row in rows]
    assert shown[0] == 'a,0.001,1.0010,2.5000,60,3 min 20 s,30,healthy: all well'.split(',')
    page = page_of(*(tmp_path / name for name in rates))
    assert 'lowest at 0.0003' in page.shown  # the chart of the swept key


@pytest.mark.filterwarnings('error')
def test_impossible_times_do_not_count(tmp_path):
    times = [1e9, -1e17, 1e9 + 60, 1e299]
    lines = [{'step': step, 'time': time, 'loss/step': 2.0} for step, time in enumerate(times)]
    run = history.read_run(write_run(tmp_path / 'run', lines))
    assert run.elapsed == {0: 0.0, 2: 60.0}
    assert '1 min 0 s' in build_page([run], DEFAULTS)
