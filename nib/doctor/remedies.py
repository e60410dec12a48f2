"""What is out of its healthy range in one batch, and what to do about it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nib.doctor.health import (
    DEAD,
    ENTROPY,
    MEMORIZED,
    SLACK,
    LayerStats,
    ParameterStats,
    largest_entropy,
)


@dataclass(frozen=True)
class OutOfRange:
    """A value out of its healthy range, and a sentence that says what to change."""

    what: str
    remedy: str


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


PARAMETER_REMEDIES = {
    'weights not finite': 'Start a new run with a lower learning_rate, from scratch or from an '
    'earlier checkpoint (--init_from=OUT_DIR/step-N)',
    'gradient not finite': 'Check where weights or activations stop being finite, and try '
    'dtype = float32',
    'no gradient': 'Check whether the loss depends on these weights: no gradient passes through '
    'dead units, a matrix of zeros or a detached tensor',
}


def judge_parameters(
    rows: Iterable[ParameterStats], limits: Mapping[str, tuple[float, float]], learning_rate: float
) -> list[OutOfRange]:
    """Returns one entry for each mark. limits: name of the parameter -> from limits_of()."""
    marked: dict[str, list[ParameterStats]] = {}
    for row in rows:
        if mark := mark_parameter(row, limits[row.name]):
            marked.setdefault(mark, []).append(row)
    found = []
    for mark, same in marked.items():
        if mark in PARAMETER_REMEDIES:
            others = f'{len(same)} parameters, the first is ' if len(same) > 1 else ''
            found.append(OutOfRange(f'{mark}: {others}{same[0].name}', PARAMETER_REMEDIES[mark]))
        else:
            found.append(_explain_update(mark, same, limits, learning_rate))
    return found


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
    'not finite': 'The numbers are too large for the dtype: try dtype = float32, and look at '
    'the previous layer',
    'nothing passes': 'All activations are equal: look at the weights of this layer and of the '
    'previous one',
    'dead units': 'Lower learning_rate or raise warmup_iters, because large steps can deactivate '
    'units permanently; or use mlp = gelu',
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
            'grad_clip = 1 keeps such a batch from doing harm'
        )
    elif norm < low:
        what = f'gradient norm {norm:.3g}, below {low:.3g}'
        remedy = (
            'There is little to learn here: the model already knows the batch, its activations are '
            'dead, or its predictions are almost certain'
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
            'The loss falls, so the loop works, but it needs more steps (--overfit_steps) or a '
            'different learning_rate: a lower one if updates are too large, otherwise a higher one'
        )
    else:
        remedy = (
            'A single batch must be learnable: look for a learning_rate that is far too low or far '
            'too high, gradients that do not reach the weights, or targets that are unrelated to '
            'the inputs'
        )
    return [OutOfRange(what, remedy)]
