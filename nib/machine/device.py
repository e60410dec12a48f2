"""The device of a run: choice, precision, memory in use and random seeds."""

import ctypes
import functools
import hashlib
import os
import sys
import warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from nib.errors import UserError, known_remedy
from nib.machine.threads import available_cores, watch_cores

NVIDIA_DRIVER = Path('/proc/driver/nvidia/version')
# A model with fewer parameters generates on a CPU about as fast with one thread as with two, which
# wait for each other more than they compute. One thread needs no second core.
SMALL_MODEL = 1_000_000


def pick_device(device: str) -> str:
    """Returns the device to use; 'auto' becomes 'cuda', 'mps' or 'cpu', the first one available.

    Also limits torch's threads to the cores of this process. Raises UserError if this machine does
    not have the device.
    """
    limit_threads()
    watch_cores()
    if device == 'auto':
        if not gpu_problem() and torch.cuda.is_available():
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
            f'{(kind == "cuda" and gpu_problem()) or "try --device=auto"}'
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
    reason = 'GPU not used' if has_gpu else gpu_problem() or 'no GPU found'
    return f'cpu ({threads} thread{"s" * (threads > 1)}, {reason})'


@functools.cache
def gpu_problem() -> str:
    """Returns why torch cannot use the NVIDIA GPU of this machine, or '' if nothing is known."""
    with warnings.catch_warnings(record=True) as caught:  # torch warns once, in its first call
        warnings.simplefilter('always')
        if torch.cuda.is_available():
            return ''
    for warning in caught:
        message = ' '.join(str(warning.message).split())
        return known_remedy(message) or message[:200]
    if NVIDIA_DRIVER.exists() and torch.version.cuda is None:
        return (
            f'torch {torch.__version__} was built without GPU support, but there is an NVIDIA '
            'driver: install a build for CUDA (pytorch.org/get-started)'
        )
    return ''


def has_bfloat16(device: str) -> bool:
    """Returns whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.startswith('cuda'):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == 'cpu' and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def pick_dtype(dtype: str, device: str) -> tuple[str, str]:
    """Returns the dtype of matrix products and the reason: ('bfloat16', 'supported by this GPU').

    Raises UserError if the user requests bfloat16 on a GPU that does not support it.
    """
    kind = {'cuda': 'GPU', 'cpu': 'CPU'}.get(torch.device(device).type, 'device')
    if dtype == 'auto':
        if has_bfloat16(device):
            return 'bfloat16', f'supported by this {kind}'
        return ('float16' if kind == 'GPU' else 'float32'), f'this {kind} does not support bfloat16'
    if dtype == 'bfloat16' and kind == 'GPU' and not has_bfloat16(device):
        raise UserError(
            f'--dtype=bfloat16: {describe_device(device)} does not support bfloat16; '
            f'use --dtype=float16 or auto'
        )
    return dtype, 'as requested'


def autocast(dtype: str, device: str):
    """Returns the context for forward passes: autocast, or a null context for float32."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


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


def prepare_device(device: str, deterministic: bool = False):
    """Configures torch and the C library for fast training on the device.

    deterministic: use only operations whose results repeat bit for bit. On a CPU, all do.
    """
    if device.startswith('cuda'):
        torch.set_float32_matmul_precision('high')  # TF32 tensor cores for float32 products
        if deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # torch requires it
            torch.use_deterministic_algorithms(True)
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


@contextmanager
def kept_buffers(model: torch.nn.Module):
    """Restores the buffers of a model at the end, some of which a changed model.py may update in
    every forward pass: a pass that is not part of a step must not change the training.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in before and buffer.shape == before[name].shape:  # else a cache has grown
                    buffer.copy_(before[name])


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


class ShapesOnly(TorchFunctionMode):
    """In its `with` block, the parameters of new layers have shapes, but no memory and no values.

    torch.device('meta') does the same, but random numbers and arithmetic on that device first
    import torch's compiler, which takes seconds. Here, everything but the parameters is real.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, '__module__', None) == 'torch.nn.init':
            tensor = kwargs['tensor'] if 'tensor' in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        if function is torch.empty:  # with which layers create their parameters
            kwargs = {**kwargs, 'device': 'meta'}
        return function(*args, **kwargs)
