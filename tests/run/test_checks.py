"""Config values that are rejected, and the values that 'auto' stands for."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import configurator
from model import GPT, GPTConfig
from nib.checkpoint import start as beginning
from nib.checkpoint.start import new_model
from nib.checkpoint.weights import Weights
from nib.errors import UserError
from nib.run.checks import check_config, settle_schedule

DEFAULTS = configurator.read_block(str(ROOT / 'train.py')).defaults


@pytest.mark.parametrize(
    'learning_rate, min_lr',
    [(6e-4, 6e-5), (1e-3, 1e-4), (1e-2, 1e-3), (2e-3, 2e-4), (0.0, 0.0), (0.06, 0.006)],
)
def test_the_schedule_ends_at_the_last_step_with_a_tenth_of_the_rate(learning_rate, min_lr):
    settled = settle_schedule(DEFAULTS | {'learning_rate': learning_rate, 'max_iters': 70})
    assert (settled['min_lr'], settled['lr_decay_iters']) == (
        min_lr,
        70,
    )  # as a person writes it, to the last bit


def test_what_is_set_stays():
    settled = settle_schedule(DEFAULTS | {'min_lr': 0.0, 'lr_decay_iters': 0})
    assert (settled['min_lr'], settled['lr_decay_iters']) == (0.0, 0)


def test_a_rate_that_would_rise_is_refused_in_one_line():
    with pytest.raises(
        UserError, match='min_lr 0.0001 is greater than learning_rate 5e-05.*--min_lr=auto'
    ) as refused:
        check_config(DEFAULTS | {'learning_rate': 5e-5, 'min_lr': 1e-4}, 1)
    assert '\n' not in str(refused.value)
    check_config(DEFAULTS | {'learning_rate': 5e-5}, 1)
    check_config(DEFAULTS | {'learning_rate': 5e-5, 'min_lr': 1e-4, 'lr_schedule': 'constant'}, 1)


WSD = {'lr_schedule': 'wsd', 'warmup_iters': 100, 'lr_decay_iters': 1000}


@pytest.mark.parametrize(
    'key, possible, impossible, others',
    [
        ('cooldown_iters', [1, 900], [0, 901], WSD),
        ('warmup_iters', [0, 1000], [-1, 1001], {'lr_decay_iters': 1000}),
        ('min_lr', [0.0, 6e-4], [-1e-9, 6.1e-4], {'learning_rate': 6e-4}),
        ('beta2', [0.0, 0.9999], [-0.1, 1.0], {}),
        ('batch_size', [1], [0], {}),
        ('gradient_accumulation_steps', [2, 4], [1, 3], {}),
    ],
)
def test_the_limits_of_a_value(key, possible, impossible, others):
    for value in possible:
        check_config(DEFAULTS | others | {key: value}, 2)
    for value in impossible:
        with pytest.raises(UserError, match=key):
            check_config(DEFAULTS | others | {key: value}, 2)


OLD = {
    'learning_rate': 1e-3,
    'min_lr': 3e-5,
    'max_iters': 100,
    'lr_decay_iters': 600000,
    'optimizer': 'adamw',
}


@pytest.mark.parametrize(
    'now, schedule',
    [
        ({}, (3e-5, 600000)),
        ({'learning_rate': 2e-3}, ('auto', 600000)),
        ({'max_iters': 200}, (3e-5, 'auto')),
        ({'min_lr': 1e-5}, (1e-5, 600000)),
        ({'min_lr': 'auto'}, ('auto', 600000)),
    ],
)
def test_a_resumed_run_keeps_the_schedule_of_before_unless_it_is_changed(now, schedule):
    """A run from before these keys had 'auto', whose config says numbers."""
    model = GPTConfig(vocab_size=65)
    resumed = SimpleNamespace(state={'config': OLD})
    values = {**DEFAULTS, **vars(model), 'learning_rate': 1e-3, 'max_iters': 100, **now}
    origins = dict.fromkeys(values, 'default') | dict.fromkeys(now, 'a flag')
    adopted = Weights('old', model, {}, {}, resumed).adopt(values, origins)
    assert (adopted['min_lr'], adopted['lr_decay_iters']) == schedule


@pytest.mark.parametrize('position', ['learned', 'rotary'])
def test_a_run_from_other_weights_has_its_own_dropout_recomputation_and_context(position):
    shape = {'block_size': 8, 'n_layer': 1, 'n_head': 1, 'n_embd': 4, 'position': position}
    other = GPT(GPTConfig(11, **shape))
    start = Weights('other', other.config, None, {'model': other.state_dict()})
    own = {'dropout': 0.3, 'recompute': True, 'block_size': 4}
    data = SimpleNamespace(tokenizer=None, vocab_size=11)
    model = new_model(DEFAULTS | shape | own, data, start)
    assert own.items() <= vars(model.config).items() and model.transformer.drop.p == 0.3
    expected = other.state_dict()
    if position == 'learned':
        expected['transformer.wpe.weight'] = expected['transformer.wpe.weight'][:4]
    for name, value in model.state_dict().items():
        assert value.equal(expected[name]), name
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(model.eval()(ids), other.eval()(ids))


def test_an_option_that_may_differ_but_changes_the_shapes_is_named(monkeypatch):
    """As in a fork that adds an option to MAY_DIFFER, and starts from a run that used it."""
    monkeypatch.setattr(beginning, 'MAY_DIFFER', ('dropout', 'smear'))
    shape = {'block_size': 8, 'n_layer': 1, 'n_head': 1, 'n_embd': 4}
    other = GPT(GPTConfig(11, smear=2, **shape))
    start = Weights('other', other.config, None, {'model': other.state_dict()})
    data = SimpleNamespace(tokenizer=None, vocab_size=11)
    for smear, said in ((0, 'which model.py lacks'), (1, 'but model.py has shape')):
        with pytest.raises(UserError, match=f'other has .*{said}.*: it was trained with smear 2;'):
            new_model(DEFAULTS | shape | {'smear': smear}, data, start)


def test_weights_that_a_changed_model_does_not_fit_are_refused():
    """As if model.py had been changed, other than by an option."""
    model = GPT(GPTConfig(11, block_size=8, n_layer=1, n_head=1, n_embd=4))
    weights = model.state_dict() | {'extra': torch.ones(2)}
    start = Weights('other', model.config, None, {'model': weights})
    data = SimpleNamespace(tokenizer=None, vocab_size=11)
    with pytest.raises(UserError, match='other has extra, which .*: it was trained with a diff'):
        new_model(DEFAULTS, data, start)
