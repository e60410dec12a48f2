"""The healthy ranges of what one batch shows of a model, and what to do about a figure outside of its own.

The ranges are rules of thumb, wide enough to leave every default of this project alone.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GRAD_NORM = (0.1, 10.0)  # of all parameters together, in a model that has begun to learn
UPDATE_RATIO = (0.001, 0.01)  # per step, in a run that is well under way
MUON_RATIO = (
    0.001,
    0.05,
)  # of Muon's matrices, whose updates go no farther in one direction than in another
UPDATE_RANGES = {
    'adamw': UPDATE_RATIO,
    'muon': MUON_RATIO,
}  # of train.py's optimizers; of another nothing is known
APART = 4.0  # an embedding's or the head's may be so many times larger: its rows are of one token each, and move apart
SLACK = 5.0  # an update ratio is marked when it is so many times out: a few times is no fault
DEAD = 0.1  # share of an MLP's units
ENTROPY = 0.05  # of attention, as a share of the largest possible
MEMORISED = 2 / 3  # of the loss that is possible without looking at the inputs


@dataclass(frozen=True)
class ParameterStats:
    """One parameter. Its gradient is d loss / d weight, in nats per unit of weight."""

    name: str
    shape: tuple[int, ...]
    rms: float  # root mean square of the weights
    grad_mean: float
    grad_std: float
    grad_max: float  # the largest absolute value
    grad_norm: float  # root of the sum of squares
    update_ratio: float | None = (
        None  # ||w after - w before|| / ||w before||; None before a step, and where all weights were 0
    )
    behind_zeros: bool = (
        False  # its block passes it on through a matrix of zeros alone, which no gradient passes
    )


@dataclass(frozen=True)
class LayerStats:
    """The residual stream behind the embedding, a block or the last norm; what only blocks have is None elsewhere."""

    name: str
    mean: float
    std: float
    attention_std: float | None = None  # of what attention adds to the stream
    mlp_std: float | None = None  # of what the MLP adds to it
    dead: float | None = None  # share of the MLP's hidden units that are closed for every token
    entropy: float | None = (
        None  # of the attention weights, in nats, mean over sequences, heads and positions
    )
    attention_logit: float | None = None  # the largest score before the softmax, in absolute value


@dataclass(frozen=True)
class OutOfRange:
    """Something out of its range: what, and what to change, a sentence."""

    what: str
    remedy: str


# -- ranges ----------------------------------------------------------------------------------------------------------


def largest_entropy(n_positions: int) -> float:
    """The largest mean entropy of causal attention: position t, from 1, has t places to look at, so the mean of ln t."""
    return math.lgamma(n_positions + 1) / n_positions


def start_tolerance(n_embd: int, n_tokens: int) -> float:
    """How far from ln(vocab_size) a fresh model's loss, the mean over n_tokens, may be, in nats.

    Its logits, sums of n_embd products of a normalised activation and a weight of standard deviation 0.02, have the variance
    s2 = 0.02^2 * n_embd. The mean of exp(logit) is exp(s2 / 2), so the loss is s2 / 2 above the ln(vocab_size) of equal
    logits: twice that is allowed for, three standard errors of the targets' mean logit, and 0.1 for a tied head, whose first
    guess is its own input.
    """
    variance = 0.02**2 * n_embd
    return 0.1 + variance + 3 * math.sqrt(variance / n_tokens)


def grad_norm_limits(n_layer: int, n_embd: int, fresh: bool) -> tuple[float, float]:
    """The range of the norm of all gradients together. A fresh model's are longer, as all tokens pull it the same way, towards
    the common ones: 0.1 to 0.6 of sqrt(n_layer * n_embd), measured on text from 128 wide and 4 layers to 1600 and 16."""
    low, high = GRAD_NORM
    return low, max(high, math.sqrt(n_layer * n_embd)) if fresh else high


def first_step_factor(beta1: float) -> float:
    """How much larger AdamW's first step is than later ones.

    At the first, m / sqrt(v) is 1 or -1 for every weight. Over gradients that do not know each other, m has the variance
    (1 - beta1) / (1 + beta1) of one gradient, the sum of (1 - beta1)^2 beta1^2k over k, and v is that of one.
    """
    return math.sqrt((1 + beta1) / (1 - beta1))


def update_limits(
    beta1: float, first: bool, learnt: bool, name: str = '', method: str = 'adamw'
) -> tuple[float, float]:
    """The update ratios, at the full learning rate, outside of which a matrix is marked.

    first: the optimizer has no memory yet; only AdamW's step is larger then. learnt: the weights are not fresh; where a new
    optimizer starts from such, its steps may be as small as one likes. name: the parameter's; an embedding's ratio may be
    small, as a batch has few tokens. method: what moves it; of one that is not in UPDATE_RANGES every ratio is inside.
    """
    if method not in UPDATE_RANGES:
        return 0.0, math.inf
    factor = first_step_factor(beta1) if first and method == 'adamw' else 1.0
    low, high = UPDATE_RANGES[method]
    if name.endswith(('wte.weight', 'wpe.weight', 'lm_head.weight')):
        high *= APART
    small = first and learnt or name.endswith(('wte.weight', 'wpe.weight'))
    return (0.0 if small else low / SLACK * factor), high * SLACK * factor


# -- marks, and what they mean ---------------------------------------------------------------------------------------


def mark_parameter(row: ParameterStats, limits: tuple[float, float]) -> str:
    """What is wrong with a parameter's gradient or update, or ''. Only matrices and embeddings have an update ratio with a
    range: biases start at 0 and gains at 1, so theirs says nothing."""
    if not math.isfinite(row.rms):
        return 'weights not finite'
    if not math.isfinite(row.grad_norm):
        return 'gradient not finite'
    if row.grad_norm == 0.0:
        return '' if row.behind_zeros else 'no gradient'
    if len(row.shape) < 2 or row.update_ratio is None:
        return ''
    low, high = limits
    return (
        'update too large'
        if row.update_ratio > high
        else 'update too small'
        if row.update_ratio <= low
        else ''
    )


def mark_layer(row: LayerStats, n_positions: int) -> str:
    """What is wrong with a layer's activations, or ''."""
    if not all(map(math.isfinite, (row.mean, row.std))):
        return 'not finite'
    if row.std == 0.0:
        return 'nothing passes'
    marks = []
    if row.dead is not None and row.dead > DEAD:
        marks.append('dead units')
    if (
        row.entropy is not None
        and n_positions > 1
        and row.entropy < ENTROPY * largest_entropy(n_positions)
    ):
        marks.append('attention collapsed')
    return ', '.join(marks)


def judge_parameters(
    rows: Iterable[ParameterStats], limits: Mapping[str, tuple[float, float]], learning_rate: float
) -> list[OutOfRange]:
    """limits: name of the parameter -> its update_limits."""
    marked = {}
    for row in rows:
        if mark := mark_parameter(row, limits[row.name]):
            marked.setdefault(mark, []).append(row)
    return [_explain_mark(mark, rows, limits, learning_rate) for mark, rows in marked.items()]


def _explain_mark(
    mark: str,
    rows: list[ParameterStats],
    limits: Mapping[str, tuple[float, float]],
    learning_rate: float,
) -> OutOfRange:
    count = f'{len(rows)} parameter{"s" * (len(rows) > 1)}'
    named = (
        f'{mark}: {count}, the first is {rows[0].name}'
        if len(rows) > 1
        else f'{mark}: {rows[0].name}'
    )
    if mark == 'weights not finite':
        return OutOfRange(
            named, 'Start anew, or from an earlier checkpoint, with a lower learning_rate'
        )
    if mark == 'gradient not finite':
        return OutOfRange(
            named, 'See where weights or activations stop being finite, and try dtype float32'
        )
    if mark == 'no gradient':
        return OutOfRange(
            named,
            'See whether the loss depends on them at all: behind dead units or a matrix of zeros, or detached, '
            'nothing learns',
        )
    large = mark == 'update too large'
    worst = (
        max(rows, key=lambda row: row.update_ratio / limits[row.name][1])
        if large
        else min(rows, key=lambda row: row.update_ratio)
    )
    low, high = limits[worst.name]
    what = f'{mark} in {count}: {worst.update_ratio:.2g} in {worst.name}'
    if worst.update_ratio == 0.0:
        return OutOfRange(
            what,
            'Raise learning_rate, which is 0'
            if learning_rate == 0.0
            else 'See whether the optimizer is given this parameter: it has a gradient, and the step does not move it',
        )
    wanted = high if large else math.sqrt(low * high)
    return OutOfRange(
        what,
        f'{"Lower" if large else "Raise"} learning_rate {learning_rate:g}, for instance to '
        f'{learning_rate * wanted / worst.update_ratio:.0e}',
    )


def judge_layers(rows: Iterable[LayerStats], n_positions: int) -> list[OutOfRange]:
    marks = [(row.name, mark_layer(row, n_positions)) for row in rows]
    findings = []
    for kind, remedy in (
        (
            'not finite',
            'The numbers are too large for the dtype: try dtype float32, and look at the layer before',
        ),
        (
            'nothing passes',
            'All activations are the same number: look at the weights of this layer and the one before',
        ),
        (
            'dead units',
            'Lower learning_rate or raise warmup_iters: large steps can close units for good; or take mlp gelu',
        ),
        (
            'attention collapsed',
            'Each position looks at one place only: set qk_norm, or lower learning_rate',
        ),
    ):
        if names := [name for name, mark in marks if kind in mark]:
            findings.append(
                OutOfRange(f'{kind} in {", ".join(names[:4])}{" ..." * (len(names) > 4)}', remedy)
            )
    return findings


def judge_grad_norm(norm: float, limits: tuple[float, float]) -> list[OutOfRange]:
    low, high = limits
    if norm > high:
        return [
            OutOfRange(
                f'gradient norm {norm:.3g}, above {high:.3g}',
                'A batch of few tokens can have that; else find the rows whose gradient stands out, and see whether '
                'their weights, or those before them, are too large. grad_clip 1 keeps such a batch from doing harm',
            )
        ]
    if norm < low:
        return [
            OutOfRange(
                f'gradient norm {norm:.3g}, below {low:.3g}',
                'Little is learnt here: the model knows the batch already, or its activations are dead, or its logits '
                'as good as certain',
            )
        ]
    return (
        []
        if math.isfinite(norm)
        else [OutOfRange(f'gradient norm {norm}', 'See where the activations stop being finite')]
    )


def judge_start(loss: float, vocab_size: int, tolerance: float | None) -> list[OutOfRange]:
    """tolerance: of a fresh model; None for one that has learnt and must be better than a guess."""
    guess = math.log(vocab_size)
    if tolerance is None and not loss < guess:
        return [
            OutOfRange(
                f'loss at the start {loss:.3f}, where a guess has {guess:.3f}',
                'The model is worse than one that knows nothing: see that the text is of the kind it was trained on',
            )
        ]
    if tolerance is None or abs(loss - guess) <= tolerance:
        return []
    if loss < guess:
        return [
            OutOfRange(
                f'loss at the start {loss:.3f}, below ln(vocab_size) = {guess:.3f}',
                'A fresh model cannot know that: see whether the target leaks into what it reads, or is its input, not '
                'moved by one',
            )
        ]
    return [
        OutOfRange(
            f'loss at the start {loss:.3f}, above ln(vocab_size) = {guess:.3f}',
            'A fresh model should be undecided: see whether its weights are too large (weight rms), above all those of '
            'the head',
        )
    ]


def judge_shift(share: float) -> list[OutOfRange]:
    return (
        []
        if share == 1.0
        else [
            OutOfRange(
                f'only {share:.1%} of the targets are the next token of the input',
                'Targets must be the inputs moved by one: y[t] = x[t + 1]',
            )
        ]
    )


def judge_memorising(losses: Mapping[int, float], goal: float) -> list[OutOfRange]:
    """losses: step -> loss before it on the one batch that all steps learn from, from step 0 on. goal: MEMORISED times what is
    possible without looking at the inputs; a model that gets stuck there has not learnt from them."""
    first, last = losses[0], losses[max(losses)]
    if last <= goal:
        return []
    what = f'the batch is not learnt by heart: loss {first:.3f} -> {last:.3f} over {max(losses)} steps, the goal is {goal:.3f}'
    if last == min(losses.values()) and last < min(0.8 * first, 0.95 * goal / MEMORISED):
        return [
            OutOfRange(
                what,
                'It falls, so the loop works, but it needs more steps (--overfit_steps) or another learning_rate, '
                'a lower one where updates are too large, else a higher one',
            )
        ]
    return [
        OutOfRange(
            what,
            'One batch must be learnable: look for a learning_rate far too low or far too high, gradients that do '
            'not reach the weights, or targets that have nothing to do with the inputs',
        )
    ]
