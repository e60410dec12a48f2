"""The choice of device, precision and compilation, communication of ranks, seeds and signals."""

import io
import os
import platform
import shutil
import signal
import socket
import sys
import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL_RUN
from processes import Started, start_on_ranks

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.errors import UserError, call
from nib.files import command, script_path
from nib.kernels import attention, cross_entropy
from nib.machine import compiling, device, rates
from nib.machine.compiling import compile_model, pick_compile
from nib.machine.device import (
    autocast,
    kept_buffers,
    pick_device,
    pick_dtype,
    prepare_device,
    seed_everything,
)
from nib.machine.ranks import Ranks, start_ranks
from nib.machine.rates import measure_flops, peak_flops
from nib.machine.signals import FINDING, HANGUP, SIGNALS, StepCut, StopSignal, resume_command


def machine(monkeypatch, cuda=0, bfloat16=True, mps=False, name='NVIDIA H100 80GB HBM3'):
    """Makes torch report a machine with these devices."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: cuda)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bfloat16)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: name)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)


def test_auto_takes_the_fastest_device_that_is_there(monkeypatch):
    for there, expected in (
        ({'cuda': 2, 'mps': True}, 'cuda'),
        ({'mps': True}, 'mps'),
        ({}, 'cpu'),
    ):
        machine(monkeypatch, **there)
        assert pick_device('auto') == expected


def test_the_reason_why_a_gpu_cannot_be_used_is_shown(monkeypatch, tmp_path):
    def old_driver():
        warnings.warn('The NVIDIA driver on your system is too old (found 11040)', stacklevel=1)
        return False

    device.gpu_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, 'is_available', old_driver)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # torch's own warning is not shown too
        assert pick_device('auto') == 'cpu' or torch.backends.mps.is_available()
    with warnings.catch_warnings(record=True):
        assert 'update the driver' in device.describe_device('cpu')

    device.gpu_problem.cache_clear()
    machine(monkeypatch)
    assert device.describe_device('cpu').endswith('no GPU found)')
    device.gpu_problem.cache_clear()
    (tmp_path / 'version').touch()
    monkeypatch.setattr(device, 'NVIDIA_DRIVER', tmp_path / 'version')
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'built without GPU support' in device.describe_device('cpu')
    with pytest.raises(UserError, match='has no cuda devices.*install a build for CUDA'):
        pick_device('cuda')
    device.gpu_problem.cache_clear()


def test_a_device_that_is_not_there_is_refused_with_what_is(monkeypatch):
    machine(monkeypatch, cuda=2)
    assert pick_device('cuda:1') == 'cuda:1'
    assert pick_device('cpu:0') == 'cpu'  # a config file that asks for 'cpu' means this too
    with pytest.raises(UserError, match='has 2 cuda devices'):
        pick_device('cuda:2')
    with pytest.raises(UserError, match='has no mps devices'):
        pick_device('mps')
    with pytest.raises(UserError, match='no such device'):
        pick_device('gpu')


def test_precision_is_what_the_device_has(monkeypatch):
    machine(monkeypatch)
    for avx512, amx, expected in (
        (False, False, 'float32'),
        (True, False, 'bfloat16'),
        (False, True, 'bfloat16'),
    ):
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
        assert pick_dtype('auto', 'cpu')[0] == expected
        assert pick_dtype('bfloat16', 'cpu') == ('bfloat16', 'as requested')
    assert pick_dtype('auto', 'mps')[0] == 'float32'
    machine(monkeypatch, cuda=1)
    assert pick_dtype('auto', 'cuda')[0] == 'bfloat16'
    machine(monkeypatch, cuda=1, bfloat16=False, name='Tesla T4')
    assert pick_dtype('auto', 'cuda')[0] == 'float16'
    with pytest.raises(UserError, match='Tesla T4.*does not support bfloat16.*auto'):
        pick_dtype('bfloat16', 'cuda')


def test_precision_sets_the_type_of_matrix_products():
    a = torch.ones(2, 2)
    for dtype in ('float32', 'bfloat16', 'float16'):
        with autocast(dtype, 'cpu'):
            assert (a @ a).dtype == getattr(torch, dtype)


def test_float32_products_use_tf32_on_a_gpu_and_only_there(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', chosen.append)
    monkeypatch.setattr('nib.machine.device.keep_freed_memory', lambda: chosen.append('memory'))
    for name, expected in (('cuda:1', ['high']), ('cpu', ['memory']), ('mps', [])):
        prepare_device(name)
        assert chosen == expected
        chosen.clear()


def test_a_deterministic_run_uses_only_operations_that_repeat_on_a_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', chosen.append)
    monkeypatch.setattr('nib.machine.device.keep_freed_memory', lambda: None)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', '')  # so that it is restored
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG')
    for name, deterministic in (('cpu', True), ('cuda', False)):
        prepare_device(name, deterministic)
        assert not chosen and 'CUBLAS_WORKSPACE_CONFIG' not in os.environ
    prepare_device('cuda', True)
    assert chosen == [True] and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'


def test_the_peak_rate_is_the_data_sheets_or_unknown(monkeypatch):
    machine(monkeypatch, cuda=1)
    assert peak_flops('cuda', 'bfloat16') == 989e12
    assert peak_flops('cuda', 'float32') is None
    assert peak_flops('cpu', 'bfloat16') is None
    for name, rate in (
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA A100-SXM4-40GB', 312e12),
        ('NVIDIA L4', 121e12),
        ('NVIDIA L40S', 362e12),
        ('NVIDIA A10G', 70e12),
        ('NVIDIA GeForce RTX 3090', 71e12),
        ('Some GPU of 2031', None),
        ('NVIDIA L40', 181.05e12),
        ('NVIDIA A40', 149.7e12),
        ('NVIDIA RTX A6000', 154.8e12),
        ('NVIDIA RTX 6000 Ada Generation', 364.25e12),
        ('Quadro RTX 6000', None),
        ('NVIDIA B200', 2250e12),
        ('NVIDIA GB200', 2500e12),
        ('NVIDIA GH200 480GB', 989e12),
        ('NVIDIA GeForce RTX 5090', 209.5e12),
        ('NVIDIA GeForce RTX 5090 D', None),
        ('NVIDIA GeForce RTX 5070', 61.7e12),
        ('NVIDIA GeForce RTX 5070 Ti', 87.9e12),
        ('NVIDIA GeForce RTX 5070 Ti Laptop GPU', None),
        ('NVIDIA GeForce RTX 4080', 97.5e12),
        ('NVIDIA GeForce RTX 4080 SUPER', None),
        ('AMD Instinct MI300X', 1307.4e12),
        ('AMD Instinct MI250X', None),
        ('Tesla V100-SXM2-16GB', None),  # in bfloat16
        ('NVIDIA H100 NVL', None),
        ('NVIDIA T400', None),
        ('NVIDIA RTX A1000 Laptop GPU', None),
        ('NVIDIA GeForce RTX 3090 Ti', None),
    ):
        machine(monkeypatch, cuda=1, name=name)
        assert peak_flops('cuda:0', 'bfloat16') == rate, name
    machine(monkeypatch, cuda=1, name='Tesla V100-SXM2-16GB')
    assert peak_flops('cuda', 'float16') == 125e12


def test_the_rate_of_a_device_is_measured_in_a_tenth_of_a_second(monkeypatch):
    """The products are real. On the clock, the first one takes a second longer than the others."""
    measure_flops.cache_clear()
    product, sizes, clock = torch.Tensor.__matmul__, [], SimpleNamespace(now=50.0)
    clock.perf_counter = lambda: clock.now

    def timed(a, b):
        clock.now += 1e-5 + 2 * len(a) ** 3 / 5e10 + (not sizes)
        sizes.append((a.dtype, *a.shape, *b.shape))
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, '__matmul__', timed)
    monkeypatch.setattr(rates, 'time', clock)
    before = torch.get_rng_state()
    rate = measure_flops('cpu', 'float32')
    assert sizes[0] == (torch.float32, 256, 256, 256, 256) and sizes[-1][1] == 512
    assert rate == pytest.approx(2 * 512**3 / (1e-5 + 2 * 512**3 / 5e10))
    assert 1.1 < clock.now - 50.0 < 1.2
    assert torch.equal(torch.get_rng_state(), before)  # losses do not depend on it
    assert measure_flops('cpu', 'float32') == rate  # measured once
    measure_flops.cache_clear()


def test_auto_compiles_if_it_pays_off_and_there_is_a_compiler(monkeypatch):
    too_short = False, 'the run is too short for compilation to pay off'
    sizes = {'batch_size': 4, 'gradient_accumulation_steps': 2, 'block_size': 8}

    def pick(compile, device, flops=0.0, ranks=1, **shape):
        with torch.device('meta'):
            model = GPT(
                GPTConfig(**{'block_size': 8, 'n_layer': 1, 'n_head': 2, 'n_embd': 64} | shape)
            )
        per_step = 3 * sum(model.flops_per_token().values()) * 4 * 2 * 8
        max_iters = -(-flops // per_step)
        asked = {'compile': compile, 'device': device, 'dtype': 'bfloat16', 'max_iters': max_iters}
        return pick_compile({**sizes, **asked, 'ranks': ranks}, model)

    monkeypatch.setattr(shutil, 'which', lambda name: '/usr/bin/' + name)
    monkeypatch.setattr(compiling, 'peak_flops', lambda device, dtype: None)
    assert pick('auto', 'cuda') == (True, 'faster on a GPU')
    monkeypatch.setattr(compiling, 'peak_flops', lambda device, dtype: 1e15)
    assert pick('auto', 'cuda', 3600e15) == (True, 'faster on a GPU')
    assert pick('auto', 'cuda', 5e15) == pick('auto', 'cuda', 60e15, ranks=8) == too_short
    assert pick(True, 'cuda', 5e15) == (True, 'as requested')
    for has_amx in (False, True):
        monkeypatch.setattr(compiling, 'HAS_AMX', has_amx)
        assert pick('auto', 'cpu')[0] is False
        assert pick('auto', 'cpu', 1e16)[0] is has_amx
        for dropout, T in ((0.0, 1024), (0.1, 256), (0.1, 1024)):
            unrolled = dropout > 0 and T > attention.QUERY_BLOCK
            chosen, _ = pick('auto', 'cpu', 1e16, dropout=dropout, block_size=T)
            assert chosen is (has_amx and not unrolled)
            assert pick('auto', 'cuda', 3600e15, dropout=dropout, block_size=T)[0] is True
        assert pick(True, 'cpu') == (True, 'as requested')
    assert pick('auto', 'cpu', 1e13) == too_short
    assert pick('auto', 'mps', 1e16)[0] is False
    assert pick(False, 'cuda') == (False, 'as requested')
    sizes['eval_only'] = True
    assert pick('auto', 'cuda', 3600e15) == pick(True, 'cuda') == (False, 'nothing is trained')
    del sizes['eval_only']
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    for asked in (True, 'auto'):
        assert pick(asked, 'cuda', 3600e15) == (False, 'no C compiler found: install gcc')


def test_a_failed_compilation_leaves_no_gradients(monkeypatch):
    model, said = torch.nn.Linear(2, 1), []
    model.register_buffer('passes', torch.zeros(()))

    def compiled(x, y):
        model.passes += 1
        model(x).sum().backward()
        raise RuntimeError('CUDA out of memory')  # in the middle of a backward pass

    monkeypatch.setattr(compiling, 'compile_function', lambda model: compiled)
    batch = torch.ones(1, 2), torch.ones(1)
    assert compile_model(model, batch, nullcontext(), said.append) is model
    # First, because it can take minutes.
    assert said[0].startswith('compiling') and 'out of memory' in said[1]
    assert all(p.grad is None for p in model.parameters()) and model.passes == 0


def test_a_cache_that_a_pass_makes_longer_stays():
    """The model may remember its length elsewhere."""
    model = torch.nn.Linear(2, 1)
    model.register_buffer('mean', torch.zeros(2))
    model.register_buffer('longer', torch.zeros(2), persistent=False)
    model.register_buffer('first', None, persistent=False)
    with kept_buffers(model):
        model.mean = 0.9 * model.mean + 1.0
        model.longer = model.first = torch.ones(3)
        model.register_buffer('added', torch.ones(3), persistent=False)
    assert not model.mean.any()
    assert model.longer.sum() == model.first.sum() == model.added.sum() == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    'many, T, dropout',
    [(cross_entropy.MANY_LOGITS, 16, 0.1), (500, 16, 0.1), (cross_entropy.MANY_LOGITS, 300, 0.0)],
    ids=['at once', 'in chunks', 'long context'],
)
def test_the_compiler_takes_the_model_in_one_graph(monkeypatch, many, T, dropout):
    monkeypatch.setattr(cross_entropy, 'MANY_LOGITS', many)
    options = {
        'position': 'rotary',
        'norm': 'rms',
        'qk_norm': True,
        'mlp': 'swiglu',
        'n_kv_head': 1,
    }
    more = {'tied_head': False, 'logit_cap': 15.0, 'dropout': dropout, 'recompute': True}
    model = GPT(GPTConfig(97, T, n_layer=1, n_head=2, n_embd=32, **options, **more))
    compiling.compile_function(model)  # kernels_fit() becomes a constant
    idx = torch.zeros(2, T, dtype=torch.long)
    with autocast('bfloat16', 'cpu'):
        found = torch._dynamo.explain(model)(idx, idx)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_seeds_depend_on_every_counter_and_its_place():
    drawn = []
    for counters in ((0, 1), (1, 0), (0, 1, 0), (0, 1)):
        seed_everything(*counters)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith('linux') or platform.libc_ver()[0] != 'glibc',
    reason='is about glibc',
)
def test_freed_memory_is_kept_for_the_next_tensors(tmp_path):
    """Blocks of 36 MB, whose pages glibc would otherwise get from the system each time."""
    runs = [Started(tmp_path / str(n), FAULTS, *devices) for n, devices in enumerate(DEVICES)]
    assert [run.end() for run in runs] == [0, 0, 0]
    faults = [int(run.stdout) for run in runs]
    assert 10 * faults[2] < min(faults[:2])


DEVICES = [], ['mps'], ['cpu']
FAULTS = """
import resource, sys, torch
from nib.machine.device import prepare_device
if sys.argv[1:]:
    prepare_device(sys.argv[1])
faults = []
for turn in range(50):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(9 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[-10:]))  # the first blocks leave gaps that are a little too small
"""


def test_one_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    ranks = start_ranks('cpu')
    assert ranks.is_first and ranks.largest(15) == 15 and ranks.on_first(lambda: 'done') == 'done'
    assert ranks.sum(torch.tensor(2.0)) == 2.0


COMPLETE = {
    'RANK': '0',
    'LOCAL_RANK': '0',
    'WORLD_SIZE': '2',
    'MASTER_ADDR': 'localhost',
    'MASTER_PORT': '1234',
}


@pytest.mark.parametrize(
    'environment', [{'RANK': '3'}, {'RANK': '0', 'WORLD_SIZE': '1'}, {'WORLD_SIZE': '4'}]
)
def test_a_variable_of_a_clusters_launcher_alone_means_one_process(monkeypatch, environment):
    for name in COMPLETE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert start_ranks('cpu').world_size == 1


@pytest.mark.parametrize(
    'name, value',
    [
        ('LOCAL_RANK', None),
        ('LOCAL_RANK', 'x'),
        ('MASTER_ADDR', None),
        ('MASTER_ADDR', ''),
        ('MASTER_PORT', None),
        ('WORLD_SIZE', '-2'),
        ('RANK', '2'),
    ],
)
def test_incomplete_or_wrong_variables_of_torchrun_are_refused(monkeypatch, name, value):
    for key, given in (COMPLETE | {name: value}).items():
        monkeypatch.delenv(key, raising=False) if given is None else monkeypatch.setenv(key, given)
    said = f"is '{value}'" if value else 'is not set'
    with pytest.raises(UserError, match=f'{name} {said}, but RANK=.*torchrun'):
        start_ranks('cpu')


@pytest.mark.parametrize(
    ('before', 'after'),
    [(signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)],
    ids=['usual', 'ignored'],
)
def test_processes_that_cannot_meet_say_so(monkeypatch, before, after):
    """While they wait, Ctrl-C ends them, unless they were started to ignore it."""
    own = signal.signal(signal.SIGINT, before)
    try:
        with socket.create_server(('localhost', 0)) as taken:
            port = str(taken.getsockname()[1])
            for name, value in (COMPLETE | {'MASTER_PORT': port}).items():
                monkeypatch.setenv(name, value)
            with pytest.raises(UserError, match=f'process 0 of 2 cannot join .* localhost:{port}'):
                start_ranks('cpu')
        assert signal.getsignal(signal.SIGINT) == after
    finally:
        signal.signal(signal.SIGINT, own)


TWO = """
import sys
import torch
from nib.errors import run_script, UserError
from nib.machine.ranks import start_ranks
from nib.machine.signals import StepCut, StopSignal

def main(argv):
    ranks = start_ranks('cpu')
    assert ranks.world_size == 2 and ranks.is_first == (ranks.rank == 0)
    assert ranks.largest(7 if ranks.rank == 1 else 0) == 7
    assert ranks.sum(torch.tensor(float(ranks.rank + 1))) == 3.0
    assert ranks.on_first(lambda: f'from {ranks.rank}') == 'from 0'
    def refuse():
        raise UserError('not here')
    stop = StopSignal(ranks)
    assert len(list(stop.cut_short(range(4 + ranks.rank)))) == 4 + ranks.rank
    seen = []
    for batch in stop.cut_short(range(9 - ranks.rank)):
        seen.append(batch)
        if ranks.rank == 1 and batch == 2:
            stop.number = 15  # on this rank only
    assert seen == [0, 1, 2]
    try:
        list(stop.cut([5, 6]))
        raise AssertionError('not cut')
    except StepCut:
        pass
    try:
        ranks.on_first(refuse)
    except UserError as error:
        assert str(error) == 'not here'
        open(f'{argv[0]}/{ranks.rank}', 'w').close()
    ranks.close()

run_script(main)
"""


@pytest.mark.slow
def test_two_ranks_agree(tmp_path):
    ranks = start_on_ranks(2, tmp_path, TWO, tmp_path)
    assert [rank.end() for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    assert (tmp_path / '0').exists() and (tmp_path / '1').exists()


DIFFERS = """
import dataclasses, os, sys, train
from nib.errors import run_script
from nib.tokens import find
opened = find.open_dataset
if os.environ['RANK'] == '1':
    CHANGE
run_script(train.main)
"""
OTHER_TEXT = """find.open_dataset = lambda *arguments: dataclasses.replace(
        opened(*arguments), fingerprint=64 * '0')"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('differs', 'change'),
    [
        ('learning_rate', 'sys.argv.append("--learning_rate=0.5")'),
        ('data_dir', 'sys.argv.append("--data_dir=elsewhere")'),
        ('the fingerprint of the dataset', OTHER_TEXT),
    ],
)
def test_processes_that_differ_do_not_train_together(data_dir, tmp_path, differs, change):
    """As on two hosts, one of which was started with another flag or has other bins."""
    flags = [*SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}']
    ranks = start_on_ranks(2, tmp_path, DIFFERS.replace('CHANGE', change), *flags)
    assert [rank.end() for rank in ranks] == [2, 2]
    assert f'error: {differs} differs between the processes' in ranks[0].stderr
    assert len(ranks[0].stderr.splitlines()) == 1 and not (tmp_path / 'run').exists()


# In the fourth step, rank 1 ends or freezes at the start of a function of train.py.
LEAVES = """
import os, signal, train
from datetime import timedelta
from nib.errors import run_script
from nib.machine import ranks
ranks.LONGEST_WAIT = timedelta(seconds=3)
function, calls = train.PLACE, []
def leave(*arguments):
    calls.append(arguments)
    if os.environ['RANK'] == '1' and len(calls) == 4:
        os.kill(os.getpid(), signal.NUMBER)
    return function(*arguments)
train.PLACE = leave
run_script(train.main)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='no SIGKILL')
@pytest.mark.parametrize(
    ('number', 'place'),
    [('SIGKILL', 'seed_everything'), ('SIGSTOP', 'seed_everything'), ('SIGSTOP', 'get_lr')],
)
def test_a_process_does_not_wait_for_ever_for_one_that_has_left(data_dir, tmp_path, number, place):
    """As on two hosts that lose their connection, which torchrun does not notice."""
    program = LEAVES.replace('PLACE', place).replace('NUMBER', number)
    flags = [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}', '--eval_interval=2']
    first, _ = start_on_ranks(2, tmp_path, program, *SMALL_RUN, *flags)
    assert first.end() == 2
    *findings, error = first.stderr.splitlines()
    assert error.startswith('error: another process of the run has ended or does not respond')
    assert all(' warning: ' in line for line in findings)
    assert store.load(tmp_path / 'run')[0].step == 2


PREPARES_FOR_HOURS = """
import sys, time, train
from nib.tokens import find
def prepare(*arguments):
    print('preparing', flush=True)
    time.sleep(3600)
find._prepare = prepare
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such signals')
def test_ctrl_c_ends_a_process_that_waits_for_the_dataset(data_dir, tmp_path):
    flags = [*SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}']
    first, second = start_on_ranks(2, tmp_path, PREPARES_FOR_HOURS, *flags)
    first.wait_for('preparing')
    second.send(signal.SIGINT)
    assert second.end(60) == -signal.SIGINT and second.stderr == ''


def test_hosts_that_cannot_connect_are_told_how(capsys):
    def connect(argv):
        raise RuntimeError('Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:152] x')

    assert call(connect, []) == 2
    said = capsys.readouterr().err
    assert 'error: the processes cannot connect' in said and 'GLOO_SOCKET_IFNAME' in said


SKIPS_A_LAYER = """
import model, train
from nib.errors import run_script
model.Block.forward = lambda self, x, rotary=None: x + self.attn(self.ln_1(x), rotary)
run_script(train.main)
"""


@pytest.mark.slow
def test_a_layer_that_a_step_skips_is_named_if_there_are_several_ranks(tmp_path, data_dir):
    flags = [*SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "out"}']
    ranks = start_on_ranks(2, tmp_path, SKIPS_A_LAYER, *flags, '--gradient_accumulation_steps=2')
    assert [rank.end() for rank in ranks] == [2, 2]
    assert 'error: a step did not use all weights of the model' in ranks[0].stderr
    assert 'Traceback' not in ranks[0].stderr + ranks[1].stderr


# Tells how many seconds are over on its clock, and waits for a signal, three times.
SIGNALLED = """
import time
from types import SimpleNamespace
from nib.machine import signals
from nib.machine.ranks import Ranks
clock, heard = SimpleNamespace(monotonic=lambda: clock.now), []
signals.time = clock
class Stop(signals.StopSignal):
    def _receive(self, number, frame):
        super()._receive(number, frame)
        heard.append(number)
with Stop(Ranks()) as stop:
    for n, seconds in enumerate((0.0, 0.9, 1.1), 1):
        clock.now = 1000.0 + seconds
        print(f'{seconds} s, stop {stop.number}', flush=True)
        while len(heard) < n:
            time.sleep(0.01)
"""


def test_a_signal_after_a_finding_still_saves(capfd):
    stop = StopSignal(Ranks())
    stop.number = FINDING
    stop._receive(signal.SIGTERM, None)  # the first signal: it must not end the process
    assert (
        stop.number == signal.SIGTERM and 'SIGTERM: stopping and saving' in capfd.readouterr().err
    )


def test_in_a_notebook_the_cell_shows_that_a_run_is_stopping(monkeypatch, capfd):
    """A cell shows what is written to sys.stderr. Its descriptor is the server's terminal."""

    class Cell(io.StringIO):
        def fileno(self):
            return 2

    monkeypatch.setattr(sys, 'ps1', 'In : ', raising=False)
    monkeypatch.setattr(sys, 'stderr', Cell())
    StopSignal(Ranks())._receive(signal.SIGINT, None)
    assert 'Ctrl-C (SIGINT): stopping and saving' in sys.stderr.getvalue()
    assert capfd.readouterr().err == ''


def test_handlers_are_restored_after_a_run():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(UserError), StopSignal(Ranks()):
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise UserError('the disk is full')
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.skipif(not HANGUP, reason='Windows has no SIGHUP')
def test_a_closed_terminal_stops_a_run_unless_nohup_has_started_it():
    with StopSignal(Ranks()) as stop:
        os.kill(os.getpid(), HANGUP)
        assert stop.number == HANGUP
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        with StopSignal(Ranks()) as stop:
            os.kill(os.getpid(), HANGUP)
            assert stop.number == 0
        assert signal.getsignal(HANGUP) == signal.SIG_IGN
    finally:
        signal.signal(HANGUP, before)


def test_in_a_thread_a_run_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run():
        with StopSignal(Ranks()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_step_is_cut_before_its_next_micro_batch():
    stop, seen = StopSignal(Ranks()), []
    with pytest.raises(StepCut):
        for batch in stop.cut(['a', 'b', 'c']):
            seen.append(batch)
            stop.number = (batch == 'b') * signal.SIGTERM
    assert seen == ['a', 'b']
    assert list(stop.cut(['a'])) == ['a']  # the loop has asked before it
    assert list(stop.cut_short(['a'])) == []


@pytest.mark.slow
def test_a_signal_is_remembered_and_a_second_one_ends_at_once(tmp_path):
    """Within a second, it counts as torchrun's echo of the first."""
    run = Started(tmp_path, SIGNALLED)
    for line in ('0.0 s, stop 0\n', '0.9 s, stop 15\n', '1.1 s, stop 15\n'):
        run.wait_for(line)
        run.send(signal.SIGTERM)
    assert run.end() == 143
    (said,) = run.stderr.splitlines()[1:]
    assert run.stderr.startswith('\n') and said.startswith('SIGTERM: stopping and saving')


def test_the_resume_command_names_the_folder_only(monkeypatch):
    monkeypatch.chdir(ROOT)
    start = f'{command("train.py")} --init_from=resume'
    assert resume_command('out', 1) == f'{start} --out_dir=out'
    assert resume_command('my run', 1) == f"{start} '--out_dir=my run'"


def test_the_resume_command_starts_as_many_processes(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    launcher = 'torchrun --standalone --nproc_per_node=2'
    resume = '--init_from=resume --out_dir=out'
    assert resume_command('out', 2) == f'{launcher} train.py {resume}'
    assert resume_command('out', 4) == f'torchrun (as before) train.py {resume}'


def test_a_printed_command_finds_the_script_from_where_the_user_stands(monkeypatch, tmp_path):
    checkout = tmp_path / 'my checkout'
    checkout.symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['my checkout/train.py'])
    assert " 'my checkout/train.py' --init_from=resume" in resume_command('out', 1)
    assert script_path('sample.py') == str(ROOT / 'sample.py')
    monkeypatch.setattr(sys, 'argv', ['elsewhere.py'])  # a program that imports train
    assert script_path('train.py') == str(ROOT / 'train.py')
    monkeypatch.chdir(ROOT / 'data')
    assert script_path('data/text/prepare.py') == 'text/prepare.py'
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'bin/python3'))
    assert command('data/text/prepare.py') == f'{tmp_path}/bin/python3 text/prepare.py'
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/python3').symlink_to('/bin/sh')
    monkeypatch.setenv('PATH', f'{tmp_path}/bin')
    assert command('data/text/prepare.py') == 'python3 text/prepare.py'
