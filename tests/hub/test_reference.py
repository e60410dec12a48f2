"""A model.py that has been changed is noticed before its weights are written for other programs."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import ARCHITECTURES, NAMES, SMALL

import model
from model import GPTConfig
from nib.errors import UserError
from nib.hub.reference import check_model

WIDE = GPTConfig(
    vocab_size=50_257,
    block_size=512,
    n_layer=12,
    n_head=6,
    n_kv_head=2,
    n_embd=384,
    bias=False,
    qkv_bias=True,
    position='rotary',
    rotary_scaling=(8.0, 1.0, 4.0, 64),
    norm='rms',
    norm_eps=1e-5,
    mlp='gelu_erf',
)


@pytest.mark.parametrize('config', [*ARCHITECTURES, WIDE], ids=[*NAMES, 'wide'])
def test_the_model_as_it_is_computes_every_architecture(config):
    state = torch.get_rng_state()
    check_model(config)
    assert torch.equal(torch.get_rng_state(), state)


def parallel(block, x, rotary=None):
    return x + block.attn(block.ln_1(x), rotary) + block.mlp(block.ln_2(x))


def scaled(q, k, query_positions, key_positions):
    scores = q @ k.transpose(-2, -1) / q.shape[-1]
    is_later = key_positions.unsqueeze(-2) > query_positions.unsqueeze(-1)
    return scores.masked_fill(is_later, -math.inf)


def slower(rotary, positions):
    return rotary.cos[positions // 2].unsqueeze(-3), rotary.sin[positions // 2].unsqueeze(-3)


class WiderMLP(model.MLP):
    def __init__(self, config):
        super().__init__(config)
        self.c_fc = torch.nn.Linear(config.n_embd, config.mlp_units + 8)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)[..., :-8]))


CHANGES = {
    'another shape': (model, 'MLP', WiderMLP),
    'a parallel block': (model.Block, 'forward', parallel),
    'another scale of attention': (model, 'attention_scores', scaled),
    'another activation': (model.ACTIVATIONS, 'gelu', torch.nn.SiLU),
    'other positions': (model.Rotary, 'forward', slower),
    'another head': (model.GPT, 'logits', lambda gpt, x: x @ gpt.transformer.wte.weight.T / 2),
}


@pytest.mark.parametrize('where, name, change', CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_refused(monkeypatch, where, name, change):
    put = monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr
    put(where, name, change)
    with pytest.raises(UserError, match=r'model\.py has been changed'):
        check_model(replace(SMALL, position='rotary') if where is model.Rotary else SMALL)


@pytest.mark.parametrize('to, dest', [('hf', 'new'), ('gguf', 'new.gguf'), ('nanogpt', 'new')])
def test_convert_writes_nothing_of_a_changed_model(
    train_here, run_main, tmp_path, monkeypatch, to, dest
):
    train_here(tmp_path / 'run', '--max_iters=1', '--eval_iters=1')
    monkeypatch.setattr(model.Block, 'forward', parallel)
    convert = ['convert.py', f'--out_dir={tmp_path / "run"}', f'--to={to}']
    ended = run_main(*convert, f'--dest={tmp_path / dest}')
    assert ended.returncode == 2 and ended.stderr.startswith('error: model.py has been changed')
    assert not (tmp_path / dest).exists()
