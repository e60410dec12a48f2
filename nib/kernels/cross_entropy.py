"""The cross-entropy of the logits without holding all of them, which need a lot of memory.

You can read model.py without this file. Letters in shapes are those of model.py, and N is the
number of tokens, B x T.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -1  # a target that the loss leaves out; what generate() yields for rows that have ended
MANY_LOGITS = 1 << 24  # with more logits than this, the loss is computed in chunks
MANY_LOGITS_GPU = 1 << 28
LOSS_CHUNK = 1 << 27  # bytes of a chunk of logits: 128 MiB
LOSS_CHUNK_GPU = 1 << 29  # 512 MiB, since a GPU needs large matrix products
CACHED_LOGITS = 1 << 20  # logits whose softmax a CPU computes at a time: 4 MiB in float32
COLUMNS = 4096  # columns of the head's gradient to add at a time: the product stays in the cache


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


# The compiler would unroll the chunks; see the operators in attention.py.
loss_operator = torch.library.custom_op('nib::loss_in_chunks', loss_in_chunks, mutates_args=())


@loss_operator.register_fake
def _(x, weight, targets, cap, with_gradients, chunk_bytes, dtype):
    shapes = (x.shape, weight.shape) if with_gradients else (0, 0)
    return x.new_empty((), dtype=torch.float32), *(
        x.new_empty(shape, dtype=torch.float32) for shape in shapes
    )
