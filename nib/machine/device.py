"""The machine under a run: device, precision, memory, compile, ranks, random seeds, signals."""
import ctypes
import hashlib
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nib.errors import UserError

# Dense matrix rates in FLOP/s by the vendors' data sheets (without sparsity): (part of the device's name, dtype) -> rate.
PEAK_FLOPS = {
    ('H200', 'bfloat16'): 989e12, ('H200', 'float16'): 989e12,
    ('H100 PCIe', 'bfloat16'): 756e12, ('H100 PCIe', 'float16'): 756e12,
    ('H100', 'bfloat16'): 989e12, ('H100', 'float16'): 989e12,
    ('A100', 'bfloat16'): 312e12, ('A100', 'float16'): 312e12,
    ('A10G', 'bfloat16'): 70e12, ('A10G', 'float16'): 70e12,
    ('L40S', 'bfloat16'): 362e12, ('L40S', 'float16'): 362e12,
    ('L4', 'bfloat16'): 121e12, ('L4', 'float16'): 121e12,
    ('V100', 'float16'): 125e12,
    ('T4', 'float16'): 65e12,
    ('RTX 4090', 'bfloat16'): 165e12, ('RTX 4090', 'float16'): 165e12,
    ('RTX 3090', 'bfloat16'): 71e12, ('RTX 3090', 'float16'): 71e12,
}


def pick_device(device: str) -> str:
    """'auto' becomes 'cuda', 'mps' or 'cpu', whichever is there first. UserError for a device that is not there."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
        device = kind if kind in ('cpu', 'mps') else device  # there is one of them: 'cpu:0' is 'cpu'
    except RuntimeError as error:
        raise UserError(f"--device={device}: no such device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    present = {'cpu': 1, 'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available())}.get(kind, 0)
    if index >= present:
        raise UserError(f'--device={device}: this machine has {present or "no"} {kind} device{"s" * (present != 1)} '
                        f'that torch {torch.__version__} can use; try --device=auto')
    return device


def describe_device(device: str) -> str:
    """The device's name for a person, and why a CPU is what is used."""
    if device.startswith('cuda'):
        return f'{device} ({torch.cuda.get_device_name(device)})'
    if device != 'cpu':
        return device
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    threads = torch.get_num_threads()
    return f'cpu ({threads} thread{"s" * (threads > 1)}; {"as asked" if has_gpu else "torch finds no GPU here"})'


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies matrices of bfloat16 faster than of float32."""
    if device.startswith('cuda'):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_dtype(dtype: str, device: str) -> tuple[str, str]:
    """The precision of matrix products and why: ('bfloat16', 'this GPU has it'). UserError where a GPU lacks it."""
    kind = 'GPU' if device.startswith('cuda') else 'CPU' if device == 'cpu' else 'device'
    if dtype == 'auto':
        if has_bfloat16(device):
            return 'bfloat16', f'this {kind} has it'
        return ('float16' if kind == 'GPU' else 'float32'), f'this {kind} has no bfloat16'
    if dtype == 'bfloat16' and kind == 'GPU' and not has_bfloat16(device):
        raise UserError(f'--dtype=bfloat16: {describe_device(device)} has no bfloat16; use --dtype=float16 or auto')
    return dtype, 'as asked'


def precision(dtype: str, device: str):
    """The context to run forward passes in: autocast, or nothing in float32."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


def peak_flops(device: str, dtype: str) -> float | None:
    """The device's dense matrix rate in FLOP/s, or None where the table does not know it."""
    if not device.startswith('cuda'):
        return None
    return look_up_peak(torch.cuda.get_device_name(device), dtype)


def look_up_peak(name: str, dtype: str) -> float | None:
    """The table's rate for a device of this name; variants of its devices are other devices."""
    words = set(re.split(r'[\s-]+', name))
    if words & {'NVL', 'Ti', 'SUPER', 'Laptop', 'Mobile', 'D', 'Max', 'Q', 'MIG'}:
        return None
    return next((rate for (part, of_dtype), rate in PEAK_FLOPS.items()
                 if words >= set(part.split()) and of_dtype == dtype), None)


def peak_memory(device: str) -> int | None:
    """The most bytes used so far: of a GPU by this process, else of the machine's memory; None where nobody tells."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), open('/proc/self/status') as file:  # Linux, whose rusage begins with the parent process's peak
        for line in file:
            if line.startswith('VmHWM'):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak  # macOS counts bytes, others KiB


def keep_freed_memory(device: str):
    """Keeps the memory of freed tensors on a CPU for the next ones of this thread, the main one. glibc gives large blocks back to
    the system, and gets them again page by page, each filled with zeros, in every step."""
    libc = ctypes.CDLL(None) if device == 'cpu' and sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):  # musl has none
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks from the heap, as small ones
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks


def synchronize(device: str):
    """Waits until the device has done all that it was given; a CPU always has."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    elif device == 'mps':
        torch.mps.synchronize()


def pick_compile(compile: bool | str, device: str, peak_seconds: float | None = None) -> tuple[bool, str]:
    """Whether to compile the model, and why. peak_seconds: what the run would take at the device's peak rate, where known."""
    compiler = os.environ.get('CXX') or 'g++'
    reason = 'as asked'
    if compile == 'auto':
        if not device.startswith('cuda'):
            return False, 'measured to be no faster on a CPU'
        if peak_seconds is not None and peak_seconds < 15:  # some minute in practice, of which compiling takes most
            return False, 'the run is too short to win back the time that it takes'
        compile, reason = True, 'faster on a GPU'
    if compile and not any(shutil.which(name) for name in (compiler, 'gcc', 'clang')):
        return False, 'there is no C compiler on this machine (install gcc)'
    return bool(compile), reason


def compile_model(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], context,
                  say: Callable[[str], None]) -> torch.nn.Module:
    """The compiled model, or the model itself, with one line, where compiling fails.

    Compiling happens at the first call, so one forward pass in `context` and one backward pass are tried here.
    """
    started = time.perf_counter()
    compiled = torch.compile(model)
    try:
        with context:
            loss = compiled(*batch)
        loss.backward()
        model.zero_grad(set_to_none=True)
    except Exception as error:  # the compiler's own errors have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        say(f'compile failed, going on without it: {reason}')
        return model
    say(f'compiled in {time.perf_counter() - started:.1f} s')
    return compiled


def seed_everything(*counters: int):
    """Seeds torch on the devices in use with a hash of the counters, so that (0, 1) and (1, 0) share nothing."""
    seed = int.from_bytes(hashlib.blake2b(repr(counters).encode(), digest_size=8).digest(), 'little')
    # What torch.manual_seed does, less the devices that are not in use: it takes ten times as long as this.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. One process is rank 0 of 1, and every method then does the plain thing."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: object = None  # a gloo group for words between processes, which never wait for a GPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def largest(self, flag: int) -> int:
        """The largest flag of all ranks."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(flag)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, of a tensor on the run's device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """Every rank's value, in their order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def on_first(self, function: Callable):
        """function() is run by rank 0 alone; all ranks get its result, or end where it raised UserError."""
        if self.world_size == 1:
            return function()
        answer = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def start_ranks(device: str) -> Ranks:
    """Joins the processes that torchrun started (gloo on a CPU, NCCL on GPUs); without torchrun, this one alone."""
    if 'RANK' not in os.environ:
        return Ranks()
    rank, local_rank, world_size = (int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
    if world_size == 1:
        return Ranks()
    if device.startswith('cuda:'):
        raise UserError(f'--device={device}: each of the {world_size} processes takes a GPU of its own; use --device=cuda')
    if device == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise UserError(f'{local_rank + 1} processes on this machine, but {torch.cuda.device_count()} GPUs: '
                            f'--nproc_per_node={torch.cuda.device_count()}')
        torch.cuda.set_device(local_rank)
    # torchrun may keep one store over its restarts, in which the addresses of the processes that died still stand.
    store, *_ = next(dist.rendezvous('env://'))
    store = dist.PrefixStore(f'restart {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo', store=store, rank=rank, world_size=world_size)
    patience = timedelta(days=7)  # while rank 0 prepares a dataset; a process that has died is noticed at once
    return Ranks(rank, local_rank, world_size, dist.new_group(backend='gloo', timeout=patience))


def distribute(model: torch.nn.Module, local_rank: int, device: str, batch: tuple[torch.Tensor, torch.Tensor],
               context) -> torch.nn.Module:
    """The model as DistributedDataParallel, whose backward pass averages the gradients over all ranks.

    It settles the order in which it sums them only after the first pass. So two passes go before, or the first step of a
    resumed run would round otherwise than the same step of a run that was not stopped.
    """
    distributed = torch.nn.parallel.DistributedDataParallel(model, [local_rank] if device.startswith('cuda') else None)
    for _ in range(2):
        with context:
            loss = distributed(*batch)
        loss.backward()
    distributed.zero_grad(set_to_none=True)
    return distributed


FINDING = 1 << 10  # in the place of a signal's number: the doctor stops the run


def resume_command(argv: Sequence[str]) -> str:
    """What to type to go on with a run of train.py that was started with these arguments."""
    launcher, world, local = 'python', os.environ.get('WORLD_SIZE', '1'), os.environ.get('LOCAL_WORLD_SIZE', '1')
    if world != '1':
        launcher = f'torchrun --standalone --nproc_per_node={local}' if world == local else 'torchrun (as before)'
    # The later flag wins.
    extra = ['--no-overwrite'] * any(item.startswith('--overwrite') for item in argv) + ['--init_from=resume']
    return f'{launcher} train.py {shlex.join([item for item in argv if item not in extra] + extra)}'


def describe_stop(stop: int, step: int, saved: bool, argv: Sequence[str]) -> str:
    """What has stopped a run after a step, and how it goes on. stop: StopSignal.number."""
    by = 'the doctor' if stop == FINDING else f'signal {stop}'
    more = (f'which is saved; to go on: {resume_command(argv)}' if saved else
            'nothing is saved yet' if stop == FINDING else 'nothing is saved yet: start again with the same command')
    return f'stopped by {by} after step {step}, {more}'


class StopSignal:
    """Remembers that the user or the system asked the run to stop, so that it can finish its step and save.

    A second signal after a second's grace ends the process at once: torchrun sends every Ctrl-C twice.
    """

    def __init__(self, announced: bool):
        self.number = 0  # of the signal received, or FINDING; 0 is none
        self._since = 0.0  # when the first signal came; 0 is never
        self._announced = announced

    def listen(self):
        self._handle(self._receive)

    def ignore(self):
        """All is done: torchrun's SIGTERM to the ranks that end a moment later must not change their exit code."""
        self._handle(signal.SIG_IGN)

    @staticmethod
    def _handle(handler):
        # Ctrl-C; a machine that goes down; what clusters announce a preemption with, and Windows lacks.
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
            if number := getattr(signal, name, None):
                signal.signal(number, handler)

    def _receive(self, number, frame):
        if self._since and time.monotonic() - self._since > 1.0:
            os._exit(128 + number)
        if not self._since:
            self.number, self._since = number, time.monotonic()
            if self._announced:  # by a plain write: print could meet itself here
                os.write(2, f'\nsignal {number}: stopping after this step (once more: at once, without saving)\n'.encode())
