"""The comparison of two revisions finds a loss that differs."""

import shutil

import pytest
from conftest import ROOT, run_script

from benchmarks import same_losses

VALUES = {'step 1 loss/step': 4.25, 'step 1 grad_norm': 1.5, 'step 2 loss/step': 4.125}


def test_equal_values_are_equal():
    assert same_losses.compare(VALUES, dict(VALUES)) == (3, '')


def test_the_first_difference_is_named_be_it_the_last_bit():
    almost = 4.25 + 2**-50
    count, difference = same_losses.compare(VALUES, VALUES | {'step 1 loss/step': almost})
    assert count == 3
    assert difference == f'step 1 loss/step: 4.25 became {almost!r}'


def test_a_missing_or_additional_value_is_a_difference():
    shorter = {place: VALUES[place] for place in list(VALUES)[:2]}
    assert same_losses.compare(VALUES, shorter)[1] == 'step 2 loss/step: 4.125 became nothing'
    assert same_losses.compare(shorter, VALUES)[1] == 'step 2 loss/step: nothing became 4.125'
    assert same_losses.compare({}, {})[1]


def test_only_losses_gradient_norms_and_samples_are_compared(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text(
        '{"step": 1, "loss/step": 4.25, "grad_norm": 1.5, "tokens_per_second": 812.0}\n'
        '{"step": 2, "loss/val": null, "sample": "one"}\n'
    )
    assert same_losses.read_values(tmp_path) == {
        'step 1 loss/step': 4.25,
        'step 1 grad_norm': 1.5,
        'step 2 loss/val': None,
        'step 2 sample': 'one',
    }


@pytest.mark.slow
def test_a_revision_with_other_weights_differs_and_a_copy_does_not(tmp_path):
    copy = tmp_path / 'copy'
    ignored = shutil.ignore_patterns('.git', 'out*', '*.bin', '__pycache__', 'docs', 'tests')
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = ['benchmarks/same_losses.py', f'--base={copy}', '--cases=GPT-2']
    done = run_script(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith('  equal')

    source = (copy / 'train.py').read_text(encoding='utf-8')
    assert 'seed: int = 1337 ' in source
    changed = source.replace('seed: int = 1337 ', 'seed: int = 1338 ')
    (copy / 'train.py').write_text(changed, encoding='utf-8')
    done = run_script(*command, f'--result={tmp_path / "table.txt"}')
    assert done.returncode == 1, done.stdout + done.stderr
    assert ' loss/' in done.stdout.splitlines()[-1] and ' became ' in done.stdout.splitlines()[-1]
    assert (tmp_path / 'table.txt').read_text() == done.stdout


def test_what_cannot_be_compared_is_refused_on_one_line(run_main):
    for flag in ('--base=no-such-branch', '--cases=GPT-9', '--rounds=0'):
        ended = run_main('benchmarks/same_losses.py', flag)
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
