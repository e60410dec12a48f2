"""Measures what one batch does in a model: gradients, updates, activations and attention.

nib/doctor/health.py says which of the values are healthy.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import model as architecture
from model import GPT, MLP, CausalSelfAttention
from nib.doctor.health import LayerStats, ParameterStats
from nib.kernels.cross_entropy import IGNORED

# A hidden unit is closed if its activation function passes hardly any gradient. Below these inputs,
# squared ReLU passes none, and the slopes of GELU and of SwiGLU's gate (SiLU) are within 0.0125 of
# 0. For other activation functions, a unit is closed if its output is 0.
CLOSED_BELOW = {'relu': 0.0, 'relu2': 0.0, 'gelu': -3.0, 'gelu_erf': -3.0, 'swiglu': -6.0}


# -- parameters ------------------------------------------------------------------------------------


@torch.no_grad()
def measure_parameters(model: nn.Module) -> list[ParameterStats]:
    """Returns the statistics of the current weights and gradients of trained parameters.

    A gradient that is None counts as zeros.
    """
    blocked = behind_zeros(model)
    rows = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        figures = (
            torch.linalg.vector_norm(weight) / math.sqrt(weight.numel()),
            grad.mean(),
            grad.std(correction=0),
            grad.abs().max(),
            torch.linalg.vector_norm(grad),
        )
        rms, mean, std, largest, norm = torch.stack(figures).tolist()
        shape, is_blocked = tuple(weight.shape), name.startswith(blocked)
        rows.append(
            ParameterStats(name, shape, rms, mean, std, largest, norm, behind_zeros=is_blocked)
        )
    return rows


def behind_zeros(model: nn.Module) -> tuple[str, ...]:
    """Returns name prefixes of the parameters that get no gradient through a c_proj of zeros.

    With zero_init, the branches of a new model's blocks end in such a projection.
    """
    prefixes = []
    for name, weight in model.named_parameters():
        block, _, branch = name.removesuffix('.c_proj.weight').rpartition('.')
        norm = {'attn': 'ln_1', 'mlp': 'ln_2'}.get(branch)
        if norm and name.endswith('.c_proj.weight') and not weight.any():
            prefixes.append(f'{block}.{norm}.')
            for part in ('c_attn', 'c_fc', 'q_norm', 'k_norm'):
                prefixes.append(f'{block}.{branch}.{part}.')
    return tuple(prefixes)


@torch.no_grad()
def add_updates(
    stats: list[ParameterStats], model: nn.Module, before: Mapping[str, torch.Tensor]
) -> list[ParameterStats]:
    """Returns the statistics with the update ratios since `before`, name -> tensor."""
    weights = dict(model.named_parameters())

    def ratio(name):
        norm = float(before[name].norm())
        return float((weights[name] - before[name]).norm()) / norm if norm else None

    return [replace(row, update_ratio=ratio(row.name)) for row in stats]


# -- layers ----------------------------------------------------------------------------------------


@torch.no_grad()
def measure_layers(model: GPT, x, y, precision, n_sequences: int) -> tuple[float, list[LayerStats]]:
    """Returns the loss, in nats per token, and the statistics of the layers, without dropout.

    x, y: token ids (B, T). n_sequences: number of sequences on which attention is measured; its
    weights, which a forward pass never holds at once, are T * T numbers in each head.
    """
    figures: dict[str, dict[str, float]] = defaultdict(dict)  # in the order of the forward pass
    # The blocks may be in the list several times. Each call of a block is its next place there.
    places: dict[Any, list[str]] = defaultdict(list)
    here = ''  # the place of the block that computes
    # Of several MLPs in a block, the one with the most tokens counts: a few tokens open few units.
    most_tokens: dict[str, int] = defaultdict(int)

    def enter(block, args):
        nonlocal here
        here, *later = places[block]
        places[block] = later or [here]

    def watch_stream(name=''):
        def hook(module, args, output):
            figures[name or here] |= {'mean': float(output.float().mean()), 'std': std_of(output)}

        return hook

    def watch_branch(key):
        def hook(module, args, output):
            figures[here][key] = std_of(output)

        return hook

    def note_attention(q, k, v):
        figures[here] |= measure_attention(q[:n_sequences], k[:n_sequences])

    def watch_units(mlp):
        def note(hidden, share):
            n_tokens = hidden.numel() // hidden.shape[-1]
            if n_tokens > most_tokens[here]:
                most_tokens[here], figures[here]['dead'] = n_tokens, share

        def hook_of_input(module, args, output):
            note(output, dead_share(mlp.kind, output))

        def hook_of_output(module, args):
            note(args[0], share_always(args[0] == 0.0))

        if mlp.kind in CLOSED_BELOW:
            return mlp.c_fc.register_forward_hook(hook_of_input)
        return mlp.c_proj.register_forward_pre_hook(hook_of_output)

    parts: Any = model.transformer
    hooks = [
        parts.drop.register_forward_hook(watch_stream('embedding')),
        parts.ln_f.register_forward_hook(watch_stream('ln_f')),
    ]
    for i, block in enumerate(parts.h):
        places[block].append(f'h.{i}')
    for block in places:
        hooks += [
            block.register_forward_pre_hook(enter),
            *(watch_units(part) for part in block.modules() if isinstance(part, MLP)),
            block.attn.register_forward_hook(watch_branch('attention_std')),
            block.mlp.register_forward_hook(watch_branch('mlp_std')),
            block.register_forward_hook(watch_stream()),
        ]
    was_training = model.training
    model.eval()
    try:
        with precision, watch_attention(model, note_attention):
            loss = float(model(x, y))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return loss, [LayerStats(name, **values) for name, values in figures.items()]


@contextmanager
def watch_attention(model: GPT, note: Callable):
    """Calls note(q, k, v) when a layer attends: q (B, H, T, D), k and v (B, K, T, D).

    Layers without attend(), in a changed model, are not watched. Others may set it in __init__(),
    even to a module, so what is watched stands in their dictionaries, where Python looks first.
    """

    def watched(attend):
        def watching(q, k, v, *others, **options):
            note(q, k, v)
            return attend(q, k, v, *others, **options)

        return watching

    layers = [part for part in model.modules() if isinstance(part, CausalSelfAttention)]
    layers = [layer for layer in layers if hasattr(layer, 'attend')]
    before = [vars(layer).get('attend') for layer in layers]
    for layer in layers:
        vars(layer)['attend'] = watched(layer.attend)
    try:
        yield
    finally:
        for layer, attend in zip(layers, before):
            del vars(layer)['attend']
            if attend:
                vars(layer)['attend'] = attend


def measure_attention(q, k) -> dict[str, float]:
    """Returns two fields of LayerStats for queries (B, H, T, D) and keys (B, K, T, D)."""
    entropies, largest = [], 0.0
    for b in range(len(q)):  # one sequence at a time, to save memory
        scores = attention_scores(q[b, None], k[b, None])
        entropies.append(entropy(scores.softmax(dim=-1)).mean())
        visible = scores.masked_fill(scores == -math.inf, 0.0)
        largest = max(largest, float(visible.abs().max()))
    return {'entropy': float(torch.stack(entropies).mean()), 'attention_logit': largest}


def attention_scores(q, k):
    """Returns the scores (B, H, T, T) before the softmax of q (B, H, T, D) and k (B, K, T, D).

    A key that a query must not see has the score -inf. The fused kernels of the model do not return
    the scores, so model.attention_scores() computes them again, in float32 or better.
    """
    k = architecture.share_heads(k, q.shape[1])  # (B, H, T, D)
    dtype = torch.promote_types(q.dtype, torch.float32)
    positions = torch.arange(q.shape[2], device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        return architecture.attention_scores(q.to(dtype), k.to(dtype), positions, positions)


def std_of(x) -> float:
    return float(x.float().std(correction=0))


def entropy(weights):
    """Returns the entropy, in nats, of distributions along the last dimension.

    It is 0 if all weight is on one place, and ln n if it is spread evenly over n.
    """
    return torch.special.entr(weights).sum(dim=-1)


def dead_share(mlp_kind: str, hidden) -> float:
    """Returns the share of hidden units that are closed for every token.

    mlp_kind: a key of CLOSED_BELOW. hidden: output of c_fc (..., mlp_units); for SwiGLU, the gates
    come before the other units.
    """
    gate = hidden.chunk(2, dim=-1)[0] if mlp_kind == 'swiglu' else hidden
    return share_always(gate <= CLOSED_BELOW[mlp_kind])


def share_always(is_closed) -> float:
    """Returns the share of units for which is_closed (..., units) is true for every token."""
    return float(is_closed.flatten(0, -2).all(dim=0).float().mean())


# -- the batch -------------------------------------------------------------------------------------


def shifted_share(x, y) -> torch.Tensor:
    """Returns the share of targets (B, T) that are the next token of the input (B, T), a scalar.

    The last targets are not counted, because their input is not in the batch. 1 if T is 1. Targets
    that the loss ignores count as correct.
    """
    is_next = (y[:, :-1] == x[:, 1:]) | (y[:, :-1] == IGNORED)
    return is_next.float().mean() if x.shape[1] > 1 else torch.ones((), device=x.device)


def unigram_entropy(targets) -> float:
    """Returns the lowest mean loss, in nats, that is possible without looking at the inputs."""
    counts = targets[targets != IGNORED].cpu().bincount().double()
    return float(entropy(counts / counts.sum()))
