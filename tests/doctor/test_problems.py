"""What the doctor says about each problem, and the config of the lab that shows it."""

import re

import pytest
from conftest import ROOT
from signs import BLOCK, CONFIG, DEFAULTS

import configurator
import model
from nib.doctor.finding import Finding
from nib.doctor.problems import PROBLEMS


@pytest.mark.parametrize('name', PROBLEMS)
def test_what_to_change_can_be_changed(name):
    causes, changes = (
        [entry if isinstance(entry, str) else entry[1] for entry in advice]
        for advice in (PROBLEMS[name].causes, PROBLEMS[name].changes)
    )
    assert causes and changes and not any(text.endswith('.') for text in causes + changes)
    change = '; '.join(changes)
    for word in re.findall(r'\b[a-z]+(?:_[a-z]+)+\b(?!\.py)', change) + re.findall(
        r'--(\w+)', change
    ):
        assert word in DEFAULTS or word == 'tokenizer' or hasattr(model, word), (
            word
        )  # prepare.py's; a function of model.py
    for script in re.findall(r'\w+\.py', change):
        assert (ROOT / script).exists() or script == 'prepare.py'
    for key, value in re.findall(
        r'\b(\w+)(?: =)? (adamw|muon|gelu|relu2|swiglu|float32|bfloat16|rewind|skip)\b', change
    ):
        if key in DEFAULTS:
            configurator.resolve(BLOCK, [f'--{key}={value}'])


@pytest.mark.parametrize(
    ('name', 'config', 'advised'),
    [
        ('diverging', {'grad_clip': 0.0}, 'grad_clip = 1'),
        ('not_finite', {'dtype': 'float16'}, 'dtype = bfloat16 or float32'),
        ('lr_too_high', {}, 'set qk_norm'),
        ('plateau', {'lr_decay_iters': 30}, 'lr_decay_iters = max_iters'),
        ('all_clipped', {'grad_clip': 0.01}, 'grad_clip = 1'),
        ('dead_units', {'mlp': 'relu2'}, 'mlp = gelu or swiglu'),
        ('dead_units', {'bias': True}, 'bias = False'),
    ],
)
def test_advice_fits_the_config(name, config, advised):
    opposite = {
        'qk_norm': True,
        'bias': False,
        'mlp': 'gelu',
        'dtype': 'float32',
        'grad_clip': 1.0,
        'min_lr': 1e-4,
    }
    assert advised in str(Finding.of(name, 1, 'a figure', CONFIG | config))
    assert advised not in str(Finding.of(name, 1, 'a figure', CONFIG | opposite))


@pytest.mark.parametrize('zero_init', [False, True])
@pytest.mark.parametrize('tied_head', [False, True])
def test_a_tied_head_is_to_blame_only_behind_blocks_that_begin_as_the_identity(
    zero_init, tied_head
):
    said = str(
        Finding.of(
            'wrong_initial_loss',
            1,
            'a figure',
            CONFIG | {'zero_init': zero_init, 'tied_head': tied_head},
        )
    )
    assert ('a tied head' in said) == ('tied_head = False' in said) == (zero_init and tied_head)


@pytest.mark.parametrize('name', [*PROBLEMS, 'healthy'])
def test_the_lab_has_a_config_that_says_what_it_breaks(name):
    lines = (ROOT / f'config/lab/{name}.py').read_text().splitlines()
    assert lines[0].startswith('# ') and len(lines[0]) > 20
    assert f"out_dir = 'out-lab-{name.replace('_', '-')}'" in lines
    assert name == 'healthy' or "include('healthy.py')" in lines


def test_the_lab_breaks_nothing_without_a_name():
    assert {path.stem for path in (ROOT / 'config/lab').glob('*.py')} == {*PROBLEMS, 'healthy'}
