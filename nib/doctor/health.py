"""Healthy ranges of what one batch shows of a model.

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
# of warm-up stayed below the limit of later steps if their first step would have had a ratio of 0.6
# at the full rate, because weights grow during the warm-up. Runs with a ratio of 1.2 did not.
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
    # After the first step, the upper limit is doubled: a healthy run may reach 0.09 in its warm-up.
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
