"""The choice of device, precision and compilation, communication of ranks, seeds and signals."""

import os
import platform
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from nib.errors import UserError
from nib.machine.compiling import pick_compile
from nib.machine.device import (
    autocast,
    peak_flops,
    pick_device,
    pick_dtype,
    prepare_device,
    seed_everything,
)
from nib.machine.ranks import start_ranks
from nib.machine.signals import FINDING, StopSignal, resume_command


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
    for device, expected in (('cuda:1', ['high']), ('cpu', ['memory']), ('mps', [])):
        prepare_device(device)
        assert chosen == expected
        chosen.clear()


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
        ('NVIDIA GB200', None),
        ('NVIDIA H100 NVL', None),
        ('NVIDIA T400', None),
        ('NVIDIA RTX A1000 Laptop GPU', None),
        ('NVIDIA GeForce RTX 3090 Ti', None),
    ):
        machine(monkeypatch, cuda=1, name=name)
        assert peak_flops('cuda:0', 'bfloat16') == rate, name


def test_compile_is_for_gpus_unless_asked_for_and_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: '/usr/bin/' + name)
    assert pick_compile('auto', 'cuda')[0] is True
    assert pick_compile('auto', 'cuda', peak_seconds=3600.0) == (True, 'faster on a GPU')
    assert pick_compile('auto', 'cuda', peak_seconds=5.0) == (
        False,
        'the run is too short for compilation to pay off',
    )
    assert pick_compile(True, 'cuda', peak_seconds=5.0) == (True, 'as requested')
    assert pick_compile('auto', 'cpu')[0] is False
    assert pick_compile(True, 'cpu') == (True, 'as requested')
    assert pick_compile(False, 'cuda') == (False, 'as requested')
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    for asked in (True, 'auto'):
        assert pick_compile(asked, 'cuda') == (False, 'no C compiler found: install gcc')


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
def test_freed_memory_is_kept_for_the_next_tensors():
    """Blocks of 36 MB, whose pages glibc would otherwise get from the system each time."""
    program = (
        'import resource, sys, torch; from nib.machine.device import prepare_device\n'
        'if sys.argv[1:]: prepare_device(sys.argv[1])\n'
        'for turn in range(40):\n'  # the first leave gaps that are a little too small
        '    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        '    torch.ones(9 << 20)\n'
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)'
    )
    faults = [
        int(
            subprocess.run(
                [sys.executable, '-c', program, *device],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for device in ([], ['mps'], ['cpu'])
    ]
    assert 10 * faults[2] < min(faults[:2])


def test_one_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    ranks = start_ranks('cpu')
    assert ranks.is_first and ranks.largest(15) == 15 and ranks.on_first(lambda: 'done') == 'done'
    assert ranks.sum(torch.tensor(2.0)) == 2.0


TWO = """
import sys
import torch
from nib.errors import run_script, UserError
from nib.machine.ranks import start_ranks

def main(argv):
    ranks = start_ranks('cpu')
    assert ranks.world_size == 2 and ranks.is_first == (ranks.rank == 0)
    assert ranks.largest(7 if ranks.rank == 1 else 0) == 7
    assert ranks.sum(torch.tensor(float(ranks.rank + 1))) == 3.0
    assert ranks.on_first(lambda: f'from {ranks.rank}') == 'from 0'
    def refuse():
        raise UserError('not here')
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
    (tmp_path / 'two.py').write_text(TWO)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(tmp_path / 'two.py'),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / '0').exists() and (tmp_path / '1').exists()


SIGNALLED = """
import sys, time
from nib.machine.signals import StopSignal
stop = StopSignal(announced=True)
stop.listen()
print('ready', flush=True)
while not stop.number:
    time.sleep(0.01)
print('heard', stop.number, flush=True)
time.sleep(60)
"""


def test_a_signal_after_a_finding_still_saves(capfd):
    stop = StopSignal(announced=True)
    stop.number = FINDING
    stop._receive(signal.SIGTERM, None)  # the first signal: it must not end the process
    assert (
        stop.number == signal.SIGTERM
        and 'signal 15: stopping after this step' in capfd.readouterr().err
    )


@pytest.mark.slow
def test_a_signal_is_remembered_and_a_second_one_ends_at_once():
    run = subprocess.Popen(
        [sys.executable, '-c', SIGNALLED],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stdout.readline() == 'ready\n'
        run.send_signal(signal.SIGTERM)
        assert run.stdout.readline() == 'heard 15\n'
        assert run.stderr.readline() == '\n' and run.stderr.readline().startswith(
            'signal 15: stopping after this step'
        )
        run.send_signal(signal.SIGTERM)  # within the second's grace: torchrun's echo of the first
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(1.2)
        run.send_signal(signal.SIGTERM)
        assert run.wait(20) == 143
    finally:
        run.kill()
        run.stdout.close()
        run.stderr.close()


def test_the_command_that_goes_on_can_be_typed(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    for argv, expected in (
        (['config/a.py', '--out_dir=my run'], "config/a.py '--out_dir=my run' --init_from=resume"),
        (
            ['--init_from', 'gpt2', '--overwrite', 'true'],
            '--init_from gpt2 --overwrite true --no-overwrite --init_from=resume',
        ),
        (['a.py', '--init_from=resume'], 'a.py --init_from=resume'),
    ):
        assert resume_command(argv) == f'python train.py {expected}'
