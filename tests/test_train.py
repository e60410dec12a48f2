"""The training loop, run as a user runs it."""

import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL_RUN, records, run_script, train
from processes import PATIENCE, TRAIN, Started, start_on_ranks

import train as training
from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.doctor import vitals
from nib.doctor.finding import Finding
from nib.machine.device import seed_everything
from nib.machine.ranks import Ranks
from nib.run import logbook
from nib.run.logbook import Logbook
from nib.tokens.batches import BatchLoader
from nib.tokens.dataset import open_dataset


def tensors_of(out_dir, which='latest'):
    return store.load(out_dir, which)[1]


def assert_equal_tensors(first, second):
    assert first.keys() == second.keys()
    for kind in first:
        assert first[kind].keys() == second[kind].keys()
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), name


@pytest.fixture(scope='session')
def whole_run(data_dir, tmp_path_factory):
    """20 steps with dropout, accumulation and a schedule."""
    out_dir = tmp_path_factory.mktemp('whole') / 'run'
    return out_dir, train(data_dir, out_dir, '--dropout=0.1')


def test_a_run_learns_and_reports_it(whole_run, data_dir):
    out_dir, done = whole_run
    losses = [
        float(loss)
        for loss in re.findall(
            r'^step \d+: train loss [\d.]+, val loss ([\d.]+)', done.stdout, re.M
        )
    ]
    assert len(losses) == 3  # steps 0, 10 and 20
    assert losses[0] == pytest.approx(
        math.log(open_dataset(data_dir / 'tiny', 16).vocab_size), rel=0.03
    )
    assert losses[-1] < losses[0] - 0.3
    logged = records(out_dir)
    assert [r['step'] for r in logged if 'loss/step' in r] == list(range(1, 21))
    assert {'loss/step', 'grad_norm', 'learning_rate', 'tokens_per_second'} <= logged[1].keys()
    assert [r['loss/val'] for r in logged if 'loss/val' in r] == pytest.approx(losses, abs=1e-4)
    config = json.loads((out_dir / 'config.json').read_text())
    assert config['config']['dataset'] == 'tiny' and config['origins']['dropout'] == 'command line'


def test_the_last_line_is_the_loss_over_the_whole_validation_split(whole_run, data_dir, train_here):
    out_dir, done = whole_run
    found, tensors = store.load(out_dir, 'latest')
    model = GPT(GPTConfig(**found.state['model'])).eval()
    model.load_state_dict(tensors['model'])
    val = torch.from_numpy(open_dataset(data_dir / 'tiny', 16).val.astype('int64'))
    n = (len(val) - 1) // 16
    with torch.no_grad():
        loss = model(val[: n * 16].view(n, 16), val[1 : n * 16 + 1].view(n, 16)).item()
    # Every character is one byte here.
    line = f'val loss {loss:.4f} nats per token ({loss / math.log(2):.4f} bits per byte) on the'
    assert f'{line} whole' in done.stdout
    only = train_here(out_dir, '--dropout=0.1', '--init_from=resume', '--eval_only', status=0)
    assert f'step 20: val loss {loss:.4f}' in only.stdout


def test_a_run_whose_script_is_edited_meanwhile_ends_as_it_began(run_main, data_dir, tmp_path):
    script, config = shutil.copy(ROOT / 'train.py', tmp_path), tmp_path / 'edit.py'
    config.write_text(f"open({str(script)!r}, 'w').write('batch_size: int = ')")
    flags = [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}', '--max_iters=1']
    done = run_main(script, config, *SMALL_RUN, *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run/report.html').exists()


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(whole_run, data_dir, tmp_path):
    out_dir = tmp_path / 'run'
    run = subprocess.Popen(
        [
            sys.executable,
            'train.py',
            *SMALL_RUN,
            f'--data_dir={data_dir}',
            f'--out_dir={out_dir}',
            '--dropout=0.1',
            '--max_iters=10000',
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    for line in run.stdout:
        if line.startswith('step 3: loss'):
            run.send_signal(signal.SIGINT)
            break
    rest = run.stdout.read()
    assert run.wait(PATIENCE) == 130
    assert '--init_from=resume' in rest
    stopped_at = int(re.search(r'stopped by Ctrl-C \(SIGINT\) after step (\d+)', rest)[1])
    assert store.load(out_dir)[0].step == stopped_at


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(data_dir, tmp_path, train_here):
    """The same batches on two processes: losses agree up to rounding; only rank 0 writes."""
    flags = [*SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "two"}']
    ranks = start_on_ranks(2, tmp_path, TRAIN, *flags)
    train_here(tmp_path / 'one', status=0)
    assert [rank.end() for rank in ranks] == [0, 0], ranks[0].stderr
    assert ranks[0].stdout.count('on the whole validation split') == 1
    assert ranks[1].stdout == ''
    keys = ('loss/step', 'grad_norm', 'loss/train', 'loss/val', 'loss/val_whole')
    for two, one in zip(records(tmp_path / 'two'), records(tmp_path / 'one'), strict=True):
        for key in keys:
            assert two.get(key) == (pytest.approx(one[key], rel=1e-3) if key in one else None)
    for name, value in tensors_of(tmp_path / 'two')['model'].items():
        torch.testing.assert_close(
            value, tensors_of(tmp_path / 'one')['model'][name], atol=2e-3, rtol=0
        )


@pytest.mark.slow
def test_a_run_is_what_its_config_says(data_dir, tmp_path, train_here):
    """Three steps of the script, compared with plain PyTorch, from the seeds to AdamW."""
    train_here(
        tmp_path / 'run',
        '--max_iters=3',
        '--lr_decay_iters=3',
        '--warmup_iters=1',
        '--min_lr=1e-3',
        '--seed=5',
        '--dropout=0.2',
        '--weight_decay=0.3',
        '--beta1=0.8',
        '--beta2=0.9',
        '--grad_clip=0.5',
        '--no-bias',
        status=0,
    )
    data = open_dataset(data_dir / 'tiny', 16)
    seed_everything(5)
    model = GPT(
        GPTConfig(data.vocab_size, 16, n_layer=2, n_head=2, n_embd=32, dropout=0.2, bias=False)
    )
    decayed = [p for p in model.parameters() if p.dim() > 1]
    spared = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{'params': decayed, 'weight_decay': 0.3}, {'params': spared, 'weight_decay': 0.0}],
        betas=(0.8, 0.9),
        foreach=False,
    )
    batches = BatchLoader(data.train, 16, 4, 5, 2)
    for step, lr in enumerate((5e-3, 1e-2, 1e-3 + 9e-3 / 2)):  # half of the cosine
        for group in optimizer.param_groups:
            group['lr'] = lr
        for micro_step in (0, 1):
            seed_everything(5, step, 0, micro_step)
            (model(*batches.batch(step, micro_step)) / 2).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        assert norm > 0.5  # or clipping would not be seen
        optimizer.step()
        optimizer.zero_grad()
    for name, value in tensors_of(tmp_path / 'run')['model'].items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_best_is_the_checkpoint_of_the_lowest_loss_and_old_ones_go(tmp_path, train_here):
    """A rate that ruins the model after a good start."""
    train_here(tmp_path / 'run', '--max_iters=10', '--keep_last=2', status=0)
    train_here(
        tmp_path / 'run',
        '--init_from=resume',
        '--learning_rate=3',
        '--min_lr=3',
        '--warmup_iters=0',
        '--max_iters=16',
        '--lr_decay_iters=16',
        '--eval_interval=2',
        '--keep_last=2',
        status=0,
    )
    losses = {r['step']: r['loss/val'] for r in records(tmp_path / 'run') if 'loss/val' in r}
    best = min(losses, key=losses.get)
    assert best not in (0, 16) and list(losses) == [0, 10, 12, 14, 16]
    found = store.load(tmp_path / 'run', 'best')[0]
    assert found.step == best and found.state['train']['best_val_loss'] == losses[best]
    assert sorted(path.name for path in (tmp_path / 'run').glob('step-*')) == sorted(
        f'step-{step:08d}' for step in {best, 14, 16}
    )


@pytest.mark.slow
def test_every_rank_drops_out_other_activations(data_dir, tmp_path):
    """The first loss of two ranks is the mean of two losses with the seeds of rank 0 and rank 1."""
    flags = [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}', '--max_iters=1']
    ranks = start_on_ranks(2, tmp_path, TRAIN, *SMALL_RUN, *flags, '--dropout=0.5')
    assert [rank.end() for rank in ranks] == [0, 0], ranks[0].stderr
    data = open_dataset(data_dir / 'tiny', 16)
    seed_everything(1337)
    model = GPT(
        GPTConfig(data.vocab_size, 16, n_layer=2, n_head=2, n_embd=32, dropout=0.5, bias=False)
    )
    losses = []
    for rank in (0, 1):
        seed_everything(1337, 0, rank, 0)
        losses.append(
            model(*BatchLoader(data.train, 16, 4, 1337, 1, Ranks(rank, rank, 2)).batch(0, 0)).item()
        )
    logged = next(r['loss/step'] for r in records(tmp_path / 'run') if 'loss/step' in r)
    assert logged == pytest.approx(sum(losses) / 2, abs=1e-5)


@pytest.mark.slow
def test_a_signal_during_the_last_evaluation_ends_it(data_dir, tmp_path, train_here):
    """The weights are already saved; --eval_only ends at once, too."""
    flags = [
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
        '--max_iters=2',
        '--eval_iters=1',
    ]
    train_here(tmp_path / 'run', *flags, status=0)
    again = ['--init_from=resume', '--eval_only', '--batch_size=1']
    run = Started(tmp_path, SLOW_EVALUATION, *SMALL_RUN, *flags, *again)
    run.wait_for('reading')
    run.send(signal.SIGTERM)
    assert run.end() == 143
    assert 'stopped by SIGTERM after step 2, with nothing new to save: start again' in run.stdout
    assert 'whole validation split' not in run.stdout
    assert store.load(tmp_path / 'run')[0].step == 2


# Its first batch takes until the signal comes.
SLOW_EVALUATION = """
import sys, time, train
from nib.tokens import batches
stop, quick = train.StopSignal(train.Ranks()), batches.cut_windows
train.StopSignal = lambda ranks: stop
def slow(*arguments):
    print('reading', flush=True)
    while not stop.number:
        time.sleep(0.01)
    return quick(*arguments)
batches.cut_windows = slow
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_new_run_keeps_the_old_one_until_it_can_start(data_dir, tmp_path, train_here):
    train_here(tmp_path / 'run', '--max_iters=10', status=0)
    done = train_here(tmp_path / 'run', '--overwrite', '--wandb_log', '--wandb_project=')
    assert done.returncode == 2 and 'wandb_project is empty' in done.stderr
    hidden = tmp_path / 'hidden' / 'wandb'
    hidden.mkdir(parents=True)
    (hidden / '__init__.py').write_text('raise ImportError')  # it is too old for this Python
    done = train(
        data_dir,
        tmp_path / 'run',
        '--overwrite',
        '--wandb_log',
        check=False,
        env={'PYTHONPATH': str(hidden.parent)},
    )
    assert done.returncode == 2 and 'pip install --upgrade wandb' in done.stderr
    assert store.load(tmp_path / 'run')[0].step == 10
    train_here(tmp_path / 'run', '--overwrite', '--max_iters=4', '--eval_interval=4', status=0)
    assert [path.name for path in (tmp_path / 'run').glob('step-*')] == ['step-00000004']


@pytest.mark.slow
def test_a_resumed_run_says_and_records_what_has_changed(whole_run, tmp_path, train_here):
    shutil.copytree(whole_run[0], tmp_path / 'run')
    done = train_here(
        tmp_path / 'run',
        '--dropout=0.1',
        '--init_from=resume',
        '--max_iters=21',
        '--seed=7',
        status=0,
    )
    changed = next(line for line in done.stdout.splitlines() if line.startswith('changed since'))
    assert changed == 'changed since the checkpoint: seed 1337 -> 7, max_iters 20 -> 21'
    assert json.loads((tmp_path / 'run/config.json').read_text())['config']['seed'] == 7


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_low_precision_follows_float32(tmp_path, dtype, whole_run, train_here):
    train_here(tmp_path / 'run', '--dropout=0.1', f'--dtype={dtype}', status=0)
    expected = [r['loss/val'] for r in records(whole_run[0]) if 'loss/val' in r]
    assert [r['loss/val'] for r in records(tmp_path / 'run') if 'loss/val' in r] == pytest.approx(
        expected, rel=0.02
    )


@pytest.mark.slow
def test_a_float16_run_keeps_its_loss_scale_when_resumed(tmp_path, monkeypatch, train_here):
    scaler = partial(torch.amp.GradScaler, growth_interval=8)  # the scale doubles twice in 20 steps
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    flags = '--dtype=float16', '--eval_interval=5'
    train_here(tmp_path / 'whole', *flags, status=0)
    train_here(tmp_path / 'cut', *flags, '--max_iters=10', status=0)
    train_here(tmp_path / 'cut', *flags, '--init_from=resume', status=0)
    scales = [store.load(tmp_path / run)[0].state['train']['scaler'] for run in ('whole', 'cut')]
    assert scales[0] == scales[1] and scales[0]['scale'] > 65536
    assert_equal_tensors(tensors_of(tmp_path / 'cut'), tensors_of(tmp_path / 'whole'))


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path, train_here):
    train_here(tmp_path / 'run', '--max_iters=10', status=0)
    done = train_here(
        tmp_path / 'run',
        '--init_from=resume',
        '--learning_rate=1e30',
        '--min_lr=1e30',
        '--grad_clip=0',
    )
    assert done.returncode == 3
    assert 'Nothing is saved' in done.stderr
    found, tensors = store.load(tmp_path / 'run')
    assert found.step == 10
    assert all(value.isfinite().all() for value in tensors['model'].values())


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved_on_ctrl_c(data_dir, tmp_path):
    """No step is logged after the first, so the run has not noticed by itself."""
    flags = [
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
        '--learning_rate=1e30',
        '--grad_clip=0',
        '--warmup_iters=0',
        '--log_interval=1000000',
        '--eval_interval=1000000',
        '--max_iters=100000',
        '--lr_decay_iters=100000',
    ]
    run = Started(tmp_path, TELLS_STEPS, *SMALL_RUN, *flags)
    run.wait_for('begins step 9')
    run.send(signal.SIGINT)
    assert run.end() == 3 and 'Nothing is saved' in run.stderr
    assert not store.exists(tmp_path / 'run')


TELLS_STEPS = """
import sys, train
original = train.train_step
def train_step(t, micro_batches, step):
    print('begins step', step, flush=True)
    return original(t, micro_batches, step)
train.train_step = train_step
sys.exit(train.main(sys.argv[1:]))
"""


def read_wandb(out_dir) -> tuple[list[dict], list[int]]:
    """Returns the rows and the exit codes of wandb's offline runs in out_dir.

    Its files are protocol buffers in LevelDB's log format.
    """
    from wandb.proto import wandb_internal_pb2

    rows, exit_codes = [], []
    for path in sorted(out_dir.glob('wandb/offline-run-*/*.wandb')):
        content, at, data = path.read_bytes(), 7, b''  # after the file's header
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:  # the rest of a block, too short for a record's header
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack('<HB', content[at + 4 : at + 7])
            data += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a record in one piece, or its last piece
                record, data = wandb_internal_pb2.Record.FromString(data), b''
                if record.WhichOneof('record_type') == 'exit':
                    exit_codes.append(record.exit.exit_code)
                elif record.WhichOneof('record_type') == 'history':
                    rows.append(
                        {
                            '.'.join(item.nested_key) or item.key: json.loads(item.value_json)
                            for item in record.history.item
                        }
                    )
    return rows, exit_codes


def exit_codes_of(out_dir) -> list[int]:
    """Returns the exit codes of read_wandb(). wandb's process may write them a moment later."""
    deadline = time.monotonic() + 60
    while not read_wandb(out_dir)[1] and time.monotonic() < deadline:
        time.sleep(0.1)
    return read_wandb(out_dir)[1]


@pytest.mark.slow
def test_wandb_and_tensorboard_get_what_metrics_jsonl_has_also_after_a_resume(tmp_path, train_here):
    out_dir, watched = (
        tmp_path / 'run',
        ['--wandb_log', '--tensorboard', '--sample_tokens=5', '--eval_interval=4'],
    )
    train_here(out_dir, *watched, '--max_iters=4', status=0)
    first_id = (out_dir / 'wandb_id').read_text()
    train_here(out_dir, *watched, '--max_iters=8', '--init_from=resume', status=0)
    assert (out_dir / 'wandb_id').read_text() == first_id
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out_dir / 'tensorboard'))
    events.Reload()
    logged = records(out_dir)
    names = {key for record in logged for key in record} - {'step', 'time'}
    assert names >= {
        'loss/step',
        'loss/train',
        'loss/val',
        'loss/val_whole',
        'bits_per_byte/train',
        'bits_per_byte/val',
        'learning_rate',
        'grad_norm',
        'tokens_per_second',
        'peak_memory',
        'sample',
    }
    texts = {name for name in names if name in ('sample', 'verdict') or name.startswith('finding/')}
    assert set(events.Tags()['scalars']) == names - texts
    history, exit_codes = read_wandb(out_dir)
    assert exit_codes == [0, 0]
    for name in names - texts:
        expected = [
            (record['step'], pytest.approx(record[name])) for record in logged if name in record
        ]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected, name
        assert [(row['_step'], row[name]) for row in history if name in row] == expected, name
    assert any(name.startswith('finding/') for name in texts) and 'verdict' in texts
    for name in texts:
        expected = [(record['step'], record[name]) for record in logged if name in record]
        if name.startswith('finding/'):  # an object in metrics.jsonl
            expected = [
                (step, str(Finding.of_record(name, step, recorded))) for step, recorded in expected
            ]
        assert [(row['_step'], row[name]) for row in history if name in row] == expected, name
        assert [
            (event.step, event.tensor_proto.string_val[0].decode())
            for event in events.Tensors(f'{name}/text_summary')
        ] == expected, name
    samples = [(record['step'], record['sample']) for record in logged if 'sample' in record]
    assert [step for step, _ in samples] == [0, 4, 8] and all(
        len(text) == 8 + 5 for _, text in samples
    )
    assert [(row['_step'], row['sample']) for row in history if 'sample' in row] == samples
    assert [event.step for event in events.Tensors('sample/text_summary')] == [0, 4, 8]


@pytest.mark.slow
def test_wandb_is_told_how_a_run_ended_and_does_not_wait_for_hours(
    tmp_path, train_here, monkeypatch
):
    settings = []

    def break_down(t, *args):
        raise OSError('the machine breaks down')

    def look(book, *args):
        settings.append(book.metrics.wandb.settings)
        original(book, *args)

    original = Logbook.log
    monkeypatch.setattr(Logbook, 'log', look)
    train_here(tmp_path / 'nan', '--wandb_log', '--learning_rate=1e30', status=3)
    assert exit_codes_of(tmp_path / 'nan') == [3]
    assert settings[0].finish_timeout == 60
    monkeypatch.setattr(training, 'train_step', break_down)
    with pytest.raises(OSError, match='breaks down'):
        train_here(tmp_path / 'broken', '--wandb_log')
    assert exit_codes_of(tmp_path / 'broken') == [1]


@pytest.mark.slow
def test_without_a_network_the_run_says_so_and_trains_on_the_fallback(data_dir, tmp_path):
    """A proxy refuses to download the dataset; the fallback is used and recorded."""
    copy = tmp_path / 'copy'  # without a text that an earlier run may have fetched
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns('.*', 'out*', 'wandb', 'input.txt', '*.bin', 'meta.json'),
    )
    prepare = copy / 'data/stdlib_char/prepare.py'  # of a part of the library, in less time
    prepare.write_text(prepare.read_text().replace("['stdlib'])", "['stdlib'], 'json')"))
    refuse = {'https_proxy': 'http://127.0.0.1:9', 'HTTPS_PROXY': 'http://127.0.0.1:9'}
    flags = [
        f'--data_dir={tmp_path / "data"}',
        f'--out_dir={tmp_path / "run"}',
        '--device=cpu',
        '--max_iters=2',
        '--eval_iters=1',
        '--n_layer=1',
    ]
    done = run_script(
        'train.py',
        'config/train_shakespeare_char.py',
        *flags,
        '--fallback_dataset=',
        env=refuse,
        folder=copy,
    )
    assert (
        done.returncode == 2 and '--fallback_dataset' in done.stderr and 'input.txt' in done.stderr
    )
    done = run_script(
        'train.py', 'config/train_shakespeare_char.py', *flags, env=refuse, folder=copy
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('***')]
    assert len(lines) == 1 and 'stdlib_char INSTEAD' in lines[0] and 'input.txt' in done.stdout
    assert (
        json.loads((tmp_path / 'run/config.json').read_text())['config']['dataset'] == 'stdlib_char'
    )
    assert store.load(tmp_path / 'run')[0].state['dataset'] == 'stdlib_char'
    sampled = run_script(
        'sample.py', f'--out_dir={tmp_path / "run"}', '--device=cpu', '--max_new_tokens=5'
    )
    assert 'stdlib_char' in sampled.stderr


@pytest.mark.slow
def test_compile_falls_back_where_it_cannot_work(data_dir, tmp_path):
    done = train(
        data_dir,
        tmp_path / 'run',
        '--compile',
        '--max_iters=2',
        python=sys.executable,  # the compiler reads some variables when it is imported
        env={'PATH': str(tmp_path), 'CXX': str(tmp_path / 'no-compiler')},
    )
    assert 'not compiled (no C compiler found' in done.stdout
    broken = tmp_path / 'g++'
    broken.write_text('#!/bin/sh\nexit 1\n')
    broken.chmod(0o755)
    done = train(
        data_dir,
        tmp_path / 'run2',
        '--compile',
        '--max_iters=2',
        python=sys.executable,  # the compiler reads some variables when it is imported
        env={'CXX': str(broken), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')},
    )
    assert 'compile failed, continuing without it' in done.stdout


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(tmp_path, train_here):
    done = train_here(tmp_path / 'run', '--compile', status=0)
    train_here(tmp_path / 'plain', status=0)
    assert 'compiled in' in done.stdout
    compiled, plain = (
        {r['step']: r['loss/step'] for r in records(tmp_path / run) if 'loss/step' in r}
        for run in ('run', 'plain')
    )
    assert len(compiled) == 20 and compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
def test_importing_a_script_does_nothing():
    done = run_script(
        '-c',
        'import os, sys; before = set(os.listdir()); import train, sample; import torch; '
        'assert set(os.listdir()) - before <= {"__pycache__"}; '
        'assert not torch.cuda.is_initialized(); assert train.max_iters == 600000; '
        'assert "torch._dynamo" not in sys.modules',  # importing the compiler takes a second
        python=sys.executable,
    )
    assert done.returncode == 0 and done.stdout == done.stderr == '', done.stderr


@pytest.fixture(scope='session')
def published_gpt2(data_dir, tmp_path_factory):
    """A folder in the format of Hugging Face's GPT-2, and their model; the weights are random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=50257, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    folder = tmp_path_factory.mktemp('hub') / 'gpt2'
    theirs.save_pretrained(folder)
    return folder, theirs


@pytest.fixture(scope='session')
def gpt2_data(tmp_path_factory):
    """A folder with a dataset 'tiny' in nanoGPT's format: only bins, of GPT-2's tokens."""
    folder = tmp_path_factory.mktemp('gpt2_data') / 'tiny'
    folder.mkdir()
    ids = (
        torch.randint(50257, (2000,), generator=torch.Generator().manual_seed(0))
        .numpy()
        .astype('<u2')
    )
    ids.tofile(folder / 'train.bin')
    ids[:500].tofile(folder / 'val.bin')
    return folder.parent


@pytest.mark.slow
def test_published_weights_are_evaluated_as_transformers_does(published_gpt2, gpt2_data, tmp_path):
    folder, theirs = published_gpt2
    done = run_script(
        'train.py',
        'config/eval_gpt2.py',
        f'--init_from={folder}',
        '--dataset=tiny',
        f'--data_dir={gpt2_data}',
        '--device=cpu',
        '--batch_size=4',
        f'--out_dir={tmp_path / "run"}',
    )
    assert done.returncode == 0, done.stderr
    ids = torch.from_numpy(open_dataset(gpt2_data / 'tiny', 32).val.astype('int64'))
    n = (len(ids) - 1) // 32
    with torch.no_grad():
        logits = theirs(ids[: n * 32].view(n, 32)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1 : n * 32 + 1]).item()
    assert f'val loss {loss:.4f} nats per token' in done.stdout
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_run_goes_on_from_published_weights_with_a_shorter_context(
    published_gpt2, gpt2_data, tmp_path
):
    flags = [
        'config/finetune_shakespeare.py',
        '--dataset=tiny',
        f'--data_dir={gpt2_data}',
        '--device=cpu',
        '--dropout=0.1',
        '--block_size=16',
        '--gradient_accumulation_steps=2',
        '--eval_iters=2',
        f'--out_dir={tmp_path / "run"}',
    ]
    done = run_script('train.py', *flags, f'--init_from={published_gpt2[0]}', '--max_iters=2')
    assert done.returncode == 0, done.stderr
    found, _ = store.load(tmp_path / 'run')
    assert (
        found.state['model']['n_layer'],
        found.state['model']['bias'],
        found.state['model']['block_size'],
    ) == (2, True, 16)
    assert found.state['config']['n_layer'] == 2  # what the run used, not what stands in the file
    done = run_script('train.py', *flags, '--init_from=resume', '--max_iters=3')
    assert done.returncode == 0, done.stderr
    assert store.load(tmp_path / 'run')[0].step == 3


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another_run(whole_run, tmp_path, train_here):
    done = train_here(
        tmp_path / 'run',
        f'--init_from={whole_run[0]}',
        '--max_iters=2',
        '--learning_rate=0',
        '--min_lr=0',
        status=0,
    )
    first = re.search('step 0: train loss .*, val loss (.*) nats', done.stdout)[1]
    best = store.load(whole_run[0], 'best')
    assert float(first) == pytest.approx(best[0].state['train']['best_val_loss'], abs=1e-4)
    assert_equal_tensors(
        {'model': tensors_of(tmp_path / 'run')['model']}, {'model': best[1]['model']}
    )


@pytest.mark.slow
def test_every_config_file_runs(tmp_path, data_dir, published_gpt2, gpt2_data, run_main):
    """Two steps of each, at reduced size; small weights replace the published ones."""
    configs = sorted((ROOT / 'config').rglob('*.py'))
    assert {
        'fast_shakespeare_char',
        'fast_gpt2',
        'train_shakespeare_char',
        'train_shakespeare',
        'finetune_shakespeare',
        'train_gpt2',
        'train_gpt2_24gb',
        'modern_shakespeare_char',
        'train_text',
        'eval_gpt2',
        'eval_gpt2_medium',
        'eval_gpt2_large',
        'eval_gpt2_xl',
    } <= {path.stem for path in configs}
    for config in configs:
        published = config.stem.startswith(('eval_', 'finetune_'))
        start = [f'--init_from={published_gpt2[0]}', '--bias'] if published else []
        flags = [flag for flag in SMALL_RUN if not flag.startswith('--block_size')] + [
            '--block_size=32'
        ]
        argv = [config, *flags, '--max_iters=2', *start, f'--out_dir={tmp_path / config.stem}']
        argv.append(f'--data_dir={gpt2_data if published else data_dir}')
        if 'import' in config.read_text():  # what it breaks in the code breaks in its process
            run = Started(tmp_path / 'output' / config.stem, TRAIN, *argv)
            status, said = run.end(), run.stderr
        else:
            done = run_main('train.py', *argv)
            status, said = done.returncode, done.stderr
        assert status == 0, f'{config}: {said}'
        if 'eval' not in config.stem:
            assert store.load(tmp_path / config.stem)[0].step == 2


def test_a_run_prepares_its_device_and_an_evaluations_seconds_include_the_check_up(
    train_here, tmp_path, monkeypatch
):
    devices, evaluate = [], vitals.Vitals.evaluate
    monkeypatch.setattr(training, 'prepare_device', lambda *args: devices.append(args))
    monkeypatch.setattr(vitals.Vitals, 'evaluate', lambda *args: time.sleep(0.3) or evaluate(*args))
    assert train_here(tmp_path, '--max_iters=1', '--eval_interval=1').returncode == 0
    assert devices == [('cpu', False)]
    seconds = [
        record['seconds/evaluation']
        for record in records(tmp_path)
        if 'seconds/evaluation' in record
    ]
    assert len(seconds) == 2 and min(seconds) >= 0.3


def test_a_resumed_run_whose_old_rate_would_rise_is_refused(train_here, tmp_path):
    """A run from before the check, or with a constant schedule, may have such a min_lr."""
    begun = train_here(tmp_path / 'run', '--lr_schedule=constant', '--min_lr=1', '--max_iters=10')
    assert begun.returncode == 0, begun.stderr
    ended = train_here(tmp_path / 'run', '--lr_schedule=cosine', '--init_from=resume')
    assert ended.returncode == 2 and 'min_lr 1 is greater than learning_rate 0.01' in ended.stderr


def test_speed_is_that_of_the_steps_without_the_evaluations(train_here, tmp_path, monkeypatch):
    """A step takes a quarter of a second, and a split's evaluation ten seconds."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    for module in (training, logbook):
        monkeypatch.setattr(module, 'time', clock)

    def take(name, seconds):
        original = getattr(training, name)

        def work(*arguments):
            clock.now += seconds
            return original(*arguments)

        monkeypatch.setattr(training, name, work)

    take('train_step', 0.25)
    take('evaluate', 10.0)
    monkeypatch.setattr(logbook, 'measure_flops', lambda device, dtype: 1e9)
    train_here(tmp_path, '--log_interval=3', status=0)
    lines = [record for record in records(tmp_path) if 'mfu' in record]
    assert [line['step'] for line in lines] == [1, 3, 6, 9, 12, 15, 18]
    n_head = len(tensors_of(tmp_path)['model']['transformer.wte.weight']) * 32
    # 128 tokens in a step; 6 FLOPs for each weight of a matrix, and attention to 16 positions.
    flops = 6 * (2 * 12 * 32**2 + n_head) + 12 * 2 * 32 * 16
    for line in lines:
        assert line['tokens_per_second'] == pytest.approx(4 * 128)
        assert line['mfu'] == pytest.approx(flops * 4 * 128 / 1e9)
