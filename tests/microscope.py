"""A small model in the Microscope of debug_training.py, to examine and to break."""

import re

import pytest
import torch
from conftest import ROOT, SMALL_RUN

import configurator

SCRIPT = 'debug_training.py'
CALM = ['--gradient_accumulation_steps=1', '--dtype=float32', '--learning_rate=3e-3']
SMALL = [*SMALL_RUN, *CALM]  # the later flag wins
ARCHITECTURES = {
    'GPT-2': {'bias': True},
    'modern': {
        'position': 'rotary',
        'norm': 'rms',
        'qk_norm': True,
        'mlp': 'swiglu',
        'n_kv_head': 2,
    },
    'one key for all': {
        'position': 'rotary',
        'n_kv_head': 1,
        'mlp': 'relu2',
        'tied_head': False,
        'logit_cap': 10.0,
    },
    'LayerNorm of queries': {'qk_norm': True, 'bias': True, 'n_kv_head': 4, 'tied_head': False},
}


@pytest.fixture
def debug(data_dir, run_main):
    """debug(*flags): the script on the small model."""
    return lambda *flags: run_main(SCRIPT, *SMALL, f'--data_dir={data_dir}', *flags)


@pytest.fixture
def make_training(data_dir, monkeypatch):
    """make_training(*flags): a Microscope on the small model, to examine and to break."""

    import debug_training  # here, because all tests load this file
    import train
    from nib.machine.device import pick_device
    from nib.run.checks import settle_schedule

    def make(*flags):
        argv = [*SMALL, f'--data_dir={data_dir}', *flags]
        values, _ = configurator.configure(
            str(ROOT / SCRIPT), argv, settle={'device': pick_device}, base='train.py'
        )
        for key, value in settle_schedule(values).items():  # which get_lr reads, as in main
            monkeypatch.setitem(vars(train), key, value)
        data = (
            debug_training.open_dataset(values)
            if values['dataset']
            else debug_training.random_tokens(values, None)[0]
        )
        return debug_training.Microscope(values, data, None)

    return make


def examined(training, steps=20) -> tuple[str, str]:
    """All of the report, and its last section, on one line."""
    from nib.lessons import examination

    text = '\n'.join(examination.examine(training, full=True, overfit_steps=steps))
    return text, ' '.join(text.split('5. WHAT IS OUT OF RANGE')[1].split())


def table(text) -> dict[str, list[str]]:
    """The rows of the parameters' table: name -> its other cells."""
    lines = text.split('update/weight\n')[1].split('\nall ')[0].splitlines()
    cells = [re.sub(r'(\d) x (\d)', r'\1x\2', line).split() for line in lines]
    return {row[0]: row[1:] for row in cells}


def plain_adamw(model, values):
    decayed, plain = (
        [p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False)
    )
    groups = [
        {'params': decayed, 'weight_decay': values['weight_decay']},
        {'params': plain, 'weight_decay': 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=values['learning_rate'], betas=(values['beta1'], values['beta2'])
    )
