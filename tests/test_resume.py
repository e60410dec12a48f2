"""A resumed run equals an uninterrupted one: weights, optimizer, losses and tokens, by SHA-256."""

import hashlib
import json
import os
import shutil
import signal

import pytest
from conftest import ROOT, records, run_script

import train as training

STEPS = 24
# Dropout, accumulation and a schedule. These flags win over those of SMALL_RUN.
RUN = [
    '--dropout=0.1',
    '--n_layer=1',
    f'--max_iters={STEPS}',
    f'--lr_decay_iters={STEPS}',
    '--eval_interval=10',
    '--eval_iters=1',
    '--keep_last=1',
]
CURVE = ('loss/step', 'grad_norm', 'learning_rate', 'loss/train', 'loss/val', 'loss/val_whole')


def digests(out_dir) -> dict[str, str]:
    """Returns SHA-256 digests of the last checkpoint's files and the curves, without times."""
    folder = out_dir / f'step-{STEPS:08d}'
    files = {
        name: (folder / name).read_bytes()
        for name in ('model.safetensors', 'optimizer.safetensors')
    }
    state = json.loads((folder / 'state.json').read_text())
    files['train state'] = json.dumps(state['train']).encode()
    files['curves'] = json.dumps(
        [(r['step'], name, r[name]) for r in records(out_dir) for name in CURVE if name in r]
    ).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def watch(cut_at=(), cut_rank=0):
    """Makes training record the digest of every micro batch, and stops it at the steps of cut_at.

    Each run gets one signal. Returns the digests by step, and a function that undoes the change.
    """
    original, tokens, cuts = training.train_step, {}, list(cut_at)

    def train_step(t, micro_batches, step):
        def watched():
            for x, y in micro_batches:
                tokens.setdefault(step, []).append(
                    hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
                )
                yield x, y

        result = original(t, watched(), step)
        if cuts and step + 1 == cuts[0]:
            cuts.pop(0)
            if t.ranks.rank == cut_rank:
                os.kill(os.getpid(), signal.SIGTERM)
        return result

    training.train_step = train_step
    return tokens, lambda: setattr(training, 'train_step', original)


@pytest.fixture
def run_cut(train_here):
    """Trains with a cut after each given step, and resumes; returns the digests of the result."""

    def run_cut(out_dir, cuts, *flags):
        tokens, undo = watch(cuts)
        try:
            for number in range(len(cuts) + 1):
                done = train_here(
                    out_dir, *RUN, *flags, *(['--init_from=resume'] if number else [])
                )
                assert done.returncode == (143 if number < len(cuts) else 0), done.stderr
        finally:
            undo()
        assert list(tokens) == list(range(STEPS))
        return digests(out_dir) | {'tokens': tokens}

    return run_cut


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_run_cut_at_any_step_equals_the_uninterrupted_one(run_cut, tmp_path, dtype):
    whole = run_cut(tmp_path / 'whole', [], f'--dtype={dtype}')
    for step in range(1, STEPS):
        assert run_cut(tmp_path / f'cut-{step}', [step], f'--dtype={dtype}') == whole, step
    assert run_cut(tmp_path / 'other', [], f'--dtype={dtype}', '--seed=1') != whole


@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'sgd'])
def test_a_chain_of_five_resumes_equals_the_uninterrupted_run(run_cut, tmp_path, optimizer):
    flag = f'--optimizer={optimizer}'
    assert run_cut(tmp_path / 'cut', [1, 9, 10, 17, 23], flag) == run_cut(
        tmp_path / 'whole', [], flag
    )


@pytest.mark.slow
def test_a_compiled_run_cut_and_resumed_equals_the_uninterrupted_compiled_one(run_cut, tmp_path):
    whole = run_cut(tmp_path / 'whole', [], '--compile')
    for cuts in ([1], [10, 17]):
        assert run_cut(tmp_path / f'cut-{cuts}', cuts, '--compile') == whole


ON_RANKS = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import test_resume
import train as training
from conftest import SMALL_RUN
from nib.machine.ranks import Ranks
ranks, close = training.start_ranks('cpu'), Ranks.close
# torch can join processes only once.
training.start_ranks, Ranks.close = lambda device: ranks, lambda ranks: None
cuts, flags = json.loads(sys.argv[1]), sys.argv[2:]
for out_dir, steps in cuts.items():
    tokens, undo = test_resume.watch(steps, cut_rank=1)
    for number in range(len(steps) + 1):
        resume = ['--init_from=resume'] * (number > 0)
        code = training.main([*SMALL_RUN, *flags, f'--out_dir={{out_dir}}', *resume])
        assert code == (143 if number < len(steps) else 0), (out_dir, code)
    undo()
    with open(f'{{out_dir}}/tokens-{{os.environ["RANK"]}}.json', 'w') as file:
        json.dump(tokens, file)
close(ranks)
del ranks  # its groups' threads end here, not while Python itself ends
"""


def run_on_ranks(n, data_dir, folder, cuts, *flags):
    """Runs each of the cuts, {name: steps}, on n processes; only rank 1 gets the signals."""
    script = folder / 'on_ranks.py'
    script.write_text(ON_RANKS)
    done = run_script(
        '-m',
        'torch.distributed.run',
        '--standalone',
        f'--nproc_per_node={n}',
        script,
        json.dumps({str(folder / name): steps for name, steps in cuts.items()}),
        f'--data_dir={data_dir}',
        *RUN,
        *flags,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def tokens_of(out_dir):
    return [json.loads((out_dir / f'tokens-{rank}.json').read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_a_run_on_two_ranks_cut_by_a_signal_to_one_equals_the_uninterrupted_one(data_dir, tmp_path):
    cuts = {'whole': [], 'chain': [1, 9, 10, 17, 23]} | {
        f'cut-{step}': [step] for step in range(1, STEPS)
    }
    run_on_ranks(2, data_dir, tmp_path, cuts)
    whole, tokens = digests(tmp_path / 'whole'), tokens_of(tmp_path / 'whole')
    assert len(tokens[0]) == STEPS and tokens[0] != tokens[1]
    for name in cuts:
        assert digests(tmp_path / name) == whole, name
        assert tokens_of(tmp_path / name) == tokens, name


@pytest.mark.slow
def test_a_run_on_four_ranks_cut_and_resumed_equals_the_uninterrupted_one(data_dir, tmp_path):
    """Here a different order of summing the gradients would show."""
    run_on_ranks(
        4, data_dir, tmp_path, {'whole': [], 'cut': [10, 17]}, '--gradient_accumulation_steps=4'
    )
    assert digests(tmp_path / 'cut') == digests(tmp_path / 'whole')


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_tokens_and_loss_on_other_ranks(data_dir, tmp_path, train_here):
    """The micro steps of one process are distributed over two, and back."""
    flags = ['--dropout=0', '--learning_rate=1e-3', '--min_lr=1e-4']  # dropout draws by rank
    tokens, undo = watch([12])
    assert train_here(tmp_path / 'one', *RUN, *flags).returncode == 143
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    assert train_here(tmp_path / 'one', *RUN, *flags, '--init_from=resume').returncode == 0
    undo()
    run_on_ranks(2, data_dir, tmp_path, {'two': []}, *flags, '--init_from=resume')
    first, second = tokens_of(tmp_path / 'two')
    assert {int(step): both + second[step] for step, both in first.items()} == {
        step: tokens[step] for step in range(12, STEPS)
    }
    for one, two in zip(records(tmp_path / 'one'), records(tmp_path / 'two'), strict=True):
        for name in CURVE:
            assert two.get(name) == (pytest.approx(one[name], abs=1e-4) if name in one else None), (
                name,
                one['step'],
            )
