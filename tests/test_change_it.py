"""docs/change_it.md: every example applies to a copy of the repository.

The copy then trains, its model is examined, and it generates text.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

PAGE = ROOT / 'docs/change_it.md'
# What makes the page's commands small, by script.
MODEL = [
    '--device=cpu',
    '--dtype=float32',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=64',
    '--batch_size=2',
    '--warmup_iters=2',
]
SMALL = {
    'train.py': [
        *MODEL,
        '--max_iters=8',
        '--eval_interval=4',
        '--eval_iters=1',
        '--log_interval=1',
        '--sample_tokens=0',
        '--overwrite',
    ],
    'debug_training.py': [*MODEL, '--max_iters=8', '--overfit_steps=2'],
    'sample.py': ['--device=cpu', '--max_new_tokens=20', '--num_samples=2'],
    'prepare.py': [],
    'report.py': ['--no-png'],
}


@dataclass(frozen=True)
class Example:
    """A section of the page: what is changed, how, and what is run afterwards."""

    name: str
    diffs: list[str]
    commands: list[str]


def read_examples() -> list[Example]:
    sections = re.split(r'^## (.*)\n', PAGE.read_text(encoding='utf-8'), flags=re.MULTILINE)[1:]
    examples = [
        Example(
            name,
            *(
                re.findall(rf'^```{kind}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
                for kind in ('diff', 'sh')
            ),
        )
        for name, text in zip(sections[::2], sections[1::2])
    ]
    return [
        Example(
            one.name, one.diffs, [line for block in one.commands for line in block.splitlines()]
        )
        for one in examples
        if one.diffs
    ]


def test_there_is_an_example_of_every_kind():
    names = {example.name for example in read_examples()}
    assert names == {
        'An optimizer',
        'An activation',
        'Attention',
        'Attention by layer',
        'A layer',
        'The loss',
        'Distillation',
        'Masked targets',
        'Frozen parameters',
        'A learning rate schedule',
        'A dataset',
        'A tokenizer',
        'A metric',
    }
    run = [command for example in read_examples() for command in example.commands]
    shown = re.findall('^(?:python|torchrun) .*$', PAGE.read_text(encoding='utf-8'), re.MULTILINE)
    assert shown == run and all(example.commands for example in read_examples())


# Runs scripts one after the other in one process, which imports torch once, and then a check.
DRIVER = """
import json, runpy, sys
commands, check = json.load(sys.stdin)
for command in commands:
    print('$', *command)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name='__main__')
    except SystemExit as end:
        if end.code:
            sys.exit(f'exit code {end.code}: {command}')
exec(check)
"""
# Greedy tokens of generate(), which keeps a cache, are those of full forward passes. There are
# enough of them to fill the context, which then drops its oldest half, and to exceed WINDOW.
CHECK_GENERATION = """
import torch
from model import GPT, GPTConfig
from nib.checkpoint.store import load
found, tensors = load(OUT_DIR, 'latest', read=('model',))
model = GPT(GPTConfig(**found.state['model'])).eval()
model.load_state_dict(tensors['model'])
tokens, size, dropped = [1, 2, 3], model.config.block_size, 0
with torch.no_grad():
    for token in map(int, model.generate([tokens], 80, temperature=0.0)):
        logits = model(torch.tensor([tokens]))[0, -1]
        assert logits[token] > logits.max() - 1e-4, (tokens, token, int(logits.argmax()))
        if len(tokens) == size:
            tokens, dropped = tokens[size // 2 :], dropped + 1
        tokens.append(token)
assert dropped == 1, (dropped, size)
"""


@pytest.fixture(scope='module')
def bins(tmp_path_factory):
    """A dataset in the place of tiny Shakespeare."""
    folder = tmp_path_factory.mktemp('bins')
    (folder / 'play.txt').write_text(
        'ROMEO: The cat and a dog.\nHere, a small bird sings: what else, but see?\n' * 60
    )
    done = run_script(
        'data/text/prepare.py', f'--input={folder}/play.txt', f'--out_dir={folder}/bins'
    )
    assert done.returncode == 0, done.stderr
    return folder / 'bins'


@pytest.fixture
def copy(tmp_path, bins):
    """A copy of the repository's files as they are now, with that dataset and a folder of notes."""
    files = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    folder = tmp_path / 'copy'
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(bins, folder / 'data/shakespeare_char', dirs_exist_ok=True)
    (folder / 'notes').mkdir()
    shutil.copyfile(bins.with_name('play.txt'), folder / 'notes/play.txt')
    return folder


def small(command: str, *flags: str) -> list[str]:
    """The script and arguments of one of the page's commands, made small."""
    program, script, *argv = shlex.split(command)
    assert program == 'python'
    return [script, *argv, *SMALL[Path(script).name], *flags]


def run(folder: Path, commands: list[list[str]], check: str = ''):
    done = run_script('-c', DRIVER, folder=folder, input=json.dumps([commands, check]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr


def apply(folder: Path, diff: str):
    done = subprocess.run(
        ['git', 'apply', '-'], cwd=folder, input=diff, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (
        f'{done.stderr}\nThe file has changed: make the diff of {PAGE.name} anew.'
    )


@pytest.mark.parametrize('example', read_examples(), ids=lambda example: example.name)
def test_example_trains_is_examined_and_samples(example, copy):
    for diff in example.diffs:
        apply(copy, diff)
    *_, trained = [command for command in example.commands if ' train.py ' in command]
    debugged = trained.replace(' train.py ', ' debug_training.py ')
    out_dir = 'out-changed'
    run(
        copy,
        [
            *(
                small(command, *[f'--out_dir={out_dir}'] * (command == trained))
                for command in example.commands
            ),
            small(debugged),
            small(debugged, '--explain'),
            small(f'python report.py --out_dir={out_dir}'),
            small(f'python sample.py --out_dir={out_dir}'),
        ],
        f'OUT_DIR = {out_dir!r}\n' + CHECK_GENERATION + CHECKS.get(example.name, ''),
    )
    if example.name in PROMISES:
        PROMISES[example.name](copy / out_dir)


@pytest.mark.slow
def test_the_examples_together_pass_the_checks_of_a_change(copy):
    for example in read_examples():
        if example.name != 'Attention':  # it changes the same line as 'Attention by layer'
            for diff in example.diffs:
                apply(copy, diff)
    if (ROOT / '.mypy_cache').exists():  # otherwise mypy reads torch again, for most of a minute
        shutil.copytree(ROOT / '.mypy_cache', copy / '.mypy_cache')
    for check in (['ruff', 'check', '.'], ['ruff', 'format', '--check', '.'], ['mypy']):
        done = subprocess.run(
            [sys.executable, '-m', *check], cwd=copy, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (check, done.stdout + done.stderr)


# -- what an example promises beside that it runs --------------------------------------------------

CHECKS = {
    'Attention': """
from model import WINDOW, attend
q, k, v = torch.randn(3, 1, 1, 2 * WINDOW, 4).unbind()
k.requires_grad_()
attend(q, k, v)[0, 0, -1].sum().backward()
seen = k.grad[0, 0].abs().sum(dim=-1) > 0
assert seen.tolist() == [False] * WINDOW + [True] * WINDOW, seen
""",
    'Attention by layer': """
import model as changed
assert [block.window for block in model.transformer.h] == [32, 0] and not changed.kernels_fit()
for window, n_seen in ((32, 32), (0, 64)):
    changed.current_window[0] = window
    q, k, v = torch.randn(3, 1, 1, 64, 4).unbind()
    changed.attend(q, k.requires_grad_(), v)[0, 0, -1].sum().backward()
    seen = k.grad[0, 0].abs().sum(dim=-1) > 0
    assert seen.tolist() == [False] * (64 - n_seen) + [True] * n_seen
""",
    # A token passes through two experts, but all weights take part in a step, as several processes
    # need it.
    'A layer': """
mlp = model.transformer.h[0].mlp
used = sum(part.weight.numel() for e in mlp.experts[:2] for part in (e.c_fc, e.c_proj))
assert len(mlp.experts) == 8
assert model.flops_per_token()['h.0.mlp'] == 2 * (used + mlp.router.weight.numel())
model(torch.tensor([[1]]), torch.tensor([[2]])).backward()
assert all(p.grad is not None for p in model.parameters())
assert sum(bool(e.c_fc.weight.grad.any()) for e in mlp.experts) == 2
""",
}


def check_only_lora_is_trained(out_dir):
    folder = max(out_dir.glob('step-*'))
    before = load_file(max((out_dir.parent / 'out-base').glob('step-*')) / 'model.safetensors')
    after = load_file(folder / 'model.safetensors')
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = after.keys() - before.keys()
    assert len(added) == 4 and all(after[name].any() for name in added)
    state = load_file(folder / 'optimizer.safetensors')
    assert {name.rpartition('/')[0] for name in state} == added


def check_schedule(out_dir):
    records = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    rates = [record['learning_rate'] for record in records if 'learning_rate' in record]
    peak = max(rates)
    assert rates.index(peak) == 2  # after two steps of warm-up
    for step, rate in enumerate(rates[2:], start=2):
        assert rate == pytest.approx(peak * (2 + 1) ** 0.5 / (step + 1) ** 0.5)


def check_metric(out_dir):
    recorded = (out_dir / 'metrics.jsonl').read_text()
    assert all(f'"weight_rms/{group}"' in recorded for group in ('attention', 'mlp', 'embedding'))
    assert '<figcaption>weight_rms' in (out_dir / 'report.html').read_text()


PROMISES = {
    'A learning rate schedule': check_schedule,
    'A metric': check_metric,
    'Frozen parameters': check_only_lora_is_trained,
}
