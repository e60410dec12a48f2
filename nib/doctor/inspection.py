"""What one batch does in a model: the gradient and the update of every parameter, the activations and attention of every
layer, as plain numbers. nib/doctor/health.py says which of them are healthy."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

import model as architecture
from model import GPT, CausalSelfAttention
from nib.doctor.health import LayerStats, ParameterStats

# A unit is closed where its non-linearity lets hardly any gradient through: squared ReLU none at all, GELU and SwiGLU's gate
# (SiLU) with a slope within 0.0125 of 0. Of another activation dead units are not counted.
CLOSED_BELOW = {'relu2': 0.0, 'gelu': -3.0, 'swiglu': -6.0}


# -- parameters ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_parameters(model: nn.Module) -> list[ParameterStats]:
    """Weights and gradients as they are now; a parameter that no gradient reached counts as one of zeros."""
    blocked = behind_zeros(model)

    def measure(name, weight):
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        norm = torch.linalg.vector_norm
        figures = (
            norm(weight) / math.sqrt(weight.numel()),
            grad.mean(),
            grad.std(correction=0),
            grad.abs().max(),
            norm(grad),
        )
        return ParameterStats(
            name,
            tuple(weight.shape),
            *torch.stack(figures).tolist(),
            behind_zeros=name.startswith(blocked),
        )

    return [measure(name, weight) for name, weight in model.named_parameters()]


def behind_zeros(model: nn.Module) -> tuple[str, ...]:
    """How the names of parameters begin whose branch of a block ends in a projection that is 0, as it may be when fresh."""
    blocked = []
    for name, weight in model.named_parameters():
        block, _, branch = name.removesuffix('.c_proj.weight').rpartition('.')
        norm = {'attn': 'ln_1', 'mlp': 'ln_2'}.get(branch)
        if norm and name.endswith('.c_proj.weight') and not weight.any():
            blocked += [
                f'{block}.{norm}.',
                *(
                    f'{block}.{branch}.{part}'
                    for part in ('c_attn.', 'c_fc.', 'q_norm.', 'k_norm.')
                ),
            ]
    return tuple(blocked)


@torch.no_grad()
def add_updates(
    stats: list[ParameterStats], model: nn.Module, before: Mapping[str, torch.Tensor]
) -> list[ParameterStats]:
    """The same with the update ratio of what has happened to the weights since `before`, name -> tensor."""

    def ratio(name, weight):
        norm = float(before[name].norm())
        return float((weight - before[name]).norm()) / norm if norm else None

    ratios = {name: ratio(name, weight) for name, weight in model.named_parameters()}
    return [replace(row, update_ratio=ratios[row.name]) for row in stats]


# -- layers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_layers(model: GPT, x, y, precision, n_sequences: int) -> tuple[float, list[LayerStats]]:
    """The loss in nats per token and the activations, without dropout. x, y (B, T). Attention is measured on the first
    n_sequences: its weights, which a forward pass never holds at once, are T * T numbers in every head."""
    figures = {}

    def note(name, **values):
        figures.setdefault(name, {}).update(values)

    def watch_stream(name):
        def hook(module, args, output):
            note(
                name, mean=float(output.float().mean()), std=float(output.float().std(correction=0))
            )

        return hook

    def watch_branch(name, key):
        def hook(module, args, output):
            note(name, **{key: float(output.float().std(correction=0))})

        return hook

    def watch_attention(name):
        def hook(module, args, output):
            x, rotary = args[:2]
            means, largest = [], 0.0
            for row in x[:n_sequences]:
                scores, _ = attention_scores(module, row[None], rotary)
                means.append(entropy(scores.softmax(dim=-1)).mean())
                largest = max(
                    largest, float(scores.masked_fill(scores == -math.inf, 0.0).abs().max())
                )
            note(name, entropy=float(torch.stack(means).mean()), attention_logit=largest)

        return hook

    def watch_units(name, mlp):
        if mlp.kind in CLOSED_BELOW:
            return mlp.c_fc.register_forward_hook(
                lambda module, args, output: note(name, dead=dead_share(mlp.kind, output))
            )
        # Of an activation that the table does not know, a closed unit is one whose output is 0.
        return mlp.c_proj.register_forward_pre_hook(
            lambda module, args: note(name, dead=share_always(args[0] == 0.0))
        )

    parts = model.transformer
    hooks = [
        parts.drop.register_forward_hook(watch_stream('embedding')),
        parts.ln_f.register_forward_hook(watch_stream('ln_f')),
    ]
    for i, block in enumerate(parts.h):
        name = f'h.{i}'
        hooks += [
            block.attn.register_forward_hook(watch_attention(name)),
            watch_units(name, block.mlp),
            block.attn.register_forward_hook(watch_branch(name, 'attention_std')),
            block.mlp.register_forward_hook(watch_branch(name, 'mlp_std')),
            block.register_forward_hook(watch_stream(name)),
        ]
    was_training = model.training
    model.eval()
    try:
        with precision:
            loss = float(model(x, y))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    order = ['embedding', *(f'h.{i}' for i in range(len(parts.h))), 'ln_f']
    return loss, [LayerStats(name, **figures[name]) for name in order]


def attention_scores(attention: CausalSelfAttention, x, rotary=None):
    """The scores (B, H, T, T) whose softmax are the weights of the values, and the values (B, H, T, D), which groups of heads
    may share. A key that the query may not look at has the score -inf.

    What the module calls for attention keeps them to itself; so model.attention_scores() computes
    them again, in float32 at least.
    """
    q, k, v = attention.query_key_value(x, rotary)
    k, v = (architecture.share_heads(part, q.shape[1]) for part in (k, v))  # (B, H, T, D)
    dtype = torch.promote_types(q.dtype, torch.float32)
    positions = torch.arange(x.shape[1], device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        return architecture.attention_scores(q.to(dtype), k.to(dtype), positions, positions), v


def entropy(weights):
    """Entropy in nats of distributions along the last dimension: 0 is all on one place, ln n evenly over n."""
    return torch.special.entr(weights).sum(dim=-1)


def dead_share(mlp_kind: str, hidden) -> float:
    """The share of units that CLOSED_BELOW calls closed for every token. hidden: c_fc's output (..., mlp_width), in SwiGLU
    the gate's units before the others."""
    gate = hidden.chunk(2, dim=-1)[0] if mlp_kind == 'swiglu' else hidden
    return share_always(gate <= CLOSED_BELOW[mlp_kind])


def share_always(is_closed) -> float:
    """The share of units for which is_closed (..., units) is true for every token."""
    return float(is_closed.flatten(0, -2).all(dim=0).float().mean())


# -- the batch -------------------------------------------------------------------------------------------------------


def shifted_share(x, y) -> float:
    """The share of targets (B, T) that are the input's next token, of those whose next token is in sight; 1 for T = 1."""
    return float((y[:, :-1] == x[:, 1:]).float().mean()) if x.shape[1] > 1 else 1.0


def unigram_entropy(targets) -> float:
    """The lowest mean loss, in nats, that is possible on these targets for one who does not look at the inputs."""
    return float(entropy(targets.flatten().cpu().bincount().double() / targets.numel()))
