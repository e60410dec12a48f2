"""The page in headless Chromium: drawing, zoom, switches, tables, phone, print, refreshes."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import configurator
from nib.report.history import read_runs
from nib.report.page import build_page

DEFAULTS = configurator.read_block(str(ROOT / 'train.py')).defaults
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as started:
        path = shutil.which('chromium') or shutil.which('google-chrome')
        try:
            browser = started.chromium.launch(executable_path=path, args=['--no-sandbox'])
        except playwright.Error:
            pytest.skip('no Chromium')
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    opened = []

    def write_runs(n_runs):
        for number in range(n_runs):
            folder = tmp_path / f'run-{number}'
            folder.mkdir()
            finding = {
                'severity': 'warning',
                'evidence': 'it rises',
                'causes': ['a'],
                'changes': [],
            }
            own = {
                'eval/a': 0.5,
                'eval/b': 0.6,
                'loss/aux': 1.0,
                'loss/own': 2.0,
                'sample': 'To be',
            }
            lines = [
                {
                    'step': step,
                    'time': 1e9 + 36 * step,
                    'loss/step': 2 + math.exp(-step / 20) + number / 10,
                    'grad_norm': 1 + step / 1000,
                    **({'loss/val': 2.5 - step / 1000 + number / 10} if step % 50 == 0 else {}),
                    **({'finding/overfitting': finding, **own} if step == 100 else {}),
                }
                for step in range(0, 201, 10)
            ]
            (folder / 'metrics.jsonl').write_text(
                ''.join(json.dumps(line) + '\n' for line in lines)
            )
            config = {'learning_rate': (number + 1) / 1000, 'grad_clip': 1.0, 'batch_size': 2}
            config |= {
                'block_size': 8,
                'gradient_accumulation_steps': 1,
                'out_dir': f'runs/{number}',
            }
            start = {'step': 0, 'command': 'train.py ' + 'config/a.py ' * 20, 'commit': 40 * 'a'}
            origins = dict.fromkeys(config, 'checkpoint of step 100')
            content = {'config': config, 'origins': origins, 'provenance': {'starts': [start]}}
            (folder / 'config.json').write_text(json.dumps(content))
        runs = read_runs([tmp_path / f'run-{number}' for number in range(n_runs)])
        (tmp_path / 'page.html').write_text(build_page(runs, DEFAULTS), encoding='utf-8')
        return f'file://{tmp_path / "page.html"}'

    def open_page(n_runs=1, width=1280, scheme='light', url=None):
        url = url or write_runs(n_runs)
        size = {'width': width, 'height': 900}
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.set_default_timeout(60_000)
        errors = []
        page.on('pageerror', lambda error: errors.append(error))  # noqa: PLW0108
        opened.append((page, errors))
        page.goto(url)
        return page

    open_page.write_runs = write_runs
    yield open_page
    for page, errors in opened:
        page.close()
        assert errors == []


def ticks(page, chart='#loss', axis='x'):
    shown = page.locator(f'{chart} span.{axis}').all_text_contents()
    return [float(text.replace(',', '').replace('K', 'e3')) for text in shown]


def test_points_are_drawn_where_their_values_are(open_page):
    page = open_page()
    path = page.locator('#gradient_norm .plot path.c0').first.get_attribute('d')
    points = [tuple(map(float, pair.split())) for pair in path.removeprefix('M').split('L')]
    assert [x for x, _ in points] == pytest.approx([50 * index for index in range(21)])
    rise = points[0][1] - points[-1][1]
    for index, (_, y) in enumerate(points):
        assert points[0][1] - y == pytest.approx(rise * index / 20, abs=0.2)


def test_the_initial_drop_is_left_out_until_it_is_asked_for(open_page):
    page = open_page()
    before = max(ticks(page, axis='y'))
    page.get_by_label('include the initial drop').check()
    assert max(ticks(page, axis='y')) > before


def test_a_line_of_two_points_is_in_sight(open_page, tmp_path):
    open_page.write_runs(1)
    metrics = tmp_path / 'run-0/metrics.jsonl'
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if line['step'] in (50, 100, 150):
            del line['loss/val']
    lines[0]['loss/val'] = 3.5
    metrics.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (tmp_path / 'page.html').write_text(build_page(read_runs([tmp_path / 'run-0']), DEFAULTS))
    page = open_page(url=f'file://{tmp_path / "page.html"}')
    assert max(ticks(page, axis='y')) >= 3.5


def test_each_chart_names_its_horizontal_axis(open_page):
    page = open_page()
    for unit, name in (('steps', 'step'), ('tokens', 'tokens'), ('time in hours', 'hours')):
        page.get_by_label('x axis').select_option(unit)
        assert set(page.locator('.chart .unit').all_text_contents()) == {name}
    assert page.locator('.chart .unit').count() == page.locator('.chart .plot').count()


def test_a_short_run_beside_a_long_one_is_in_sight(open_page, tmp_path):
    open_page.write_runs(2)
    metrics = tmp_path / 'run-1/metrics.jsonl'
    metrics.write_text(''.join(metrics.read_text().splitlines(keepends=True)[:2]))
    runs = read_runs([tmp_path / 'run-0', tmp_path / 'run-1'])
    (tmp_path / 'page.html').write_text(build_page(runs, DEFAULTS), encoding='utf-8')
    page = open_page(url=f'file://{tmp_path / "page.html"}')
    assert max(ticks(page, axis='y')) >= 2.6  # its only validation loss
    page.get_by_role('checkbox', name='run-1').uncheck()
    assert max(ticks(page, axis='y')) < 2.5


def test_dragging_zooms_all_charts_and_a_double_click_resets(open_page):
    page = open_page()
    box = page.locator('#loss .plot').bounding_box()
    y = box['y'] + box['height'] / 2
    page.mouse.move(box['x'] + box['width'] / 2, y)
    page.mouse.down()
    page.mouse.move(box['x'] + 0.75 * box['width'], y, steps=3)
    page.mouse.up()
    for chart in ('#loss', '#gradient_norm'):
        assert min(ticks(page, chart)) >= 99 and max(ticks(page, chart)) <= 151
    assert float(page.get_by_label('from').input_value()) == pytest.approx(100, abs=2)
    page.locator('#loss .plot').dblclick()
    assert (min(ticks(page)), max(ticks(page))) == (0, 200)


def test_steps_tokens_and_hours(open_page):
    page = open_page()
    across = page.get_by_label('x axis')
    across.select_option('tokens')
    assert 2500 <= max(ticks(page)) <= 200 * 16
    across.select_option('hours')
    assert max(ticks(page)) == 2
    across.select_option('step')
    page.locator('[name=logX]').check()
    assert ticks(page) == [1, 10, 100]


def test_a_legend_entry_switches_its_curve(open_page):
    page = open_page()
    entry = page.locator('#loss').get_by_role('button', name='validation')
    drawn = page.locator('#loss svg[viewBox="0 0 1000 1000"] path.c0')
    assert drawn.count() > 0
    entry.focus()
    page.keyboard.press('Enter')
    assert drawn.count() == 0 and entry.get_attribute('aria-pressed') == 'false'
    page.keyboard.press('Enter')  # the focus has stayed
    assert drawn.count() > 0


def test_a_chart_has_a_table_of_its_values(open_page):
    page = open_page()
    page.locator('#gradient_norm summary').click()
    rows = page.locator('#gradient_norm tbody tr').all_inner_texts()
    assert len(rows) == 21 and rows[-1].split() == ['200', '1.2', '1.2']


def test_the_number_of_a_finding_leads_to_it(open_page):
    page = open_page()
    page.locator('#gradient_norm .badge').click()
    assert page.evaluate('location.hash') == '#finding-1'


def test_the_table_of_runs_sorts_and_switches(open_page):
    page = open_page(n_runs=10)
    page.get_by_role('button', name='best loss').click()
    assert page.locator('.runs tbody th').first.inner_text().strip() == 'run-0'
    page.get_by_role('button', name='best loss').click()
    assert page.locator('.runs tbody th').first.inner_text().strip() == 'run-9'
    curves = page.locator('#gradient_norm .plot path[d*="L"]')
    before = curves.count()
    page.get_by_role('checkbox', name='run-3').uncheck()
    assert curves.count() == before - 1


def test_a_refresh_keeps_the_zoom_the_switches_and_the_open_tables(open_page):
    page = open_page()
    page.get_by_label('from').fill('100')
    page.locator('#loss').get_by_role('button', name='validation').click()
    page.locator('#gradient_norm summary').click()
    page.evaluate(
        """() => {
            document.querySelector('#loss figcaption').textContent = 'before the refresh'
            const html = document.documentElement.outerHTML
            const source = html.replace('>before the refresh<', '>new<')
            replacePage(new DOMParser().parseFromString(source, 'text/html'))
        }"""
    )
    assert page.locator('#loss figcaption').inner_text() == 'new'
    assert min(ticks(page)) == 100 and page.get_by_label('from').input_value() == '100'
    entry = page.locator('#loss').get_by_role('button', name='validation')
    assert entry.get_attribute('aria-pressed') == 'false'
    assert page.locator('#gradient_norm tbody tr').count() == 21


def test_a_page_that_follows_a_run_keeps_what_the_reader_did(open_page, tmp_path):
    """The run goes on, is deleted, and the server ends."""
    open_page.write_runs(2)
    command = [sys.executable, '-u', ROOT / 'report.py', '--watch', '--port=0']
    folders = [tmp_path / 'run-0', tmp_path / 'run-1']
    with subprocess.Popen([*command, *folders], stdout=subprocess.PIPE, text=True) as served:
        try:
            page = open_page(url=served.stdout.readline().split()[0])
            page.get_by_label('smoothing').fill('0.5')
            page.get_by_label('from').fill('40')
            page.get_by_role('checkbox', name='run-1').uncheck()
            page.get_by_role('button', name='best loss').click()
            page.get_by_role('button', name='best loss').click()
            page.locator('#step_losses, #gradient_norm').last.scroll_into_view_if_needed()
            box = page.locator('#gradient_norm .plot').bounding_box()
            page.mouse.move(box['x'] + box['width'] / 2, box['y'] + 50)

            def seen():
                return {
                    'tip': page.locator('#gradient_norm .tip').inner_text(),
                    'smoothing': page.get_by_label('smoothing').input_value(),
                    'from': page.get_by_label('from').input_value(),
                    'ticks': ticks(page, '#gradient_norm')[:2],
                    'switch': page.get_by_role('checkbox', name='run-1').is_checked(),
                    'first': page.locator('.runs tbody th').first.inner_text().strip(),
                }

            page.locator('#live', has_text='live: follows').wait_for()
            before, steps = seen(), page.locator('.runs tbody tr').first.inner_text()
            scroll = page.evaluate('scrollY')
            assert scroll > 100 and re.search(r'run-0.*\n1\.', before['tip'])
            assert before['ticks'] == [50, 100] and before['first'] == 'run-1'
            for folder in folders:
                with open(folder / 'metrics.jsonl', 'a') as file:
                    file.write(json.dumps({'step': 201, 'grad_norm': 1.2}) + '\n')
            page.locator('.runs', has_text='201').wait_for()
            assert page.locator('.runs tbody tr').first.inner_text() != steps
            assert seen() == before and abs(page.evaluate('scrollY') - scroll) < 20
            shutil.rmtree(folders[1])
            page.locator('#live', has_text='run-1').wait_for()
            assert seen() == before
        finally:
            served.kill()
    page.locator('#live', has_text='no longer').wait_for()
    assert seen() == before


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('n_runs', [1, 10])
def test_axe_finds_nothing(open_page, n_runs, width, scheme):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    page = open_page(n_runs, width, scheme)
    tables = "document.querySelectorAll('details:not(.data), #gradient_norm-data')"
    page.evaluate(f'{tables}.forEach(one => one.open = true)')
    page.locator('#gradient_norm-data tbody').wait_for()
    found = axe.run(page)
    assert found.response['passes'] and not found.violations_count, found.generate_report()


@pytest.mark.parametrize('n_runs', [1, 10])
def test_a_phone_shows_all_of_the_page(open_page, n_runs):
    page = open_page(n_runs, width=390)
    assert page.evaluate('document.documentElement.scrollWidth') == 390
    # No number or word is broken, except at an underscore: a cell without a space has one line.
    broken = page.evaluate(
        """() => [...document.querySelectorAll('td, th')].filter(cell => {
            const range = document.createRange()
            range.selectNodeContents(cell)
            return range.getBoundingClientRect().height > 30
                && !/[\\s/_]/.test(cell.textContent.trim()) && !cell.closest('.origin')
        }).map(cell => cell.textContent)"""
    )
    assert broken == []
    rows = "[...document.querySelectorAll('.config tr')].map(row => row.offsetHeight)"
    assert n_runs > 1 or max(page.evaluate(rows)) < 40  # one line each: the table scrolls


@pytest.mark.parametrize('width', [390, 700, 1000, 1400])
def test_the_table_of_runs_scrolls_in_its_box_or_fits_into_it(open_page, width):
    page = open_page(10, width)
    seen = page.evaluate(
        """() => {
            document.querySelector('.runs label').lastChild.textContent = 'learning-rate='.repeat(6)
            const box = document.querySelector('.runs').parentElement
            const needs = box.scrollWidth > box.clientWidth
            box.scrollLeft = box.scrollWidth
            const edge = one => one.getBoundingClientRect().right
            const verdict = document.querySelector('.runs td:last-child')
            return [needs, edge(verdict) - edge(box), document.documentElement.scrollWidth]
        }"""
    )
    assert seen[0] == (width < 1000)
    assert seen[1] <= 0 and seen[2] == width


@pytest.mark.parametrize('n_runs', [1, 10])
def test_a_printed_page_is_white_and_cuts_no_chart(open_page, n_runs):
    page = open_page(n_runs, width=720, scheme='dark')
    page.emulate_media(media='print')
    style = page.evaluate(
        """() => {
            const one = name => getComputedStyle(document.querySelector(name))
            const all = name => [...document.querySelectorAll(name)]
            return {
                ink: one('body').color,
                back: one('body').backgroundColor,
                card: one('.chart').backgroundColor,
                curve: one('#gradient_norm path.c0').stroke,
                toolbar: one('#toolbar').display,
                closed: one('#defaults').display,
                badge: one('.badge').printColorAdjust,
                breaks: [one('.chart').breakInside, one('h2').breakAfter],
                tallest: Math.max(...all('.chart').map(chart => chart.offsetHeight)),
                wide: all('.wide').map(box => box.scrollWidth).filter(width => width > 720),
            }
        }"""
    )
    assert style['back'] == 'rgba(0, 0, 0, 0)' and style['card'] == 'rgb(255, 255, 255)'
    assert style['ink'] == 'rgb(27, 31, 36)' and style['curve'] == 'rgb(0, 114, 178)'
    assert style['closed'] == 'none' and style['badge'] == 'exact'
    assert style['toolbar'] == 'none' and style['breaks'] == ['avoid', 'avoid']
    assert style['tallest'] < 900 and style['wide'] == []  # in pixels of an A4 page
