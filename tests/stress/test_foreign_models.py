"""Random changes of open models' config.json, a few of the program's thousands."""

import signal

import pytest

from nib.hub import family, gpt2

PROGRAM = 'stress/foreign_models.py'
pytestmark = pytest.mark.skipif(not hasattr(signal, 'SIGPROF'), reason='limits processor time')


@pytest.mark.slow
def test_150_changed_models_are_computed_like_transformers_or_rejected(run_main, tmp_path):
    table = tmp_path / 'table.txt'
    done = run_main(PROGRAM, '--cases=150', '--seed=5', f'--result={table}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert table.read_text() == done.stdout and done.stdout.startswith('150 cases')
    equal, unchanged, rejected, *bad = map(int, done.stdout.splitlines()[-1].split()[1:])
    assert equal + unchanged + rejected == 150 and bad == [0, 0, 0, 0]
    assert min(equal, rejected) > 30


@pytest.mark.slow
def test_another_model_and_a_rejection_without_a_name_are_seen(run_main, monkeypatch):
    """A reader that ignores the activation, and one that does not say what is wrong."""
    flags = [PROGRAM, '--cases=60', '--seed=2']
    with monkeypatch.context() as patch:
        patch.setattr(family.Family, 'check_keys', lambda self, config, special: None)
        patch.setattr(gpt2, 'ACTIVATIONS', dict.fromkeys(gpt2.ACTIVATIONS, 'relu'))
        done = run_main(*flags)
    assert done.returncode == 1 and ': another model: ' in done.stderr
    monkeypatch.setattr(family.Family, 'read_fields', lambda self, *_: {}['no such key'])
    done = run_main(*flags)
    assert done.returncode == 1 and ': no clear line: ' in done.stderr
