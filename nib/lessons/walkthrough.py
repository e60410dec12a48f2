"""One training step with real numbers, each computed twice: by formula, and by the training code.

The functions that compute by hand come first, then the lesson, as lines of text. `training` is the
Microscope of debug_training.py: a model, its batches, and single steps.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model import GPT
from nib.kernels.cross_entropy import IGNORED
from nib.lessons.examination import describe_batch, note

# The lesson follows the weight with the largest gradient in the first of these that has a gradient.
# With zero_init, blocks end in zeros, which let no gradient through.
PARAMETERS = (
    'transformer.h.0.mlp.c_fc.weight',
    'transformer.h.0.mlp.c_proj.weight',
    'transformer.wte.weight',
)
# The step of finite differences: in float64, neither rounding nor curvature matters.
SMALL = 1e-5
EPS = 1e-8  # of AdamW, as in nib/optim.py


# -- by hand ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamWStep:
    """One weight in one step of AdamW."""

    before: float
    gradient: float
    m: float  # moving average of the gradients
    v: float  # moving average of their squares
    m_hat: float  # both with bias correction
    v_hat: float
    decay: float
    update: float

    @property
    def after(self) -> float:
        return self.before + self.decay + self.update


@dataclass
class AdamWByHand:
    """AdamW for one weight, in Python floats (Loshchilov and Hutter 2019, algorithm 2)."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    m: float = 0.0  # after t steps, and so is v
    v: float = 0.0
    t: int = 0

    def step(self, weight: float, gradient: float) -> AdamWStep:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m_hat, v_hat = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        decay = -self.lr * self.weight_decay * weight
        update = -self.lr * m_hat / (math.sqrt(v_hat) + EPS)
        return AdamWStep(weight, gradient, self.m, self.v, m_hat, v_hat, decay, update)


@torch.no_grad()
def finite_difference(
    loss: Callable[[], torch.Tensor], parameter: torch.Tensor, index: tuple[int, ...]
) -> tuple[float, float, float]:
    """Returns (loss(w + h) - loss(w - h)) / 2h for one entry w of a parameter, and both losses."""
    weight = parameter[index].clone()
    parameter[index] = weight + SMALL
    plus = float(loss())
    parameter[index] = weight - SMALL
    minus = float(loss())
    parameter[index] = weight
    return (plus - minus) / (2 * SMALL), plus, minus


def double_copy(model: GPT) -> GPT:
    """Returns a copy of the model in float64 on the CPU, without dropout."""
    return copy.deepcopy(model).to('cpu').double().eval()


@dataclass(frozen=True)
class Weight:
    """The weight that the lesson follows: an entry of a parameter."""

    name: str  # of the parameter
    index: tuple[int, ...]

    @classmethod
    def with_largest_gradient(cls, model: GPT) -> 'Weight':
        """Chooses a weight of a model that has gradients."""
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        names = dict.fromkeys((*PARAMETERS, *grads))  # a changed model may have none of PARAMETERS
        with_gradient = (name for name in names if name in grads and grads[name].any())
        name = next(with_gradient, next(iter(grads)))
        grad = grads[name]
        index = torch.unravel_index(grad.abs().argmax(), grad.shape)
        return cls(name, tuple(int(i) for i in index))

    def value(self, model: GPT) -> float:
        return float(model.get_parameter(self.name).detach()[self.index])

    def gradient(self, model: GPT) -> float:
        return float(model.get_parameter(self.name).grad[self.index])

    def __str__(self) -> str:
        return f'{self.name}[{", ".join(map(str, self.index))}]'


def total_norm(model: GPT) -> float:
    """Returns the root of the sum of all squared gradients, computed in float64 on the CPU."""
    gradients = [p.grad.cpu().double() for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


# -- the lesson ------------------------------------------------------------------------------------


def walk_through(training) -> Iterator[str]:
    """Yields the lesson. Changes the model."""
    model = training.model.eval()
    x, y = training.batch()
    yield f'One step with real numbers: {training.describe()}'
    yield '\nTHE BATCH\n'
    yield from describe_batch(training)
    if model.config.dropout:
        yield 'Dropout is off here, so that every number can be computed twice.'
    counts = y != IGNORED
    end = 1 + int(counts[0].nonzero()[-1])  # the lesson follows the last target that counts
    kept = counts[:, :end].any(dim=1)  # the others have no loss
    x, y = x[kept, :end], y[kept, :end]
    training.accumulate([(x, y)])
    weight = Weight.with_largest_gradient(model)
    model.zero_grad(set_to_none=True)
    exact = double_copy(model)
    yield '\n1. FROM LOGITS TO THE LOSS\n'
    yield from explain_loss(exact, x.cpu(), y.cpu(), training.show_tokens, training.shown)
    yield '\n2. A GRADIENT, BY AUTOGRAD AND BY FINITE DIFFERENCES\n'
    yield from explain_gradient(exact, x.cpu(), y.cpu(), weight)
    del exact  # it is twice as large as the model
    yield '\n3. MICRO BATCHES: WHY THE LOSS IS DIVIDED\n'
    size = len(x) // min(4, len(x))
    micro_batches = [
        (x[i : i + size], y[i : i + size]) for i in range(0, len(x) - len(x) % size, size)
    ]
    yield from explain_accumulation(training, micro_batches, weight)
    yield '\n4. CLIPPING\n'
    yield from explain_clipping(training, [(x, y)], weight)
    yield '\n5. ADAMW\n'
    yield from explain_adamw(training, [[training.batch(number)] for number in range(3)], weight)


def explain_loss(
    model: GPT, x, y, show: Callable[[torch.Tensor], str], shown: int
) -> Iterator[str]:
    """Explains the loss of the last token of the first sequence, starting from its logits.

    x, y: token ids (B, T). show: converts token ids to text. shown: tokens of context to show.
    """
    with torch.no_grad():
        logits = model(x)  # (B, T, V)
    row, target = logits[0, -1], int(y[0, -1])
    total, probabilities = float(row.exp().sum()), row.softmax(dim=-1)
    most_likely = row.topk(min(4, len(row))).indices.tolist()
    yield note(
        f'The model has read ... {show(x[0, -shown:])} and gives every token of its vocabulary a '
        f'number, its logit. Softmax converts logits to probabilities: exp(logit) / sum of '
        f'exp(logit) over the vocabulary.'
    )
    yield f'\n{"token":>14}{"logit":>10}{"exp(logit)":>14}{"probability":>13}'
    for token in most_likely + [target] * (target not in most_likely):
        mark = '  <- the target, the actual next token' if token == target else ''
        yield (
            f'{show(torch.tensor([token])):>14}{row[token]:10.4f}{row[token].exp():14.4f}'
            f'{probabilities[token]:13.6f}{mark}'
        )
    yield f'{f"all {len(row):,}":>14}{"":10}{total:14.4f}{1.0:13.6f}\n'
    p, own = float(probabilities[target]), float(row.logsumexp(dim=0) - row[target])
    mean = float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED))
    counted = int((y != IGNORED).sum())
    yield f'loss of this token    -ln p = -ln {p:.6g} = {own:.6f} nats'
    yield f'loss of the batch     {mean:.6f} nats, the mean of -ln p over {counted:,} tokens'
    yield f'a uniform guess       ln {len(row):,} = {math.log(len(row)):.6f} nats\n'
    yield (
        'The loss measures surprise: it is 0 if the model was certain of the token, and grows as '
        'the probability falls.'
    )


def explain_gradient(model: GPT, x, y, weight: Weight) -> Iterator[str]:
    """Compares autograd with a formula for a token's logits, and with differences for one weight.

    model: in float64, with no gradients yet.
    """

    def loss():  # not model(x, y), whose loss is float32
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED)

    with torch.no_grad():
        logits = model(x[:1])[0, -1]
    logits.requires_grad_()
    F.cross_entropy(logits[None], y[:1, -1]).backward()
    formula = logits.detach().softmax(dim=-1) - F.one_hot(y[0, -1], len(logits))
    target, other = int(y[0, -1]), int(formula.argmax())
    yield (
        'A gradient says how the loss changes with a number: change of the loss = gradient * '
        'small change of the number.\n'
    )
    yield f'{"the token above: gradient of the logit of":44}{"formula":>14}{"autograd":>14}'
    yield (
        f'{"the target, p - 1":44}{formula[target]:14.8f}{logits.grad[target]:14.8f}'
        f'   below 0: raise it'
    )
    yield (
        f'{"the most likely other token, p":44}{formula[other]:14.8f}{logits.grad[other]:14.8f}'
        f'   above 0: lower it\n'
    )
    loss().backward()
    by_autograd = weight.gradient(model)
    parameter = model.get_parameter(weight.name)
    by_difference, plus, minus = finite_difference(loss, parameter, weight.index)
    apart = abs(by_autograd - by_difference) / max(abs(by_autograd), 1e-300)
    yield note(
        f'One weight w, {weight} = {weight.value(model):.6f}, the one '
        f'with the largest gradient of its matrix: move it by h = {SMALL:g} in both directions, '
        f'and compute the loss of the batch.'
    )
    yield f'\nloss(w + h)                         {plus:.14f}'
    yield f'loss(w - h)                         {minus:.14f}'
    yield f'(loss(w + h) - loss(w - h)) / 2h    {by_difference:+.10e}   finite difference'
    yield (
        f'loss.backward()                     {by_autograd:+.10e}   autograd; relative difference '
        f'{apart:.0e}\n'
    )
    yield note(
        f'Finite differences need two forward passes for each of '
        f'{sum(p.numel() for p in model.parameters()):,} weights. The backward pass computes all '
        f'gradients by the chain rule, in about the time of two forward passes. (The numbers are '
        f'float64: in float32, rounding would hide the difference of the losses.)'
    )


def explain_accumulation(training, micro_batches: Sequence, weight: Weight) -> Iterator[str]:
    """Compares the gradients that train.py accumulates with two others.

    These are the gradients of the whole batch, and of losses that are not divided. Leaves no
    gradients.
    """
    model, n = training.model, len(micro_batches)
    uneven = len({int((y != IGNORED).sum()) for _, y in micro_batches}) > 1

    def row(label):
        norm, gradient = total_norm(model), weight.gradient(model)
        model.zero_grad(set_to_none=True)
        return f'{label:36}{gradient:24.8f}{norm:24.4f}'

    yield (
        f'A batch that does not fit into memory is split into micro batches, {n} here, whose '
        f'gradients backward() adds up.\n'
    )
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
        f'With the division, the sum is the gradient of the whole batch, except for rounding'
        f'{" and the equal weight of all micro batches, however few targets they have" * uneven}. '
        f'It is shorter than most of its parts, which partly cancel. Without the division, the sum '
        f'is {n} times too long, and a step of SGD would go {n} times too far. AdamW would hardly '
        f'change, because it divides by the size of the gradient, but every norm that is logged or '
        f'clipped would be wrong.'
    )


def explain_clipping(training, micro_batches: Sequence, weight: Weight) -> Iterator[str]:
    """Compares clip_grad_norm_, which train_step calls, with the formula. Leaves no gradients."""
    model, grad_clip = training.model, training.values['grad_clip']
    training.accumulate(micro_batches)
    norm, before = total_norm(model), weight.gradient(model)
    factor = min(1.0, (grad_clip or math.inf) / (norm + 1e-6))  # torch adds 1e-6 too
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    clipped, after = total_norm(model), weight.gradient(model)
    model.zero_grad(set_to_none=True)
    limit = f'limits it to {grad_clip:g}' if grad_clip else '0 does not limit it'
    yield f'The norm is the root of the sum of all squared gradients; grad_clip {limit}.\n'
    yield f'{"":28}{"by hand":>16}{"torch":>16}'
    yield f'{"norm before":28}{norm:16.8f}'
    factor_of_torch = clipped / norm if norm else 1.0
    yield f'{"factor, at most 1":28}{factor:16.8f}{factor_of_torch:16.8f}   grad_clip / norm'
    yield (
        f'{"gradient of the weight":28}{before * factor:16.8f}{after:16.8f}   {before:.8f} before'
    )
    yield f'{"norm after":28}{norm * factor:16.8f}{clipped:16.8f}\n'
    if factor < 1:
        yield note(
            'All gradients are multiplied by the same factor, so the direction of the step stays '
            'the same, and no unusual batch can move the weights far.'
        )
    else:
        yield 'The norm is small enough: nothing is clipped in this step.'


def explain_adamw(training, steps: Sequence[Sequence], weight: Weight) -> Iterator[str]:
    """Follows one weight by hand through real training steps. Changes the model.

    steps: the micro batches of each step.
    """
    model, grad_clip = training.model, training.values['grad_clip']
    optimizer, index = training.new_optimizer('adamw'), weight.index
    parameter = model.get_parameter(weight.name)
    part, state = next(
        (part, state) for part in optimizer.parts for p, state in part.state() if p is parameter
    )
    lr, (beta1, beta2), decay = optimizer.lr, part.betas, part.weight_decay
    m, v = float(state['exp_avg'][index]), float(state['exp_avg_sq'][index])
    by_hand = AdamWByHand(lr, beta1, beta2, decay, m, v, int(state['step']))
    first = by_hand.t + 1
    hand, torchs = [], []
    for micro_batches in steps:
        training.accumulate(micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        hand.append(by_hand.step(weight.value(model), weight.gradient(model)))
        model.zero_grad(set_to_none=True)
        training.step(optimizer, micro_batches)  # changes the tensors of the state
        m, v = float(state['exp_avg'][index]), float(state['exp_avg_sq'][index])
        torchs.append((m, v, weight.value(model)))

    def row(label, formula, cells):
        return f'{label:14}{formula:42}' + ''.join(f'{cell:>17}' for cell in cells)

    def figures(label, formula, key, form):
        return row(label, formula, [form.format(getattr(step, key)) for step in hand])

    if training.values['optimizer'] == 'muon':
        yield note(
            "In this run, Muon updates the blocks' matrices and AdamW the rest. Here, AdamW "
            'updates all of them.'
        )
    elif training.values['optimizer'] != 'adamw':
        yield note(
            f'This run uses the optimizer {training.values["optimizer"]}. Here, AdamW updates all '
            f'weights instead.'
        )
    yield (
        f'The weight in {len(steps)} real steps on different batches, with learning rate {lr:g}, '
        f'beta1 {beta1:g}, beta2 {beta2:g} and weight decay {decay:g}.\n'
    )
    yield row('', '', [f't = {t}' for t in range(first, first + len(steps))])
    yield figures('w', 'the weight', 'before', '{:.8f}')
    yield figures('g', 'its gradient, clipped', 'gradient', '{:.6e}')
    yield figures('m', f'{beta1:g} m + {1 - beta1:.3g} g', 'm', '{:.6e}')
    yield figures('v', f'{beta2:g} v + {1 - beta2:.3g} g^2', 'v', '{:.6e}')
    yield figures('m_hat', f'm / (1 - {beta1:g}^t)', 'm_hat', '{:.6e}')
    yield figures('v_hat', f'v / (1 - {beta2:g}^t)', 'v_hat', '{:.6e}')
    yield figures('decay', f'-{lr:g} * {decay:g} w', 'decay', '{:.8f}')
    yield figures('update', f'-{lr:g} m_hat / (sqrt(v_hat) + {EPS:g})', 'update', '{:.8f}')
    yield figures('w by hand', 'w + decay + update', 'after', '{:.8f}')
    yield row(
        'w by torch',
        "after train_step, by torch's fused kernel",
        [f'{theirs[2]:.8f}' for theirs in torchs],
    )
    apart = []
    for step, theirs in zip(hand, torchs):
        ours = (step.m, step.v, step.after)
        apart.append(f'{max(abs(a - b) for a, b in zip(ours, theirs)):.1e}')
    yield row('difference', 'the largest of m, v and w', apart)
    yield '\n' + note(
        f'm is a moving average of the gradients, and v of their squares. Both start at 0, so they '
        f'are too small at first. The division by 1 - beta^t, called bias correction, compensates '
        f'for that. At t = 1, it gives m_hat = g and sqrt(v_hat) = |g|, so the size of the update '
        f'is the learning rate {lr:g}, whatever the gradient. Later, if gradients disagree, m_hat '
        f'is small compared with sqrt(v_hat), and so is the update.'
    )
    text = (
        f'All these steps use the full learning rate {lr:g}, while the rate of the run itself '
        f'depends on the step.'
    )
    if training.values['warmup_iters'] and not training.has_memory:
        steps_of_warmup = training.values['warmup_iters'] + 1
        text += (
            f' It warms up: in its first step, the rate is {lr:g} / {steps_of_warmup} = '
            f'{lr / steps_of_warmup:.3g}, and the update of this weight is '
            f'{hand[0].update / steps_of_warmup:.6f} instead of {hand[0].update:.6f}. Section 10 '
            f'of docs/training_loop.md shows that step.'
        )
    yield note(text)
