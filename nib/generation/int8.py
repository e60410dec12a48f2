"""Linear layers with 8-bit weights, for generation on a CPU.

Each row of a matrix is rounded to multiples of its largest absolute value / 127. The rows of an
input are scaled to the same range and then rounded together, so large values in one row do not make
another less precise. Products are integers; embeddings, norms and attention stay in float32.
"""

import copy
import warnings
from typing import Any

import torch
from torch import nn

from model import GPT
from nib.errors import UserError
from nib.generation.layers import can_untie, is_linear, untie


def quantize(model: GPT) -> GPT:
    """Returns a copy of the model with 8-bit weights in its linear layers and its output head.

    A tied head that logits() of a changed model.py treats differently stays as it is.

    The copy shares the other parameters. It cannot be trained. Raises UserError if the model is not
    on a CPU, or if torch has no 8-bit products for this processor.
    """
    weight = model.transformer.wte.weight
    if reason := why_not(weight.device.type):
        raise UserError(f'8-bit weights: {reason}')
    twin = _quantized(model)
    if model.config.tied_head and can_untie(model):
        twin = untie(twin, Int8Linear(weight, None))
    return twin.eval()


def why_not(device: str) -> str | None:
    """Returns why products with 8-bit weights are not possible on a device; None if they are."""
    if device != 'cpu':
        return (
            f'8-bit products need a CPU, but the device is {device}: use --device=cpu or '
            f'--dtype=bfloat16'
        )
    has_operators = hasattr(torch.ops.quantized, 'linear_dynamic')
    if not has_operators or torch.backends.quantized.engine == 'none':
        return f'torch {torch.__version__} has no 8-bit products here: use --dtype=float32'
    return None


class Int8Linear(nn.Module):
    """A linear layer with a matrix of 8-bit integers and a float32 scale for each of its rows."""

    def __init__(self, weight, bias):
        super().__init__()
        weight = weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # torch plans another way to create such tensors
            warnings.simplefilter('ignore')
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.bias = None if bias is None else bias.detach().float()
        # Without these instructions, sums of two products of 8 bits overflow 16 bits.
        self.use_7_bits = not torch.cpu._is_vnni_supported()

    def forward(self, x):
        if x.numel() == x.shape[-1]:  # one row
            y = torch.ops.quantized.linear_dynamic(x, self.packed, self.use_7_bits)
            return y if self.bias is None else y.add_(self.bias)
        # The product has one scale for all rows, so they are scaled to the same range.
        scales = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        y = torch.ops.quantized.linear_dynamic(x / scales, self.packed, self.use_7_bits)
        return y.mul_(scales) if self.bias is None else torch.addcmul(self.bias, y, scales)


def _quantized(module: nn.Module) -> Any:
    if is_linear(module):
        return Int8Linear(module.weight, module.bias)
    twin = copy.copy(module)
    twin._modules = {name: _quantized(child) for name, child in module._modules.items()}
    return twin
