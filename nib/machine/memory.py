"""The memory of this machine: the largest micro batch that fits into it, and full memory."""

import bisect
import itertools
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch

from model import GPTConfig
from nib.errors import UserError, is_full
from nib.machine.cgroup import memory_limits
from nib.machine.device import kept_buffers, synchronize
from nib.machine.memory_plan import plan_memory

USABLE = 0.9  # share of the memory to plan with, as allocators leave gaps
FAR = 4  # a run that needs this many times the memory is rejected: no estimate is that wrong


def fit_batch_size(t, config: Mapping, say: Callable[[str], None]) -> dict[str, int]:
    """Chooses the largest batch_size that fits into the memory, with the same tokens per step.

    t: train.py's Training, before it is compiled. The estimate decides which sizes are tried. A
    size is taken if a step with it, which changes nothing, does not fill the memory. Returns
    batch_size and gradient_accumulation_steps. Raises UserError if no size fits.
    """
    room = available_memory(t.device, t.ranks.world_size)
    for sizes in batch_sizes(config):
        needed = needed_memory(t.raw_model.config, {**config, **sizes})
        is_smallest = sizes['batch_size'] == 1
        # All ranks take the same size.
        if t.ranks.largest(needed > USABLE * room) and not is_smallest:
            continue
        if not t.ranks.largest(fills_memory(t, sizes['batch_size'])):
            say(
                f'batch_size {sizes["batch_size"]}, gradient_accumulation_steps '
                f'{sizes["gradient_accumulation_steps"]} (auto: about {needed / 1e9:.2f} of '
                f'{room / 1e9:.2f} GB; one step tried)'
            )
            return sizes
    raise UserError(
        f'out of memory on {t.device} with one sequence of {config["block_size"]} tokens: '
        'use a smaller model or --block_size, or add --recompute'
    )


def batch_sizes(config: Mapping) -> list[dict[str, int]]:
    """Returns the pairs of batch_size and gradient_accumulation_steps, largest batch_size first.

    All have the tokens per step of the config, and the same number of micro steps on every rank.
    """
    ranks = config.get('ranks', 1)
    factors = config['batch_size'], config['gradient_accumulation_steps'] // ranks
    sizes = {a * b for a, b in itertools.product(*map(divisors, factors))}
    return [
        {'batch_size': size, 'gradient_accumulation_steps': math.prod(factors) // size * ranks}
        for size in sorted(sizes, reverse=True)
    ]


def divisors(n: int) -> set[int]:
    """Returns all numbers that divide n."""
    small = {i for i in range(1, math.isqrt(n) + 1) if n % i == 0}
    return small | {n // i for i in small}


def needed_memory(model: GPTConfig, config: Mapping) -> float:
    """Returns the bytes that a run takes, with a model that may still be compiled.

    On a CPU, weights and optimizer already exist, but are copied when they are saved.
    """
    may_compile = [False] if config.get('compile', False) is False else [False, True]
    return max(plan_memory(model, config, compiled).peak for compiled in may_compile)


def fills_memory(t, batch_size: int) -> bool:
    """Tries a step with zeros as tokens, and returns whether the memory was full."""
    full = False
    try:
        x = torch.zeros(batch_size, t.batches.block_size, dtype=torch.long, device=t.device)
        with kept_buffers(t.model):
            for _ in range(2):  # as with accumulated gradients
                with t.precision:
                    loss = t.model(x, x)
                t.scaler.scale(loss).backward()
        t.optimizer.update(torch.zeros((), dtype=torch.bool, device=t.device))  # not usable
        synchronize(t.device)
    except (MemoryError, RuntimeError) as error:
        if not is_full(error):
            raise
        full = True
    t.optimizer.zero_grad()
    if t.device.startswith('cuda'):
        torch.cuda.empty_cache()
    return full


def explain_full_memory(error: Exception, t, config: Mapping):
    """Raises UserError with the keys and values that would fit, if the error is full memory.

    It returns if it is another error, or if it is unknown how much memory there is.
    """
    if not is_full(error):
        return
    try:
        room = available_memory(t.device, t.ranks.world_size)
    except UserError:  # unknown: the script explains the error without numbers
        return
    tries = []
    for recompute in [True] if config['recompute'] else [False, True]:
        changes = {'recompute': recompute}
        model = replace(t.raw_model.config, recompute=recompute)
        for sizes in batch_sizes(config):
            is_new = sizes['batch_size'] < config['batch_size'] or recompute > config['recompute']
            if is_new and needed_memory(model, {**config, **changes, **sizes}) <= USABLE * room:
                flags = ' '.join(f'--{key}={value}' for key, value in sizes.items())
                tries.append(flags + ' --recompute' * (recompute > config['recompute']))
                break
    needed = needed_memory(t.raw_model.config, config)
    raise UserError(
        f'out of memory on {t.device}: batch_size {config["batch_size"]} takes about '
        f'{needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB is available; try '
        f'{" or ".join(tries) or "a smaller model or --block_size"}; the message was: '
        f'{" ".join(str(error).split())[:200]}'
    ) from error


def check_memory(model: GPTConfig, config: Mapping, auto: bool = False):
    """Raises UserError if training on a CPU needs several times the memory of the machine.

    The system would kill such a run without a message, or it would seem to hang. On a GPU, torch
    raises an error. auto: whether fit_batch_size() will choose batch_size. A batch_size of 0 means
    the model alone.
    """

    def needed(batch_size, model=model):
        return needed_memory(model, {**config, 'batch_size': batch_size})

    batch_size, total = 1 if auto else config['batch_size'], total_memory()
    if config['device'] != 'cpu' or needed(batch_size) <= FAR * total:
        return
    if needed(batch_size, replace(model, recompute=True)) <= total:  # a changed model.py may do so
        return
    room = available_memory('cpu', config.get('ranks', 1))
    n_fitting = bisect.bisect(range(batch_size + 1), USABLE * room, key=needed)  # of 0, 1, 2, ...
    if n_fitting == 0:
        reject('training this model', needed(0), room, 'use a smaller one')
    what = f'batch_size {batch_size} with block_size {config["block_size"]}'
    remedy = f'use at most --batch_size={n_fitting - 1}'
    reject(what, needed(batch_size), room, remedy if n_fitting > 1 else 'lower --block_size')


def check_samples(model: GPTConfig, num_samples: int, n_positions: int):
    """Raises UserError if the caches of sample.py need several times the memory of the machine."""
    row = 2 * 2 * model.n_layer * model.kv_heads * model.head_width  # 16-bit keys and values
    row *= min(n_positions, model.block_size)
    if num_samples * row > FAR * total_memory():
        room = available_memory('cpu')
        remedy = f'use at most --num_samples={max(1, int(USABLE * room / row))}'
        reject(f'num_samples {num_samples}', num_samples * row, room, remedy)


def reject(what: str, needed: float, room: float, remedy: str):
    raise UserError(
        f'{what} takes about {needed / 1e9:,.1f} GB, but {room / 1e9:,.1f} GB is available: '
        f'{remedy}'
    )


# -- how much memory there is ----------------------------------------------------------------------


def available_memory(device: str, ranks: int = 1) -> float:
    """Returns the bytes that a process can use on the device, with those it has on a GPU.

    On a CPU this is what the system and the control group (of a container, for example) leave, in
    equal parts for all ranks. Raises UserError if unknown.
    """
    if device.startswith('cuda'):
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device == 'mps':
        return torch.mps.recommended_max_memory()
    left = [limit - used for limit, used in memory_limits()]
    left += [size for name, size in system_memory().items() if name == 'MemAvailable']
    if not left and hasattr(os, 'sysconf'):  # macOS
        left = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    if not left:
        raise UserError('the memory of this machine is unknown: set --batch_size to a number')
    return min(left) / ranks


def total_memory() -> float:
    """Returns the bytes of memory and swap space that a process can ever use; inf if unknown."""
    system = system_memory()
    if not system.get('MemTotal'):
        return math.inf
    limits = [limit for limit, _ in memory_limits()]
    return min([system['MemTotal'], *limits]) + system.get('SwapTotal', 0)


def system_memory() -> dict[str, int]:
    """Returns the rows of /proc/meminfo in bytes; none on other systems than Linux."""
    with suppress(OSError, ValueError, IndexError), open('/proc/meminfo') as file:
        rows = (line.split() for line in file)
        return {name.rstrip(':'): 1024 * int(size) for name, size, *_ in rows}
    return {}
