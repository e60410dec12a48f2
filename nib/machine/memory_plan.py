"""An estimate of the memory that training takes, by part, from the shapes of a model alone."""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from model import GPT, GPTConfig
from nib.kernels import cross_entropy, elementwise
from nib.kernels.attention import QUERY_BLOCK
from nib.machine.device import ShapesOnly
from nib.machine.shares import assign

FLOAT = 4  # bytes of a float32
MUON_COPIES = 18  # bytes per number while Muon orthogonalizes a matrix
GAPS = 0.4  # share of a CPU's activations that do not fit into gaps of the heap


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that the training steps of one process take, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # of a micro batch, with the 16-bit copies of the weights
    logits: float  # with what else the loss holds
    work: float  # on a CPU, temporary tensors and gaps of the heap
    update: float  # temporary tensors of the optimizer's step
    # Whether no part can reuse memory that another part has freed, as on a CPU's heap.
    adds_up: bool
    accumulates: bool  # whether gradients exist beside all activations

    @property
    def peak(self) -> float:
        """The most that exists at a time.

        The backward pass frees the activations of a layer when it adds its gradients. So a GPU's
        peak is at its beginning, or after its end. On a CPU's heap, small tensors take parts of
        what large ones have freed, which then is too small for the next large ones.
        """
        forward = self.activations + self.logits + self.work
        backward = self.gradients + self.update
        if self.adds_up:
            used = forward + backward
        else:
            used = max(forward + self.gradients * self.accumulates, backward)
        return self.weights + self.optimizer + used


def plan_memory(config: GPTConfig, values: Mapping, compiled: bool = False) -> MemoryPlan:
    """Estimates the memory of training steps.

    values: train.py's config with the device, dtype and ranks to use. compiled: whether the model
    is compiled, which matters on a GPU.
    """
    device, dtype, ranks = values['device'], values['dtype'], values.get('ranks', 1)
    sizes = parameter_shapes(config)
    n_params = sum(shape.numel() for shape in sizes.values())
    matrices = [s for name, s in sizes.items() if len(s) == 2 and '.h.' in name]
    optimizer, update = optimizer_bytes(sizes, values)
    accumulates = values['gradient_accumulation_steps'] > ranks
    tokens = values['batch_size'] * config.block_size
    activations = tokens * activation_bytes(config, device, dtype)
    if dtype != 'float32':  # autocast keeps its copies until the backward pass
        activations += 2 * sum(s.numel() for s in matrices)
    work = 0.0
    if device == 'cpu':
        work = heap_bytes(config, tokens, activations, dtype, accumulates)
    return MemoryPlan(
        weights=FLOAT * n_params,
        gradients=FLOAT * n_params,
        optimizer=optimizer,
        activations=activations,
        logits=loss_bytes(config, tokens, device, dtype, compiled),
        work=work,
        update=update,
        adds_up=device == 'cpu',
        accumulates=accumulates or ranks > 1,  # several ranks never free their gradients
    )


@functools.cache
def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Returns the shapes of a model's parameters by name, without making the model."""
    if config.position == 'rotary':
        config = replace(config, block_size=1)  # its tables are not parameters
    with ShapesOnly():
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def optimizer_bytes(sizes: Mapping[str, torch.Size], values: Mapping) -> tuple[float, float]:
    """Returns the bytes of the optimizer's state and of its step's temporary tensors.

    sizes: shapes of the parameters by name. If they are sharded, each number is that of the rank
    where it is largest.
    """
    n_shares = values.get('ranks', 1) if values.get('shard_optimizer') else 1
    states, copies = [0] * n_shares, [Counter() for _ in range(n_shares)]
    owners = assign([shape.numel() for shape in sizes.values()], n_shares)
    for (name, shape), owner in zip(sizes.items(), owners):
        is_muon = values['optimizer'] == 'muon' and len(shape) == 2 and '.h.' in name
        states[owner] += shape.numel() * (1 if is_muon or values['optimizer'] == 'sgd' else 2)
        if is_muon:  # updates all matrices of a shape at once, with float32 and 16-bit copies
            copies[owner][tuple(sorted(shape))] += shape.numel()
    most = max(max(of_rank.values(), default=0) for of_rank in copies)
    return FLOAT * max(states), MUON_COPIES * most


def heap_bytes(
    config: GPTConfig, tokens: int, activations: float, dtype: str, accumulates: bool
) -> float:
    """Returns the bytes that training takes on a CPU's heap beside what it keeps."""
    V, C, is_float32 = config.vocab_size, config.n_embd, dtype == 'float32'
    # A tied table has two gradients and their sum. That of an untied head is in loss_bytes, too.
    tables = FLOAT * V * C * ((1 if config.tied_head else -1) + accumulates)
    # Small tensors split what activations have freed, and more often with gradients that stay until
    # the next pass. In float32, the loss has freed more than they need, unless the gradient of an
    # untied head lies in it.
    block, holes = backward_bytes(config, dtype)
    gaps = max(GAPS * activations * (not config.recompute), tokens * block)
    gaps += tokens * holes * config.recompute
    if tokens * V > cross_entropy.MANY_LOGITS and is_float32 and not config.recompute:
        gaps = 0.0 if config.tied_head else chunk_bytes(config, tokens, 'cpu', dtype)
    gaps += GAPS * activations * accumulates
    # The last term, with dropout: attention weights of all heads, random numbers, what remains of
    # the weights, and gradients. Without dropout, only the weights of a few heads exist at a time.
    is_long = config.block_size > QUERY_BLOCK  # the weights are computed once more
    copies = (12 if is_long else 8) * (config.dropout > 0)
    weights = tokens * config.n_head * min(config.block_size, QUERY_BLOCK)
    return tables + gaps + copies * (FLOAT if is_float32 else 2) * weights


def backward_bytes(config: GPTConfig, dtype: str) -> tuple[float, float]:
    """Returns what the backward pass takes on a CPU's heap beside activations, in bytes per token.

    The first number is for a block: gradients of weights split what a block has freed, so that the
    next one needs new memory, and hidden units and their activation have gradients. The second is
    the holes that the forward pass leaves with recompute: the input that each block keeps takes a
    part of what its hidden units have freed, and those of the next block do not fit into the rest.
    """
    width = config.mlp_units * (2 if config.mlp == 'swiglu' else 1)
    hidden = (FLOAT if dtype == 'float32' else 2) * width
    holes = config.n_layer * max(0, hidden - FLOAT * config.n_embd)
    return layer_bytes(config, 'cpu', dtype) + 2 * hidden, holes


def activation_bytes(config: GPTConfig, device: str, dtype: str) -> float:
    """Returns the bytes per token that the backward pass needs, of all layers."""
    layer = layer_bytes(config, device, dtype)
    last = norm_bytes(config, device) + (FLOAT if dtype == 'float32' else 2) * config.n_embd
    if config.recompute:
        return config.n_layer * FLOAT * config.n_embd + layer + last
    return config.n_layer * layer + last


def norm_bytes(config: GPTConfig, device: str) -> int:
    """Returns the bytes per token that a normalization keeps."""
    # RMSNorm on a CPU is several operations, and keeps the normalized stream too.
    return FLOAT * config.n_embd * (2 if config.norm == 'rms' and device == 'cpu' else 1)


def layer_bytes(config: GPTConfig, device: str, dtype: str) -> float:
    """Returns the bytes per token that the backward pass needs, of a layer.

    These are the inputs of each operation whose gradient depends on them. The residual stream is
    float32, matrix products are in `dtype`.
    """
    C, W = config.n_embd, config.mlp_units
    Q, KV = config.n_head * config.head_width, config.kv_heads * config.head_width
    size = FLOAT if dtype == 'float32' else 2
    on_cpu = device == 'cpu'
    in_blocks = on_cpu and (dtype == 'bfloat16' or config.dropout > 0)  # kernels.attend_in_blocks
    # Without copies, the values remain a part of the tensor of queries, keys and values.
    is_long = config.block_size > QUERY_BLOCK and not config.dropout
    has_views = in_blocks and is_long and KV == Q

    rms_parts = config.norm == 'rms' and on_cpu
    norm = norm_bytes(config, device)
    is_new = config.qk_norm or config.position == 'rotary'  # queries and keys are new tensors
    qkv = size * (Q + 2 * KV)
    if config.qk_norm and rms_parts:
        qkv += FLOAT * (Q + KV) * (2 if dtype != 'float32' else 1)
    elif config.qk_norm and dtype != 'float32' and not has_views:
        qkv += size * (Q + 2 * KV) if in_blocks else FLOAT * (Q + KV)
    if has_views:
        qkv += size * (Q + KV) * is_new
    elif in_blocks:
        qkv += 2 * size * (Q - KV)  # keys and values, repeated for the heads that share them
    else:
        qkv += size * (Q + KV + Q * on_cpu) * is_new
    mask = 0  # of dropout
    if config.dropout:  # a byte for each element, except in torch's dropout on a CPU
        mask = size if on_cpu and elementwise.DRAWS_IN_PARALLEL else 1
    if in_blocks and config.block_size <= QUERY_BLOCK:
        # The attention weights; with dropout, also those that remain.
        weights = size + (size + mask if config.dropout else 0)
        qkv += weights * config.n_head * config.block_size
    attention = norm + size * C + qkv + size * Q
    hidden = 4 * W if config.mlp == 'swiglu' else 2 * W
    mlp = norm + size * C + size * hidden
    return attention + mlp + 2 * mask * C


def loss_bytes(config: GPTConfig, tokens: int, device: str, dtype: str, compiled: bool) -> float:
    """Returns the bytes that the loss of a micro batch holds at its peak, beside the gradients."""
    V, C = config.vocab_size, config.n_embd
    size = FLOAT if dtype == 'float32' else 2
    copy = 0 if dtype == 'float32' else size * V * C
    if compiled and device != 'cpu':
        return size * tokens * V  # the compiler fuses the rest
    many = cross_entropy.MANY_LOGITS_GPU if device.startswith('cuda') else cross_entropy.MANY_LOGITS
    if tokens * V <= many:
        # Logits, and in float32 their logarithmic softmax and its gradients; the copied head.
        return (size + 2 * FLOAT) * tokens * V + 2 * copy + FLOAT * V * C
    # A chunk of logits, the copied head, and the gradients of both inputs.
    return chunk_bytes(config, tokens, device, dtype) + copy + FLOAT * (tokens * C + V * C)


def chunk_bytes(config: GPTConfig, tokens: int, device: str, dtype: str) -> float:
    """Returns the bytes of a chunk of logits, and of their softmax in float32."""
    size = FLOAT if dtype == 'float32' else 2
    chunk = cross_entropy.LOSS_CHUNK_GPU if device.startswith('cuda') else cross_entropy.LOSS_CHUNK
    logits = config.vocab_size * min(tokens, max(1, chunk // (size * config.vocab_size)))
    if dtype == 'float32':
        return FLOAT * logits
    softmax = min(logits, cross_entropy.CACHED_LOGITS) if device == 'cpu' else logits
    return size * logits + FLOAT * softmax
