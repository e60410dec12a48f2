"""docs/sharing.md: its code, on a small model, with the packages that are installed."""

import dataclasses
import re
import shlex
import string
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script
from processes import free_port
from small_models import SMALL, make_model
from test_docs import read_blocks

from nib.api import generate, load
from nib.hub import gguf, huggingface
from nib.text.tokenizer import CharTokenizer

BLOCKS = read_blocks(ROOT / 'docs/sharing.md')
TOKENIZER = CharTokenizer.train(string.printable)


def block(kind: str, word: str) -> str:
    """The body of the page's block of this kind that contains a word."""
    (body,) = [block.body for block in BLOCKS if block.kind == kind and word in block.body]
    return body


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model, and as the folder shakespeare-hf in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    size = dict(vocab_size=TOKENIZER.vocab_size, block_size=64)
    made = make_model(dataclasses.replace(SMALL, **size))
    huggingface.write('shakespeare-hf', made.config, made.state_dict(), TOKENIZER, 'card')
    return made


def greedy(model) -> str:
    return generate(model, TOKENIZER, 'ROMEO:', 50, temperature=0)


def test_transformers(model, capsys):
    exec(block('python', 'decode(ids[0])'), {})
    assert capsys.readouterr().out == greedy(model) + '\n'


@pytest.mark.slow
def test_the_server_of_llama_cpp_streams_to_the_client_of_openai(
    model, tmp_path, capsys, monkeypatch
):
    pytest.importorskip('llama_cpp.server.app')
    pytest.importorskip('openai')
    for name in ('NO_PROXY', 'no_proxy'):
        monkeypatch.setenv(name, 'localhost')
    gguf.write('shakespeare.gguf', model.config, model.state_dict(), TOKENIZER, 'f32')
    port = str(free_port())
    command = block('sh', 'llama_cpp.server').splitlines()[1].replace('8000', port)
    log = tmp_path / 'log.txt'
    with log.open('w') as output:
        server = subprocess.Popen(
            [sys.executable, *shlex.split(command)[1:]], stdout=output, stderr=output
        )
        try:
            while 'Uvicorn running' not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            exec(block('python', 'OpenAI(').replace('8000', port), {})
        finally:
            server.terminate()
            server.wait()
    assert 'ROMEO:' + capsys.readouterr().out == greedy(model)


@pytest.mark.slow
def test_a_task_of_lm_evaluation_harness(model, tmp_path):
    pytest.importorskip('lm_eval')
    (tmp_path / 'tasks').mkdir()
    for kind, word, name in (
        ('json', 'start', 'spelling.jsonl'),
        ('yaml', 'task', 'spelling.yaml'),
    ):
        (tmp_path / 'tasks' / name).write_text(block(kind, word))
    command = block('sh', 'lm_eval --model').splitlines()[1]
    done = run_script('-m', *shlex.split(command), folder=tmp_path)
    assert re.search(r'\|spelling\|.*\|acc +\|', done.stdout), done.stdout + done.stderr


@pytest.mark.slow
def test_finetuning_with_peft_and_back(model, capsys):
    pytest.importorskip('peft')
    exec(block('python', 'LoraConfig'), {})
    losses = [float(loss) for loss in re.findall(r'loss ([\d.]+)', capsys.readouterr().out)]
    assert len(losses) == 5 and losses[-1] < losses[0] / 2
    again, tokenizer = load('shakespeare-lora')
    assert tokenizer == TOKENIZER
    assert generate(again, tokenizer, 'ROMEO:', 50, temperature=0) != greedy(model)
