"""torch.compile: whether to use it, and compilation that falls back to the uncompiled model."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from model import GPT, kernels_fit
from nib.kernels.attention import HAS_AMX, QUERY_BLOCK
from nib.machine.device import kept_buffers
from nib.machine.rates import peak_flops

SHORT_RUN = 15  # seconds at the peak rate; about a minute in practice, mostly spent compiling
SHORT_CPU_RUN = 6e14  # FLOPs; a quarter of an hour on two cores, up to a minute of it compiling
NO_COMPILER = 'no C compiler found: install gcc'


def pick_compile(config: Mapping, model: GPT) -> tuple[bool, str]:
    """Returns whether to compile the model of a run, and the reason.

    config: train.py's values with the device, dtype and ranks to use. The choice depends on the
    whole run and not on the load of the machine, so that a resumed run chooses the same.
    """
    device, chosen, reason = config['device'], config['compile'], 'as requested'
    if config.get('eval_only'):
        return False, 'nothing is trained'
    if chosen == 'auto':
        on_gpu = device.startswith('cuda')
        if not on_gpu and not (device == 'cpu' and HAS_AMX):
            return False, 'the model would hardly run faster on this CPU'
        if not on_gpu and model.config.dropout and model.config.block_size > QUERY_BLOCK:
            # The compiler unrolls attend_in_blocks(), which takes minutes.
            return False, 'compilation takes minutes with dropout and a long context'
        shortest = SHORT_CPU_RUN
        if on_gpu:
            peak = peak_flops(device, config['dtype']) or 0.0
            shortest = SHORT_RUN * peak * config.get('ranks', 1)
        if run_flops(config, model) < shortest:
            return False, 'the run is too short for compilation to pay off'
        chosen, reason = True, f'faster on {"a GPU" if on_gpu else "this CPU in a long run"}'
    if chosen and not has_compiler():
        return False, NO_COMPILER
    return bool(chosen), reason


def run_flops(config: Mapping, model: GPT) -> int:
    """Returns the FLOPs of a run's training steps, over all ranks.

    A backward pass takes twice as many as a forward pass.
    """
    sequences = config['batch_size'] * config['gradient_accumulation_steps']
    tokens = sequences * config['block_size'] * config['max_iters']
    return 3 * sum(model.flops_per_token().values()) * tokens


def has_compiler() -> bool:
    """Returns whether torch.compile finds a C compiler."""
    return any(shutil.which(name) for name in (os.environ.get('CXX') or 'g++', 'gcc', 'clang'))


def compile_function(function: Callable, **options) -> Any:
    """Returns torch.compile(function), in which kernels_fit() is a constant.

    It is not declared constant where it is defined, because that imports the compiler, which takes
    a second of every command's start.
    """
    torch.compiler.assume_constant_result(kernels_fit)
    return torch.compile(function, **options)


def compile_model(
    model: torch.nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    context,
    say: Callable[[str], None],
) -> torch.nn.Module:
    """Returns the compiled model, or the model itself if compilation fails, and reports which.

    torch.compile compiles in the first call, so this function runs one forward pass in `context`
    and one backward pass.
    """
    started = time.perf_counter()
    compiled: torch.nn.Module = compile_function(model)
    say('compiling, which can take a minute or two')
    try:
        with kept_buffers(model):
            with context:
                loss = compiled(*batch)
            loss.backward()
    except Exception as error:  # the compiler's errors have no common base class
        say(f'compile failed, continuing without it: {explain_failure(error)}')
        return model
    finally:
        model.zero_grad(set_to_none=True)
    say(f'compiled in {time.perf_counter() - started:.1f} s')
    return compiled


def explain_failure(error: Exception) -> str:
    """Returns the first line of the compiler's error message, which may be pages long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
