"""The device of a run: choice, precision, memory, peak rate and random seeds."""

from nib.machine.threads import available_cores

import ctypes
import hashlib
import os
import re
import sys
from contextlib import nullcontext, suppress

import torch

from nib.errors import UserError

# Dense matrix rates (without sparsity) in FLOP/s, from the vendors' data sheets.
# Key: words of the device's name, and the dtype.
PEAK_FLOPS = {
    ('B200', 'bfloat16'): 2250e12,
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
    ('A40', 'bfloat16'): 149.7e12,
    ('RTX A6000', 'bfloat16'): 154.8e12,
    ('RTX 6000 Ada', 'bfloat16'): 364.25e12,
    ('L40', 'bfloat16'): 181.05e12,
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

# A model with fewer parameters generates on a CPU about as fast with one thread as with two, which
# wait for each other more than they compute. One thread needs no second core.
SMALL_MODEL = 1_000_000


def pick_device(device: str) -> str:
    """Returns the device to use; 'auto' becomes 'cuda', 'mps' or 'cpu', the first one available.

    Also limits torch's threads to the cores of this process. Raises UserError if this machine does
    not have the device.
    """
    limit_threads()
    if device == 'auto':
        if torch.cuda.is_available():
            return 'cuda'
        return 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError as error:
        raise UserError(
            f"--device={device}: no such device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from error
    available = {
        'cpu': 1,
        'cuda': torch.cuda.device_count(),
        'mps': int(torch.backends.mps.is_available()),
    }.get(kind, 0)
    if index >= available:
        raise UserError(
            f'--device={device}: this machine has {available or "no"} {kind} '
            f'device{"s" * (available != 1)} that torch {torch.__version__} can use; '
            f'try --device=auto'
        )
    return kind if kind in ('cpu', 'mps') else device  # there is only one: 'cpu:0' is 'cpu'


def limit_threads(most: int | None = None):
    """Limits torch's threads, unless the user has chosen. most: None for as many as cores."""
    if not os.environ.keys() & {'OMP_NUM_THREADS', 'MKL_NUM_THREADS'}:
        torch.set_num_threads(min(torch.get_num_threads(), most or available_cores()))


def describe_device(device: str) -> str:
    """Returns the device's name for a log line, with the reason if it is a CPU."""
    if device.startswith('cuda'):
        return f'{device} ({torch.cuda.get_device_name(device)})'
    if device != 'cpu':
        return device
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    threads = torch.get_num_threads()
    reason = 'as asked' if has_gpu else 'torch finds no GPU here'
    return f'cpu ({threads} thread{"s" * (threads > 1)}; {reason})'


def has_bfloat16(device: str) -> bool:
    """Returns whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.startswith('cuda'):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == 'cpu' and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def pick_dtype(dtype: str, device: str) -> tuple[str, str]:
    """Returns the dtype of matrix products and the reason: ('bfloat16', 'this GPU has it').

    Raises UserError if the user requests bfloat16 on a GPU that does not support it.
    """
    kind = {'cuda': 'GPU', 'cpu': 'CPU'}.get(torch.device(device).type, 'device')
    if dtype == 'auto':
        if has_bfloat16(device):
            return 'bfloat16', f'this {kind} has it'
        return ('float16' if kind == 'GPU' else 'float32'), f'this {kind} has no bfloat16'
    if dtype == 'bfloat16' and kind == 'GPU' and not has_bfloat16(device):
        raise UserError(
            f'--dtype=bfloat16: {describe_device(device)} has no bfloat16; '
            f'use --dtype=float16 or auto'
        )
    return dtype, 'as asked'


def autocast(dtype: str, device: str):
    """Returns the context for forward passes: autocast, or a null context for float32."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


def peak_flops(device: str, dtype: str) -> float | None:
    """Returns the device's dense matrix rate in FLOP/s, or None if it is not in the table."""
    if not device.startswith('cuda'):
        return None
    return look_up_peak(torch.cuda.get_device_name(device), dtype)


def look_up_peak(name: str, dtype: str) -> float | None:
    """Returns the rate of the device with this name; variants such as 'Ti' are not in the table."""
    words = set(re.split(r'[\s-]+', name))
    if words & {'NVL', 'Ti', 'SUPER', 'Laptop', 'Mobile', 'D', 'Max', 'Q', 'MIG'}:
        return None
    for (key, key_dtype), rate in PEAK_FLOPS.items():
        if words >= set(key.split()) and dtype == key_dtype:
            return rate
    return None


def peak_memory(device: str) -> int | None:
    """Returns the peak memory use in bytes, or None if unknown.

    On a GPU, this is the memory that this process has allocated there, otherwise the process's
    main memory.
    """
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    # Linux. getrusage would include the peak of the parent process there.
    with suppress(OSError), open('/proc/self/status') as file:
        for line in file:
            if line.startswith('VmHWM'):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak  # bytes on macOS, KiB elsewhere


def prepare_device(device: str):
    """Configures torch and the C library for fast training on the device."""
    if device.startswith('cuda'):
        torch.set_float32_matmul_precision('high')  # TF32 tensor cores for float32 products
    if device == 'cpu':
        keep_freed_memory()


def keep_freed_memory():
    """Makes glibc keep the memory of freed tensors for the next ones. Affects the main thread.

    By default, glibc returns large blocks to the system. It then gets them back in every step, page
    by page, each filled with zeros.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):  # musl has none
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)  # allocate large blocks on the heap, like small ones
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap


def synchronize(device: str):
    """Waits until the device has finished all submitted work; a CPU always has."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    elif device == 'mps':
        torch.mps.synchronize()


def seed_everything(*counters: int | str):
    """Seeds torch on the devices in use with a hash of the counters.

    Because of the hash, similar counters such as (0, 1) and (1, 0) give unrelated seeds.
    """
    seed = int.from_bytes(
        hashlib.blake2b(repr(counters).encode(), digest_size=8).digest(), 'little'
    )
    # Like torch.manual_seed, which takes ten times as long because it also seeds unused devices.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
