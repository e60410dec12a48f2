"""One training step in real numbers, each made twice: by the formula, and by what training really calls.

What computes the numbers by hand comes first, then the lesson, in lines to read. `training` is debug_training.py's: the model,
its batches, and single steps of it.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model import GPT
from nib.lessons.examination import describe_batch, note

# The first of these that has a gradient: its largest entry is followed through the step. Fresh blocks may end in zeros, which
# let no gradient through to the layers before.
PARAMETERS = (
    'transformer.h.0.mlp.c_fc.weight',
    'transformer.h.0.mlp.c_proj.weight',
    'transformer.wte.weight',
)
SMALL = 1e-5  # how far a weight is moved to see what the loss does: in float64 neither rounding nor curvature matters


# -- by hand ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamWStep:
    """One weight in one step of AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    before: float
    gradient: float
    m: float  # mean of the gradients, the older the less
    v: float  # mean of their squares
    m_hat: float  # both as if they had not begun at 0
    v_hat: float
    decay: float
    update: float

    @property
    def after(self) -> float:
        return self.before + self.decay + self.update


def adamw_by_hand(
    weight: float,
    gradient: float,
    m: float,
    v: float,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> AdamWStep:
    """Step t, from 1, in Python's floats. m, v: from the step before, 0 at first."""
    m = betas[0] * m + (1 - betas[0]) * gradient
    v = betas[1] * v + (1 - betas[1]) * gradient**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return AdamWStep(
        weight,
        gradient,
        m,
        v,
        m_hat,
        v_hat,
        -lr * weight_decay * weight,
        -lr * m_hat / (math.sqrt(v_hat) + eps),
    )


@torch.no_grad()
def finite_difference(
    loss: Callable[[], torch.Tensor], parameter: torch.Tensor, index: tuple[int, ...]
) -> tuple[float, float, float]:
    """(loss(w + SMALL) - loss(w - SMALL)) / (2 SMALL) for the entry w of a parameter, and the two losses."""
    weight, losses = parameter[index].clone(), []
    for moved in (weight + SMALL, weight - SMALL):
        parameter[index] = moved
        losses.append(float(loss()))
    parameter[index] = weight
    return (losses[0] - losses[1]) / (2 * SMALL), *losses


def double_copy(model: GPT) -> GPT:
    """The model in float64 on the CPU, without dropout."""
    return copy.deepcopy(model).to('cpu').double().eval()


def largest_gradient(parameter: torch.Tensor) -> tuple[int, ...]:
    """Where the gradient's largest entry stands."""
    return tuple(
        int(i) for i in torch.unravel_index(parameter.grad.abs().argmax(), parameter.shape)
    )


# -- the lesson ------------------------------------------------------------------------------------------------------


def walk_through(training) -> Iterator[str]:
    """All of the lesson. Changes the model."""
    model, clip = training.model.eval(), training.values['grad_clip']
    x, y = training.batch()
    yield f'One step with real numbers: {training.describe()}'
    yield '\nTHE BATCH\n'
    yield from describe_batch(training)
    if model.config.dropout:
        yield 'Dropout is off here, so that each number can be had twice.'
    training.accumulate([(x, y)])
    name = next(
        (name for name in PARAMETERS if model.get_parameter(name).grad.any()), PARAMETERS[-1]
    )
    index = largest_gradient(model.get_parameter(name))
    model.zero_grad(set_to_none=True)
    exact = double_copy(model)
    yield '\n1. FROM LOGITS TO THE LOSS\n'
    yield from explain_loss(exact, x.cpu(), y.cpu(), training.show_tokens, training.shown)
    yield '\n2. A GRADIENT, BY AUTOGRAD AND BY DIFFERENCES\n'
    yield from explain_gradient(exact, x.cpu(), y.cpu(), name, index)
    del exact  # twice the size of the model
    yield '\n3. MICRO BATCHES: WHY THE LOSS IS DIVIDED\n'
    size = len(x) // min(4, len(x))
    micro_batches = [
        (x[i : i + size], y[i : i + size]) for i in range(0, len(x) - len(x) % size, size)
    ]
    yield from explain_accumulation(training, micro_batches, name, index)
    yield '\n4. CLIPPING\n'
    yield from explain_clipping(training, [(x, y)], clip, name, index)
    yield '\n5. ADAMW\n'
    yield from explain_adamw(
        training, [[training.batch(number)] for number in range(3)], clip, name, index
    )


def explain_loss(
    model: GPT, x, y, show: Callable[[torch.Tensor], str], shown: int
) -> Iterator[str]:
    """From the logits of the first sequence's last position to its loss. show: token ids as a person reads them;
    shown: so many of the context."""
    with torch.no_grad():
        logits = model(x)  # (B, T, V)
    row, target = logits[0, -1], int(y[0, -1])
    total, probabilities = float(row.exp().sum()), row.softmax(dim=-1)
    likeliest = row.topk(min(4, len(row))).indices.tolist()
    yield note(
        f'The model has read ... {show(x[0, -shown:])} and gives every token of its vocabulary a number, its logit. '
        f'Softmax makes probabilities of them: exp(logit) / sum of exp(logit) over the vocabulary.'
    )
    yield f'\n{"token":>14}{"logit":>10}{"exp(logit)":>14}{"probability":>13}'
    for token in likeliest + [target] * (target not in likeliest):
        yield (
            f'{show(torch.tensor([token])):>14}{row[token]:10.4f}{row[token].exp():14.4f}{probabilities[token]:13.6f}'
            + '  <- the target, what really comes next' * (token == target)
        )
    yield f'{f"all {len(row):,}":>14}{"":10}{total:14.4f}{1.0:13.6f}\n'
    p, own = float(probabilities[target]), float(row.logsumexp(dim=0) - row[target])
    mean = float(F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    yield f'loss of this token    -log p = -ln {p:.6g} = {own:.6f} nats'
    yield f'loss of the batch     {mean:.6f} nats, the mean of -log p over its {y.numel():,} tokens'
    yield f'a guess among all     ln {len(row):,} = {math.log(len(row)):.6f} nats\n'
    yield 'The loss is the surprise at what comes: 0 where it was held for certain, and more the less likely it was held.'


def explain_gradient(model: GPT, x, y, name: str, index: tuple[int, ...]) -> Iterator[str]:
    """The gradients of a token's logits by the formula, and of one weight by differences, beside autograd. model: in float64,
    with no gradients yet."""

    def loss():  # not model(x, y), whose loss is float32
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    with torch.no_grad():
        logits = model(x[:1])[0, -1]
    logits.requires_grad_()
    F.cross_entropy(logits[None], y[:1, -1]).backward()
    formula, target = (
        logits.detach().softmax(dim=-1) - F.one_hot(y[0, -1], len(logits)),
        int(y[0, -1]),
    )
    other = int(formula.argmax())
    yield 'A gradient says how the loss changes with a number: change of the loss = gradient * small change of the number.\n'
    yield f'{"the token above: its loss by the logit of":44}{"formula":>14}{"autograd":>14}'
    yield f'{"the target, p - 1":44}{formula[target]:14.8f}{logits.grad[target]:14.8f}   below 0: raise it'
    yield f'{"the likeliest other token, p":44}{formula[other]:14.8f}{logits.grad[other]:14.8f}   above 0: lower it\n'
    loss().backward()
    parameter = model.get_parameter(name)
    by_autograd, (by_difference, plus, minus) = (
        float(parameter.grad[index]),
        finite_difference(loss, parameter, index),
    )
    apart = abs(by_autograd - by_difference) / max(abs(by_autograd), 1e-300)
    yield note(
        f'One weight w, {entry(name, index)} = {float(parameter[index].detach()):.6f}, the one with the largest gradient '
        f'of its matrix: move it by h = {SMALL:g} both ways and look at the loss of the batch.'
    )
    yield f'\nloss(w + h)                         {plus:.14f}'
    yield f'loss(w - h)                         {minus:.14f}'
    yield f'(loss(w + h) - loss(w - h)) / 2h    {by_difference:+.10e}   finite difference'
    yield f'loss.backward()                     {by_autograd:+.10e}   autograd; a part of {apart:.0e} apart\n'
    yield note(
        f'Differences take two forward passes for each of {sum(p.numel() for p in model.parameters()):,} weights. '
        f'Backward finds all gradients by the chain rule, in the time of about two. (These are float64: in float32 '
        f'rounding would hide the difference of the losses.)'
    )


def explain_accumulation(
    training, micro_batches: Sequence, name: str, index: tuple[int, ...]
) -> Iterator[str]:
    """Gradients of micro batches summed by train.py's accumulate_gradients, beside the whole batch's and beside the sum of
    losses that nobody divided. Leaves no gradients."""
    model, parameter, n = training.model, training.model.get_parameter(name), len(micro_batches)

    def row(label):
        norm, gradient = total_norm(model), float(parameter.grad[index])
        model.zero_grad(set_to_none=True)
        return f'{label:36}{gradient:24.8f}{norm:24.4f}'

    yield f'A batch that is too large for the memory comes in micro batches, {n} here, whose gradients backward() adds up.\n'
    yield f'{"":36}{"gradient of the weight":>24}{"norm of all gradients":>24}'
    for number, batch in enumerate(micro_batches, start=1):
        loss = model(*batch)
        loss.backward()
        yield row(f'micro batch {number} alone, loss {float(loss.detach()):.4f}')
    for batch in micro_batches:  # the mistake
        model(*batch).backward()
    undivided = row('sum of loss, not divided')
    training.accumulate(micro_batches)
    yield row(f'sum of loss / {n}: train.py')
    training.accumulate([tuple(torch.cat(part) for part in zip(*micro_batches))])
    yield row('the whole batch at once')
    yield undivided + '\n'
    yield note(
        f"Divided, the sum is the whole batch's gradient but for rounding, and shorter than most of its parts, which "
        f'partly cancel. Not divided it is {n} times too long: SGD would step {n} times too far. AdamW would hardly '
        f'notice, as it divides by the size of the gradient; but every norm that is logged or clipped would be wrong.'
    )


def explain_clipping(
    training, micro_batches: Sequence, grad_clip: float, name: str, index: tuple[int, ...]
) -> Iterator[str]:
    """torch's clip_grad_norm_, which train_step calls, beside the formula. Leaves no gradients."""
    model, parameter = training.model, training.model.get_parameter(name)
    training.accumulate(micro_batches)
    norm, before = total_norm(model), float(parameter.grad[index])
    factor = min(
        1.0, (grad_clip or math.inf) / (norm + 1e-6)
    )  # 1e-6: as torch has it, against a division by 0
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    clipped, after = total_norm(model), float(parameter.grad[index])
    model.zero_grad(set_to_none=True)
    allowed = f'{grad_clip:g} allows no larger one' if grad_clip else '0 allows any'
    yield f'The norm is the root of the sum of all squared gradients; grad_clip = {allowed}.\n'
    yield f'{"":28}{"by hand":>16}{"torch":>16}'
    yield f'{"norm before":28}{norm:16.8f}'
    yield f'{"factor, at most 1":28}{factor:16.8f}{clipped / norm if norm else 1.0:16.8f}   grad_clip / norm'
    yield f'{"gradient of the weight":28}{before * factor:16.8f}{after:16.8f}   {before:.8f} before'
    yield f'{"norm after":28}{norm * factor:16.8f}{clipped:16.8f}\n'
    yield (
        'All gradients become smaller by one factor, so their direction stays: no rare, wild batch can throw the weights far.'
        if factor < 1
        else 'The gradients are short enough: nothing is clipped in this step.'
    )


def explain_adamw(
    training, steps: Sequence[Sequence], grad_clip: float, name: str, index: tuple[int, ...]
) -> Iterator[str]:
    """Real training steps, each on its micro batches, with one weight followed by hand. Changes the model."""
    model, parameter, optimizer = (
        training.model,
        training.model.get_parameter(name),
        training.new_optimizer('adamw'),
    )
    part, state = next(
        (part, state) for part in optimizer.parts for p, state in part.state() if p is parameter
    )
    lr, (beta1, beta2), eps, decay = optimizer.lr, part.betas, 1e-8, part.weight_decay
    m, v, first = (
        float(state['exp_avg'][index]),
        float(state['exp_avg_sq'][index]),
        int(state['step']) + 1,
    )
    hand, torchs = [], []
    for t, micro_batches in enumerate(steps, start=first):
        training.accumulate(micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        gradient, weight = float(parameter.grad[index]), float(parameter[index].detach())
        model.zero_grad(set_to_none=True)
        hand.append(adamw_by_hand(weight, gradient, m, v, t, lr, (beta1, beta2), eps, decay))
        m, v = hand[-1].m, hand[-1].v
        training.step(optimizer, micro_batches)  # which changes the state's tensors
        torchs.append(
            (
                float(state['exp_avg'][index]),
                float(state['exp_avg_sq'][index]),
                float(parameter[index].detach()),
            )
        )

    def row(label, formula, cells):
        return f'{label:14}{formula:42}' + ''.join(f'{cell:>17}' for cell in cells)

    def figures(label, formula, key, form):
        return row(label, formula, [form.format(getattr(step, key)) for step in hand])

    if training.values['optimizer'] == 'muon':
        yield note(
            "In this run Muon moves the blocks' matrices, and AdamW the rest. Here AdamW moves all of them."
        )
    elif training.values['optimizer'] != 'adamw':
        yield note(
            f'This run trains with {training.values["optimizer"]}. Here AdamW moves all weights instead.'
        )
    yield (
        f'The weight in {len(steps)} real steps on as many batches, with learning rate {lr:g}, beta1 {beta1:g}, beta2 '
        f'{beta2:g} and weight decay {decay:g}.\n'
    )
    yield row('', '', [f't = {t}' for t in range(first, first + len(steps))])
    yield figures('w', 'the weight', 'before', '{:.8f}')
    yield figures('g', 'its gradient, clipped', 'gradient', '{:.6e}')
    yield figures('m', f'{beta1:g} m + {1 - beta1:.3g} g', 'm', '{:.6e}')
    yield figures('v', f'{beta2:g} v + {1 - beta2:.3g} g^2', 'v', '{:.6e}')
    yield figures('m_hat', f'm / (1 - {beta1:g}^t)', 'm_hat', '{:.6e}')
    yield figures('v_hat', f'v / (1 - {beta2:g}^t)', 'v_hat', '{:.6e}')
    yield figures('decay', f'-{lr:g} * {decay:g} w', 'decay', '{:.8f}')
    yield figures('update', f'-{lr:g} m_hat / (sqrt(v_hat) + {eps:g})', 'update', '{:.8f}')
    yield figures('w by hand', 'w + decay + update', 'after', '{:.8f}')
    yield row(
        'w by torch',
        "after train_step, by torch's fused kernel",
        [f'{theirs[2]:.8f}' for theirs in torchs],
    )
    yield row(
        'apart',
        'the most of m, v and w',
        [
            f'{max(abs(a - b) for a, b in zip((step.m, step.v, step.after), theirs)):.1e}'
            for step, theirs in zip(hand, torchs)
        ],
    )
    yield '\n' + note(
        f'm is a running mean of the gradients, v of their squares. Both begin at 0, so at first they are too small, and the '
        f'division by 1 - beta^t, bias correction, mends that. At t = 1 it makes m_hat = g and sqrt(v_hat) = |g|: whatever the '
        f'gradient, the update is the learning rate {lr:g}. Later, where gradients disagree, m_hat is small beside sqrt(v_hat), '
        f'and so is the update.'
    )


def total_norm(model: GPT) -> float:
    """The root of the sum of all squared gradients, added up in float64 on the CPU."""
    return math.sqrt(
        sum(
            float(p.grad.cpu().double().square().sum())
            for p in model.parameters()
            if p.grad is not None
        )
    )


def entry(name: str, index: tuple[int, ...]) -> str:
    return f'{name}[{", ".join(map(str, index))}]'
