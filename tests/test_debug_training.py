"""debug_training.py: how much of a batch it takes, and every way to start it."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from microscope import SCRIPT, examined

import debug_training
from model import GPT, GPTConfig
from nib.lessons import examination
from nib.text.tokenizer import ByteTokenizer


def test_a_batch_is_cut_to_what_a_cpu_computes_soon(make_training, monkeypatch):
    assert make_training().batch()[0].shape == (4, 16)
    assert make_training('--batch_tokens=40').batch()[0].shape == (2, 16)
    assert make_training('--batch_tokens=10').batch()[0].shape == (1, 10)
    assert make_training('--batch_tokens=1000').batch()[0].shape == (4, 16)
    assert make_training('--batch_tokens=10', '--explain').batch()[0].shape == (2, 5)
    assert make_training('--batch_size=1', '--explain').batch()[0].shape == (2, 16)
    training = make_training('--block_size=100')
    monkeypatch.setattr(
        debug_training, 'QUICK', 210 * 3 * sum(training.model.flops_per_token().values())
    )
    assert make_training('--block_size=100').batch()[0].shape == (2, 100)
    monkeypatch.setattr(
        debug_training, 'QUICK', 80 * 3 * sum(training.model.flops_per_token().values())
    )
    assert make_training('--block_size=100').batch()[0].shape == (1, 80)
    text = ' '.join(
        '\n'.join(examination.describe_batch(make_training('--batch_tokens=10'))).split()
    )
    assert '1 sequence of 10 tokens' in text and '(--batch_tokens=64 examines all)' in text


def test_the_part_that_is_examined_is_the_beginning_of_the_batch_of_training(make_training):
    training = make_training('--batch_tokens=40', '--gradient_accumulation_steps=3')
    for number in (0, 1, 7):
        x, y = training.training.batches.batch(number, 0)
        assert torch.equal(training.batch(number)[0], x[:2])
        assert torch.equal(training.batch(number)[1], y[:2])


def test_a_batch_far_too_large_for_the_memory_costs_only_the_part_that_is_examined(make_training):
    """Whole, its offsets alone would have 16 GB."""
    for flags in ([], ['--dataset=']):
        training = make_training('--batch_size=2000000000', '--batch_tokens=40', *flags)
        assert training.batch(1)[0].shape == (2, 16)
        assert training.data.train.nbytes < 200e6


def test_parts_of_a_character_are_shown_as_bytes(make_training):
    training = make_training()
    training.data = replace(training.data, tokenizer=ByteTokenizer())
    ids = torch.tensor([*'né中'.encode(), 256, *'中'.encode()[:2]])
    assert training.show_tokens(ids) == "'né中<|endoftext|><0xE4><0xB8>'"
    parts = [training.show_tokens(part) for part in ids[1:6].split(1)]
    assert parts == ["'<0xC3>'", "'<0xA9>'", "'<0xE4>'", "'<0xB8>'", "'<0xAD>'"]


def test_a_step_that_is_undone_leaves_nothing(make_training):
    training = make_training()
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    examined(training, steps=2)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items()
    )
    assert training.model.training and all(p.grad is None for p in training.model.parameters())


def test_float16s_scale_is_taken_out_of_the_gradients(make_training, debug):
    """As are the steps in which it is still too large."""
    done = debug('--dtype=float16', '--logit_cap=5', '--overfit_steps=2')
    assert done.returncode == 0, done.stderr
    training = make_training('--dtype=float16')
    training.training.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**60)
    training.accumulate([training.batch()])
    halves = {name: p.grad.clone() for name, p in training.model.named_parameters()}
    exact = make_training()
    exact.accumulate([exact.batch()])
    for name, parameter in exact.model.named_parameters():
        assert (halves[name] - parameter.grad).norm() < 0.05 * parameter.grad.norm(), name


@pytest.mark.parametrize('config', sorted(path.name for path in (ROOT / 'config').glob('*.py')))
def test_every_config_file_runs(config, run_main, tmp_path, monkeypatch):
    """In a small size, on random tokens, and as a new model where it asks for published weights."""
    monkeypatch.chdir(tmp_path)
    small = [
        '--dataset=',
        '--init_from=scratch',
        '--device=cpu',
        '--n_layer=1',
        '--n_head=2',
        '--n_embd=16',
        '--block_size=8',
        '--batch_size=2',
    ]
    for flags in (['--overfit_steps=2'], ['--explain']):
        done = run_main(SCRIPT, ROOT / 'config' / config, *small, *flags)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        assert 'Random tokens contain nothing to learn' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_published_weights_and_runs_meet_random_tokens(train_here, debug, tmp_path):
    sizes = {'n_layer': 1, 'n_head': 2, 'n_embd': 16}
    model = GPT(GPTConfig(vocab_size=300, block_size=32, bias=True, **sizes))
    (tmp_path / 'gpt2').mkdir()
    (tmp_path / 'gpt2/config.json').write_text(
        json.dumps({'model_type': 'gpt2', 'vocab_size': 300, 'n_positions': 32, **sizes})
    )
    published = {
        name.removeprefix('transformer.'): tensor.t().contiguous()
        if tensor.ndim == 2 and '.h.' in name
        else tensor
        for name, tensor in model.state_dict().items()
    }
    safetensors.torch.save_file(published, tmp_path / 'gpt2/model.safetensors')
    architecture = ['--n_layer=1', '--n_embd=16', '--bias=True', '--block_size=32', '--dataset=']
    done = debug(f'--init_from={tmp_path / "gpt2"}', *architecture, '--overfit_steps=1')
    assert done.returncode == 0, done.stderr
    assert 'ln 300, a uniform guess' in done.stdout and 'healthy: below' not in done.stdout
    train_here(tmp_path / 'run', '--max_iters=2')
    for start in (tmp_path / 'run', 'resume'):
        done = debug(
            f'--init_from={start}',
            f'--out_dir={tmp_path / "run"}',
            '--dataset=',
            '--overfit_steps=1',
        )
        assert done.returncode == 0, done.stderr
        assert 'worse than a guess on random tokens' in done.stdout


def test_mistakes_are_one_line(debug, tmp_path):
    for flags, words in (
        (['--overfit_steps=0'], 'overfit_steps is 0: it must be at least 1'),
        (['--batch_tokens=-1'], 'batch_tokens is -1'),
        (['--vocab_size=1', '--dataset='], 'vocab_size is 1: random tokens need at least 2'),
        (['--vocab_size=100'], 'but vocab_size is 100: leave vocab_size out'),
        (['--dataset=nowhere'], 'or use random tokens: --dataset='),
        (['--n_head=3'], 'n_embd 32 is not divisible by n_head 3'),
        (['--init_from=nowhere'], "expected 'scratch'"),
        (['--init_from=resume', f'--out_dir={tmp_path}'], 'train first'),
        (['--learning_rate=-1'], 'learning_rate is -1'),
        (
            ['--budget=10m'],
            "budget is '10m' (command line): only train.py plans runs; leave it out",
        ),
        (['--explian'], 'did you mean --explain?'),
    ):
        done = debug(*flags)
        assert done.returncode == 2 and done.stdout == '', (flags, done.stdout)
        assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_without_a_dataset_the_run_in_out_dir_is_offered(debug, tmp_path):
    (tmp_path / 'run/step-00000010').mkdir(parents=True)
    said = debug('--dataset=nowhere', f'--out_dir={tmp_path / "run"}').stderr
    assert f'to examine the run in {tmp_path / "run"}, add --init_from=resume' in said


def test_help_tells_its_own_keys_and_train_pys(run_main):
    said = run_main(SCRIPT, '--help').stdout
    assert '--explain' in said and '--batch_tokens' in said and '--learning_rate' in said
