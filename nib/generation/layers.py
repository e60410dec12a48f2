"""The model that generates: a copy whose layers are faster for a few rows on a CPU.

model.py may have been changed, so the faster code is used only where it gives the same results.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, MLP, RMSNorm


def for_generation(module: nn.Module, linear: Any) -> Any:
    """A copy of the module without dropout. It shares all parameters except those it rewrites:
    packed matrices, and the gains of RMSNorm on a CPU.

    linear: PackedLinear or RowLinear, replaces linear layers where that is faster; None: neither.
    """
    if linear and is_linear(module) and linear.pays(module.weight):
        return linear(module.weight, module.bias)
    if linear and type(module) is RMSNorm and FewRowNorm.pays(module.weight):
        norm = FewRowNorm(module)
        if agree(norm, module, module.weight):
            return norm
    if isinstance(module, nn.Dropout):
        return nn.Identity()
    parts = {name: for_generation(part, linear) for name, part in module._modules.items()}
    twin = with_parts(module, parts)
    twin.training = False
    if isinstance(module, MLP) and isinstance(getattr(module, 'activation', None), nn.GELU):
        is_packed = isinstance(getattr(twin, 'c_fc', None), PackedLinear)
        return fuse_gelu(twin, module.c_fc.weight) if is_packed else twin
    if isinstance(module, GPT) and module.config.tied_head and linear:
        head = module.transformer.wte.weight
        if linear.pays(head) and can_untie(module):
            return untie(twin, linear(head, None))
    return twin


def with_parts(module: nn.Module, parts: dict) -> Any:
    """A copy of a module with these parts, which need not be modules."""
    twin: Any = copy.copy(module)
    twin._modules = module._modules | parts
    return twin


def fuse_gelu(mlp: Any, weight) -> Any:
    """An MLP whose packed product, with the plain matrix `weight`, applies GELU, if it may."""
    product = copy.copy(mlp.c_fc)
    product.then = 'gelu', [], mlp.activation.approximate
    fused = {'c_fc': product, 'activation': nn.Identity()}
    rest = {'c_proj': nn.Identity()}  # need not be compared
    is_same = agree(with_parts(mlp, fused | rest), with_parts(mlp, rest), weight)
    return with_parts(mlp, fused) if is_same else mlp


def untie(model: GPT, head) -> Any:
    """A copy of a model with a tied head that has a separate one."""
    twin = with_parts(model, {'lm_head': head})
    twin.config = replace(model.config, tied_head=False)
    return twin


def can_untie(model: GPT) -> bool:
    """Whether logits() gives the same with a separate head. Compares the logits of few tokens."""
    few = nn.Embedding.from_pretrained(model.transformer.wte.weight.detach()[:64])
    tied = with_parts(model, {'transformer': with_parts(model.transformer, {'wte': few})})
    return agree(untie(tied, RowLinear(few.weight, None)).logits, tied.logits, few.weight)


def agree(fast, plain, weight) -> bool:
    """Whether two layers give the same for a random row, as wide as those of `weight`."""
    generator = torch.Generator('cpu').manual_seed(0)
    x = torch.randn(1, 1, weight.shape[-1], generator=generator, device='cpu').type_as(weight)
    try:
        with (
            torch.no_grad(),
            torch.autocast('cpu', enabled=False),
        ):  # its rounding would hide a difference
            y, expected = fast(x).float(), plain(x).float()
    except Exception:  # a changed layer may need more than a row
        return False
    tolerance = 0.02 if weight.dtype == torch.bfloat16 else 1e-3  # rounding
    return torch.allclose(y, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


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
