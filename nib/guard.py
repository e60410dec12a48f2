"""Steps whose loss or gradients are not finite: keeps them out of the weights and explains them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

ENDLESS = 1 << 62
MAX_REWINDS = 3  # from the same checkpoint; if more batches fail, it is not by chance


class BadSteps:
    """Counts consecutive non-finite steps on the device, so no step waits for it.

    After `limit` of them, no further step is usable. However late the count is read, the weights
    are those from before these steps. limit None: no limit. float16: non-finite gradients with a
    finite loss are handled by the loss scale, and not counted.
    """

    def __init__(self, limit: int | None, device: str, float16: bool = False):
        self.limit, self.device, self.float16 = limit or ENDLESS, device, float16
        self.reset()

    def reset(self, in_a_row: int = 0):
        """Restarts counting. in_a_row: the number that a resumed run had counted."""
        # Consecutive bad steps; all bad steps; steps since the last bad one.
        self._counts = torch.tensor([in_a_row, 0, 0], device=self.device)
        self._reported = 0
        self._steps = 0  # since the last check

    def usable(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Returns a boolean tensor: whether a step's gradients may be applied to the weights.

        They may be if loss and gradient norm are finite, and the limit is not reached.
        """
        self._steps += 1
        finite = loss.isfinite() & grad_norm.isfinite()
        bad = ~(loss.isfinite() if self.float16 else finite)
        in_a_row, in_all, since = self._counts
        open_ = in_a_row < self.limit
        self._counts = torch.stack(
            (
                torch.where(open_, torch.where(bad, in_a_row + 1, 0), in_a_row),
                in_all + (bad & open_),
                torch.where(bad & open_, 0, since + 1),
            )
        )
        return finite & open_

    def look(self, step: int, scaler: torch.amp.GradScaler) -> 'Seen':
        """Returns what has happened since the last check. Waits for the device.

        step: number of steps done.
        """
        in_a_row, in_all, since = self._counts.tolist()
        new, self._reported = in_all - self._reported, in_all
        steps, self._steps = self._steps, 0
        last, ending = step - since, in_a_row >= self.limit
        if scaler.is_enabled() and scaler.get_scale() < 1 and self.limit < ENDLESS:
            last, ending = step, True
            sentence = f'step {step}: gradients not finite at a loss scale below 1'
        elif ending:
            sentence = f'step {last}: loss or gradients not finite, {in_a_row} steps in a row'
        elif new > 1:
            sentence = (
                f'step {last}: loss or gradients not finite ({new} such steps since the last check)'
            )
        else:
            sentence = f'step {last}: loss or gradients not finite'
        return Seen(in_a_row, steps, new, last, ending, sentence)


@dataclass(frozen=True)
class Seen:
    """The non-finite ('bad') steps since the last check."""

    in_a_row: int  # consecutive bad steps, up to the last step
    steps: int  # all steps since the last check
    new: int  # bad steps since the last check
    last: int  # number of the last bad step; the first step is 1
    ending: bool  # whether the run cannot continue like this
    sentence: str


@contextmanager
def watch_outputs(model: torch.nn.Module) -> Iterator[list[str]]:
    """Collects the names of modules whose output is not finite, in the order of execution."""
    names = []

    def watch(name):
        def look(module, inputs, output):
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                names.append(name)

        return look

    hooks = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def describe(outputs: list[str], parameters: list[str]) -> str:
    """Returns a line about where values stop being finite.

    outputs: from watch_outputs. parameters: from nonfinite_parameters.
    """
    affected = ', '.join(parameters[:3])
    if not parameters:
        affected = 'none when the step is repeated'
        if not outputs:
            affected += ' (the norm of finite gradients can overflow)'
    if len(parameters) > 3:
        affected += f' and {len(parameters) - 3} more'
    line = f'parameters affected: {affected}'
    if outputs:
        line = f'the first module whose output is not finite is {outputs[0]}; {line}'
    return line


def nonfinite_parameters(model: torch.nn.Module) -> list[str]:
    """Returns the names of parameters that are not finite, or whose gradients are not.

    They are ordered from the output to the input, as the backward pass reaches them.
    """
    return [
        name
        for name, parameter in reversed(list(model.named_parameters()))
        if not all(
            tensor is None or tensor.isfinite().all() for tensor in (parameter, parameter.grad)
        )
    ]
