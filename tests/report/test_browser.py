"""The page in headless Chromium: drawing, zoom, switches, tables, phone. Needs playwright."""

import json
import math
import shutil

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

    def open_page(n_runs=1, width=1280):
        for number in range(n_runs):
            folder = tmp_path / f'run-{number}'
            folder.mkdir()
            lines = [
                {
                    'step': step,
                    'time': 1e9 + 36 * step,
                    'loss/step': 2 + math.exp(-step / 20) + number / 10,
                    'grad_norm': 1 + step / 1000,
                    **({'loss/val': 2.5 - step / 1000 + number / 10} if step % 50 == 0 else {}),
                }
                for step in range(0, 201, 10)
            ]
            (folder / 'metrics.jsonl').write_text(
                ''.join(json.dumps(line) + '\n' for line in lines)
            )
            config = {'learning_rate': (number + 1) / 1000, 'grad_clip': 1.0, 'batch_size': 2}
            config |= {'block_size': 8, 'gradient_accumulation_steps': 1}
            (folder / 'config.json').write_text(json.dumps({'config': config}))
        runs = read_runs([tmp_path / f'run-{number}' for number in range(n_runs)])
        (tmp_path / 'page.html').write_text(build_page(runs, DEFAULTS), encoding='utf-8')
        page = browser.new_page(viewport={'width': width, 'height': 900})
        page.set_default_timeout(5000)
        errors = []
        page.on('pageerror', lambda error: errors.append(error))  # noqa: PLW0108
        opened.append((page, errors))
        page.goto(f'file://{tmp_path / "page.html"}')
        return page

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


def test_the_first_fall_is_left_out_until_it_is_asked_for(open_page):
    page = open_page()
    before = max(ticks(page, axis='y'))
    page.get_by_label('all of the first fall').check()
    assert max(ticks(page, axis='y')) > before


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
    across = page.get_by_label('across')
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


@pytest.mark.parametrize('n_runs', [1, 10])
def test_a_phone_shows_all_of_the_page(open_page, n_runs):
    page = open_page(n_runs, width=390)
    assert page.evaluate('document.documentElement.scrollWidth') == 390
