"""Faster ways to compute what model.py defines: attention, GELU and dropout on a CPU, and the loss.

You can read model.py without this file. Letters in shapes are those of model.py, and N is the
number of tokens, B x T.
"""

import functools
import inspect
import math
from types import CodeType, ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

IGNORED = -1  # a target that the loss leaves out; what generate() yields for rows that have ended
QUERY_BLOCK = 256  # queries per block in attend_in_blocks
CACHED_WEIGHTS = 1 << 21  # attention weights that LongAttention holds at a time: 4 MiB
HAS_AMX = torch.cpu._is_amx_tile_supported()  # Intel; some kernels are faster only there
MANY_LOGITS = 1 << 24  # with more logits than this, the loss is computed in chunks
MANY_LOGITS_GPU = 1 << 28
LOSS_CHUNK = 1 << 27  # bytes of a chunk of logits: 128 MiB
LOSS_CHUNK_GPU = 1 << 29  # 512 MiB, since a GPU needs large matrix products
CACHED_LOGITS = 1 << 20  # logits whose softmax a CPU computes at a time: 4 MiB in float32
COLUMNS = 4096  # columns of the head's gradient to add at a time: the product stays in the cache


# -- attention ------------------------------------------------------------------------------------


def share_heads(part, n_head: int):
    """Keys or values (B, K, T, D), repeated for the n_head / K query heads that share each."""
    sharing = n_head // part.shape[1]
    return part if sharing == 1 else part.repeat_interleave(sharing, dim=1)


@functools.cache
@torch.no_grad()
def is_causal_attention(scores) -> bool:
    """Whether `scores`, a function like attention_scores(), gives the weights of the causal kernel.

    They are compared at positions near and far apart, which reveals a window of any size. If the
    function reads a variable, it may give other weights later, so the answer is False.
    """
    if reads_variables(scores):
        return False
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


def reads_variables(value, callers=()) -> bool:
    """Whether a function, or one that it calls, reads a variable that may hold state.

    Modules, numbers, strings and functions that are not written in Python do not count.
    """
    if not inspect.isfunction(value):
        return not (isinstance(value, (ModuleType, int, float, str)) or inspect.isbuiltin(value))
    if value in callers:  # it calls itself
        return False
    names, outside = names_in(value.__code__), value.__globals__
    found = [outside[name] for name in names if name in outside]
    found += [cell.cell_contents for cell in value.__closure__ or ()]
    return any(reads_variables(one, (*callers, value)) for one in found)


def names_in(code: CodeType) -> list[str]:
    """Returns the names of globals and attributes in a function and in those inside of it."""
    inner = (part for part in code.co_consts if inspect.iscode(part))
    return [*code.co_names, *(name for part in inner for name in names_in(part))]


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


# -- dropout --------------------------------------------------------------------------------------


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


# -- GELU -----------------------------------------------------------------------------------------


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


# -- the loss -------------------------------------------------------------------------------------


def uses_head_kernel(x, vocab_size: int) -> bool:
    """Whether head_cross_entropy() is better than F.cross_entropy on all logits at once.

    It is on a GPU, and on a CPU if the logits of hidden states x (N, C) need a lot of memory.
    """
    return x.is_cuda or len(x) * vocab_size > MANY_LOGITS


def head_cross_entropy(x, weight, targets, cap: float):
    """Computes the mean cross-entropy of the logits x @ weight.T.

    x (N, C): hidden states. weight (V, C): the output head's. targets (N): token ids, or IGNORED.
    cap: GPTConfig.logit_cap. Returns a float32 scalar.
    """
    V = len(weight)
    # torch.compile fuses the plain loss on a GPU, which is faster than the loss in chunks.
    is_fused = x.is_cuda and torch.compiler.is_compiling()
    if len(x) * V > (MANY_LOGITS_GPU if x.is_cuda else MANY_LOGITS) and not is_fused:
        chunk = LOSS_CHUNK_GPU if x.is_cuda else LOSS_CHUNK
        return ChunkedLoss.apply(x, weight, targets, cap, torch.is_grad_enabled(), chunk)
    logits = F.linear(x, pad_rows(weight)).float()  # (N, V and padding)
    if cap:
        logits = cap * torch.tanh(logits / cap)  # model.soft_cap
    is_padding = torch.arange(logits.shape[1], device=x.device) >= V
    logits = logits.masked_fill(is_padding, -math.inf)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


def pad_rows(weight):
    """Adds rows of zeros to the head's weight (V, C) on a GPU, up to a multiple of 64.

    An H100 multiplies GPT-2's 50,257 rows at 96 TFLOP/s and 50,304 at 706. The logits of the added
    rows must not count.
    """
    return F.pad(weight, (0, 0, 0, -len(weight) % 64)) if weight.is_cuda else weight


class ChunkedLoss(torch.autograd.Function):
    """The loss of head_cross_entropy(), without holding all logits at once.

    The logits of a large vocabulary take most of a small model's memory. Each chunk of them
    contributes to the loss and, as d loss / d logits = softmax(logits) - one_hot(target), to the
    gradients. The next chunk reuses its buffer: on a CPU, getting new pages from the system takes
    longer than filling them.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, with_gradients, chunk_bytes):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        compute = loss_operator if torch.compiler.is_compiling() else loss_in_chunks
        loss, grad_x, grad_weight = compute(
            x, weight, targets, cap, with_gradients, chunk_bytes, dtype
        )
        n_counted = (targets != IGNORED).sum()
        ctx.save_for_backward(grad_x, grad_weight, n_counted)
        ctx.dtypes = x.dtype, weight.dtype
        return loss / n_counted

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, n_counted = ctx.saved_tensors
        scale = grad_loss / n_counted
        grad_x = grad_x.mul_(scale).to(ctx.dtypes[0])
        return grad_x, grad_weight.mul_(scale).to(ctx.dtypes[1]), None, None, None, None


def loss_in_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float,
    with_gradients: bool,
    chunk_bytes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, and its gradients for x and weight, empty without with_gradients.

    Sums, not means: a mean's tiny gradients would vanish in float16.
    """
    head, V = pad_rows(weight.to(dtype)), len(weight)
    rows = min(len(x), max(1, chunk_bytes // (len(head) * head.itemsize)))
    few = max(1, CACHED_LOGITS // len(head)) if x.device.type == 'cpu' else rows
    logits = head.new_empty(rows, len(head))
    losses = torch.empty(len(x), device=x.device)
    grad_x = torch.zeros(x.shape if with_gradients else 0, device=x.device)
    grad_weight = torch.zeros(head.shape if with_gradients else 0, device=x.device)

    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        chunk, target = x[part].to(dtype, copy=True), targets[part]
        logits = logits[: len(chunk)]
        torch.mm(chunk, head.t(), out=logits)
        for group in zip(logits.split(few), target.split(few), losses[part].split(few)):
            write_losses(*group, V, cap, with_gradients)
        if not with_gradients:
            continue
        counted = (target != IGNORED)[:, None]
        grad_x[part] = (logits @ head) * counted
        chunk *= counted
        for total, columns in zip(grad_weight.split(COLUMNS), logits.split(COLUMNS, dim=1)):
            total.add_(columns.t() @ chunk)

    return losses.sum(), grad_x, grad_weight[:V]


def write_losses(logits, targets, losses, V: int, cap: float, with_gradients: bool):
    """Writes the losses (N) of logits (N, V and padding), whose gradients then replace them."""
    log_probs, targets, counted = logits.float(), targets.clamp(min=0)[:, None], targets != IGNORED
    if cap:
        bent = log_probs.div_(cap).tanh_().clone()  # model.soft_cap
        log_probs.mul_(cap)
    log_probs[:, V:] = -math.inf
    torch.log_softmax(log_probs, dim=-1, out=log_probs)
    losses.copy_(log_probs.gather(1, targets)[:, 0] * -counted.float())
    if not with_gradients:
        return
    minus_one_hot = -torch.ones_like(targets, dtype=torch.float32)
    grad = log_probs.exp_().scatter_add_(1, targets, minus_one_hot)
    if cap:
        grad.mul_(bent.square_().neg_().add_(1))  # the derivative of soft_cap
    logits.copy_(grad)


# For the compiler, as attention_gradients_operator.
loss_operator = torch.library.custom_op('nib::loss_in_chunks', loss_in_chunks, mutates_args=())


@loss_operator.register_fake
def _(x, weight, targets, cap, with_gradients, chunk_bytes, dtype):
    shapes = (x.shape, weight.shape) if with_gradients else (0, 0)
    return x.new_empty((), dtype=torch.float32), *(
        x.new_empty(shape, dtype=torch.float32) for shape in shapes
    )
