"""The doctor's rules: one function for each problem.

A rule takes the doctor `d`, which holds the run's vital signs, and returns the evidence of its
problem, or None. Comments say where the thresholds come from. docs/doctor.md describes the
experiment that checks them.
"""

import math
import statistics
from collections.abc import Callable

from nib.doctor import health, remedies
from nib.doctor.problems import Severity
from nib.doctor.texts import PROBE_LENGTH

# -- rules for the data ----------------------------------------------------------------------------


def tiny_vocabulary(d) -> str | None:
    data = d.data
    enough = data.sampled > 4 * data.vocab_size
    if not d.trained and enough and data.used < 0.05 * data.vocab_size:
        return (
            f'{data.used} of {data.vocab_size:,} tokens occur in {data.sampled:,} tokens of '
            f'the training text'
        )
    return None


def different_texts(d) -> str | None:
    # Twice as far as the parts of the training text are from each other. 0.01 is added for
    # texts whose parts are all alike.
    data = d.data
    if data.distance > 2 * data.usual_distance + 0.01:
        return (
            f'the token frequencies of the training and validation texts differ by '
            f'{data.distance:.3f} nats (Jensen-Shannon), while parts of the training text '
            f'differ by up to {data.usual_distance:.3f}'
        )
    return None


def val_leaked(d) -> str | None:
    # If a passage has 30 nats, it does not occur in 8 million tokens by chance. In a text that
    # is mostly one token, it may.
    if d.data.leaked > 0.25 and PROBE_LENGTH * d.data.entropy > 30.0:
        return (
            f'{d.data.leaked:.0%} of the passages sampled from the validation text also '
            f'occur in the training text, word for word'
        )
    return None


# -- rules for each logged step --------------------------------------------------------------------


def targets_not_shifted(d) -> str | None:
    if d.vital_signs.shifted < 0.99:
        return (
            f'{d.vital_signs.shifted:.0%} of the targets are the next token of the input, '
            f'and {d.vital_signs.copied:.0%} are the input itself'
        )
    return None


def constant_batches(d) -> str | None:
    # Batches of a few tokens, or of mostly one token, can be equal by chance. From 50 nats on,
    # they cannot.
    nats = d.config['batch_size'] * d.config['block_size'] * d.data.entropy
    if d.vital_signs.repeated == 1.0 and nats > 50.0:
        return f'the batch of step {d.vital_signs.step} equals that of the previous logged step'
    return None


def wrong_initial_loss(d) -> str | None:
    if d.vital_signs.step != 1 or d.trained or not d.evaluations:
        return None
    # The loss of the evaluation, because training may add dropout and other terms.
    loss = d.evaluations[0].train_loss
    if not math.isfinite(loss):
        return None
    # 0.15 is for texts that repeat tokens, such as Python's indentation, which the first
    # predictions of a tied head match.
    tolerance = health.start_tolerance(d.config['n_embd'], d.tokens_per_step) + 0.15
    d.starts_low = loss < math.log(d.data.vocab_size)
    judged = remedies.judge_start(loss, d.data.vocab_size, tolerance)
    return judged[0].what if judged else None


def no_warmup(d) -> str | None:
    if d.vital_signs.step != 1 or d.config['optimizer'] != 'adamw':
        return None
    limits = health.update_limits(d.config['beta1'], first=True, trained=d.trained)
    ratio = largest_ratio(d)
    if d.config['warmup_iters'] < health.WARMUP and ratio > limits[1]:
        return (
            f'the first step moved the weights by {ratio:.2g} of their size; at most '
            f'{limits[1]:.2g} is usual'
        )
    return None


def lr_too_high(d) -> str | None:
    ratio, limit = largest_ratio(d), ratio_limits(d)[1]
    if d.lasts('lr_too_high', d.vital_signs.step > 1 and ratio > limit, 2):
        return (
            f'at learning rate {d.vital_signs.learning_rate:.2g}, steps move the weights by '
            f'{ratio:.2g} of their size; 0.001 to 0.01 is usual'
        )
    return None


def lr_too_low(d) -> str | None:
    step, lr, full = d.vital_signs.step, d.vital_signs.learning_rate, d.config['learning_rate']
    if d.trained or not d.lines or step < 10 or not 0.0 < lr <= full:
        return None
    # A small ratio can also come from weights that large steps have made large, or from a
    # schedule that has nearly ended.
    if d.found('lr_too_high', 'no_warmup', 'vanishing_gradients'):
        return None
    if step > d.config['warmup_iters'] and lr < 0.5 * full:
        return None
    ratio = largest_ratio(d) * full / lr  # during the warm-up, extrapolated to the full rate
    # The weights do not move at all, or the loss has exploded.
    if ratio == 0.0 or d.lines[-1].loss > 1.5 * d.lines[0].loss:
        return None
    # A run that has learned more may be resumed with a low rate on purpose.
    ignorant = d.lines[-1].loss > d.data.entropy
    if d.lasts('lr_too_low', ratio < ratio_limits(d)[0] and ignorant, 3):
        return (
            f'at the full learning rate {full:g}, a step moves the weights by {ratio:.2g} of '
            f'their size; 0.001 to 0.01 is usual'
        )
    # Or the ratio is in the lower part of the usual range, and after a quarter of the run the
    # model has not learned the simplest pattern.
    if step > 0.25 * d.config['max_iters'] and ratio < 0.003 and ignorant:
        return (
            f'after a quarter of the run, the loss is {d.lines[-1].loss:.3f}, above the '
            f'{d.data.entropy:.3f} of a model that only knows the frequency of each token; a step '
            f'moves the weights by {ratio:.2g} of their size'
        )
    return None


def diverging(d) -> str | None:
    if d.lowest is None or d.unsummed:
        return None  # each window is judged once, however many lines it has
    now, lowest, guess = d.windows[-1], d.lowest, math.log(d.data.vocab_size)
    rise = now.loss - lowest.loss
    error = math.hypot(now.error, lowest.error)
    is_rise = rise > max(0.15, 0.05 * lowest.loss, 4 * error)
    rises = d.lasts('diverging', is_rise, 2)
    # Or the model was better than a uniform guess, and is now worse.
    if rises or lowest.loss + 0.5 < guess < now.loss - 0.2:
        return (
            f'the loss rises: {lowest.loss:.3f} at step {lowest.step}, {now.loss:.3f} at step '
            f'{now.step}'
        )
    return None


def plateau(d) -> str | None:
    done = d.vital_signs.step / d.config['max_iters']
    if done > 0.8 or d.vital_signs.step < d.config['warmup_iters']:
        return None
    still = d.vital_signs.step > 1 and largest_ratio(d) < 1e-7
    if d.lasts('plateau', still, 3):
        return (
            f'the weights no longer move: the learning rate is '
            f'{d.vital_signs.learning_rate:.2g} after {done:.0%} of the run'
        )
    # Without progress for a quarter of the run means: even with two standard errors, the gain is
    # below half a percent. Wait between two windows, and if the last one looks like divergence.
    if done < 0.25 or d.unsummed or d.streak.get('diverging'):
        return None
    begin = d.vital_signs.step - 0.25 * d.config['max_iters']
    windows = [window for window in d.windows if window.step > begin]
    if len(windows) < 8:
        return None
    half = len(windows) // 2
    loss_before, error_before = mean_loss(windows[:half])
    loss_now, error_now = mean_loss(windows[half:])
    last = windows[-1].loss
    if loss_before - loss_now + 2 * math.hypot(error_before, error_now) < 0.005 * last:
        return (
            f'the loss has not fallen since step {windows[0].step}: it is {last:.3f}, at '
            f'learning rate {d.vital_signs.learning_rate:.2g}'
        )
    return None


def exploding_gradients(d) -> str | None:
    _, high = health.grad_norm_limits(d.config['n_layer'], d.config['n_embd'], fresh=True)
    norms = [math.inf if math.isnan(norm) else norm for norm in d.vital_signs.grad_norms]
    largest = max(norms)
    large = d.lasts('exploding_gradients', not largest <= high, 2)
    limited = d.config['grad_clip'] != 0.0 or d.vital_signs.loss_scale is not None
    if not limited and (large or not math.isfinite(largest)):
        return (
            f'the gradient norm reaches {largest:.3g}; more than {high:.3g} is unusual, and '
            f'nothing clips it'
        )
    return None


def vanishing_gradients(d) -> str | None:
    rms = d.vital_signs.block_grad_rms
    norms = [norm for norm in d.vital_signs.grad_norms if math.isfinite(norm)]
    if not norms or not d.lines:
        return None  # no finite step so far
    none = rms[:1] == [0.0]
    tiny = len(rms) > 2 and 0.0 < rms[-1] < math.inf and rms[0] < 1e-3 * rms[-1]
    # A small gradient is no problem if everything is learned.
    low = health.GRAD_NORM[0] / health.SLACK
    small = max(norms) < low and d.lines[-1].loss > 0.9 * d.data.entropy
    present = d.vital_signs.step > 1 and (none or tiny or small)
    if not d.lasts('vanishing_gradients', present, 2):
        return None
    d.gradients_lost = none and not any(rms) and max(norms) > 0.0
    if d.gradients_lost:
        return f'the optimizer gets gradients of 0, although their norm is {max(norms):.3g}'
    if none:
        return 'no gradient reaches the first block'
    if tiny:
        return (
            f'the gradients of the first block are {rms[0]:.1g}, those of the last block '
            f'{rms[-1]:.1g}'
        )
    return (
        f'the gradient norm is {max(norms):.1g}; 0.1 to 10 is usual. The model learns little: the '
        f'loss is {d.lines[-1].loss:.3f}'
    )


def all_clipped(d) -> str | None:
    clip = d.config['grad_clip']
    norms = [norm for norm in d.vital_signs.grad_norms if math.isfinite(norm)]
    if not clip or not norms:
        return None
    settled = min(max(d.config['warmup_iters'], 20), 0.1 * d.config['max_iters'])
    present = d.vital_signs.step >= settled and min(norms) > 5 * clip
    if d.lasts('all_clipped', present, 4):
        return (
            f'every step is clipped: the gradient norm is {statistics.median(norms):.3g}, and '
            f'grad_clip is {clip:g}'
        )
    return None


def weight_decay_too_strong(d) -> str | None:
    shrunk = {
        group: d.vital_signs.weight_rms[group] / d.first_rms[group]
        for group in health.LEARNING
        if d.first_rms.get(group)
    }
    if not shrunk:
        return None
    group = min(shrunk, key=lambda name: shrunk[name])
    if shrunk[group] < 0.75:
        return f'the weights of {group} have shrunk to {shrunk[group]:.2f} of their initial size'
    return None


def float16_underflow(d) -> str | None:
    scale = d.vital_signs.loss_scale
    if scale is not None and scale < 1024:  # it starts at 65536, and is halved at an overflow
        return f'the float16 loss scale has fallen to {scale:g}'
    return None


def throughput_collapse(d) -> str | None:
    if not d.lines or d.lines[-1].tokens_per_second >= 0.4 * d.fastest:
        return None  # the median is at most `fastest`, so it need not be computed
    n, seconds = 0, 0.0
    while n < len(d.lines) and (n < 3 or seconds < 1.0):  # the machine may pause briefly
        n += 1
        seconds += d.lines[-n].n * d.tokens_per_step / d.lines[-n].tokens_per_second
    before, now = d.lines[1:-n], d.lines[-n:]
    if len(before) < 3:
        return None
    usual = statistics.median(line.tokens_per_second for line in before)
    if max(line.tokens_per_second for line in now) >= 0.4 * usual:
        return None
    evidence = f'{now[-1].tokens_per_second:,.0f} tokens/s, down from {usual:,.0f}'
    # On a quiet machine, or with slow data, it was at most 0.2% of the time. Next to one
    # to four busy processes on two cores, it was 29 to 49%.
    wait_before = statistics.median(line.core_wait for line in before)
    wait = statistics.median(line.core_wait for line in now)
    d.cores_taken = wait > wait_before + 0.1
    if d.cores_taken:
        evidence += f'; the run waits for a core {wait:.0%} of the time'
    return evidence


# -- rules for each evaluation ---------------------------------------------------------------------


def other_targets(d) -> str | None:
    # Training contradicts evaluation: the steps do better than a uniform guess, but the same text
    # is evaluated as worse than that.
    now, guess = d.evaluations[-1], math.log(d.data.vocab_size)
    # One batch may have been learned by heart, or the weights have changed since the last line.
    other = d.found('constant_batches', 'lr_too_high', 'diverging')
    if other or not d.lines or d.lines[-1].step != now.step:
        return None
    loss = d.lines[-1].loss
    present = loss < guess < now.train_loss - 0.5 and loss < now.train_loss - 1.0
    if d.lasts('other_targets', present, 2):
        return (
            f'the steps have a loss of {loss:.3f}, but that of the training text in the evaluation '
            f'is {now.train_loss:.3f}, worse than a uniform guess ({guess:.3f})'
        )
    return None


def attention_collapsed(d) -> str | None:
    now = d.evaluations[-1]
    if now.step and now.attention_logit > 200.0 and now.attention_entropy < 0.1:
        return (
            f'attention looks at a single position: its scores reach {now.attention_logit:.3g}, '
            f'and its entropy is {now.attention_entropy:.1%} of the maximum'
        )
    return None


def dead_units(d) -> str | None:
    dead = d.evaluations[-1].dead_units
    if dead is not None and d.lasts('dead_units', dead > health.DEAD, 2):
        return f'{dead:.0%} of the hidden units of an MLP are inactive for every token'
    return None


def overfitting(d) -> str | None:
    now, best = d.evaluations[-1], min(d.evaluations, key=lambda signs: signs.val_loss)
    # The standard error of a mean over this many tokens, whose losses have a standard deviation
    # of about 1.5 nats. A rise is measured on the same tokens, which leaves little of it; the
    # gap is between different tokens.
    sequences = d.config['eval_iters'] * d.config['batch_size']
    error = 1.5 / math.sqrt(sequences * d.config['block_size'])
    rise, gap = now.val_loss - best.val_loss, now.val_loss - now.train_loss
    passes = now.step * d.tokens_per_step / d.train_tokens
    is_rise = rise > max(0.01 * best.val_loss, error) and now.train_loss < best.train_loss
    rises = d.lasts('overfitting', is_rise, 2)
    if d.found('different_texts'):
        return None
    if rises or passes > 2.0 and gap > max(0.1 * now.train_loss, 4 * error):
        return (
            f'train loss {now.train_loss:.3f}, validation loss {now.val_loss:.3f} (best: '
            f'{best.val_loss:.3f} at step {best.step}); the text was read {passes:.1f} times'
        )
    return None


def underfitting(d) -> str | None:
    now = d.evaluations[-1]
    tokens = d.config['max_iters'] * d.tokens_per_step
    before = [signs for signs in d.evaluations[:-1] if signs.step >= 0.5 * now.step]
    if not before or tokens < 200 * d.n_params or d.trained:
        return None
    gap, gain = now.val_loss - now.train_loss, before[0].train_loss - now.train_loss
    if gap < 0.03 * now.train_loss and gain < 0.05 * now.train_loss:
        return (
            f'{tokens:,} tokens for {d.n_params:,} parameters, '
            f'{tokens / d.n_params:,.0f} per parameter; the train and validation losses are '
            f'close together ({now.train_loss:.3f} and {now.val_loss:.3f}) and hardly fall'
        )
    return None


def batch_too_small(d) -> str | None:
    known = [signs.noise_scale for signs in d.evaluations if signs.noise_scale is not None]
    if len(known) < 2 or d.found('vanishing_gradients'):
        return None
    # Training takes 1 + noise scale times as many steps as without noise (McCandlish et al.
    # 2018, section 2.3 with B = 1). More than ten times is a waste of steps.
    signal = statistics.fmean(1 / (1 + noise) for noise in known)
    if signal < 1 / 11:
        scale = f'about {1 / signal - 1:,.0f}' if signal > 1e-3 else 'more than a thousand'
        plural = 's' * (d.tokens_per_step > 1)
        return (
            f"a step's gradient is {1 - signal:.0%} noise: the noise scale is {scale} batches "
            f'of {d.tokens_per_step:,} token{plural}'
        )
    return None


# -- the rule after the last step ------------------------------------------------------------------


def generation_differs(d) -> str | None:
    return d.difference


# -- used by several rules -------------------------------------------------------------------------


def largest_ratio(d) -> float:
    """Returns the largest update ratio of the blocks; NaN if their matrices are frozen."""
    ratios = d.vital_signs.update_ratio
    return max((ratios[group] for group in health.LEARNING if group in ratios), default=math.nan)


def ratio_limits(d) -> tuple[float, float]:
    return health.update_limits(
        d.config['beta1'], first=False, trained=d.trained, method=d.config['optimizer']
    )


def mean_loss(windows) -> tuple[float, float]:
    """Returns the mean loss of LossWindows and its standard error.

    The error follows from those of the windows, or from how far the windows are apart if that is
    more, as after a spike.
    """
    n, mean = len(windows), statistics.fmean(window.loss for window in windows)
    within = sum(window.error**2 for window in windows) / n**2
    between = sum((window.loss - mean) ** 2 for window in windows) / n**2
    return mean, math.sqrt(max(within, between))


# -- when each rule applies ------------------------------------------------------------------------

DATA_RULES = (tiny_vocabulary, different_texts, val_leaked)
STEP_RULES = (
    targets_not_shifted,
    constant_batches,
    wrong_initial_loss,
    no_warmup,
    lr_too_high,
    lr_too_low,
    diverging,
    plateau,
    exploding_gradients,
    vanishing_gradients,
    all_clipped,
    weight_decay_too_strong,
    float16_underflow,
    throughput_collapse,
)
EVALUATION_RULES = (
    other_targets,
    attention_collapsed,
    dead_units,
    overfitting,
    underfitting,
    batch_too_small,
)
# Signs of a problem that have the remedies of another one, and so no name of their own: the name
# and the severity of that one.
NAMES: dict[Callable, tuple[str, Severity]] = {
    attention_collapsed: ('lr_too_high', 'warning'),
    other_targets: (
        'targets_not_shifted',
        'warning',
    ),  # a run may train on a few batches on purpose
}
GENERATION_RULES = (generation_differs,)
