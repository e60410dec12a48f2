"""report.py, and the report that train.py writes at the end of a run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, records, run_script
from processes import PATIENCE
from report_pages import DEFAULTS, FINDING, Page, full_records, write_run

from nib.report.page import write_report


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
    one, other = (
        write_run(tmp_path / name, [{'step': 1, 'loss/step': 1.0}]) for name in ('one', 'other')
    )
    assert run_main('report.py', one, other).returncode == 0
    page = Page((tmp_path / 'comparison.html').read_text())
    assert any(page.values(chart).get("other: a step's batch") == {1: 1.0} for chart in page.charts)
    assert {path.stem for path in (tmp_path / 'comparison').iterdir()} == page.charts.keys()
    assert (
        run_main(
            'report.py', f'--out_dir={run}', f'--page={tmp_path}/x.html', '--no-png'
        ).returncode
        == 0
    )
    assert (tmp_path / 'x.html').exists() and not (tmp_path / 'x').exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a disk that is full')
def test_a_full_disk_is_reported_with_the_name_of_the_png(tmp_path, run_main):
    pytest.importorskip('matplotlib')
    run = write_run(tmp_path / 'run', [{'step': 1, 'loss/step': 1.0}])
    (run / 'report').mkdir()
    png = run / 'report' / 'loss.png'
    png.symlink_to('/dev/full')
    done = run_main('report.py', f'--out_dir={run}')
    assert done.returncode == 2 and done.stderr.startswith(f'error: {png}: No space left on device')


@pytest.mark.parametrize('n, last', [(1, '1 problem-0'), (30, 'and 6 more')])
def test_a_png_names_its_findings(tmp_path, monkeypatch, n, last):
    figure = pytest.importorskip('matplotlib.figure')
    legends, legend = [], figure.Figure.legend
    monkeypatch.setattr(
        figure.Figure,
        'legend',
        lambda self, *args, **options: legends.append(legend(self, *args, **options)),
    )
    lines = [{'step': step, 'loss/val': 2.0} for step in (1, 40)] + [
        {'step': 1 + i, f'finding/problem-{i}': FINDING} for i in range(n)
    ]
    write_report([write_run(tmp_path / 'run', lines)], DEFAULTS, tmp_path / 'page.html', png=True)
    (named,) = [[label.get_text() for label in one.get_texts()] for one in legends]
    assert '1 problem-0' in named and last in named and len(named) == 2 + n - max(0, n - 24 - 1)


def test_half_a_character_in_a_name_is_drawn_as_a_question_mark(tmp_path):
    pytest.importorskip('matplotlib')
    lines = [{'step': step, '\ud800': 2.0, 'finding/\ud801': FINDING} for step in (1, 2)]
    run = write_run(tmp_path / 'run', lines)
    assert write_report([run], DEFAULTS, tmp_path / 'page.html', png=True) > 0


def test_without_matplotlib_there_is_the_page_and_a_line(tmp_path, run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.delitem(sys.modules, 'matplotlib.figure', raising=False)
    run = write_run(tmp_path / 'run', full_records())
    done = run_main('report.py', f'--out_dir={run}')
    assert (
        done.returncode == 0
        and 'pip install --upgrade matplotlib' in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    assert Page((run / 'report.html').read_text()).charts


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--out_dir=nowhere'], 'no such folder'),
        (['--out_dir=config'], 'not a run'),
        (['--out_dir='], 'not a run'),
        (['--out_dir={run}', '--page=x.txt'], 'must end in .html'),
        (['--out_dir={run}', '--page={run}/step-00000010/x.html'], 'is inside a checkpoint'),
        (['--out_dir={run}', '--page=no/where/x.html'], 'no/where'),
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
