"""Attention on a CPU that is faster than its definition in model.py, and when it may be used.

You can read model.py without this file. Letters in shapes are those of model.py, and N is a number
of heads, over all sequences.
"""

import functools
import inspect
import math
import sys
from itertools import chain
from types import CodeType, ModuleType, NoneType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from nib.kernels.elementwise import drop_out

QUERY_BLOCK = 256  # queries per block in attend_in_blocks
CACHED_WEIGHTS = 1 << 21  # attention weights that LongAttention holds at a time: 4 MiB
HAS_AMX = torch.cpu._is_amx_tile_supported()  # Intel; some kernels are faster only there


def share_heads(part, n_head: int):
    """Keys or values (B, K, T, D), repeated for the n_head / K query heads that share each."""
    sharing = n_head // part.shape[1]
    return part if sharing == 1 else part.repeat_interleave(sharing, dim=1)


def is_causal_attention(scores) -> bool:
    """Whether `scores`, a function like attention_scores(), gives the weights of the causal kernel.

    If the function reads a variable, it may give other weights later, so the answer is False.
    """
    constants = constants_of(scores)
    return constants is not None and gives_causal_weights(scores, constants)


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def gives_causal_weights(scores, constants) -> bool:
    """is_causal_attention() of a function that reads only these constants.

    The weights are compared at positions near and far apart, which reveals a window of any size.
    """
    positions = torch.tensor([*range(32), *(2**i for i in range(5, 21))], device='cpu')
    generator = torch.Generator('cpu').manual_seed(0)
    q, k = (
        torch.randn(
            2, 1, 4, len(positions), 16, generator=generator, dtype=torch.float64, device='cpu'
        )
        * 2
    )
    identity = torch.eye(len(positions), dtype=q.dtype, device='cpu').expand(1, 4, -1, -1)
    # The caller may have selected kernels that a CPU does not have.
    with torch.autocast('cpu', enabled=False), sdpa_kernel(SDPBackend.MATH):
        kernel_weights = F.scaled_dot_product_attention(q, k, identity, is_causal=True)
        try:
            weights = scores(q, k, positions, positions).softmax(dim=-1)
        except (RuntimeError, IndexError):  # it expects other shapes or positions
            return False
    return torch.allclose(weights, kernel_weights, rtol=0, atol=1e-6)


def constants_of(value, name: str = '', callers=()) -> tuple | None:
    """The numbers and strings that a function, and those that it calls, read from outside.

    None if it may read state: anything else that is neither a module nor written in C, or a number
    whose name is not in capitals. name: that of a variable outside the function.
    """
    if isinstance(value, (int, float, str, NoneType)):
        return (value,) if name == name.upper() else None
    if not inspect.isfunction(value):
        return () if isinstance(value, ModuleType) or inspect.isbuiltin(value) else None
    if value in callers:  # it calls itself
        return ()
    names = names_in(value.__code__)
    found = [(value.__globals__[name], name) for name in names if name in value.__globals__]
    for module, _ in found[:]:
        if isinstance(module, ModuleType) and not is_library(module):
            found += [(getattr(module, name), name) for name in names if hasattr(module, name)]
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    found += [(one, '') for one in (*defaults, *cells)]
    found += [(one, name) for name, one in vars(value).items()]
    parts = [constants_of(*one, (*callers, value)) for one in found]
    return None if None in parts else tuple(chain(*parts))


def is_library(module: ModuleType) -> bool:
    return module.__name__.partition('.')[0] in (*sys.stdlib_module_names, 'torch', 'numpy')


@functools.cache
def names_in(code: CodeType) -> tuple[str, ...]:
    """Returns the names of globals and attributes in a function and in those inside of it."""
    inner = (part for part in code.co_consts if inspect.iscode(part))
    return (*code.co_names, *(name for part in inner for name in names_in(part)))


def attend_in_blocks(q, k, v, dropout: float = 0.0):
    """Causal attention on a CPU: in bfloat16, and in any precision with dropout.

    Computes the same as scaled_dot_product_attention. A block of queries skips the keys after its
    last position. If there is more than one block, the backward pass recomputes the weights of each
    block instead of keeping them in memory.
    """
    B, H, T, D = q.shape
    k, v = share_heads(k, H), share_heads(v, H)
    if T > QUERY_BLOCK and not dropout:
        return LongAttention.apply(q, k, v)
    q, k, v = (part.reshape(B * H, T, D) for part in (q, k, v))
    if T <= QUERY_BLOCK:
        return attend_block(q, k, v, dropout).view(B, H, T, D)
    blocks = [
        checkpoint(attend_block, q[:, block], k[:, seen], v[:, seen], dropout, use_reentrant=False)
        for block, seen in blocks_of(T)
    ]
    return torch.cat(blocks, dim=1).view(B, H, T, D)


def blocks_of(T: int) -> list[tuple[slice, slice]]:
    """The positions of each block of queries, and of the keys that it may look at."""
    ends = [*range(QUERY_BLOCK, T, QUERY_BLOCK), T]
    return [(slice(start, end), slice(end)) for start, end in zip([0, *ends], ends)]


def attend_block(q, k, v, dropout):
    """Attention of the last Q positions of a context of S: q (N, Q, D), k and v (N, S, D)."""
    return drop_out(block_weights(q, k), dropout) @ v


def block_weights(q, k):
    """The weights (N, Q, S) of S keys for the last Q positions: q (N, Q, D), k (N, S, D)."""
    Q, (S, D) = q.shape[1], k.shape[1:]
    mask = torch.full((Q, S), -math.inf, dtype=q.dtype).triu(S - Q + 1)
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(D)).softmax(-1)


class LongAttention(torch.autograd.Function):
    """attend_in_blocks() of a long context without dropout: q, k and v (B, H, T, D).

    On a processor with AMX, the library's kernel is faster than blocks in the forward pass.
    Elsewhere, blocks are faster in both passes. See docs/experiments.md, "Attention".
    """

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        if HAS_AMX:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        compiling = torch.compiler.is_compiling()
        return (weighted_values_operator if compiling else weighted_values)(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        compiling = torch.compiler.is_compiling()
        compute = attention_gradients_operator if compiling else attention_gradients
        return compute(*ctx.saved_tensors, grad_y)


def few_heads(*parts):
    """Splits parts (N, T, D) of attention into a few heads, whose weights stay in the cache."""
    heads = max(1, CACHED_WEIGHTS // (QUERY_BLOCK * parts[0].shape[1]))
    return zip(*(part.split(heads) for part in parts), strict=True)


def weighted_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What attention gives for q, k and v, all (B, H, T, D)."""
    B, H, T, D = q.shape
    inputs = [part.reshape(B * H, T, D) for part in (q, k, v)]
    y = q.new_empty(B * H, T, D)
    for queries, keys, values, part in few_heads(*inputs, y):
        for block, seen in blocks_of(T):
            weights = block_weights(queries[:, block], keys[:, seen])
            part[:, block] = weights @ values[:, seen]
    return y.view(B, H, T, D)


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, all (B, H, T, D)."""
    B, H, T, D = grad_y.shape
    inputs = [part.reshape(B * H, T, D) for part in (q, k, v, grad_y)]
    grads = [part.new_empty(part.shape) for part in inputs[:3]]
    for parts in few_heads(*inputs, *grads):
        write_attention_gradients(*parts)
    grad_q, grad_k, grad_v = (grad.view(B, H, T, D) for grad in grads)
    return grad_q, grad_k, grad_v


def write_attention_gradients(q, k, v, grad_y, grad_q, grad_k, grad_v):
    """Computes the gradients of some heads, all (N, T, D), and writes them to the last three."""
    T, D = q.shape[1:]
    for block, seen in reversed(blocks_of(T)):  # the last block is first: it sees all keys
        # Each product would copy what is not contiguous.
        queries, grads = q[:, block].contiguous(), grad_y[:, block].contiguous()
        keys, values = k[:, seen].contiguous(), v[:, seen].contiguous()
        weights = block_weights(queries, keys)
        grad_weights = grads @ values.transpose(1, 2)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores /= math.sqrt(D)
        grad_q[:, block] = grad_scores @ keys
        for total, left, right in ((grad_k, grad_scores, queries), (grad_v, weights, grads)):
            part = left.transpose(1, 2) @ right
            if seen.stop == T:
                total.copy_(part)
            else:
                total[:, seen] += part


# The compiler would unroll the blocks. Otherwise the functions are called, because the first call
# of an operator imports the compiler, which takes a second.
weighted_values_operator = torch.library.custom_op(
    'nib::weighted_values', weighted_values, mutates_args=()
)
attention_gradients_operator = torch.library.custom_op(
    'nib::attention_gradients', attention_gradients, mutates_args=()
)


@weighted_values_operator.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


@attention_gradients_operator.register_fake
def _(q, k, v, grad_y):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
