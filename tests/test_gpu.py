"""What only a GPU can show; skipped on machines without one. benchmarks/gpu.py runs these tests."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import records, train
from test_resume import CURVE

import configurator
import train as training
from model import GPT, GPTConfig
from nib import optim
from nib.kernels import cross_entropy, elementwise
from nib.machine import graphs
from nib.machine.device import autocast
from nib.machine.memory_plan import plan_memory
from nib.machine.ranks import Ranks
from nib.tokens.dataset import open_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]

SMALL = GPTConfig(
    vocab_size=1000, block_size=64, n_layer=2, n_head=4, n_embd=128
)  # GPT-2's architecture
MODERN = GPTConfig(
    vocab_size=1000,
    block_size=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=128,
    position='rotary',
    norm='rms',
    qk_norm=True,
    mlp='swiglu',
    tied_head=False,
    bias=False,
)
CONFIGS = pytest.mark.parametrize('config', [SMALL, MODERN], ids=['gpt2', 'modern'])


def make_model(config, seed=0):
    torch.manual_seed(seed)
    return GPT(config).cuda()


def tokens(rows, length, vocab_size=1000, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(vocab_size, size=(rows, length))
    ).cuda()


def greedy(model, prompts, n, **options):
    return torch.stack(list(model.generate(prompts, n, temperature=0.0, **options)), dim=1).tolist()


@pytest.mark.parametrize(
    'dtype, tolerance', [('float32', 2e-3), ('bfloat16', 2e-2), ('float16', 3e-3)]
)
def test_logits_equal_transformers_on_a_gpu(dtype, tolerance):
    transformers = pytest.importorskip('transformers')
    theirs = (
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=1000,
                n_positions=64,
                n_layer=2,
                n_head=4,
                n_embd=128,
                activation_function='gelu_new',
            )
        )
        .cuda()
        .eval()
    )
    ours = make_model(SMALL).eval()
    state = {
        name: tensor
        for name, tensor in theirs.state_dict().items()
        if not name.endswith(('.attn.bias', '.attn.masked_bias')) and name != 'lm_head.weight'
    }
    transposed = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
    ours.load_state_dict(
        {
            name: tensor.t() if name.endswith(transposed) else tensor
            for name, tensor in state.items()
        }
    )
    idx = tokens(4, 64)
    with torch.no_grad():
        expected = theirs.double()(idx).logits
        with autocast(dtype, 'cuda'):
            logits = ours(idx)
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


@CONFIGS
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cached_sampling_equals_full_passes_on_a_gpu(config, dtype):
    model = make_model(config).to(dtype).eval()
    prompt = tokens(1, 10)[0].tolist()
    written = greedy(model, [prompt], 40)[0]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + written], device='cuda'))[
            0, len(prompt) - 1 : -1
        ].float()
    chosen = logits.gather(1, torch.tensor(written, device='cuda')[:, None])[:, 0]
    near = (
        1e-3 if dtype == torch.float32 else 3e-2
    )  # two orders of summing may disagree about near ties
    assert (logits.max(dim=1).values - chosen).max() <= near * logits.abs().max()


@CONFIGS
def test_compiled_steps_write_the_same_tokens(config):
    model = make_model(config).eval()
    for prompts in (
        [tokens(1, 5)[0].tolist()],
        [tokens(1, 5)[0].tolist(), tokens(1, 20, seed=1)[0].tolist()],
    ):
        assert greedy(model, prompts, 50, compile=True) == greedy(model, prompts, 50)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('compile', ['compile', 'compile --deterministic', 'no-compile'])
def test_a_resumed_run_equals_the_uninterrupted_one_on_a_gpu(data_dir, tmp_path, dtype, compile):
    flags = [
        '--device=cuda',
        f'--dtype={dtype}',
        *f'--{compile}'.split(),
        '--dropout=0.1',
        '--max_iters=50',
        '--lr_decay_iters=50',
        '--keep_last=9',
    ]
    train(data_dir, tmp_path / 'whole', *flags)
    train(data_dir, tmp_path / 'cut', *flags, '--max_iters=20')
    train(data_dir, tmp_path / 'cut', *flags, '--init_from=resume')
    whole, cut = (
        {(r['step'], name): r[name] for r in records(tmp_path / run) for name in CURVE if name in r}
        for run in ('whole', 'cut')
    )
    cut.pop((20, 'loss/val_whole'))  # of the run that ended there
    assert cut.keys() == whole.keys() and len(whole) > 50
    if compile == 'compile':  # its sums vary in their order from run to run
        assert list(cut.values()) == pytest.approx(list(whole.values()), rel=0.02)
        return
    assert cut == whole
    for file in ('model.safetensors', 'optimizer.safetensors'):
        assert (tmp_path / 'cut/step-00000050' / file).read_bytes() == (
            tmp_path / 'whole/step-00000050' / file
        ).read_bytes()


@pytest.mark.parametrize('cuda_graph', [True, False])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'sgd'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_training_step_never_waits_for_the_gpu(optimizer, dtype, cuda_graph, data_dir):
    config = configurator.read_block(training.__file__).defaults | {
        'device': 'cuda',
        'dtype': dtype,
        'optimizer': optimizer,
        'cuda_graph': cuda_graph,
        'n_layer': 2,
        'n_head': 4,
        'n_kv_head': 2,
        'n_embd': 128,
        'block_size': 64,
        'batch_size': 8,
        'gradient_accumulation_steps': 2,
        'position': 'rotary',
        'norm': 'rms',
        'qk_norm': True,
        'mlp': 'swiglu',
        'tied_head': False,
    }
    t = training.Training.set_up(config, open_dataset(data_dir / 'tiny', 64))
    t.compile_and_distribute(False, print)
    assert isinstance(t.model, graphs.GraphedModel) is cuda_graph
    t.optimizer.lr = 1e-3
    for step in range(3):  # kernels are loaded and memory is set up
        training.train_step(t, t.batches.micro_batches(step), step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for step in range(3, 6):
            loss, _ = training.train_step(t, t.batches.micro_batches(step), step)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert loss.isfinite()


def test_a_step_that_is_not_finite_is_left_out_on_a_gpu():
    for method in ('adamw', 'muon', 'sgd'):
        model = make_model(SMALL)
        optimizer = optim.Optimizer(model, method)
        optimizer.lr = 1e-2
        for usable in (True, False):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            model(tokens(2, 64), tokens(2, 64, seed=1)).backward()
            if not usable:
                for p in model.parameters():
                    p.grad.fill_(torch.nan)
            optimizer.step(torch.tensor(usable, device='cuda'))
            optimizer.zero_grad()
            changed = [
                name for name, p in model.named_parameters() if not torch.equal(p, before[name])
            ]
            assert len(changed) == (len(before) if usable else 0), (method, usable, changed)


def test_nccl_with_one_rank_gives_the_same_gradients(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('nccl', store=store, rank=0, world_size=1)
    try:
        plain, inner = make_model(SMALL), make_model(SMALL)
        batch = tokens(4, 64), tokens(4, 64, seed=1)
        ranks = Ranks(world_size=2)  # one alone would get the model itself
        distributed = ranks.distribute(inner, 'cuda:0', batch, contextlib.nullcontext())
        for model in (plain, distributed):
            model(*batch).backward()
        for ours, theirs in zip(plain.parameters(), inner.parameters()):
            assert torch.equal(ours.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    'vocab_size, tied, cap', [(997, True, 0.0), (1000, False, 5.0), (5000, True, 0.0)]
)
def test_the_padded_vocabulary_never_shows(vocab_size, tied, cap, monkeypatch):
    """Loss and gradients with the padded head of a GPU equal plain float64 on a CPU.

    The loss is computed at once, in chunks and compiled.
    """
    config = GPTConfig(
        vocab_size=vocab_size,
        block_size=32,
        n_layer=1,
        n_head=2,
        n_embd=32,
        tied_head=tied,
        logit_cap=cap,
    )
    torch.manual_seed(0)
    plain = GPT(config).double()
    idx, targets = tokens(4, 32, vocab_size), tokens(4, 32, vocab_size, seed=1)
    logits = plain(idx.cpu())
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.cpu().flatten())
    expected.backward()
    for how in ('at once', 'in chunks', 'compiled'):
        model = GPT(config).cuda()
        model.load_state_dict(plain.state_dict())
        many = 50 * vocab_size if how == 'in chunks' else 1 << 28
        monkeypatch.setattr(cross_entropy, 'MANY_LOGITS_GPU', many)
        monkeypatch.setattr(cross_entropy, 'LOSS_CHUNK_GPU', 4 * many)
        loss = (torch.compile(model) if how == 'compiled' else model)(idx, targets)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-3)
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            assert ours.grad.shape == theirs.grad.shape
            assert (ours.grad.cpu() - theirs.grad).norm() <= 2e-3 * theirs.grad.norm()
        assert model(idx).shape[-1] == vocab_size


@pytest.mark.parametrize('wait', [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()])
def test_a_model_that_waits_for_the_gpu_generates_without_a_cuda_graph(wait):
    model = make_model(SMALL).eval()
    expected = greedy(model, [[1, 2, 3]], 20)

    class Waiting(torch.nn.Module):
        def forward(self, x):
            wait(x)
            return x

    model.transformer.drop = Waiting()
    assert greedy(model, [[1, 2, 3]], 20) == expected
    torch.nn.functional.dropout(torch.ones(9, device='cuda'))  # random numbers still work


# -- CUDA graphs of training passes ----------------------------------------------------------------


def make_training(data_dir, **changes):
    config = configurator.read_block(training.__file__).defaults | {
        'device': 'cuda',
        'dtype': 'bfloat16',
        'n_layer': 2,
        'n_head': 4,
        'n_embd': 128,
        'block_size': 64,
        'batch_size': 8,
        'gradient_accumulation_steps': 3,
        'dropout': 0.2,
        **changes,
    }
    t = training.Training.set_up(config, open_dataset(data_dir / 'tiny', config['block_size']))
    said = []
    t.compile_and_distribute(config['compile'] is True, said.append)
    t.optimizer.lr = 1e-3
    return t, said


def train_steps(t, n):
    """The losses and gradient norms of n steps, and the weights after them."""
    steps = [training.train_step(t, t.batches.micro_batches(step), step) for step in range(n)]
    return [number for pair in steps for number in pair] + [
        p.detach() for p in t.raw_model.parameters()
    ]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_graphed_steps_equal_those_without_graphs(data_dir, dtype, optimizer):
    """Also with dropout, whose seeds change between passes, and accumulated gradients."""
    options = {'dtype': dtype, 'optimizer': optimizer}
    graphed, said = make_training(data_dir, **options)
    plain, _ = make_training(data_dir, cuda_graph=False, **options)
    assert isinstance(graphed.model, graphs.GraphedModel) and 'captured' in said[0]
    assert plain.model is plain.raw_model
    for ours, expected in zip(train_steps(graphed, 6), train_steps(plain, 6)):
        assert torch.equal(ours, expected)


def test_a_compiled_model_is_captured_too(data_dir):
    graphed, said = make_training(data_dir, compile=True, dropout=0.0)
    plain, _ = make_training(data_dir, cuda_graph=False, dropout=0.0)
    assert isinstance(graphed.model, graphs.GraphedModel), said
    for ours, expected in zip(train_steps(graphed, 3)[:6], train_steps(plain, 3)[:6]):
        assert ours.item() == pytest.approx(expected.item(), rel=2e-2)


def test_a_model_that_changes_runs_without_its_graph(data_dir, monkeypatch):
    t, _ = make_training(data_dir, dropout=0.0)
    x, y = t.batches.batch(0, 0)
    with t.precision:
        first = t.model(x, y).item()
        t.raw_model.transformer.h[0].scale = 2.0  # a number that a changed model may set
        monkeypatch.setattr(
            type(t.raw_model.transformer.h[0]),
            'forward',
            lambda block, x, rotary=None: x * getattr(block, 'scale', 1.0),
        )
        assert t.model(x, y).item() != first
        del t.raw_model.transformer.h[0].scale
        assert t.model(x, y).item() == first  # the graph, which does not see the other forward()
        t.raw_model.eval()
        assert t.model(x, y).item() != first
        assert t.model(x[:3], y[:3]).isfinite()


@pytest.mark.parametrize('wait', [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()])
def test_a_model_that_waits_for_the_gpu_trains_without_a_graph(data_dir, monkeypatch, wait):
    """Its dropout, too: a failed capture leaves torch's random generator unusable."""
    drop = elementwise.Dropout.forward
    monkeypatch.setattr(elementwise.Dropout, 'forward', lambda self, x: (wait(x), drop(self, x))[1])
    t, said = make_training(data_dir)
    assert t.model is t.raw_model and 'without CUDA graphs' in said[-1]
    assert all(p.grad is None for p in t.raw_model.parameters())
    monkeypatch.undo()
    plain, _ = make_training(data_dir, cuda_graph=False)
    for ours, expected in zip(train_steps(t, 3), train_steps(plain, 3)):
        assert torch.equal(ours, expected)


def test_a_backward_pass_of_an_earlier_batch_is_an_error(data_dir):
    t, _ = make_training(data_dir)
    first, _ = t.model(*t.batches.batch(0, 0)), t.model(*t.batches.batch(0, 1))
    with pytest.raises(RuntimeError, match='--no-cuda_graph'):
        first.backward()


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('compile', [False, True])
def test_the_planned_memory_is_what_a_step_takes(data_dir, compile):
    sizes = dict(n_layer=6, n_head=8, n_embd=512, block_size=128, batch_size=256, dropout=0.0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    t, _ = make_training(data_dir, compile=compile, cuda_graph=False, **sizes)
    train_steps(t, 2)
    measured = torch.cuda.max_memory_allocated() - before
    values = configurator.read_block(training.__file__).defaults | sizes
    values |= {'device': 'cuda', 'dtype': 'bfloat16', 'gradient_accumulation_steps': 3}
    planned = plan_memory(t.raw_model.config, values, compile).peak
    assert planned == pytest.approx(measured, rel=0.15)


def test_a_batch_that_does_not_fit_is_one_line_with_sizes_that_do(data_dir, tmp_path):
    flags = ['--device=cuda', '--n_embd=1024', '--block_size=64', '--batch_size=262144']
    done = train(data_dir, tmp_path / 'out', *flags, check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: out of memory on cuda') and '; try --batch_size=' in last


def test_the_largest_batch_is_found_by_a_trial(data_dir, tmp_path):
    flags = ['--device=cuda', '--batch_size=auto', '--gradient_accumulation_steps=40']
    done = train(data_dir, tmp_path / 'out', *flags)
    assert 'batch_size 480, gradient_accumulation_steps 1 (auto: about' in done.stdout
