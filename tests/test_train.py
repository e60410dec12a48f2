"""The training loop: run as a user runs it, and its one step against arithmetic."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL_RUN, records, run_script, train

import train as training
from model import GPT, GPTConfig
from nib import checkpoint, corpus, loader, optim, runtime

SMALL = GPTConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=32)


def tensors_of(out_dir, which='latest'):
    return checkpoint.load(out_dir, which)[1]


def assert_equal_tensors(first, second):
    assert first.keys() == second.keys()
    for kind in first:
        assert first[kind].keys() == second[kind].keys()
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), name


@pytest.fixture(scope='module')
def whole_run(data_dir, tmp_path_factory):
    """20 steps with dropout, accumulation and a schedule."""
    out_dir = tmp_path_factory.mktemp('whole') / 'run'
    return out_dir, train(data_dir, out_dir, '--dropout=0.1')


def test_a_run_learns_and_reports_it(whole_run, data_dir):
    out_dir, done = whole_run
    losses = [float(loss) for loss in re.findall(r'^step \d+: train loss [\d.]+, val loss ([\d.]+)', done.stdout, re.M)]
    assert len(losses) == 3  # steps 0, 10 and 20
    assert losses[0] == pytest.approx(math.log(corpus.open_dataset(data_dir / 'tiny', 16).vocab_size), rel=0.03)
    assert losses[-1] < losses[0] - 0.3
    logged = records(out_dir)
    assert [r['step'] for r in logged if 'loss/step' in r] == list(range(1, 21))
    assert {'loss/step', 'grad_norm', 'learning_rate', 'tokens_per_second'} <= logged[1].keys()
    assert [r['loss/val'] for r in logged if 'loss/val' in r] == pytest.approx(losses, abs=1e-4)
    config = json.loads((out_dir / 'config.json').read_text())
    assert config['config']['dataset'] == 'tiny' and config['origins']['dropout'] == 'command line'


def test_the_last_line_is_the_loss_over_the_whole_validation_split(whole_run, data_dir):
    out_dir, done = whole_run
    found, tensors = checkpoint.load(out_dir, 'latest')
    model = GPT(GPTConfig(**found.state['model'])).eval()
    model.load_state_dict(tensors['model'])
    val = torch.from_numpy(corpus.open_dataset(data_dir / 'tiny', 16).val.astype('int64'))
    n = (len(val) - 1) // 16
    with torch.no_grad():
        loss = model(val[:n * 16].view(n, 16), val[1:n * 16 + 1].view(n, 16)).item()
    # a character is a byte here
    assert f'val loss {loss:.4f} nats per token ({loss / math.log(2):.4f} bits per byte) over the whole' in done.stdout
    only = train(data_dir, out_dir, '--dropout=0.1', '--init_from=resume', '--eval_only')
    assert f'step 20: val loss {loss:.4f}' in only.stdout


def test_a_run_cut_at_10_and_resumed_equals_the_uninterrupted_one(whole_run, data_dir, tmp_path):
    """The same learning rates, batches and dropout: every weight and moment, bit for bit, and the same curve."""
    train(data_dir, tmp_path / 'run', '--dropout=0.1', '--max_iters=10')
    resumed = train(data_dir, tmp_path / 'run', '--dropout=0.1', '--init_from=resume')
    assert 'resuming from' in resumed.stdout
    assert_equal_tensors(tensors_of(tmp_path / 'run'), tensors_of(whole_run[0]))
    curve = [(r['step'], r['loss/step'], r['grad_norm']) for r in records(whole_run[0]) if 'loss/step' in r]
    assert [(r['step'], r['loss/step'], r['grad_norm']) for r in records(tmp_path / 'run') if 'loss/step' in r] == curve


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(whole_run, data_dir, tmp_path):
    out_dir = tmp_path / 'run'
    run = subprocess.Popen([sys.executable, 'train.py', *SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={out_dir}',
                            '--dropout=0.1', '--max_iters=100000'], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                           env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for line in run.stdout:
        if line.startswith('step 3: loss'):
            run.send_signal(signal.SIGINT)
            break
    rest = run.stdout.read()
    assert run.wait(60) == 130
    assert '--init_from=resume' in rest
    stopped_at = int(re.search(r'stopped by signal 2 after step (\d+)', rest)[1])
    assert checkpoint.load(out_dir)[0].step == stopped_at


def test_sigterm_is_heard_too(data_dir, tmp_path):
    run = subprocess.Popen([sys.executable, 'train.py', *SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}',
                            '--max_iters=100000'], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    next(line for line in run.stdout if line.startswith('step 2: loss'))
    run.send_signal(signal.SIGTERM)
    run.stdout.read()
    assert run.wait(60) == 143
    assert checkpoint.load(tmp_path / 'run')[0].step >= 2


def test_two_ranks_learn_what_one_learns(data_dir, tmp_path):
    """The same batches shared out over two processes: losses agree to rounding, evaluation too; rank 0 alone writes."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    done = train(data_dir, tmp_path / 'two', launcher=torchrun)
    train(data_dir, tmp_path / 'one')
    assert done.stdout.count('over the whole validation split') == 1
    keys = ('loss/step', 'grad_norm', 'loss/train', 'loss/val', 'loss/val_whole')
    for two, one in zip(records(tmp_path / 'two'), records(tmp_path / 'one'), strict=True):
        for key in keys:
            assert two.get(key) == (pytest.approx(one[key], rel=1e-3) if key in one else None)
    for name, value in tensors_of(tmp_path / 'two')['model'].items():
        torch.testing.assert_close(value, tensors_of(tmp_path / 'one')['model'][name], atol=2e-3, rtol=0)


def test_a_step_that_cannot_be_shared_out_is_refused_on_one_line(data_dir, tmp_path):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    done = train(data_dir, tmp_path / 'run', '--gradient_accumulation_steps=3', launcher=torchrun, check=False)
    assert done.returncode != 0
    assert '--gradient_accumulation_steps=4' in done.stderr


def test_accumulated_gradients_are_those_of_one_large_batch():
    torch.manual_seed(0)
    model = GPT(SMALL)
    ids = torch.randint(31, (64, 17))
    gradients = []
    for micro_steps in (1, 4):
        batches = [(part[:, :-1], part[:, 1:]) for part in ids.chunk(micro_steps)]
        caught = {}

        class Catch:  # an optimizer that only looks
            def step(self):
                caught.update({name: p.grad.clone() for name, p in model.named_parameters()})

            def zero_grad(self, set_to_none):
                model.zero_grad(set_to_none)

        scaler = torch.amp.GradScaler('cpu', enabled=False)
        loss, norm = training.train_step(model, Catch(), scaler, batches, micro_steps, runtime.precision('float32', 'cpu'),
                                         0.0, (0, 0, 0))
        gradients.append((caught, loss, norm))
    (once, loss, norm), (accumulated, loss4, norm4) = gradients
    for name in once:
        torch.testing.assert_close(once[name], accumulated[name], atol=1e-6, rtol=0)
    assert loss.item() == pytest.approx(loss4.item(), abs=1e-6)
    assert norm.item() == pytest.approx(norm4.item(), rel=1e-5)


def test_a_step_equals_plain_pytorch():
    """Forward, backward, clip, AdamW, written out with torch.optim.AdamW's unfused loop."""
    torch.manual_seed(0)
    config = GPTConfig(**{**vars(SMALL), 'bias': False})  # a key's bias has no gradient but rounding, which Adam would blow up
    ours, theirs = GPT(config), GPT(config)
    theirs.load_state_dict(ours.state_dict())
    optimizer = optim.adamw(ours, 1e-2, (0.9, 0.95), 0.1)
    plain = torch.optim.AdamW(optim.parameter_groups(theirs, 0.1), lr=1e-2, betas=(0.9, 0.95), foreach=False)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    for step in range(5):
        ids = torch.randint(31, (4, 17))
        loss, norm = training.train_step(ours, optimizer, scaler, [(ids[:, :-1], ids[:, 1:])], 1,
                                         runtime.precision('float32', 'cpu'), 0.5, (0, step, 0))
        expected = theirs(ids[:, :-1], ids[:, 1:])
        expected.backward()
        norm_by_hand = math.sqrt(sum(p.grad.double().square().sum().item() for p in theirs.parameters()))
        for p in theirs.parameters():
            p.grad *= min(1.0, 0.5 / norm_by_hand)
        plain.step()
        plain.zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert norm.item() == pytest.approx(norm_by_hand, rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_the_learning_rate_warms_up_and_decays_along_a_cosine(monkeypatch):
    for key, value in dict(learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, lr_decay_iters=1100, decay_lr=True).items():
        monkeypatch.setattr(training, key, value)
    by_hand = {0: 1e-3 / 101, 50: 1e-3 * 51 / 101, 100: 1e-3, 350: 1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2, 600: 5.5e-4,
               1100: 1e-4, 5000: 1e-4}
    for step, lr in by_hand.items():
        assert training.get_lr(step) == pytest.approx(lr, rel=1e-9)
    monkeypatch.setattr(training, 'decay_lr', False)
    assert training.get_lr(0) == training.get_lr(10_000) == 1e-3


def test_evaluation_turns_dropout_off_and_weighs_every_token_alike():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SMALL), 'dropout': 0.5})).train()
    tokens = torch.randint(31, (16 * 7 + 1,)).numpy()
    losses = {training.evaluate(model, loader.eval_batches(tokens, 16, size), runtime.precision('float32', 'cpu'),
                                runtime.Ranks()) for size in (7,)}
    assert model.training
    again = training.evaluate(model, loader.eval_batches(tokens, 16, 4), runtime.precision('float32', 'cpu'), runtime.Ranks())
    assert losses.pop() == pytest.approx(again, abs=1e-6)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_low_precision_follows_float32(data_dir, tmp_path, dtype, whole_run):
    train(data_dir, tmp_path / 'run', '--dropout=0.1', f'--dtype={dtype}')
    expected = [r['loss/val'] for r in records(whole_run[0]) if 'loss/val' in r]
    assert [r['loss/val'] for r in records(tmp_path / 'run') if 'loss/val' in r] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize('dtype', ['float16'])
def test_a_float16_run_keeps_its_loss_scale_when_resumed(data_dir, tmp_path, dtype):
    train(data_dir, tmp_path / 'whole', f'--dtype={dtype}', '--eval_interval=5')
    train(data_dir, tmp_path / 'cut', f'--dtype={dtype}', '--eval_interval=5', '--max_iters=10')
    assert checkpoint.load(tmp_path / 'cut')[0].state['train']['scaler']['scale'] > 0
    train(data_dir, tmp_path / 'cut', f'--dtype={dtype}', '--eval_interval=5', '--init_from=resume')
    assert_equal_tensors(tensors_of(tmp_path / 'cut'), tensors_of(tmp_path / 'whole'))


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(data_dir, tmp_path):
    train(data_dir, tmp_path / 'run', '--max_iters=10')
    done = train(data_dir, tmp_path / 'run', '--init_from=resume', '--learning_rate=1e30', '--min_lr=1e30',
                 '--grad_clip=0', check=False)
    assert done.returncode == 3
    assert 'nothing is saved' in done.stderr
    found, tensors = checkpoint.load(tmp_path / 'run')
    assert found.step == 10
    assert all(value.isfinite().all() for value in tensors['model'].values())


def test_weights_that_are_not_finite_are_not_saved_on_ctrl_c(data_dir, tmp_path):
    """No step is logged after the first, so that the run has not noticed by itself."""
    run = subprocess.Popen([sys.executable, 'train.py', *SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}',
                            '--learning_rate=1e30', '--grad_clip=0', '--warmup_iters=0', '--log_interval=1000000',
                            '--eval_interval=1000000', '--max_iters=1000000', '--lr_decay_iters=1000000'],
                           cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in run.stdout if line.startswith('step 1: loss'))
    time.sleep(1)  # many steps
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 3 and 'nothing is saved' in said
    assert not checkpoint.exists(tmp_path / 'run')


def test_wandb_offline_and_tensorboard_get_the_names_of_metrics_jsonl(data_dir, tmp_path):
    train(data_dir, tmp_path / 'run', '--wandb_log', '--tensorboard', '--max_iters=4')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / 'run' / 'tensorboard'))
    events.Reload()
    names = {key for record in records(tmp_path / 'run') for key in record} - {'step'}
    assert set(events.Tags()['scalars']) == names
    written = [r['loss/step'] for r in records(tmp_path / 'run') if 'loss/step' in r]
    assert [event.value for event in events.Scalars('loss/step')] == pytest.approx(written)
    assert list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))


def test_a_second_run_does_not_write_over_the_first(data_dir, tmp_path):
    train(data_dir, tmp_path / 'run', '--max_iters=10')
    before = tensors_of(tmp_path / 'run')
    done = train(data_dir, tmp_path / 'run', '--seed=2', check=False)
    assert done.returncode == 2 and '--overwrite' in done.stderr and 'Traceback' not in done.stderr
    assert_equal_tensors(tensors_of(tmp_path / 'run'), before)
    train(data_dir, tmp_path / 'run', '--seed=2', '--overwrite', '--max_iters=10')
    assert checkpoint.load(tmp_path / 'run')[0].state['config']['seed'] == 2


def test_a_run_is_not_resumed_as_another_one(data_dir, tmp_path):
    train(data_dir, tmp_path / 'run', '--max_iters=10')
    done = train(data_dir, tmp_path / 'run', '--init_from=resume', '--n_embd=64', check=False)
    assert done.returncode == 2 and 'n_embd 32' in done.stderr and '64' in done.stderr
    corpus.write_char_dataset(tmp_path / 'data' / 'tiny', 'The cat sees a dog, and then it sleeps.\n' * 60, {})
    done = train(tmp_path / 'data', tmp_path / 'run', '--init_from=resume', check=False)
    assert done.returncode == 2 and 'was trained' in done.stderr


@pytest.mark.parametrize('flags, said', [
    (['--batch_size=0'], 'batch_size'), (['--n_embd=33'], 'n_embd 33'), (['--learning_rate=nan'], 'learning_rate'),
    (['--warmup_iters=50'], 'warmup_iters 50'), (['--dataset=none'], 'none/train.bin'), (['--device=cuda:99'], 'cuda:99'),
    (['--device=abacus'], 'abacus'), (['--learing_rate=1'], 'learning_rate'), (['--init_from=resume'], 'no such folder'),
    (['--block_size=100000'], 'block_size'), (['--grad_clip=-1'], 'grad_clip')])
def test_a_mistake_is_named_on_one_line(data_dir, tmp_path, flags, said):
    done = train(data_dir, tmp_path / 'run', *flags, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and said in done.stderr
    assert not (tmp_path / 'run').exists()


def test_without_a_network_the_run_says_so_and_trains_on_the_fallback(data_dir, tmp_path):
    """The config's dataset cannot be fetched through a proxy that refuses; the fallback is prepared and recorded."""
    if (ROOT / 'data/shakespeare_char/input.txt').exists():
        pytest.skip('tiny Shakespeare is here already')
    refuse = {'https_proxy': 'http://127.0.0.1:9', 'HTTPS_PROXY': 'http://127.0.0.1:9'}
    flags = [f'--data_dir={tmp_path / "data"}', f'--out_dir={tmp_path / "run"}', '--device=cpu', '--max_iters=2',
             '--eval_iters=1', '--n_layer=1']
    done = run_script('train.py', 'config/train_shakespeare_char.py', *flags, '--fallback_dataset=', env=refuse)
    assert done.returncode == 2 and '--fallback_dataset' in done.stderr and 'input.txt' in done.stderr
    done = run_script('train.py', 'config/train_shakespeare_char.py', *flags, env=refuse)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('***')]
    assert len(lines) == 1 and 'stdlib_char INSTEAD' in lines[0] and 'input.txt' in lines[0]
    assert json.loads((tmp_path / 'run/config.json').read_text())['config']['dataset'] == 'stdlib_char'
    assert checkpoint.load(tmp_path / 'run')[0].state['dataset'] == 'stdlib_char'
    sampled = run_script('sample.py', f'--out_dir={tmp_path / "run"}', '--device=cpu', '--max_new_tokens=5')
    assert 'stdlib_char' in sampled.stderr


def test_compile_falls_back_where_it_cannot_work(data_dir, tmp_path):
    done = train(data_dir, tmp_path / 'run', '--compile', '--max_iters=2',
                 env={'PATH': str(tmp_path), 'CXX': str(tmp_path / 'no-compiler')})
    assert 'compile off (there is no C compiler' in done.stdout
    broken = tmp_path / 'g++'
    broken.write_text('#!/bin/sh\nexit 1\n')
    broken.chmod(0o755)
    done = train(data_dir, tmp_path / 'run2', '--compile', '--max_iters=2',
                 env={'CXX': str(broken), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')})
    assert 'compile failed, going on without it' in done.stdout


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(data_dir, tmp_path, whole_run):
    done = train(data_dir, tmp_path / 'run', '--compile')
    train(data_dir, tmp_path / 'plain')
    assert 'compiled in' in done.stdout
    for compiled, plain in zip(records(tmp_path / 'run'), records(tmp_path / 'plain'), strict=True):
        assert compiled.get('loss/step', 0) == pytest.approx(plain.get('loss/step', 0), rel=1e-3)


def test_importing_a_script_does_nothing():
    done = run_script('-c', 'import os; before = set(os.listdir()); import train, sample; import torch; '
                            'assert set(os.listdir()) - before <= {"__pycache__"}; '
                            'assert not torch.cuda.is_initialized(); assert train.max_iters == 600000')
    assert done.returncode == 0 and done.stdout == done.stderr == '', done.stderr


def test_every_config_file_runs(tmp_path, data_dir):
    """Two steps of each, at reduced size."""
    configs = sorted((ROOT / 'config').rglob('*.py'))
    assert configs
    for config in configs:
        done = run_script('train.py', config, *SMALL_RUN, '--max_iters=2', f'--data_dir={data_dir}',
                          f'--out_dir={tmp_path / config.stem}')
        assert done.returncode == 0, f'{config}: {done.stderr}'
