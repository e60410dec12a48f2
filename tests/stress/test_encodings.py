"""Random texts in random encodings, a few of the program's thousands."""

import shutil

import pytest
from conftest import run_script


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('iconv'), reason='runs the advised commands')
def test_100_random_texts_are_read_as_they_are_or_rejected(tmp_path):
    done = run_script(
        'stress/encodings.py', '--cases=100', '--seed=100', f'--result={tmp_path / "table.txt"}'
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / 'table.txt').read_text()
    assert table == done.stdout and table.startswith('100 cases')
    read, rejected, converted, *bad = table.splitlines()[-1].split()[1:]
    assert int(read) + int(rejected) + int(converted) == 100 and bad == ['0', '0', '0']


def test_another_text_and_advice_that_fails_are_seen(tmp_path, run_main, monkeypatch):
    """A reader that takes any byte, and one that advises another encoding."""
    from nib.text import reading

    flags = ['stress/encodings.py', '--cases=12']
    monkeypatch.setattr(
        reading,
        '_iconv',
        lambda path, source: reading._command('iconv -f KOI8-R -t UTF-8 {file} > {new}', path),
    )
    done = run_main(*flags)
    assert done.returncode == 1 and ': advice fails: ' in done.stderr
    monkeypatch.setattr(
        reading, 'decode', lambda stream, path, say: [stream.read().decode('latin-1')]
    )
    done = run_main(*flags)
    assert done.returncode == 1 and ': another text: ' in done.stderr
