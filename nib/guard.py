"""Steps whose loss or gradients are not finite: kept from the weights, counted, and looked into."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

ENDLESS = 1 << 62
MAX_REWINDS = 3  # from the same checkpoint; batch after batch that fails is no accident


class BadSteps:
    """Counts the steps in a row that were not finite, on the device, so that no step waits for it.

    From the `limit`-th on, no step is usable any more: however late somebody looks, the weights are those before it.
    limit None: there is no such end. float16: gradients that overflow beside a finite loss are the loss scale's business,
    and not counted.
    """

    def __init__(self, limit: int | None, device: str, float16: bool = False):
        self.limit, self.device, self.float16 = limit or ENDLESS, device, float16
        self.reset()

    def reset(self, in_a_row: int = 0):
        """Begins to count again. in_a_row: what a resumed run had counted."""
        self._counts = torch.tensor(
            [in_a_row, 0, 0], device=self.device
        )  # in a row; in all; steps since the last one
        self._reported = 0
        self._steps = 0  # since the last look

    def usable(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether a step's gradients may change the weights, as a tensor: its loss and their norm are finite."""
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
        """What has come up since the last look, after `step` steps. Waits for the device."""
        in_a_row, in_all, since = self._counts.tolist()
        new, self._reported = in_all - self._reported, in_all
        steps, self._steps = self._steps, 0
        if scaler.is_enabled() and scaler.get_scale() < 1 and self.limit < ENDLESS:
            return Seen(
                in_a_row,
                steps,
                new,
                step,
                True,
                f'step {step}: gradients not finite at a loss scale below 1',
            )
        ending = in_a_row >= self.limit
        count = (
            f', {in_a_row} steps in a row'
            if ending
            else f' ({new} such steps since the last look)'
            if new > 1
            else ''
        )
        return Seen(
            in_a_row,
            steps,
            new,
            step - since,
            ending,
            f'step {step - since}: loss or gradients not finite{count}',
        )


@dataclass(frozen=True)
class Seen:
    in_a_row: int  # bad steps, up to the last step
    steps: int  # since the last look
    new: int  # bad ones of them
    last: int  # the number of the last bad step; the first step is 1
    ending: bool  # it cannot go on like this
    sentence: str


@contextmanager
def watch_outputs(model: torch.nn.Module) -> Iterator[list[str]]:
    """Collects the names of the modules whose output is not finite, in the order in which they run."""
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
    """Where the values stop being finite, in a line."""
    first = [f'the first module whose output is not finite is {outputs[0]}'] if outputs else []
    more = f' and {len(parameters) - 3} more' if len(parameters) > 3 else ''
    return '; '.join(
        first
        + [f'parameters affected: {", ".join(parameters[:3]) or "none when computed again"}{more}']
    )


def nonfinite_parameters(model: torch.nn.Module) -> list[str]:
    """Parameters that are not finite or whose gradients are not, from the output back, as the backward pass meets them."""
    return [
        name
        for name, parameter in reversed(list(model.named_parameters()))
        if not all(
            tensor is None or tensor.isfinite().all() for tensor in (parameter, parameter.grad)
        )
    ]
