"""Dropout and GELU, which torch computes slowly on some CPUs."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def draws_in_parallel() -> bool:
    """Whether torch draws the masks of dropout in all threads on this CPU.

    On Intel processors, it uses MKL, which takes one seed from the generator for all numbers.
    """
    states = []
    for size in (100, 200):
        generator = torch.Generator('cpu').manual_seed(0)
        torch.empty(size, device='cpu').bernoulli_(0.5, generator=generator)
        states.append(generator.get_state())
    return torch.equal(*states)


DRAWS_IN_PARALLEL = draws_in_parallel()


def drop_out(x, p: float):
    """F.dropout(x, p); the forward pass takes a quarter of the time if torch draws in one thread.

    torch draws a random number for each element. Here, 16 bits of a number of 64 bits decide, so
    that p is rounded to a multiple of 2^-16.
    """
    is_slow = x.device.type == 'cpu' and not DRAWS_IN_PARALLEL and not torch.compiler.is_compiling()
    if not is_slow or not 0 < p < 1:  # torch rejects what is not a probability
        return F.dropout(x, p)
    numbers = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device='cpu')
    bits = numbers.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of the 2^16 values that 16 bits have
    return x * (bits >= dropped - 2**15) * (2**16 / (2**16 - dropped))


class Dropout(nn.Dropout):
    """nn.Dropout with drop_out()."""

    def forward(self, x):
        return drop_out(x, self.p) if self.training else x


def tanh_gelu(x):
    """GELU by its tanh approximation: x * (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3).

    Compiled for a CPU, tanh takes half of the time of this function. As (1 + tanh(u)) / 2 is the
    logistic function of 2u, whose exponential is fast, the compiler gets that.
    """
    if not (x.device.type == 'cpu' and torch.compiler.is_compiling()):
        return F.gelu(x, approximate='tanh')
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    return (z * torch.sigmoid(2 * u)).type_as(x)
