"""A changed model.py is noticed before its weights are written, and when others' are read."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import train_once
from small_models import ARCHITECTURES, NAMES, SMALL, make_model

import convert
import model
from model import GPTConfig
from nib import errors
from nib.checkpoint import start, store
from nib.checkpoint.start import read_weights
from nib.checkpoint.weights import Weights, build_model
from nib.errors import UserError
from nib.hub.reference import check_model, check_tokenizer, crop, is_original
from nib.text.tokenizer import ByteTokenizer, CharTokenizer
from nib.text.vocabulary import IdTokenizer, VocabularyTokenizer

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


class Scaled(model.MLP):
    """Divides by a number that training changes."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('size', torch.ones(()))

    def forward(self, x):
        return super().forward(x / self.size)


CHANGES = {
    'a buffer that is 1 at first': (model, 'MLP', Scaled),
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


class LowerTokenizer(ByteTokenizer):
    """That of docs/change_it.md."""

    def to_json(self):
        return {'kind': 'lowercase'}


def test_an_added_tokenizer_is_refused():
    for known in (
        ByteTokenizer(),
        CharTokenizer('ab'),
        IdTokenizer(3),
        VocabularyTokenizer(('a',)),
    ):
        check_tokenizer(known)
    with pytest.raises(UserError, match='of the kind lowercase: other programs would split the'):
        check_tokenizer(LowerTokenizer())


class WithGate(model.Block):
    """Has a new path that begins at zero, or does not."""

    start = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.gate = torch.nn.Parameter(torch.full((config.n_embd,), self.start))
        self.side = torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, rotary=None):
        return super().forward(x, rotary) + self.gate * self.side(self.ln_1(x))


FORKS = {  # what is replaced, and whether it computes something else at first
    'a parallel block': ('Block.forward', parallel, True),
    'a new path that is 0': ('Block', WithGate, False),
    'a new path': ('Block', type('Open', (WithGate,), {'start': 1.0}), True),
    'nothing': ('Block', model.Block, False),
}


@pytest.fixture(scope='module')
def written(data_dir, tmp_path_factory):
    """A model of tiny's characters, as transformers and nanoGPT store it."""
    folder = tmp_path_factory.mktemp('written')
    train_once(data_dir, folder / 'run', '--max_iters=1', '--eval_iters=1', '--mlp=gelu_erf')
    for to in ('hf', 'nanogpt'):
        flags = [f'--out_dir={folder / "run"}', f'--to={to}', f'--dest={folder / to}']
        assert not errors.call(convert.main, flags)
    return folder


@pytest.mark.parametrize('source', ['hf', 'nanogpt'])
@pytest.mark.parametrize('name, change, differs', FORKS.values(), ids=FORKS)
def test_a_fork_trains_from_open_weights_with_a_warning_if_it_computes_something_else(
    name, change, differs, source, written, train_here, run_main, tmp_path, monkeypatch
):
    init_from, flags = f'--init_from={written / source}', ['--max_iters=1', '--eval_iters=1']
    place, _, attribute = name.partition('.')
    if attribute:
        monkeypatch.setattr(getattr(model, place), attribute, change)
    else:
        monkeypatch.setattr(model, place, change)
    if source == 'nanogpt' and issubclass(model.Block, WithGate):
        ended = train_here(tmp_path / 'run', init_from, *flags)
        assert ended.returncode == 2 and 'a modified nanoGPT is not supported' in ended.stderr
        return
    trained = train_here(tmp_path / 'run', init_from, *flags, '--report=False', status=0)
    sampled = run_main('sample.py', init_from, '--max_new_tokens=3', '--device=cpu')
    assert sampled.returncode == 0, sampled.stderr
    for ended in (trained, sampled):
        said = [line for line in ended.stderr.splitlines() if 'model.py' in line]
        notes = [line for line in said if 'lacks, such as transformer.h.0.gate' in line]
        assert len(notes) == issubclass(model.Block, WithGate), ended.stderr
        warnings = [line for line in said if line not in notes]
        assert len(warnings) == differs, ended.stderr
        assert all('logits differ from those of the original model' in line for line in warnings)
    saved = store.load(tmp_path / 'run')[1]['model']
    assert ('transformer.h.0.gate' in saved) == issubclass(model.Block, WithGate)


class WithoutBias(model.Block):
    def __init__(self, config):
        super().__init__(config)
        self.mlp.c_proj = torch.nn.Linear(config.mlp_units, config.n_embd, bias=False)


def test_a_fork_without_a_weight_of_an_open_model_refuses_it(written, monkeypatch):
    config, tensors = crop(SMALL, make_model(SMALL).state_dict())
    monkeypatch.setattr(model, 'Block', WithoutBias)
    assert not is_original(build_model(config, tensors), tensors)
    with pytest.raises(UserError, match=r'mlp\.c_proj\.bias is not part of GPT2LMHeadModel'):
        read_weights(str(written / 'hf'))


def test_a_fork_that_needs_more_layers_than_are_compared_gives_the_warning(monkeypatch):
    def initialize(block, config):
        assert config.n_layer > 2
        original(block, config)

    config, said, original = replace(SMALL, n_layer=3), [], model.Block.__init__
    tensors = {'model': make_model(config).state_dict()}
    monkeypatch.setattr(model.Block, '__init__', initialize)
    start._compared(Weights('x', config, None, tensors), said.append)
    assert len(said) == 1 and said[0].startswith('warning: model.py has been changed')


def test_a_model_of_zeros_is_not_called_changed():
    tensors = {name: 0 * tensor for name, tensor in make_model(SMALL).state_dict().items()}
    assert is_original(build_model(SMALL, tensors), tensors)


def test_every_architecture_is_the_original_when_it_is_loaded():
    for config in ARCHITECTURES:
        if not config.smear:
            weights = make_model(config).state_dict()
            small, tensors = crop(config, weights)
            assert small.n_layer == 2 and is_original(build_model(small, tensors), tensors)
