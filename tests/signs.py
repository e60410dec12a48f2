"""The vital signs of a healthy run, and changes to them that show each problem."""

import math
from dataclasses import replace

from conftest import ROOT

import configurator
from nib.doctor.doctor import Doctor
from nib.doctor.finding import Finding
from nib.doctor.texts import DataSigns
from nib.doctor.vitals import EvaluationSigns, StepSigns

BLOCK = configurator.read_block(str(ROOT / 'train.py'))
DEFAULTS = BLOCK.defaults
CONFIG = DEFAULTS | {
    'n_layer': 4,
    'n_embd': 128,
    'max_iters': 300,
    'lr_decay_iters': 300,
    'warmup_iters': 20,
    'learning_rate': 1e-3,
    'batch_size': 16,
    'block_size': 32,
    'gradient_accumulation_steps': 1,
    'eval_iters': 20,
}
DATA = DataSigns(
    vocab_size=65,
    used=60,
    sampled=100_000,
    entropy=3.3,
    leaked=0.0,
    distance=0.01,
    usual_distance=0.01,
)
GUESS = math.log(65)  # the loss of a uniform guess


def loss_at(step: int) -> float:
    return 1.5 + (GUESS - 1.5) * math.exp(-step / 80)


def step_signs(step: int, n: int = 1, **changes) -> StepSigns:
    """Those of a healthy run."""
    losses = [loss_at(s) + 0.02 * (-1) ** s for s in range(step - n, step)]
    return replace(
        StepSigns(
            step,
            1e-3 * min(1.0, step / 20),
            losses,
            [0.5] * n,
            {'attention': 0.004, 'mlp': 0.003, 'embedding': 0.05},
            {'attention': 0.02, 'mlp': 0.02, 'embedding': 0.02},
            [1e-3] * 4,
            None if step == 1 else 0.06,
            1.0,
            0.04,
            1e5,
        ),
        **changes,
    )


def evaluation_signs(step: int, **changes) -> EvaluationSigns:
    return replace(
        EvaluationSigns(step, loss_at(step), 1.01 * loss_at(step), 0.0, 5.0, 0.7, 1.0, 0.5),
        **changes,
    )


def make_doctor(
    config=None, data=None, n_params=100_000, train_tokens=1_000_000, trained=False
) -> Doctor:
    return Doctor(
        CONFIG | (config or {}), replace(DATA, **data or {}), n_params, train_tokens, trained
    )


def show(
    doctor: Doctor,
    step=lambda s: {},
    evaluation=lambda s: {},
    start=GUESS,
    generation=None,
    log_interval=10,
    first=0,
    last=300,
) -> list[Finding]:
    """Returns the findings of a healthy run whose vital signs step() and evaluation() change.

    start: the train loss of the evaluation at step 0.
    """
    found = doctor.see_data()
    logged = first
    for s in range(first, last + 1):
        if s % log_interval == 0 and s > first or s == 1:
            found += doctor.see_step(step_signs(s, s - logged, **step(s)))
            logged = s
        if s % 30 == 0:
            signs = evaluation_signs(s, **evaluation(s))
            signs = signs if s else replace(signs, train_loss=start)
            found += doctor.see_evaluation(signs)
    return found + doctor.see_generation(last, generation)


def names_of(findings) -> list[str]:
    return [finding.name for finding in findings]


def ratio(value):
    return {'update_ratio': {'attention': value / 2, 'mlp': value, 'embedding': 0.01}}


def rising(s):
    return {'losses': [loss_at(s) + 2.0 * (s > 100)] * 10}


# name -> changes to a healthy run that show this problem and no other
FIRING = {
    'diverging': {'step': rising},
    'lr_too_high': {'step': lambda s: ratio(0.2)},
    'lr_too_low': {'step': lambda s: ratio(1e-5)},
    'plateau': {
        'step': lambda s: (
            {'losses': [max(loss_at(s), 3.0) + 0.01 * (-1) ** i for i in range(10)]}
            if s > 1
            else {}
        )
    },
    'exploding_gradients': {
        'config': {'grad_clip': 0.0},
        'step': lambda s: {'grad_norms': [1.0, 1e3]},
    },
    'vanishing_gradients': {'step': lambda s: {'block_grad_rms': [1e-9, 1e-7, 1e-5, 1e-3]}},
    'all_clipped': {'step': lambda s: {'grad_norms': [8.0] * 10}},
    'no_warmup': {'config': {'warmup_iters': 0}, 'step': lambda s: ratio(0.5) if s == 1 else {}},
    'overfitting': {
        'evaluation': lambda s: {'train_loss': 2.0 - s / 300, 'val_loss': 2.0 + abs(s - 90) / 100}
    },
    'underfitting': {
        'n_params': 500,
        'evaluation': lambda s: {'train_loss': 2.0, 'val_loss': 2.02},
    },
    'constant_batches': {'step': lambda s: {'repeated': 1.0 if s > 1 else None}},
    'tiny_vocabulary': {'data': {'vocab_size': 4096}, 'start': math.log(4096)},
    'different_texts': {'data': {'distance': 0.2}},
    'targets_not_shifted': {'step': lambda s: {'shifted': 0.04, 'copied': 1.0}},
    'val_leaked': {'data': {'leaked': 0.8}},
    'dead_units': {'evaluation': lambda s: {'dead_units': 0.6}},
    'wrong_initial_loss': {'start': 9.0},
    'throughput_collapse': {'step': lambda s: {'tokens_per_second': 2e4 if s > 100 else 1e5}},
    'float16_underflow': {'step': lambda s: {'loss_scale': 65536.0 / 2 ** (s // 10)}},
    'weight_decay_too_strong': {
        'step': lambda s: {
            'weight_rms': {'attention': 0.02, 'mlp': 0.02 * math.exp(-s / 300), 'embedding': 0.02}
        }
    },
    'batch_too_small': {'evaluation': lambda s: {'noise_scale': 40.0}},
    'generation_differs': {'generation': 'after 252 tokens, the logits differ by 31%'},
}


def diagnose(name: str, **options):
    changes = FIRING[name]
    doctor = make_doctor(
        **{key: changes[key] for key in ('config', 'data', 'n_params') if key in changes}
    )
    return doctor, show(
        doctor,
        **{
            key: changes[key]
            for key in ('step', 'evaluation', 'start', 'generation')
            if key in changes
        },
        **options,
    )
