"""torch.compile: whether to use it, and a model that is compiled or, where that fails, left as it is."""

import os
import shutil
import time
from collections.abc import Callable

import torch


def pick_compile(
    compile: bool | str, device: str, peak_seconds: float | None = None
) -> tuple[bool, str]:
    """Whether to compile the model, and why. peak_seconds: what the run would take at the device's peak rate, where known."""
    compiler = os.environ.get('CXX') or 'g++'
    reason = 'as asked'
    if compile == 'auto':
        if not device.startswith('cuda'):
            return False, 'measured to be no faster on a CPU'
        if (
            peak_seconds is not None and peak_seconds < 15
        ):  # some minute in practice, of which compiling takes most
            return False, 'the run is too short to win back the time that it takes'
        compile, reason = True, 'faster on a GPU'
    if compile and not any(shutil.which(name) for name in (compiler, 'gcc', 'clang')):
        return False, 'there is no C compiler on this machine (install gcc)'
    return bool(compile), reason


def compile_model(
    model: torch.nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    context,
    say: Callable[[str], None],
) -> torch.nn.Module:
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
        say(f'compile failed, going on without it: {explain_failure(error)}')
        return model
    say(f'compiled in {time.perf_counter() - started:.1f} s')
    return compiled


def explain_failure(error: Exception) -> str:
    """The first line of what the compiler said, which may be pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
