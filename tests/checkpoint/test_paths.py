"""Folders that are not runs: each script says what it found instead, and what to type."""

import json
import shutil

import pytest
from conftest import records

import train as training
from nib.checkpoint import store
from nib.checkpoint.paths import explain
from nib.checkpoint.start import read_weights
from nib.errors import UserError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with two runs and some folders that are not runs."""
    monkeypatch.chdir(tmp_path)
    for file, text in {
        'out-a/step-00000010/state.json': '{}',
        'out-a/latest': 'step-00000010',
        'out-new/metrics.jsonl': '',
        'hf/config.json': '{"model_type": "gpt2"}',
        'nanogpt/ckpt.pt': '',
        'odd/ckpt.pt/file': '',
        'notes/train.bin': '',
        'more/out-c/metrics.jsonl': '',
        'empty/x.txt': '',
        'gguf/q4.gguf': '',
        'gguf/README.md': '',
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


WRONG = {
    'out-aa': 'out-aa: no such folder; did you mean out-a?',
    'out': 'out: no such folder; name the folder of a run: out-',
    'nowhere': '/train.py CONFIG --out_dir=nowhere; existing runs: out-',
    'no/where': '/train.py CONFIG --out_dir=no/where',
    'out-a/step-00000010': 'is a single checkpoint of a run; did you mean out-a?',
    'out-a/step-00000011': 'not the folder of a run; did you mean out-a?',
    'out-a/latest': 'not the folder of a run; did you mean out-a?',
    'out-new': 'contains no checkpoint yet',
    'hf': "Hugging Face's format, not a run: use it with --init_from=hf",
    'nanogpt': 'a nanoGPT checkpoint, not a run: use it with --init_from=nanogpt/ckpt.pt;',
    'nanogpt/ckpt.pt': 'not the folder of a run; for a nanoGPT checkpoint, use --init_',
    'odd': 'not a run, because it contains no checkpoint',
    'notes': 'is a dataset, not a run: train on it with --dataset=notes --data_dir=.',
    'more': 'not a run, but contains runs: name one of them: more/out-c',
    'empty': 'not a run, because it contains no checkpoint; train first: ',
    'empty/x.txt': 'is a file, not the folder of a run',
    'no/model.gguf': 'no/model.gguf is a GGUF file, which nibGPT cannot read',
    'gguf': 'gguf/q4.gguf is a GGUF file, which nibGPT cannot read; use the original',
    'https://huggingface.co/owner/name': 'name OWNER/NAME only, owner/name',
    'https://huggingface.co/owner/name/tree/main': 'name OWNER/NAME only, owner/name',
    'https://huggingface.co/gpt2': 'name OWNER/NAME only, gpt2',
}


@pytest.mark.parametrize('path, words', WRONG.items())
def test_a_wrong_folder_is_explained(path, words, place):
    assert words in explain(path)


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'report.py', 'debug_training.py'])
def test_every_script_explains_it_in_one_line(script, place, run_main):
    resume = ['--init_from=resume'] if script in ('train.py', 'debug_training.py') else []
    for path in ('out-aa', 'hf', 'nanogpt', 'notes', 'more'):
        done = run_main(script, f'--out_dir={path}', *resume)
        assert done.returncode == 2 and done.stderr.splitlines() == [f'error: {explain(path)}']


def test_a_new_run_does_not_write_into_a_checkpoint_or_a_model(place, train_here):
    for path in ('out-a/step-00000010', 'hf'):
        before = sorted(place.joinpath(path).iterdir())
        done = train_here(path, '--overwrite')
        assert done.returncode == 2 and 'choose another --out_dir for a new run' in done.stderr
        assert sorted(place.joinpath(path).iterdir()) == before


def test_the_directory_of_a_checkpoint_names_it(train_here, run_main, tmp_path, monkeypatch):
    """For sample.py and as a start; a run is resumed from its newest checkpoint only."""
    train_here(tmp_path / 'run', '--keep_last=2', '--eval_iters=1')
    first = tmp_path / 'run/step-00000010'
    for path, which in ((first, 'latest'), (tmp_path / 'run', 'step-10')):
        done = run_main('sample.py', f'--out_dir={path}', f'--which={which}', '--max_new_tokens=1')
        assert 'step-00000010: step 10, trained on tiny' in done.stderr
    monkeypatch.chdir(first)
    assert store.locate('.', 'best') == (tmp_path / 'run', '10')
    done = train_here(tmp_path / 'new', f'--init_from={first}', '--eval_only')
    assert done.returncode == 0 and f'starting from {first}' in done.stdout
    loss = [r['loss/val'] for r in records(tmp_path / 'run') if 'loss/val' in r][1:2]
    done = train_here(
        tmp_path / 'new',
        f'--init_from={first}',
        '--max_iters=0',
        '--warmup_iters=0',
        '--eval_iters=1',
    )
    assert [r['loss/val'] for r in records(tmp_path / 'new') if 'loss/val' in r] == loss
    done = run_main(training, '--init_from=resume', f'--out_dir={first}')
    assert done.returncode == 2 and 'did you mean' in done.stderr


def test_a_folder_with_the_name_of_a_published_model_is_read(tmp_path, monkeypatch, run_main):
    (tmp_path / 'gpt2').mkdir()
    (tmp_path / 'gpt2/config.json').write_text(json.dumps({'model_type': 'gpt2', 'n_embd': 'x'}))
    shutil.copy(tmp_path / 'gpt2/config.json', tmp_path / 'gpt2/model.safetensors')
    monkeypatch.chdir(tmp_path)
    done = run_main(training, '--init_from=gpt2', '--dataset=none', '--device=cpu')
    assert done.returncode == 2 and 'download' not in done.stderr.split(';')[0], done.stderr


def test_a_folder_named_like_gpt2_that_is_no_model_is_named(tmp_path, monkeypatch):
    (tmp_path / 'gpt2').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='/gpt2 hides the model .* use openai-community/gpt2$'):
        read_weights('gpt2', print)


def test_a_file_of_a_model_leads_to_its_folder(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt2'}))
    (tmp_path / 'model.safetensors').touch()
    with pytest.raises(UserError, match='part of a model; name its folder, '):
        read_weights(str(tmp_path / 'model.safetensors'), print)
