"""The doctor of a run: examines its vital signs, and reports each trouble once, with the evidence.

Each rule is a method named after its trouble, which returns the evidence or None. Comments say
where the thresholds come from. docs/doctor.md describes the experiment that checks them.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nib.doctor import health
from nib.doctor.troubles import SEVERITIES, TROUBLES, Finding, Severity
from nib.doctor.vitals import PROBE_LENGTH, DataSigns, EvaluationSigns, StepSigns
from nib.guard import Seen

KEPT = 1000  # lines and windows to remember; beyond that, older ones are thinned out


@dataclass(frozen=True)
class Line:
    """What a logged line summarizes: the steps since the previous line."""

    step: int
    n: int  # steps with a finite loss
    loss: float  # their mean
    variance: float  # of their losses
    tokens_per_second: float
    core_wait: float = 0.0  # share of the time that the main thread waited for a core, if known


@dataclass(frozen=True)
class LossWindow:
    """The mean loss over one or more lines, at least ten steps."""

    step: int  # the last one
    loss: float
    error: float  # the standard error of the mean

    @classmethod
    def over(cls, lines: Sequence[Line]) -> 'LossWindow':
        n = sum(line.n for line in lines)
        loss = sum(line.loss * line.n for line in lines) / n
        variance = sum(line.n * (line.variance + (line.loss - loss) ** 2) for line in lines) / n
        return cls(lines[-1].step, loss, math.sqrt(variance / n))


def mean_loss(windows: Sequence[LossWindow]) -> tuple[float, float]:
    """Returns the mean loss of windows and its standard error.

    The error follows from those of the windows, or from how far the windows are apart if that is
    more, as after a spike.
    """
    n, mean = len(windows), statistics.fmean(window.loss for window in windows)
    within = sum(window.error**2 for window in windows) / n**2
    between = sum((window.loss - mean) ** 2 for window in windows) / n**2
    return mean, math.sqrt(max(within, between))


def is_tolerated(finding: Finding) -> bool:
    """Returns whether the finding is about non-finite steps that the run skips."""
    return finding.name == 'not_finite' and finding.severity == 'warning'


class Doctor:
    """Collects the vital signs of a run and returns new findings.

    Call see_data() once, see_step() at each logged step, see_evaluation() at each evaluation, and
    see_generation() after the last step. If the run was resumed, recall() restores its earlier
    findings and evaluations first.

    config: that of train.py, as the run uses it. data: from examine_data(). n_params: of the model.
    train_tokens: length of the training text. trained: whether the run started from trained
    weights.
    """

    DATA_RULES = ('tiny_vocabulary', 'different_texts', 'val_leaked')
    STEP_RULES = (
        'targets_not_shifted',
        'constant_batches',
        'wrong_initial_loss',
        'no_warmup',
        'lr_too_high',
        'lr_too_low',
        'diverging',
        'plateau',
        'exploding_gradients',
        'vanishing_gradients',
        'all_clipped',
        'weight_decay_too_strong',
        'float16_underflow',
        'throughput_collapse',
    )
    EVALUATION_RULES = (
        'attention_collapsed',
        'dead_units',
        'overfitting',
        'underfitting',
        'batch_too_small',
    )
    GENERATION_RULES = ('generation_differs',)

    def __init__(
        self, config: Mapping, data: DataSigns, n_params: int, train_tokens: int, trained: bool
    ):
        self.config, self.data, self.trained = config, data, trained
        self.n_params, self.train_tokens = n_params, train_tokens
        sequences = config['batch_size'] * config['gradient_accumulation_steps']
        self.tokens_per_step = sequences * config['block_size']
        self.findings: list[Finding] = []
        self.lines: list[Line] = []
        self.fastest = 0.0  # the highest tokens per second of any line
        self.windows: list[LossWindow] = []
        self.lowest: LossWindow | None = None  # the one with the lowest loss, except the last
        self._unsummed: list[Line] = []  # lines that are not in a window yet
        self.vital_signs: StepSigns | None = None  # of the last logged step
        self.first_rms: dict[str, float] | None = None  # of the weights
        self.streak: dict[str, int] = {}  # rule -> how many times in a row its sign was present
        self.evaluations: list[EvaluationSigns] = []
        self.difference: str | None = None  # result of check_generation()
        self.cores_taken = False  # whether the run is slow because it waits for cores
        self.steps = 0  # since the run was started or resumed
        self.bad_steps = 0  # of these, the non-finite ones
        self.first_bad = self.last_bad = 0  # the first and the last one that is known

    # -- input -------------------------------------------------------------------------------------

    def see_data(self) -> list[Finding]:
        return self._apply(self.DATA_RULES, 0)

    def see_step(self, vital_signs: StepSigns) -> list[Finding]:
        self.vital_signs = vital_signs
        finite = [loss for loss in vital_signs.losses if math.isfinite(loss)]
        if finite:
            mean = statistics.fmean(finite)
            variance = statistics.fmean((loss - mean) ** 2 for loss in finite)
            self._add_line(
                Line(
                    vital_signs.step,
                    len(finite),
                    mean,
                    variance,
                    vital_signs.tokens_per_second,
                    vital_signs.core_wait or 0.0,
                )
            )
        self.first_rms = self.first_rms or vital_signs.weight_rms
        return self._apply(self.STEP_RULES, vital_signs.step)

    def see_evaluation(self, vital_signs: EvaluationSigns) -> list[Finding]:
        self.evaluations.append(vital_signs)
        return self._apply(self.EVALUATION_RULES, vital_signs.step)

    def see_generation(self, step: int, difference: str | None) -> list[Finding]:
        """difference: result of nib.generation.check_generation() after the last step."""
        self.difference = difference
        return self._apply(self.GENERATION_RULES, step)

    def see_bad_steps(self, step: int, seen: Seen) -> list[Finding]:
        """Counts non-finite steps, which were skipped, in a run that continues."""
        self.steps, self.bad_steps = self.steps + seen.steps, self.bad_steps + seen.new
        if seen.new:
            self.first_bad, self.last_bad = self.first_bad or seen.last, seen.last
        # Healthy runs have none, and overflows in float16 do not count. One bad batch in hundreds
        # does no harm if it is skipped.
        many = self.bad_steps >= 3 and self.bad_steps > 0.01 * self.steps
        if seen.ending or not many:
            return []
        evidence = (
            f'{self.bad_steps} of {self.steps:,} steps had a non-finite loss or gradient and were '
            f'skipped: the first by step {self.first_bad}, the last was step {self.last_bad}'
        )
        return self._report('not_finite', step, evidence, 'warning')

    def see_nonfinite(self, step: int, sentence: str) -> list[Finding]:
        """Records that the run has ended because of non-finite numbers."""
        # This replaces a warning about skipped steps.
        self.findings = [finding for finding in self.findings if not is_tolerated(finding)]
        return self._report('not_finite', step, sentence)

    def recall(self, records: Iterable[Mapping]):
        """Restores findings and evaluations from records of metrics.jsonl."""
        for record in records:
            if evaluation := EvaluationSigns.of_record(record):
                self.evaluations.append(evaluation)
            for key in record:
                name = key.removeprefix('finding/')
                if key.startswith('finding/') and name in TROUBLES:
                    self.findings.append(Finding.of_record(name, record['step'], record[key]))

    def rewind(self, step: int):
        """Forgets what it has seen after `step`, from which the run continues."""
        self.findings = [finding for finding in self.findings if finding.step <= step]
        self.evaluations = [
            vital_signs for vital_signs in self.evaluations if vital_signs.step <= step
        ]
        lines = self.lines
        self.lines, self.windows, self.lowest, self._unsummed = [], [], None, []
        for line in lines:
            if line.step <= step:
                self._add_line(line)
        self.streak.clear()

    def verdict(self, step: int) -> str:
        """Returns the verdict on a run of `step` steps, a sentence."""
        if not self.findings:
            return f'healthy, no findings in {step:,} step{"s" * (step != 1)}'
        parts = []
        for severity in SEVERITIES:
            names = [finding.name for finding in self.findings if finding.severity == severity]
            if names:
                parts.append(f'{severity}: {", ".join(names)}')
        return '; '.join(parts)

    def _apply(self, rules: Iterable[str], step: int) -> list[Finding]:
        found = []
        for rule in rules:
            # Collapsed attention is a later sign of a learning rate that is too high, and has the
            # same remedy, so it has no name of its own.
            name = 'lr_too_high' if rule == 'attention_collapsed' else rule
            if not self._found(name) and (evidence := getattr(self, rule)()):
                found += self._report(name, step, evidence)
        return found

    def _add_line(self, line: Line):
        """Adds a line to the current window, so that the cost of a look stays constant."""
        self.lines.append(line)
        self.fastest = max(self.fastest, line.tokens_per_second)
        self._unsummed.append(line)
        if sum(line.n for line in self._unsummed) >= 10:
            if self.windows and (self.lowest is None or self.windows[-1].loss < self.lowest.loss):
                self.lowest = self.windows[-1]
            self.windows.append(LossWindow.over(self._unsummed))
            self._unsummed = []
        for kept in (self.lines, self.windows):
            if len(kept) > KEPT:
                del kept[1 : KEPT // 2 : 2]  # every second one of the older half

    def _found(self, *names: str) -> bool:
        return any(finding.name in names for finding in self.findings)

    def _report(
        self, name: str, step: int, evidence: str, severity: Severity | None = None
    ) -> list[Finding]:
        """Adds a finding, unless it is known, or a consequence of a run that is ruined already."""
        ruined = any(
            finding.name in ('diverging', 'not_finite') and not is_tolerated(finding)
            for finding in self.findings
        )
        if self._found(name) or ruined and name != 'not_finite':
            return []
        facts = {**self.config, 'cores_taken': self.cores_taken}
        finding = Finding.of(name, step, evidence, facts, severity)
        self.findings.append(finding)
        return [finding]

    def _lasts(self, rule: str, present: bool, times: int) -> bool:
        """Returns whether the sign of a rule is present for the `times`-th time in a row."""
        self.streak[rule] = self.streak.get(rule, 0) + 1 if present else 0
        return self.streak[rule] >= times

    # -- rules for the data ------------------------------------------------------------------------

    def tiny_vocabulary(self) -> str | None:
        data = self.data
        enough = data.sampled > 4 * data.vocab_size
        if not self.trained and enough and data.used < 0.05 * data.vocab_size:
            return (
                f'{data.used} of {data.vocab_size:,} tokens occur in {data.sampled:,} tokens of '
                f'the training text'
            )
        return None

    def different_texts(self) -> str | None:
        # Twice as far as the parts of the training text are from each other. 0.01 is added for
        # texts whose parts are all alike.
        data = self.data
        if data.distance > 2 * data.usual_distance + 0.01:
            return (
                f'the token frequencies of the training and validation texts differ by '
                f'{data.distance:.3f} nats (Jensen-Shannon), while parts of the training text '
                f'differ by up to {data.usual_distance:.3f}'
            )
        return None

    def val_leaked(self) -> str | None:
        # If a passage has 30 nats, it does not occur in 8 million tokens by chance. In a text that
        # is mostly one token, it may.
        if self.data.leaked > 0.25 and PROBE_LENGTH * self.data.entropy > 30.0:
            return (
                f'{self.data.leaked:.0%} of the passages sampled from the validation text also '
                f'occur in the training text, word for word'
            )
        return None

    # -- rules for each logged step ----------------------------------------------------------------

    def targets_not_shifted(self) -> str | None:
        if self.vital_signs.shifted < 0.99:
            return (
                f'{self.vital_signs.shifted:.0%} of the targets are the next token of the input, '
                f'and {self.vital_signs.copied:.0%} are the input itself'
            )
        return None

    def constant_batches(self) -> str | None:
        # Batches of a few tokens, or of mostly one token, can be equal by chance. From 50 nats on,
        # they cannot.
        nats = self.config['batch_size'] * self.config['block_size'] * self.data.entropy
        if self.vital_signs.repeated == 1.0 and nats > 50.0:
            return (
                f'the batch of step {self.vital_signs.step} equals that of the previous logged step'
            )
        return None

    def wrong_initial_loss(self) -> str | None:
        if (
            self.vital_signs.step != 1
            or self.trained
            or not math.isfinite(self.vital_signs.losses[0])
        ):
            return None
        # 0.15 is for texts that repeat tokens, such as Python's indentation, which the first
        # predictions of a tied head match.
        tolerance = health.start_tolerance(self.config['n_embd'], self.tokens_per_step) + 0.15
        judged = health.judge_start(self.vital_signs.losses[0], self.data.vocab_size, tolerance)
        return judged[0].what if judged else None

    def no_warmup(self) -> str | None:
        if self.vital_signs.step != 1 or self.config['optimizer'] != 'adamw':
            return None
        limits = health.update_limits(self.config['beta1'], first=True, trained=self.trained)
        ratio = self._largest_ratio()
        if self.config['warmup_iters'] < health.WARMUP and ratio > limits[1]:
            return (
                f'the first step moved the weights by {ratio:.2g} of their size, while at most '
                f'{limits[1]:.2g} is usual'
            )
        return None

    def lr_too_high(self) -> str | None:
        ratio, limit = self._largest_ratio(), self._ratio_limits()[1]
        if self._lasts('lr_too_high', self.vital_signs.step > 1 and ratio > limit, 2):
            return (
                f'a step moves the weights by {ratio:.2g} of their size, repeatedly, while 0.001 '
                f'to 0.01 is usual, at learning rate {self.vital_signs.learning_rate:.2g}'
            )
        return None

    def lr_too_low(self) -> str | None:
        step, lr, full = (
            self.vital_signs.step,
            self.vital_signs.learning_rate,
            self.config['learning_rate'],
        )
        if self.trained or not self.lines or step < 10 or not 0.0 < lr <= full:
            return None
        # A small ratio can also come from weights that large steps have made large, or from a
        # schedule that has nearly ended.
        if self._found('lr_too_high', 'no_warmup', 'vanishing_gradients'):
            return None
        if step > self.config['warmup_iters'] and lr < 0.5 * full:
            return None
        ratio = (
            self._largest_ratio() * full / lr
        )  # during the warm-up, extrapolated to the full rate
        # A run that has learned more may be resumed with a low rate on purpose.
        ignorant = self.lines[-1].loss > self.data.entropy
        if self._lasts('lr_too_low', ratio < self._ratio_limits()[0] and ignorant, 3):
            return (
                f'a step moves the weights by {ratio:.2g} of their size at the full learning rate '
                f'{full:g}, while 0.001 to 0.01 is usual'
            )
        # Or the ratio is in the lower part of the usual range, and after a quarter of the run the
        # model has not learned the simplest pattern.
        if step > 0.25 * self.config['max_iters'] and ratio < 0.003 and ignorant:
            return (
                f'a step moves the weights by {ratio:.2g} of their size, and after a quarter of '
                f'the run the loss is {self.lines[-1].loss:.3f}, while a model that only knows the '
                f'frequency of each token has {self.data.entropy:.3f}'
            )
        return None

    def diverging(self) -> str | None:
        if self.lowest is None or self._unsummed:
            return None  # each window is judged once, however many lines it has
        now, lowest, guess = self.windows[-1], self.lowest, math.log(self.data.vocab_size)
        rise = now.loss - lowest.loss
        error = math.hypot(now.error, lowest.error)
        is_rise = rise > max(0.15, 0.05 * lowest.loss, 4 * error)
        rises = self._lasts('diverging', is_rise, 2)
        # Or the model was better than a uniform guess, and is now worse.
        if rises or lowest.loss + 0.5 < guess < now.loss - 0.2:
            return (
                f'the loss rises: {lowest.loss:.3f} at step {lowest.step}, {now.loss:.3f} at step '
                f'{now.step}'
            )
        return None

    def plateau(self) -> str | None:
        done = self.vital_signs.step / self.config['max_iters']
        if done > 0.8 or self.vital_signs.step < self.config['warmup_iters']:
            return None
        still = self.vital_signs.step > 1 and self._largest_ratio() < 1e-7
        if self._lasts('plateau', still, 3):
            return (
                f'the weights no longer move: the learning rate is '
                f'{self.vital_signs.learning_rate:.2g} after {done:.0%} of the run'
            )
        # A quarter of the run without progress, for certain: even with two standard errors, the
        # gain is below half a percent. Not between two windows, and not if the last window looks
        # like divergence.
        if done < 0.25 or self._unsummed or self.streak.get('diverging'):
            return None
        begin = self.vital_signs.step - 0.25 * self.config['max_iters']
        windows = [window for window in self.windows if window.step > begin]
        if len(windows) < 8:
            return None
        half = len(windows) // 2
        loss_before, error_before = mean_loss(windows[:half])
        loss_now, error_now = mean_loss(windows[half:])
        last = windows[-1].loss
        if loss_before - loss_now + 2 * math.hypot(error_before, error_now) < 0.005 * last:
            return (
                f'the loss has not fallen since step {windows[0].step}: it is {last:.3f}, at '
                f'learning rate {self.vital_signs.learning_rate:.2g}'
            )
        return None

    def exploding_gradients(self) -> str | None:
        _, high = health.grad_norm_limits(self.config['n_layer'], self.config['n_embd'], fresh=True)
        norms = [math.inf if math.isnan(norm) else norm for norm in self.vital_signs.grad_norms]
        largest = max(norms)
        large = self._lasts('exploding_gradients', not largest <= high, 2)
        limited = self.config['grad_clip'] != 0.0 or self.vital_signs.loss_scale is not None
        if not limited and (large or not math.isfinite(largest)):
            return (
                f'the norm of the gradients is up to {largest:.3g}, while {high:.3g} is already '
                f'large, and nothing clips it'
            )
        return None

    def vanishing_gradients(self) -> str | None:
        rms = self.vital_signs.block_grad_rms
        norms = [norm for norm in self.vital_signs.grad_norms if math.isfinite(norm)]
        if not norms or not self.lines:
            return None  # no finite step so far
        none = rms[:1] == [0.0]
        tiny = len(rms) > 2 and 0.0 < rms[-1] < math.inf and rms[0] < 1e-3 * rms[-1]
        # A small gradient is no trouble if everything is learned.
        low = health.GRAD_NORM[0] / health.SLACK
        small = max(norms) < low and self.lines[-1].loss > 0.9 * self.data.entropy
        present = self.vital_signs.step > 1 and (none or tiny or small)
        if not self._lasts('vanishing_gradients', present, 2):
            return None
        if none:
            return 'no gradient reaches the first block'
        if tiny:
            return (
                f'the gradients of the first block are {rms[0]:.1g}, those of the last block '
                f'{rms[-1]:.1g}'
            )
        return (
            f'the norm of the gradients is {max(norms):.1g}, while 0.1 to 10 is usual, and the '
            f'model learns little: the loss is {self.lines[-1].loss:.3f}'
        )

    def all_clipped(self) -> str | None:
        clip = self.config['grad_clip']
        norms = [norm for norm in self.vital_signs.grad_norms if math.isfinite(norm)]
        if not clip or not norms:
            return None
        settled = min(max(self.config['warmup_iters'], 20), 0.1 * self.config['max_iters'])
        present = self.vital_signs.step >= settled and min(norms) > 5 * clip
        if self._lasts('all_clipped', present, 4):
            return (
                f'every step is clipped: the norm of the gradients is '
                f'{statistics.median(norms):.3g}, and grad_clip is {clip:g}'
            )
        return None

    def weight_decay_too_strong(self) -> str | None:
        shrunk = {
            group: self.vital_signs.weight_rms[group] / self.first_rms[group]
            for group in health.LEARNING
            if self.first_rms.get(group)
        }
        if not shrunk:
            return None
        group = min(shrunk, key=lambda name: shrunk[name])
        if shrunk[group] < 0.75:
            return (
                f'the weights of {group} have shrunk to {shrunk[group]:.2f} of their initial size'
            )
        return None

    def float16_underflow(self) -> str | None:
        scale = self.vital_signs.loss_scale
        if scale is not None and scale < 1024:  # it starts at 65536, and is halved at an overflow
            return f'the loss scale of float16 has fallen to {scale:g}'
        return None

    def throughput_collapse(self) -> str | None:
        if not self.lines or self.lines[-1].tokens_per_second >= 0.4 * self.fastest:
            return None  # the median, at most the fastest, needs no look
        n, seconds = 0, 0.0
        while n < len(self.lines) and (n < 3 or seconds < 1.0):  # the machine may pause shortly
            n += 1
            seconds += self.lines[-n].n * self.tokens_per_step / self.lines[-n].tokens_per_second
        before, now = self.lines[1:-n], self.lines[-n:]
        if len(before) < 3:
            return None
        usual = statistics.median(line.tokens_per_second for line in before)
        if max(line.tokens_per_second for line in now) >= 0.4 * usual:
            return None
        evidence = f'{now[-1].tokens_per_second:,.0f} tokens/s, while {usual:,.0f} were usual'
        # On a quiet machine, or with slow data, it was at most 0.2 % of the time. Next to one
        # to four busy processes on two cores, it was 29 to 49 %.
        wait_before, wait = (
            statistics.median(line.core_wait for line in lines) for lines in (before, now)
        )
        self.cores_taken = wait > wait_before + 0.1
        if self.cores_taken:
            evidence += f'; the run waits {wait:.0%} of the time for a core'
        return evidence

    # -- rules for each evaluation -----------------------------------------------------------------

    def attention_collapsed(self) -> str | None:
        now = self.evaluations[-1]
        if now.step and now.attention_logit > 200.0 and now.attention_entropy < 0.1:
            return (
                f'attention sees a single position: its scores are up to '
                f'{now.attention_logit:.3g}, its entropy is {now.attention_entropy:.1%} of the '
                f'maximum'
            )
        return None

    def dead_units(self) -> str | None:
        dead = self.evaluations[-1].dead_units
        if dead is not None and self._lasts('dead_units', dead > health.DEAD, 2):
            return f'{dead:.0%} of the hidden units of an MLP are closed for every token'
        return None

    def overfitting(self) -> str | None:
        now, best = (
            self.evaluations[-1],
            min(self.evaluations, key=lambda vital_signs: vital_signs.val_loss),
        )
        # The standard error of a mean over this many tokens, whose losses have a standard deviation
        # of about 1.5 nats. A rise is measured on the same tokens, which leaves little of it; the
        # gap is between different tokens.
        sequences = self.config['eval_iters'] * self.config['batch_size']
        error = 1.5 / math.sqrt(sequences * self.config['block_size'])
        rise, gap = now.val_loss - best.val_loss, now.val_loss - now.train_loss
        passes = now.step * self.tokens_per_step / self.train_tokens
        is_rise = rise > max(0.01 * best.val_loss, error) and now.train_loss < best.train_loss
        rises = self._lasts('overfitting', is_rise, 2)
        if self._found('different_texts'):
            return None
        if rises or passes > 2.0 and gap > max(0.1 * now.train_loss, 4 * error):
            return (
                f'train loss {now.train_loss:.3f}, validation loss {now.val_loss:.3f}, the best so '
                f'far is {best.val_loss:.3f} at step {best.step}; the text was read {passes:.1f} '
                f'times'
            )
        return None

    def underfitting(self) -> str | None:
        now = self.evaluations[-1]
        tokens = self.config['max_iters'] * self.tokens_per_step
        before = [
            vital_signs
            for vital_signs in self.evaluations[:-1]
            if vital_signs.step >= 0.5 * now.step
        ]
        if not before or tokens < 200 * self.n_params or self.trained:
            return None
        gap, gain = now.val_loss - now.train_loss, before[0].train_loss - now.train_loss
        if gap < 0.03 * now.train_loss and gain < 0.05 * now.train_loss:
            return (
                f'{tokens:,} tokens for {self.n_params:,} parameters, '
                f'{tokens / self.n_params:,.0f} per parameter, and the train and validation losses '
                f'hardly fall and are close together, at {now.train_loss:.3f} and '
                f'{now.val_loss:.3f}'
            )
        return None

    def batch_too_small(self) -> str | None:
        known = [
            vital_signs.noise_scale
            for vital_signs in self.evaluations
            if vital_signs.noise_scale is not None
        ]
        if len(known) < 2 or self._found('vanishing_gradients'):
            return None
        # Training takes 1 + noise scale times as many steps as without noise (McCandlish et al.
        # 2018, section 2.3 with B = 1). More than ten times is a waste of steps.
        signal = statistics.fmean(1 / (1 + noise) for noise in known)
        if signal < 1 / 11:
            scale = f'about {1 / signal - 1:,.0f}' if signal > 1e-3 else 'more than a thousand'
            plural = 's' * (self.tokens_per_step > 1)
            return (
                f"a step's gradient is {1 - signal:.0%} noise: the noise scale is {scale} batches "
                f'of {self.tokens_per_step:,} token{plural}'
            )
        return None

    # -- the rule after the last step --------------------------------------------------------------

    def generation_differs(self) -> str | None:
        return self.difference

    # -- used by several rules ---------------------------------------------------------------------

    def _largest_ratio(self) -> float:
        return max(self.vital_signs.update_ratio[group] for group in health.LEARNING)

    def _ratio_limits(self) -> tuple[float, float]:
        return health.update_limits(
            self.config['beta1'], first=False, trained=self.trained, method=self.config['optimizer']
        )
