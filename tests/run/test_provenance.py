"""A run says where it comes from."""

import json
import re
import subprocess
from datetime import datetime, timezone

import pytest
from conftest import records

from nib.report import page
from nib.report.history import read_run, show_seconds
from nib.run.folder import write_config
from nib.run.provenance import find_commit


def test_a_run_records_its_origin(tmp_path, train_here, data_dir):
    out_dir = tmp_path / 'run'
    assert train_here(out_dir).returncode == 0
    content = json.loads((out_dir / 'config.json').read_text())['provenance']
    (start,) = content['starts']
    keys = {'step', 'date', 'command', 'machine', 'device', 'versions'}
    assert keys <= set(start) and start['step'] == 0
    meta = json.loads((data_dir / 'tiny' / 'meta.json').read_text())
    assert content['dataset']['name'] == 'tiny' and content['parameters'] > 0
    assert content['dataset']['vocabulary'] == meta['vocab_size']
    times = [record['time'] for record in records(out_dir)]
    assert times == sorted(times) and times[0] > 1.6e9
    page = (out_dir / 'report.html').read_text()
    for value in (content['dataset']['fingerprint'], start['date']):
        assert value in page


def test_a_resumed_run_keeps_its_earlier_starts(tmp_path):
    for step in (0, 10, 20):
        write_config(tmp_path, {}, {}, step, {}, {'starts': [{'step': step}]})
    starts = json.loads((tmp_path / 'config.json').read_text())['provenance']['starts']
    assert [start['step'] for start in starts] == [0, 10, 20]


def test_the_duration_leaves_out_the_pause_before_a_resume(tmp_path):
    lines = [{'step': step, 'time': 1e9 + 60 * step + 86400 * (step > 10)} for step in range(21)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    dates = [datetime.fromtimestamp(seconds, timezone.utc) for seconds in (1e9, 1e9 + 87000)]
    starts = [{'step': 10 * number, 'date': date.isoformat()} for number, date in enumerate(dates)]
    content = {'config': {}, 'provenance': {'starts': starts}}
    (tmp_path / 'config.json').write_text(json.dumps(content))
    run = read_run(tmp_path)
    assert run.elapsed[10] == 600 and run.seconds == 20 * 60  # and not a day more
    content = re.search(r'"hours":(\[.*?\])', page.toolbar([run], []))[1]
    assert json.loads(content)[-1] == pytest.approx(1 / 3, abs=1e-5)
    names = [name for name, _ in run.origin()]  # the step is in the heading
    assert names[-2:] == ['start at step 0: date', 'start at step 10: date']


@pytest.mark.parametrize(
    'seconds, shown',
    [(59.4, '59 s'), (60, '1 min 0 s'), (3599, '59 min 59 s'), (3600, '1 h 0 min')],
)
def test_durations_are_shown_as_people_read_them(seconds, shown):
    assert show_seconds(seconds) == shown


def test_the_commit_says_whether_files_have_changed(tmp_path, monkeypatch):
    assert find_commit(tmp_path) is None  # no repository

    def git(*command):
        author = ['-c', 'user.name=a', '-c', 'user.email=a@example.com']
        return subprocess.run(
            ['git', *author, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git('init', '-q')
    (tmp_path / 'file').write_text('1')
    git('add', 'file')
    git('commit', '-q', '-m', 'first')
    assert find_commit(tmp_path) == git('rev-parse', 'HEAD')
    (tmp_path / 'file').write_text('2')
    assert find_commit(tmp_path) == git('rev-parse', 'HEAD') + '-dirty'
    monkeypatch.setenv('PATH', str(tmp_path))  # git is not installed
    assert find_commit(tmp_path) is None
