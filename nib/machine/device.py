"""The device under a run: which one, its precision and memory, its peak rate, random seeds."""

import ctypes
import hashlib
import re
import sys
from contextlib import nullcontext, suppress

import torch

from nib.errors import UserError

# Dense matrix rates in FLOP/s by the vendors' data sheets (without sparsity): (part of the device's name, dtype) -> rate.
PEAK_FLOPS = {
    ('H200', 'bfloat16'): 989e12,
    ('H200', 'float16'): 989e12,
    ('H100 PCIe', 'bfloat16'): 756e12,
    ('H100 PCIe', 'float16'): 756e12,
    ('H100', 'bfloat16'): 989e12,
    ('H100', 'float16'): 989e12,
    ('A100', 'bfloat16'): 312e12,
    ('A100', 'float16'): 312e12,
    ('A10G', 'bfloat16'): 70e12,
    ('A10G', 'float16'): 70e12,
    ('L40S', 'bfloat16'): 362e12,
    ('L40S', 'float16'): 362e12,
    ('L4', 'bfloat16'): 121e12,
    ('L4', 'float16'): 121e12,
    ('V100', 'float16'): 125e12,
    ('T4', 'float16'): 65e12,
    ('RTX 4090', 'bfloat16'): 165e12,
    ('RTX 4090', 'float16'): 165e12,
    ('RTX 3090', 'bfloat16'): 71e12,
    ('RTX 3090', 'float16'): 71e12,
}


def pick_device(device: str) -> str:
    """'auto' becomes 'cuda', 'mps' or 'cpu', whichever is there first. UserError for a device that is not there."""
    if device == 'auto':
        return (
            'cuda'
            if torch.cuda.is_available()
            else 'mps'
            if torch.backends.mps.is_available()
            else 'cpu'
        )
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
        device = (
            kind if kind in ('cpu', 'mps') else device
        )  # there is one of them: 'cpu:0' is 'cpu'
    except RuntimeError as error:
        raise UserError(
            f"--device={device}: no such device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from error
    present = {
        'cpu': 1,
        'cuda': torch.cuda.device_count(),
        'mps': int(torch.backends.mps.is_available()),
    }.get(kind, 0)
    if index >= present:
        raise UserError(
            f'--device={device}: this machine has {present or "no"} {kind} device{"s" * (present != 1)} '
            f'that torch {torch.__version__} can use; try --device=auto'
        )
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
    return device == 'cpu' and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def pick_dtype(dtype: str, device: str) -> tuple[str, str]:
    """The precision of matrix products and why: ('bfloat16', 'this GPU has it'). UserError where a GPU lacks it."""
    kind = 'GPU' if device.startswith('cuda') else 'CPU' if device == 'cpu' else 'device'
    if dtype == 'auto':
        if has_bfloat16(device):
            return 'bfloat16', f'this {kind} has it'
        return ('float16' if kind == 'GPU' else 'float32'), f'this {kind} has no bfloat16'
    if dtype == 'bfloat16' and kind == 'GPU' and not has_bfloat16(device):
        raise UserError(
            f'--dtype=bfloat16: {describe_device(device)} has no bfloat16; use --dtype=float16 or auto'
        )
    return dtype, 'as asked'


def autocast(dtype: str, device: str):
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
    return next(
        (
            rate
            for (part, of_dtype), rate in PEAK_FLOPS.items()
            if words >= set(part.split()) and of_dtype == dtype
        ),
        None,
    )


def peak_memory(device: str) -> int | None:
    """The most bytes used so far: of a GPU by this process, else of the machine's memory; None where nobody tells."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    with (
        suppress(OSError),
        open('/proc/self/status') as file,
    ):  # Linux, whose rusage begins with the parent process's peak
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


def seed_everything(*counters: int):
    """Seeds torch on the devices in use with a hash of the counters, so that (0, 1) and (1, 0) share nothing."""
    seed = int.from_bytes(
        hashlib.blake2b(repr(counters).encode(), digest_size=8).digest(), 'little'
    )
    # What torch.manual_seed does, less the devices that are not in use: it takes ten times as long as this.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
