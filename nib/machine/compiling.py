"""torch.compile: whether to use it, and compilation that falls back to the uncompiled model."""

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from model import GPTConfig, kernels_fit
from nib.kernels import HAS_AMX, QUERY_BLOCK

SHORT_RUN = 15  # seconds at the peak rate; about a minute in practice, mostly spent compiling
SHORT_CPU_RUN = 6e14  # FLOPs; a quarter of an hour on two cores, up to a minute of it compiling


def pick_compile(
    compile: bool | str,
    device: str,
    flops: float = 0.0,
    peak_flops: float | None = None,
    model: GPTConfig | None = None,
) -> tuple[bool, str]:
    """Returns whether to compile the model, and the reason.

    flops: of the whole run, so that a resumed run chooses the same. peak_flops: the device's peak
    rate in FLOP/s, if known. model: not compiled if that would take minutes.
    """
    compiler = os.environ.get('CXX') or 'g++'
    reason = 'as requested'
    if compile == 'auto':
        on_gpu = device.startswith('cuda')
        if not on_gpu and not (device == 'cpu' and HAS_AMX):
            return False, 'no faster on a CPU'
        if not on_gpu and model and model.dropout and model.block_size > QUERY_BLOCK:
            # The compiler unrolls attend_in_blocks().
            return False, 'compilation takes minutes with dropout and a long context'
        # The rate of a CPU varies with its load, on which the choice must not depend.
        if flops < (SHORT_RUN * (peak_flops or 0.0) if on_gpu else SHORT_CPU_RUN):
            return False, 'the run is too short for compilation to pay off'
        compile, reason = True, f'faster on {"a GPU" if on_gpu else "this CPU in a long run"}'
    if compile and not any(shutil.which(name) for name in (compiler, 'gcc', 'clang')):
        return False, 'no C compiler found: install gcc'
    return bool(compile), reason


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
    try:
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
