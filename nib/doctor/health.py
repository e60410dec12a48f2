"""Healthy ranges of what one batch shows of a model, and what to do about a value out of range.

The ranges are rules of thumb. They are wide enough that no default of this project is marked.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GRAD_NORM = (0.1, 10.0)  # of all parameters together, in a model that has begun to learn
UPDATE_RATIO = (0.001, 0.01)  # per step, after the start of a run
MUON_RATIO = (0.001, 0.05)  # higher, because Muon's updates are equally large in all directions
# By the name of the optimizer in train.py. For other optimizers, no range is known.
UPDATE_RANGES = {'adamw': UPDATE_RATIO, 'muon': MUON_RATIO}
# Groups of matrices whose update ratios are judged. Those of embeddings and head are not, because
# a batch contains few of their rows.
LEARNING = ('attention', 'mlp')
SLACK = 5.0  # an update ratio is too small if it is this many times below its range
WARMUP = 10  # steps of a warm-up that keeps the first steps from doing harm
# With a warm-up, a first step at the full rate may be as large as the weights. Runs with 30 steps
# of warm-up, whose first step would have a ratio of 0.6 at the full rate, stayed below the limit of
# later steps, since weights grow meanwhile. At 1.2 they did not.
WARMED_UP = 1.0
DEAD = 0.1  # share of an MLP's hidden units
ENTROPY = 0.05  # of attention, as a share of the maximum
MEMORIZED = 2 / 3  # of the lowest loss that is possible without looking at the inputs


@dataclass(frozen=True)
class ParameterStats:
    """Statistics of one parameter. Gradients are d loss / d weight, in nats per unit of weight."""

    name: str
    shape: tuple[int, ...]
    rms: float  # root mean square of the weights
    grad_mean: float
    grad_std: float
    grad_max: float  # the largest absolute value
    grad_norm: float  # root of the sum of squares
    # ||w after - w before|| / ||w before||; None before a step, and if all weights were 0
    update_ratio: float | None = None
    # Whether its branch of a block ends in a matrix of zeros, which no gradient passes.
    behind_zeros: bool = False


@dataclass(frozen=True)
class LayerStats:
    """Statistics of the residual stream after the embedding, a block or the last norm.

    The fields that can be None are those of a block.
    """

    name: str
    mean: float
    std: float
    attention_std: float | None = None  # of the output of attention
    mlp_std: float | None = None  # of the output of the MLP
    dead: float | None = None  # share of the MLP's hidden units that are closed for every token
    entropy: float | None = None  # of attention weights, in nats, mean over sequences and heads
    attention_logit: float | None = None  # the largest absolute score before the softmax


@dataclass(frozen=True)
class OutOfRange:
    """A value out of its healthy range, and a sentence that says what to change."""

    what: str
    remedy: str


# -- ranges ----------------------------------------------------------------------------------------


def largest_entropy(n_positions: int) -> float:
    """Returns the largest possible mean entropy of causal attention, in nats.

    Position t, counted from 1, can attend to t positions, so this is the mean of ln t.
    """
    return math.lgamma(n_positions + 1) / n_positions


def start_tolerance(n_embd: int, n_tokens: int) -> float:
    """Returns how far the loss of a new model may be from ln(vocab_size), in nats.

    n_tokens: number of tokens over which the loss is averaged.

    A logit is a sum of n_embd products of a normalized activation and a weight with standard
    deviation 0.02, so its variance is s2 = 0.02^2 * n_embd. The mean of exp(logit) is exp(s2 / 2),
    so the loss is s2 / 2 above ln(vocab_size). The tolerance is twice that, plus three standard
    errors of the targets' mean logit, plus 0.1 for a tied head, which predicts its own input first.
    """
    variance = 0.02**2 * n_embd
    return 0.1 + variance + 3 * math.sqrt(variance / n_tokens)


def grad_norm_limits(n_layer: int, n_embd: int, fresh: bool) -> tuple[float, float]:
    """Returns the healthy range of the norm of all gradients together.

    The gradients of a new model are larger, because all tokens pull it in the same direction,
    toward the frequent ones. Measured on text, from 4 layers of width 128 to 16 of width 1600, the
    norm was 0.1 to 0.6 of sqrt(n_layer * n_embd).
    """
    low, high = GRAD_NORM
    return low, max(high, math.sqrt(n_layer * n_embd)) if fresh else high


def first_step_factor(beta1: float) -> float:
    """Returns how many times larger AdamW's first step is than later ones.

    In the first step, m / sqrt(v) is 1 or -1 for every weight. If gradients are independent, m
    later has the variance (1 - beta1) / (1 + beta1) of one gradient, which is the sum of
    (1 - beta1)^2 beta1^2k over k, and v is the variance of one gradient.
    """
    return math.sqrt((1 + beta1) / (1 - beta1))


def group_of(name: str) -> str:
    """Returns the group that a matrix belongs to, by the name of the parameter."""
    for part, group in (('.attn.', 'attention'), ('.mlp.', 'mlp'), ('lm_head', 'head')):
        if part in name:
            return group
    return 'embedding'


def update_limits(
    beta1: float, first: bool, trained: bool, method: str = 'adamw', warmup_iters: int = 0
) -> tuple[float, float]:
    """Returns the limits of the update ratio of a group of matrices at the full learning rate.

    The doctor and debug_training.py both judge by them.

    first: the optimizer has no state yet, which makes a step of AdamW larger. trained: the weights
    are not new; the first steps from such weights may be arbitrarily small. method: the optimizer
    of the matrices; if it is not in UPDATE_RANGES, there are no limits. warmup_iters: of a first
    step that is taken at the full rate, although the run warms up before it reaches that.
    """
    if method not in UPDATE_RANGES:
        return 0.0, math.inf
    factor = first_step_factor(beta1) if first and method == 'adamw' else 1.0
    low, high = UPDATE_RANGES[method]
    # Above, twice as much after the first step: a healthy run may reach 0.09 in its warm-up.
    high *= SLACK * factor if first else 2 * SLACK
    if first and warmup_iters >= WARMUP:
        high = max(high, WARMED_UP)
    return (0.0 if first and trained else low / SLACK * factor), high


def group_ratios(rows: Iterable[ParameterStats]) -> dict[str, float]:
    """Returns the update ratio of each group, of all its matrices together."""
    squares: dict[str, list[float]] = {}
    for row in rows:
        if len(row.shape) >= 2 and row.update_ratio is not None:
            sums = squares.setdefault(group_of(row.name), [0.0, 0.0])
            square = row.rms**2 * math.prod(row.shape)
            sums[0] += row.update_ratio**2 * square
            sums[1] += square
    return {group: math.sqrt(moved / size) for group, (moved, size) in squares.items() if size}


def limits_of(
    row: ParameterStats, ratios: Mapping[str, float], limits: tuple[float, float]
) -> tuple[float, float]:
    """Returns the limits of one parameter's update ratio.

    It is too large only if that of its group is, as the doctor judges groups. That of an embedding
    may be small, because a batch contains few of its tokens.

    ratios: from group_ratios(). limits: from update_limits().
    """
    low, high = limits
    group = group_of(row.name)
    too_large = group in LEARNING and ratios.get(group, 0.0) > high
    return (0.0 if group == 'embedding' else low), (high if too_large else math.inf)


# -- marks, and what they mean ---------------------------------------------------------------------


def mark_parameter(row: ParameterStats, limits: tuple[float, float]) -> str:
    """Returns what is wrong with a parameter's gradient or update, or ''.

    Only matrices and embeddings have a healthy range for the update ratio. Biases start at 0 and
    gains at 1, so theirs means nothing.
    """
    if not math.isfinite(row.rms):
        return 'weights not finite'
    if not math.isfinite(row.grad_norm):
        return 'gradient not finite'
    if row.grad_norm == 0.0:
        return '' if row.behind_zeros else 'no gradient'
    if len(row.shape) < 2 or row.update_ratio is None:
        return ''
    low, high = limits
    if row.update_ratio > high:
        return 'update too large'
    if row.update_ratio <= low:
        return 'update too small'
    return ''


def mark_layer(row: LayerStats, n_positions: int) -> str:
    """Returns what is wrong with a layer's activations, or ''."""
    if not (math.isfinite(row.mean) and math.isfinite(row.std)):
        return 'not finite'
    if row.std == 0.0:
        return 'nothing passes'
    marks = []
    if row.dead is not None and row.dead > DEAD:
        marks.append('dead units')
    least = ENTROPY * largest_entropy(n_positions)
    if row.entropy is not None and n_positions > 1 and row.entropy < least:
        marks.append('attention collapsed')
    return ', '.join(marks)


def judge_parameters(
    rows: Iterable[ParameterStats], limits: Mapping[str, tuple[float, float]], learning_rate: float
) -> list[OutOfRange]:
    """Returns one entry for each mark. limits: name of the parameter -> from limits_of()."""
    marked: dict[str, list[ParameterStats]] = {}
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
    if mark.startswith('update'):
        return _explain_update(mark, rows, limits, learning_rate)
    remedies = {
        'weights not finite': 'Start again, or resume from an earlier checkpoint, with a lower '
        'learning_rate',
        'gradient not finite': 'Check where weights or activations stop being finite, and try '
        'dtype float32',
        'no gradient': 'Check whether the loss depends on these weights: no gradient passes dead '
        'units, a matrix of zeros or a detached tensor',
    }
    if len(rows) > 1:
        what = f'{mark}: {len(rows)} parameters, the first is {rows[0].name}'
    else:
        what = f'{mark}: {rows[0].name}'
    return OutOfRange(what, remedies[mark])


def _explain_update(
    mark: str,
    rows: list[ParameterStats],
    limits: Mapping[str, tuple[float, float]],
    learning_rate: float,
) -> OutOfRange:
    if mark == 'update too large':
        worst = max(rows, key=lambda row: row.update_ratio / limits[row.name][1])
    else:
        worst = min(rows, key=lambda row: row.update_ratio)
    count = f'{len(rows)} parameter{"s" * (len(rows) > 1)}'
    what = f'{mark} in {count}: {worst.update_ratio:.2g} in {worst.name}'
    if worst.update_ratio == 0.0 and learning_rate == 0.0:
        return OutOfRange(what, 'Raise learning_rate, which is 0')
    if worst.update_ratio == 0.0:
        return OutOfRange(
            what,
            'Check whether the optimizer has this parameter: it has a gradient, but the step does '
            'not change it',
        )
    low, high = limits[worst.name]
    if mark == 'update too large':
        verb, wanted = 'Lower', high
    else:
        verb, wanted = 'Raise', 3 * SLACK * low  # within the healthy range
    suggested = learning_rate * wanted / worst.update_ratio
    return OutOfRange(what, f'{verb} learning_rate from {learning_rate:g} to about {suggested:.0e}')


LAYER_REMEDIES = {
    'not finite': 'The numbers are too large for the dtype: try dtype float32, and look at the '
    'previous layer',
    'nothing passes': 'All activations are equal: look at the weights of this layer and of the '
    'previous one',
    'dead units': 'Lower learning_rate or raise warmup_iters, because large steps can close units '
    'for good; or use mlp gelu',
    'attention collapsed': 'Each position attends to a single one: set qk_norm, or lower '
    'learning_rate',
}


def judge_layers(rows: Iterable[LayerStats], n_positions: int) -> list[OutOfRange]:
    marks = {row.name: mark_layer(row, n_positions) for row in rows}
    found = []
    for kind, remedy in LAYER_REMEDIES.items():
        names = [name for name, mark in marks.items() if kind in mark]
        if names:
            more = ' ...' if len(names) > 4 else ''
            found.append(OutOfRange(f'{kind} in {", ".join(names[:4])}{more}', remedy))
    return found


def judge_grad_norm(norm: float, limits: tuple[float, float]) -> list[OutOfRange]:
    low, high = limits
    if norm > high:
        what = f'gradient norm {norm:.3g}, above {high:.3g}'
        remedy = (
            'A batch of few tokens can have such a norm. Otherwise, find the rows whose gradient '
            'stands out, and check whether their weights, or those before them, are too large. '
            'grad_clip 1 keeps such a batch from doing harm'
        )
    elif norm < low:
        what = f'gradient norm {norm:.3g}, below {low:.3g}'
        remedy = (
            'Little is learned here: the model already knows the batch, its activations are dead, '
            'or its predictions are almost certain'
        )
    elif not math.isfinite(norm):
        what = f'gradient norm {norm}'
        remedy = 'Check where the activations stop being finite'
    else:
        return []
    return [OutOfRange(what, remedy)]


def judge_start(loss: float, vocab_size: int, tolerance: float | None) -> list[OutOfRange]:
    """Compares the loss at the start, in nats, with that of a uniform guess.

    tolerance: of a new model; None for a trained one, which must be better than a guess.
    """
    guess = math.log(vocab_size)
    if tolerance is None:
        if loss < guess:
            return []
        what = f'loss at the start {loss:.3f}, while a uniform guess has {guess:.3f}'
        remedy = (
            'The model is worse than a guess: check whether the text is of the kind '
            'that it was trained on'
        )
    elif abs(loss - guess) <= tolerance:
        return []
    elif loss < guess:
        what = f'loss at the start {loss:.3f}, below ln(vocab_size) = {guess:.3f}'
        remedy = (
            'A new model cannot know that much: check whether the targets leak into the inputs, or '
            'are the inputs, not shifted by one'
        )
    else:
        what = f'loss at the start {loss:.3f}, above ln(vocab_size) = {guess:.3f}'
        remedy = (
            'The predictions of a new model should be nearly uniform: check whether its weights '
            'are too large (weight rms), especially those of the head'
        )
    return [OutOfRange(what, remedy)]


def judge_shift(share: float) -> list[OutOfRange]:
    """share: share of targets that are the next token of the input."""
    if share == 1.0:
        return []
    return [
        OutOfRange(
            f'only {share:.1%} of the targets are the next token of the input',
            'Targets must be the inputs shifted by one: y[t] = x[t + 1]',
        )
    ]


def judge_memorizing(losses: Mapping[int, float], goal: float) -> list[OutOfRange]:
    """Checks whether training on a single batch has memorized it.

    losses: step -> loss before that step, from step 0 on. goal: MEMORIZED times the loss that is
    possible without looking at the inputs. A model that is stuck above has not learned from them.
    """
    last_step = max(losses)
    first, last = losses[0], losses[last_step]
    if last <= goal:
        return []
    what = (
        f'the batch is not memorized: loss {first:.3f} -> {last:.3f} over {last_step} steps, the '
        f'goal is {goal:.3f}'
    )
    if last == min(losses.values()) and last < min(0.8 * first, 0.95 * goal / MEMORIZED):
        remedy = (
            'The loss falls, so the loop works, but it needs more steps (--overfit_steps) or '
            'another learning_rate: a lower one if updates are too large, otherwise a higher one'
        )
    else:
        remedy = (
            'A single batch must be learnable: look for a learning_rate that is far too low or far '
            'too high, gradients that do not reach the weights, or targets that are unrelated to '
            'the inputs'
        )
    return [OutOfRange(what, remedy)]
