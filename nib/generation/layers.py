"""The model that generates: a copy whose layers are faster for a few rows on a CPU."""

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, MLP, RMSNorm


def for_generation(module: nn.Module, linear: Any):
    """A copy of the module without dropout. It shares all parameters except those it rewrites:
    packed matrices, and the gains of RMSNorm on a CPU.

    linear: PackedLinear or RowLinear, replaces linear layers where that is faster; None: neither.
    """
    if linear and is_linear(module) and linear.pays(module.weight):
        return linear(module.weight, module.bias)
    if linear and type(module) is RMSNorm and FewRowNorm.pays(module.weight):
        return FewRowNorm(module)
    if isinstance(module, nn.Dropout):
        return nn.Identity()
    twin: Any = copy.copy(module)
    twin.training = False
    twin._modules = {name: for_generation(child, linear) for name, child in module._modules.items()}
    is_gelu = isinstance(module, MLP) and isinstance(module.activation, nn.GELU)
    if is_gelu and isinstance(twin.c_fc, PackedLinear):  # part of the packed product
        twin.c_fc.then = 'gelu', [], twin.activation.approximate
        twin.activation = nn.Identity()
    if isinstance(module, GPT) and module.config.tied_head and linear:
        head = module.transformer.wte.weight
        if linear.pays(head):
            twin.lm_head = linear(head, None)
            twin.config = replace(module.config, tied_head=False)
    return twin


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is a plain linear layer. A subclass in a fork may compute more."""
    return type(module).forward is nn.Linear.forward


class PackedLinear:
    """A linear layer for a CPU with a copy of its matrix in the memory layout that oneDNN prefers.

    A product with few rows then runs at memory bandwidth; the plain matrix reaches a third of that.
    """

    SMALLEST = 1 << 17  # elements of a float32 matrix; with fewer, the overhead of a call dominates

    def __init__(self, weight, bias):
        rows = 16  # the number of rows of x that the layout is optimized for
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias
        self.multiply = torch.ops.mkldnn._linear_pointwise.default
        self.then = 'none', [], ''  # operation applied to the product: name, scalars, algorithm

    def __call__(self, x):
        return self.multiply(x, self.weight, self.bias, *self.then)

    @classmethod
    def pays(cls, weight) -> bool:
        """Whether packing is faster here, and torch has the operators, which are not public."""
        mkldnn = torch.ops.mkldnn
        needed = '_reorder_linear_weight', '_linear_pointwise', '_is_mkldnn_bf16_supported'
        if weight.device.type != 'cpu' or not torch.backends.mkldnn.is_available():
            return False
        if not all(hasattr(mkldnn, name) for name in needed):
            return False
        if weight.dtype == torch.float32:
            return weight.numel() >= cls.SMALLEST
        return weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()


class RowLinear:
    """A linear layer for one row at a time on an Intel processor with AMX.

    A product of the plain matrix with a vector runs at memory bandwidth there, so that packing it
    would only cost time.
    """

    def __init__(self, weight, bias):
        self.weight, self.bias = weight.detach(), bias

    def __call__(self, x):
        if x.numel() != x.shape[-1] or x.dtype != self.weight.dtype:  # a prompt, or autocast
            return F.linear(x, self.weight, self.bias)
        row = x.flatten()
        y = self.weight.mv(row) if self.bias is None else torch.addmv(self.bias, self.weight, row)
        return y.view(*x.shape[:-1], -1)

    @classmethod
    def pays(cls, weight) -> bool:
        return weight.device.type == 'cpu'


class FewRowNorm:
    """RMSNorm of a few rows on a CPU, in half as many operations as torch's."""

    def __init__(self, norm: RMSNorm):
        width = norm.normalized_shape[0]
        self.weight = norm.weight.detach() * math.sqrt(width)
        self.dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        self.least = torch.tensor(math.sqrt(width * norm.eps), dtype=self.dtype, device='cpu')

    def __call__(self, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.dtype)
        return (x * self.weight.type_as(x)).div_(length.hypot_(self.least))

    @classmethod
    def pays(cls, weight) -> bool:
        return weight.device.type == 'cpu' and weight.dtype != torch.float16  # it would overflow
