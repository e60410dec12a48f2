"""The memory estimate equals what autograd saves, and the batch size follows from it."""

import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, records, run_script
from small_models import ARCHITECTURES, NAMES

import bench
import train as training
from model import GPT, GPTConfig
from nib import errors
from nib.checkpoint import store
from nib.errors import UserError
from nib.kernels import elementwise
from nib.machine import memory, memory_plan
from nib.machine.device import ShapesOnly, autocast
from nib.machine.ranks import Ranks, clear_gradients

MODERN = {
    'position': 'rotary',
    'norm': 'rms',
    'qk_norm': True,
    'mlp': 'swiglu',
    'tied_head': False,
    'n_kv_head': 2,
    'bias': False,
}
GB = 1e9
SEQUENCES = 4  # enough that what does not grow with them hardly counts


def saved_bytes(config: GPTConfig, dtype: str) -> int:
    """The bytes per token that autograd saves in a forward pass, except for parameters."""
    model, seen, kept = GPT(config), {}, []
    own = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no other tensor gets its address
        return tensor

    x = torch.zeros(SEQUENCES, config.block_size, dtype=torch.long)
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saving, autocast(dtype, 'cpu'):
        model(x, x)
    return sum(seen.values()) / x.numel()


@pytest.mark.parametrize('block_size', [64, 320])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    'changes',
    [
        {},
        MODERN,
        {'qk_norm': True},
        {'position': 'rotary', 'mlp': 'relu2'},
        {'dropout': 0.1},
        {'dropout': 0.2},
        {'head_dim': 48, 'mlp_width': 96},
    ],
    ids=['gpt2', 'modern', 'qk_norm', 'rotary', 'dropout', "torch's dropout", 'wide heads'],
)
def test_a_layer_needs_the_activations_that_autograd_saves(monkeypatch, changes, dtype, block_size):
    is_torchs = changes.get('dropout') == 0.2
    monkeypatch.setattr(elementwise, 'DRAWS_IN_PARALLEL', is_torchs)
    shape = {'vocab_size': 64, 'n_head': 4, 'n_embd': 128, 'block_size': block_size, **changes}
    one, two = (GPTConfig(n_layer=n, **shape) for n in (1, 2))
    saved = saved_bytes(two, dtype) - saved_bytes(one, dtype)
    if dtype == 'bfloat16':  # the copies of a layer's matrices, which plan_memory counts
        matrices = [p for p in GPT(one).transformer.h.parameters() if p.dim() == 2]
        saved -= 2 * sum(p.numel() for p in matrices) / (SEQUENCES * block_size)
    planned = [memory_plan.activation_bytes(config, 'cpu', dtype) for config in (one, two)]
    assert planned[1] - planned[0] == pytest.approx(saved, rel=0.03)


def test_the_estimate_for_a_gpu_is_what_an_h100_took():
    """GPT-2 (124M), compiled, from the results of benchmarks/gpu.py."""
    text = (ROOT / 'benchmarks/results/gpu_h100.txt').read_text()
    for batch_size in (16, 32):
        measured = float(re.search(rf'batch {batch_size}, nibGPT: peak memory, GB +(\S+)', text)[1])
        values = {
            'batch_size': batch_size,
            'gradient_accumulation_steps': 4,
            'device': 'cuda',
            'dtype': 'bfloat16',
            'optimizer': 'adamw',
        }
        plan = memory_plan.plan_memory(GPTConfig(bias=False), values, compiled=True)
        assert plan.peak / GB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    'flags, n, bound',
    [
        ('--.*--recompute.*', 14, 0.12),
        ('(?!.*--(?:vocab_size|recompute))--.*', 21, 0.15),
        ('--.*--dropout.*', 5, 0.16),
    ],
    ids=['recompute', "GPT-2's vocabulary", 'dropout'],
)
def test_the_estimate_is_what_this_cpu_took(monkeypatch, flags, n, bound):
    """The results of benchmarks/planned_memory.py."""
    monkeypatch.setattr(elementwise, 'DRAWS_IN_PARALLEL', False)  # dropout ran on AMD
    text = (ROOT / 'benchmarks/results/planned_memory.txt').read_text()
    rows = re.findall(rf'^ *[\d,]+ +([\d,]+) +\S+  ({flags})$', text, re.MULTILINE)
    assert len(rows) >= n
    for measured, flags in rows:
        config = ['--device=cpu', '--gradient_accumulation_steps=1', *flags.split()]
        values = bench.read_config(config)
        model = GPTConfig.pick(values, values['vocab_size'] or 50304)
        plan = memory_plan.plan_memory(model, values)
        assert plan.peak / 1e6 == pytest.approx(float(measured.replace(',', '')), rel=bound), flags


def test_a_compiled_model_holds_all_logits_on_a_gpu():
    """The trial step is not compiled, so the estimate must leave room for the compiled model."""
    config = {'device': 'cuda:0', 'dtype': 'bfloat16', 'optimizer': 'adamw', 'batch_size': 64}
    config |= {'gradient_accumulation_steps': 1}
    eager, auto = (
        memory.needed_memory(GPTConfig(), config | {'compile': compile})
        for compile in (False, 'auto')
    )
    logits = 2 * 64 * 1024 * 50257
    assert eager + logits / 2 < auto < eager + logits


def test_sgd_keeps_one_number_per_weight_and_adamw_two():
    for method, copies in (('adamw', 2), ('sgd', 1)):
        values = {'device': 'cpu', 'dtype': 'float32', 'optimizer': method, 'batch_size': 1}
        plan = memory_plan.plan_memory(GPTConfig(), values | {'gradient_accumulation_steps': 1})
        assert plan.optimizer == copies * plan.weights


@pytest.mark.parametrize('micro_steps', [1, 2])
def test_several_ranks_hold_the_planned_gradients(micro_steps):
    config = GPTConfig(vocab_size=60, block_size=8, n_layer=1, n_head=2, n_embd=16)
    x = torch.zeros(1, 8, dtype=torch.long)
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = GPT(config)
        distributed = Ranks(world_size=2).distribute(model, 'cpu', (x, x), nullcontext())
        held = {}  # address -> storage
        for micro_step in range(2 * micro_steps):  # of two steps
            is_last = micro_step % micro_steps == micro_steps - 1
            with nullcontext() if is_last else distributed.no_sync():
                distributed(x, x).backward()
            for p in model.parameters():
                storage = p.grad.untyped_storage()
                held[storage.data_ptr()] = storage  # so that no other one gets its address
            if is_last:
                clear_gradients(model.parameters())
                assert not any(p.grad.any() for p in model.parameters())
    finally:
        dist.destroy_process_group()
    values = {'device': 'cpu', 'dtype': 'float32', 'optimizer': 'adamw', 'batch_size': 1}
    values |= {'ranks': 2, 'gradient_accumulation_steps': 2 * micro_steps}
    plan = memory_plan.plan_memory(config, values)
    assert plan.gradients == pytest.approx(sum(s.nbytes() for s in held.values()), rel=0.02)


def test_memory_on_a_gpu_is_what_is_free_and_what_the_process_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (5e9, 24e9))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 2e9)
    assert memory.available_memory('cuda:1') == 7e9


def sizes_of(out_dir) -> tuple[int, int]:
    config = json.loads((out_dir / 'config.json').read_text())
    config = config.get('config', config)
    return config['batch_size'], config['gradient_accumulation_steps']


def fill_memory_above(monkeypatch, batch_size):
    """Lets the model's forward pass fill the memory if a batch is larger."""
    forward = GPT.forward

    def limited(self, idx, targets=None):
        if len(idx) > batch_size:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT, 'forward', limited)


def test_the_largest_batch_that_fits_keeps_the_tokens_per_step(train_here, tmp_path, monkeypatch):
    auto = ['--batch_size=auto', '--max_iters=1', '--eval_iters=1']  # 12 sequences, twice
    done = train_here(tmp_path / 'all', *auto)
    assert done.returncode == 0, done.stderr
    assert sizes_of(tmp_path / 'all') == (24, 1)
    assert '384 tokens per step' in done.stdout and 'batch_size 24' in done.stdout

    model = store.load(tmp_path / 'all')[0].state['model']
    config = {'device': 'cpu', 'dtype': 'float32', 'optimizer': 'adamw', 'batch_size': 6}
    config |= {'gradient_accumulation_steps': 4}
    needed = memory.needed_memory(GPTConfig(**model), config)
    monkeypatch.setattr(
        memory, 'available_memory', lambda device, ranks: 1.01 * needed / memory.USABLE
    )
    assert train_here(tmp_path / 'estimate', *auto).returncode == 0
    assert sizes_of(tmp_path / 'estimate') == (6, 4)

    fill_memory_above(monkeypatch, 3)  # the estimate was too low
    done = train_here(tmp_path / 'trial', *auto, '--eval_interval=9')
    assert sizes_of(tmp_path / 'trial') == (3, 8)
    fill_memory_above(monkeypatch, 0)
    done = train_here(tmp_path / 'none', *auto)
    assert done.returncode == 2 and 'out of memory on cpu with one sequence of 16' in done.stderr


def test_a_run_with_an_automatic_batch_size_resumes_exactly(
    train_here, run_main, tmp_path, monkeypatch
):
    """The trial step changes nothing, and the stored sizes are taken again."""
    auto = ['--batch_size=auto', '--dropout=0.1', '--optimizer=muon', '--eval_iters=1']
    fill_memory_above(monkeypatch, 8)
    chosen = ['--batch_size=8', '--gradient_accumulation_steps=3', *auto[1:]]
    assert train_here(tmp_path / 'chosen', *chosen, '--max_iters=6').returncode == 0
    assert train_here(tmp_path / 'auto', *auto, '--max_iters=3').returncode == 0
    monkeypatch.setattr(memory, 'available_memory', lambda device, ranks: 0)
    done = train_here(tmp_path / 'auto', *auto, '--max_iters=6', '--init_from=resume')
    assert done.returncode == 0, done.stderr
    assert sizes_of(tmp_path / 'auto') == (8, 3)
    one, two = (store.load(tmp_path / name)[1] for name in ('chosen', 'auto'))
    for kind in ('model', 'optimizer'):
        assert all(torch.equal(one[kind][name], two[kind][name]) for name in one[kind])
    losses = [
        [r['loss/step'] for r in records(tmp_path / name) if 'loss/step' in r]
        for name in ('chosen', 'auto')
    ]
    assert losses[0] == losses[1]
    done = run_main(training, '--init_from=resume', f'--out_dir={tmp_path / "auto"}')
    assert done.returncode == 0 and 'changed since' not in done.stdout, done.stderr
    assert sizes_of(tmp_path / 'auto') == (8, 3)  # without the flag, too


@pytest.mark.parametrize(
    'message',
    [
        'CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 23 GiB.',
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory",
        'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`',
    ],
)
def test_full_memory_is_one_line_with_sizes_that_fit(train_here, tmp_path, monkeypatch, message):
    kind = torch.OutOfMemoryError if 'Tried' in message else RuntimeError

    def fill(*arguments):
        raise kind(message)

    monkeypatch.setattr(training, 'train_step', fill)
    flags = ['--batch_size=1024', '--block_size=16', '--gradient_accumulation_steps=1']
    monkeypatch.setattr(memory, 'available_memory', lambda device, ranks: 21e6)
    done = train_here(tmp_path / 'run', *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert 'out of memory on cpu: batch_size 1024' in done.stderr
    sizes = re.findall(r'--batch_size=(\d+) --gradient_accumulation_steps=(\d+)', done.stderr)
    assert len(sizes) == 2 and '--recompute; ' in done.stderr
    assert all(int(size) * int(steps) == 1024 for size, steps in sizes)
    assert int(sizes[0][0]) < int(sizes[1][0]) < 1024  # recomputing leaves room for more


def test_full_memory_of_unknown_size_is_explained_without_numbers(
    train_here, tmp_path, monkeypatch
):
    def fill(*arguments):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    def unknown(*arguments):  # as on Windows
        raise UserError('the memory of this machine is unknown: set --batch_size to a number')

    monkeypatch.setattr(training, 'train_step', fill)
    monkeypatch.setattr(memory, 'available_memory', unknown)
    done = train_here(tmp_path / 'run', status=2)
    assert len(done.stderr.splitlines()) == 1 and 'out of memory. Halve' in done.stderr


def test_other_errors_of_a_run_stay_what_they_are(train_here, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError('a bug')

    monkeypatch.setattr(training, 'train_step', fail)
    with pytest.raises(RuntimeError, match='a bug'):
        train_here(tmp_path / 'run')


@pytest.mark.parametrize(
    'message, words',
    [
        ('CUDA error: no kernel image is available for execution on the device', 'for this GPU'),
        ('CUDA driver version is insufficient for CUDA runtime version', 'update the driver'),
        ('The NVIDIA driver on your system is too old (found version 11040).', 'update the driver'),
        ('NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error', 'NCCL_DEBUG=WARN'),
    ],
)
def test_what_is_wrong_with_a_gpu_is_one_line_with_a_remedy(capsys, message, words):
    def fail(argv):
        raise RuntimeError(message + '\nCompile with TORCH_USE_CUDA_DSA to see more.')

    assert errors.call(fail, []) == errors.EXIT_USER_ERROR
    line = capsys.readouterr().err
    assert line.startswith('error: ') and line.count('\n') == 1
    assert words in line and message in line


IMPOSSIBLE = {  # flags of a run -> what the line says
    '--batch_size=100000000': r'batch_size 100000000 with block_size 16 takes .* GB, but .* GB',
    '--n_embd=400000': r'training this model takes .* GB, but .* GB .* use a smaller one',
    '--batch_size=auto --n_embd=400000': 'training this model takes',
}


@pytest.mark.parametrize('flags', IMPOSSIBLE)
@pytest.mark.skipif(not memory.system_memory(), reason='needs /proc/meminfo')
def test_a_run_far_beyond_the_memory_is_refused_at_once(train_here, run_main, tmp_path, flags):
    done = train_here(tmp_path / 'run', *flags.split(), '--dataset=missing')
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert re.search(IMPOSSIBLE[flags], done.stderr)
    assert not (tmp_path / 'run').exists()
    config = [*flags.split(), '--dataset=', '--device=cpu', '--n_head=2', '--block_size=16']
    if 'auto' not in flags:
        done = run_main('bench.py', *config, '--dataset=x')
        assert done.returncode == 2 and re.search(IMPOSSIBLE[flags], done.stderr)
    if 'n_embd' in flags:
        done = run_main('debug_training.py', *config)
        assert done.returncode == 2 and re.search(IMPOSSIBLE[flags], done.stderr)


def test_only_a_run_that_needs_several_times_the_memory_is_refused(
    train_here, tmp_path, monkeypatch
):
    flags = ['--batch_size=24', '--gradient_accumulation_steps=1', '--max_iters=1']
    model = GPTConfig(vocab_size=1, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False)
    config = {'device': 'cpu', 'dtype': 'float32', 'optimizer': 'adamw', 'batch_size': 24}
    config |= {'gradient_accumulation_steps': 1, 'compile': False}
    needed = memory.needed_memory(model, config)
    monkeypatch.setattr(memory, 'available_memory', lambda device, ranks: needed / 3)
    monkeypatch.setattr(memory, 'total_memory', lambda: 1.01 * needed / memory.FAR)
    train_here(tmp_path / 'near', *flags, status=0)
    monkeypatch.setattr(memory, 'total_memory', lambda: 0.99 * needed / memory.FAR)
    done = train_here(tmp_path / 'far', *flags, status=2)
    size = int(re.search('use at most --batch_size=(.*)', done.stderr)[1])
    sizes = [memory.needed_memory(model, config | {'batch_size': n}) for n in (size, size + 1)]
    assert sizes[0] <= memory.USABLE * needed / 3 < sizes[1]
    # A smaller batch is chosen, and an evaluation needs no gradients.
    train_here(tmp_path / 'auto', *flags, '--batch_size=auto', status=0)
    train_here(
        tmp_path / 'none', *flags, '--eval_only', f'--init_from={tmp_path / "near"}', status=0
    )


def test_a_run_that_fits_if_its_activations_are_recomputed_is_not_refused(monkeypatch):
    """A changed model.py may recompute them in its own way."""
    config = {'device': 'cpu', 'dtype': 'bfloat16', 'optimizer': 'adamw', 'batch_size': 10**5}
    config |= {'gradient_accumulation_steps': 1, 'block_size': 64}
    model = GPTConfig(n_layer=99, n_embd=128, n_head=4, vocab_size=65, block_size=64)
    with_recompute = memory.needed_memory(replace(model, recompute=True), config)
    assert memory.needed_memory(model, config) > 1.2 * memory.FAR * with_recompute
    monkeypatch.setattr(memory, 'total_memory', lambda: 1.01 * with_recompute)
    memory.check_memory(model, config)
    monkeypatch.setattr(memory, 'total_memory', lambda: 0.99 * with_recompute)
    with pytest.raises(UserError, match='use at most --batch_size=|use a smaller one'):
        memory.check_memory(model, config)


def test_samples_far_beyond_the_memory_are_refused(train_here, run_main, tmp_path, monkeypatch):
    train_here(tmp_path / 'run', '--max_iters=1', '--eval_iters=1')
    sample = ['sample.py', f'--out_dir={tmp_path / "run"}', '--max_new_tokens=3', '--device=cpu']
    cache = 2 * 2 * 2 * 32 * 4  # keys and values of 2 layers in 16 bits, a prompt of one token
    monkeypatch.setattr(memory, 'available_memory', lambda device: 2.5 * cache / memory.USABLE)
    monkeypatch.setattr(memory, 'total_memory', lambda: 4.9 * cache / memory.FAR)
    assert run_main(*sample, '--num_samples=4').returncode == 0
    done = run_main(*sample, '--num_samples=5')
    assert done.returncode == 2 and 'use at most --num_samples=2' in done.stderr


def test_total_memory_is_that_of_the_control_group_and_swap_space(monkeypatch):
    rows = {'MemTotal': 1000, 'MemAvailable': 700, 'SwapTotal': 50}
    monkeypatch.setattr(memory, 'system_memory', lambda: rows)
    monkeypatch.setattr(memory, 'memory_limits', list)
    assert (memory.total_memory(), memory.available_memory('cpu', 2)) == (1050, 350)
    monkeypatch.setattr(memory, 'memory_limits', lambda: [(1 << 63, 500), (600, 100)])
    assert (memory.total_memory(), memory.available_memory('cpu')) == (650, 500)
    monkeypatch.setattr(memory, 'system_memory', dict)  # macOS
    assert memory.total_memory() == math.inf and memory.available_memory('cpu') == 500
    monkeypatch.setattr(memory, 'system_memory', lambda: dict.fromkeys(rows, 0))  # a sandbox
    assert memory.total_memory() == math.inf


def test_batch_sizes_are_all_divisors_of_the_sequences():
    for batch_size, accumulation in ((12, 40), (7, 9), (1, 1)):
        n = batch_size * accumulation
        config = {'batch_size': batch_size, 'gradient_accumulation_steps': 2 * accumulation}
        expected = [(size, 2 * n // size) for size in range(n, 0, -1) if n % size == 0]
        sizes = memory.batch_sizes(config | {'ranks': 2})
        assert [tuple(pair.values()) for pair in sizes] == expected
    config = {'batch_size': (1 << 31) - 1, 'gradient_accumulation_steps': 1 << 30}
    assert len(memory.batch_sizes(config)) == 62  # at once


@pytest.mark.parametrize('config', [*ARCHITECTURES, GPTConfig(n_layer=1)], ids=[*NAMES, 'large'])
def test_shapes_need_no_memory_and_no_random_numbers(config):
    state = torch.get_rng_state()
    with ShapesOnly():
        model = GPT(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    real = GPT(config)
    shapes = {name: parameter.shape for name, parameter in real.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert shapes == memory_plan.parameter_shapes(config)
    for name, buffer in real.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))


def test_a_parameter_that_is_not_empty_at_first_gets_its_initial_values():
    with ShapesOnly():
        gate = torch.nn.init.constant_(torch.nn.Parameter(torch.zeros(3)), 2.0)
    assert gate.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.slow
def test_shapes_do_not_import_the_compiler(tmp_path):
    """It takes torch seconds, every time that a model is loaded."""
    program = (
        'import sys; from nib.machine.memory_plan import parameter_shapes as shapes; '
        'from model import GPTConfig; shapes(GPTConfig()); shapes(GPTConfig(position="rotary")); '
        'sys.exit("torch._dynamo" in sys.modules)'
    )
    done = run_script('-c', program, python=sys.executable)
    assert done.returncode == 0, done.stderr
