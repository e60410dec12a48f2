"""nib/api.py, which notebooks use: every kind of model, its logits, its attention, its text."""

import dataclasses

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from small_models import MODERN, SMALL, make_model
from transformers import AutoModelForCausalLM

import configurator
from nib.api import Continuation, attention_maps, encode, generate, load, stream
from nib.checkpoint import store, weights
from nib.errors import UserError
from nib.hub import huggingface, nanogpt
from nib.text.tokenizer import CharTokenizer

CHARACTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;?!"\''
TOKENIZER = CharTokenizer.train(CHARACTERS)
TEXT = 'What a Cat sees'
UNSHARED = dataclasses.replace(MODERN, n_kv_head=0, tied_head=False, head_dim=10)


@pytest.mark.parametrize('config', [SMALL, MODERN, UNSHARED], ids=['gpt2', 'qwen3', 'wide'])
def test_an_exported_model_has_the_logits_and_attention_of_transformers(config, tmp_path):
    original = make_model(dataclasses.replace(config, vocab_size=len(CHARACTERS)))
    folder = str(tmp_path / 'model')
    huggingface.write(folder, original.config, original.state_dict(), TOKENIZER, 'card')
    model, tokenizer = load(folder)
    ids = encode(tokenizer, TEXT)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager').eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), output_attentions=True)
        torch.testing.assert_close(model(torch.tensor([ids])), expected.logits)
    maps = attention_maps(model, ids)
    assert len(maps) == config.n_layer
    for ours, theirs in zip(maps, expected.attentions, strict=True):
        assert ours.shape == (config.n_head, len(ids), len(ids))
        torch.testing.assert_close(ours, theirs[0], atol=1e-6, rtol=1e-5)
    assert not any(block.attn._forward_hooks for block in model.transformer.h)


def test_a_checkpoint_of_nanogpt_is_loaded(tmp_path):
    original = make_model(dataclasses.replace(SMALL, vocab_size=len(CHARACTERS), mlp='gelu_erf'))
    tensors = {'model': original.state_dict()}
    config = configurator.read_block(str(ROOT / 'train.py')).defaults
    nanogpt.write_folder(tmp_path / 'out', original.config, tensors, TOKENIZER, {'step': 1}, config)
    for name in (tmp_path / 'out', tmp_path / 'out/ckpt.pt'):
        model, tokenizer = load(str(name))
        idx = torch.tensor([encode(tokenizer, TEXT)])
        assert torch.equal(model(idx), original(idx))


def test_a_changed_model_with_a_buffer_of_its_own_is_loaded(tmp_path, monkeypatch):
    """Checkpoints do not hold a buffer that is not persistent, such as the slopes of ALiBi."""

    class Changed(weights.GPT):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer('slopes', torch.arange(4.0), persistent=False)

    original = make_model(dataclasses.replace(SMALL, vocab_size=len(CHARACTERS)))
    huggingface.write(
        str(tmp_path / 'm'), original.config, original.state_dict(), TOKENIZER, 'card'
    )
    monkeypatch.setattr(weights, 'GPT', Changed)
    model, _ = load(str(tmp_path / 'm'))
    assert model.slopes.tolist() == [0, 1, 2, 3]
    idx = torch.tensor([encode(TOKENIZER, TEXT)])
    assert torch.equal(model(idx), original(idx))


def test_a_run_is_loaded_and_writes_the_text_of_sample_py(train_here, run_main, tmp_path):
    run = tmp_path / 'run'
    train_here(run, '--eval_interval=10', '--keep_last=2', '--dropout=0.5')
    store.point(run, 'best', run / 'step-00000010')
    for name, which, step in (
        (run, 'best', 10),
        (run, 'latest', 20),
        (run, '20', 20),
        (str(run), 20, 20),
        (run / 'step-00000020', 'best', 20),
    ):
        model, tokenizer = load(name, which)
        _, tensors = store.load(run, str(step))
        weights = model.state_dict()
        assert all(torch.equal(t, weights[key]) for key, t in tensors['model'].items())
    # The model is that of step 20.
    flags = ['--which=20', '--num_samples=1', '--device=cpu', '--dtype=float32', '--stop=s ']
    said = run_main('sample.py', f'--out_dir={run}', '--start=The cat', *flags)
    options = dict(temperature=0.8, top_k=200, seed=1337)
    assert generate(model, tokenizer, 'The cat', 500, 's ', **options) + '\n' == said.stdout


def test_errors_are_one_exception(train_here, tmp_path):
    train_here(tmp_path / 'run', '--max_iters=1', '--eval_iters=1', '--eval_interval=1')
    with pytest.raises(UserError, match='did you mean .*run'):
        load(str(tmp_path / 'ruin'))
    with pytest.raises(UserError, match='no such checkpoint|no checkpoint of step'):
        load(str(tmp_path / 'run'), '77')
    model, tokenizer = load(str(tmp_path / 'run'))
    with pytest.raises(UserError, match="^prompt: the text .*not in the vocabulary.*'é'") as error:
        encode(tokenizer, 'é')
    assert error.value.__suppress_context__  # a notebook shows one traceback
    with pytest.raises(UserError, match='temperature is -1'):
        generate(model, tokenizer, 'The', temperature=-1)
    with pytest.raises(UserError, match='empty'):
        generate(model, tokenizer, '')
    with pytest.raises(UserError, match='ids is empty'):
        attention_maps(model, [])
    for id in (999, -1):
        with pytest.raises(UserError, match=f'ids contains {id}, but the vocabulary ends at'):
            attention_maps(model, [0, id])
    for wrong in ({'max_new_tokens': 2.5}, {'top_k': 2.5}):
        with pytest.raises(UserError, match='is 2.5: it must be a whole number'):
            generate(model, tokenizer, 'The', **wrong)
    with pytest.raises(UserError, match='prompts is empty'):
        next(stream(model, tokenizer, [], 2))
    # A tensor of ids is as good as a list.
    texts = [[*stream(model, tokenizer, p, 3, seed=1)] for p in ([[1, 2]], torch.tensor([[1, 2]]))]
    assert texts[0] == texts[1]


@given(st.binary() | st.text().map(str.encode))
def test_bytes_that_come_one_by_one_make_the_text_that_they_make_together(content):
    row = Continuation()
    shown = ''.join(
        [row.add(content[at : at + 1]) for at in range(len(content))] + [row.add(b'', final=True)]
    )
    assert shown == row.text == content.decode('utf-8', 'replace')
