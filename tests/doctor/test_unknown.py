"""The doctor and the lessons work with an optimizer and an activation that they do not know."""

import pytest
import torch
from conftest import ROOT

import configurator
import debug_training
import train as training
from nib.doctor.doctor import Doctor
from nib.doctor.texts import examine_data
from nib.doctor.vitals import Vitals
from nib.lessons import examination, walkthrough
from nib.machine.device import pick_device
from nib.optim import Optimizer
from nib.run.checks import settle_schedule

FLAGS = [
    '--dataset=',
    '--device=cpu',
    '--dtype=float32',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=1',
    '--learning_rate=1e-2',
    '--overfit_steps=3',
]


class Sign:
    """Moves each weight by the learning rate, against the sign of its gradient; has no state."""

    def __init__(self, params):
        self.params, self.lr_ratio, self.betas, self.weight_decay = (
            list(params),
            1.0,
            (0.9, 0.95),
            0.0,
        )

    def step(self, lr, usable):
        for p in self.params:
            p.add_(p.grad.sign(), alpha=-lr * float(usable))

    def state(self):
        return [(p, {}) for p in self.params]


@pytest.fixture
def values(monkeypatch):
    pick = Optimizer.pick.__func__

    def picked(cls, values, model, has_bfloat16, *ranks):
        if values['optimizer'] != 'sign':
            return pick(cls, values, model, has_bfloat16, *ranks)
        optimizer = cls(model)
        optimizer.parts = [Sign(model.parameters())]
        return optimizer

    monkeypatch.setattr(Optimizer, 'pick', classmethod(picked))
    values, _ = configurator.configure(
        str(ROOT / 'debug_training.py'), FLAGS, settle={'device': pick_device}, base='train.py'
    )
    for key, value in settle_schedule(values).items():  # which get_lr reads
        monkeypatch.setitem(vars(training), key, value)
    return values | {'optimizer': 'sign'}


def test_a_run_is_watched(values):
    data, _ = debug_training.random_tokens(values, None)
    t = training.Training.set_up(values, data)
    vitals = Vitals(t.model, t.optimizer, t.scaler, t.batches, t.precision)
    doctor = Doctor(
        values | {'max_iters': 4},
        examine_data(data.train, data.val, data.vocab_size),
        1000,
        len(data.train),
        trained=False,
    )
    t.optimizer.lr = 0.05  # which would be far too high for AdamW
    found = []
    for step in range(4):
        mean_loss, grad_norm = training.train_step(
            t, vitals.begin(t.batches.micro_batches(step)), step
        )
        vitals.note(mean_loss, grad_norm)
        found += doctor.see_step(vitals.read(step + 1, 0.05, 1000.0))
    vital_signs = vitals.evaluate(4, 0, 3.0, 3.0, t.batches.batch(0, 0))
    found += doctor.see_evaluation(vital_signs)
    assert not {finding.name for finding in found} & {
        'lr_too_high',
        'lr_too_low',
        'vanishing_gradients',
    }


@pytest.mark.parametrize('explain', [False, True])
def test_the_lessons_name_it_and_mark_nothing_for_it(values, explain):
    values = values | {'explain': explain, 'batch_tokens': 64}
    data, _ = debug_training.random_tokens(values, None)
    microscope = debug_training.Microscope(values, data, None)
    lines = '\n'.join(
        walkthrough.walk_through(microscope)
        if explain
        else examination.examine(microscope, False, 3)
    )
    assert 'Muon' not in lines and 'sign' in lines and 'update too' not in lines


def test_an_unknown_activation_is_no_error(values):
    values = values | {'optimizer': 'adamw', 'batch_tokens': 64}
    data, _ = debug_training.random_tokens(values, None)
    microscope = debug_training.Microscope(values, data, None)
    for block in microscope.model.transformer.h:
        block.mlp.kind = 'tanh'
        block.mlp.forward = lambda x, mlp=block.mlp: mlp.c_proj(torch.tanh(mlp.c_fc(x)))
    object.__setattr__(microscope.model.config, 'mlp', 'tanh')
    t = microscope.training
    assert 'GELU' not in '\n'.join(examination.examine(microscope, False, 3))
    vital_signs = Vitals(t.model, t.optimizer, t.scaler, t.batches, t.precision).evaluate(
        0, 0, 3.0, 3.0, t.batches.batch(0, 0)
    )
    assert vital_signs.dead_units == 0.0  # no unit is 0 for every token
