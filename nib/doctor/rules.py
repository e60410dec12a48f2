"""The doctor of a run: reads its vital signs and names what is wrong, each trouble once, with the evidence.

Every rule is a method of the trouble's name, which returns the evidence, or None. Where its threshold comes from, it says.
docs/doctor.md has the experiment that checks them.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nib.doctor import health
from nib.doctor.troubles import SEVERITIES, TROUBLES, Finding, Severity
from nib.doctor.vitals import PROBE_LENGTH, DataSigns, EvaluationSigns, StepSigns
from nib.guard import Seen

LEARNING = (
    'attention',
    'mlp',
)  # the groups of matrices that an update ratio is judged of: a batch has few of an embedding's rows
KEPT = 1000  # lines and windows that are remembered; more are thinned out


@dataclass(frozen=True)
class Line:
    """The mean over the steps that a logged step sums up."""

    step: int
    n: int
    loss: float
    variance: float  # of the losses of its steps
    tokens_per_second: float


@dataclass(frozen=True)
class LossWindow:
    """The mean loss over at least ten steps, of which so many lines sum up."""

    step: int  # the last one
    loss: float
    error: float  # the mean's standard error

    @classmethod
    def over(cls, lines: Sequence[Line]) -> 'LossWindow':
        n = sum(line.n for line in lines)
        loss = sum(line.loss * line.n for line in lines) / n
        variance = sum(line.n * (line.variance + (line.loss - loss) ** 2) for line in lines) / n
        return cls(lines[-1].step, loss, math.sqrt(variance / n))


def mean_loss(windows: Sequence[LossWindow]) -> tuple[float, float]:
    """The mean and its standard error: by the windows' own, or by how far they are apart, whichever is more, as after a spike."""
    n, mean = len(windows), statistics.fmean(window.loss for window in windows)
    within = sum(window.error**2 for window in windows) / n**2
    between = sum((window.loss - mean) ** 2 for window in windows) / n**2
    return mean, math.sqrt(max(within, between))


def is_tolerated(finding: Finding) -> bool:
    """Whether the run goes on although steps were not finite, as they are left out."""
    return finding.name == 'not_finite' and finding.severity == 'warning'


class Doctor:
    """see_data() once, then see_step() at each logged step and see_evaluation() at each evaluation, see_generation() after the last
    step; each returns new findings.

    config: train.py's, as the run uses it. trained: whether the run began with weights that had learnt before. From a resumed
    run's records, recall() learns what was found and evaluated before.
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
        self.config, self.data, self.n_params, self.train_tokens, self.trained = (
            config,
            data,
            n_params,
            train_tokens,
            trained,
        )
        self.tokens_per_step = (
            config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps']
        )
        self.findings: list[Finding] = []
        self.lines: list[Line] = []
        self.fastest = 0.0  # tokens per second of any line
        self.windows: list[LossWindow] = []
        self.lowest: LossWindow | None = None  # of those before the last
        self._unsummed: list[Line] = []  # lines that are in no window yet
        self.signs: StepSigns | None = None  # of the last logged step
        self.first_rms: dict[str, float] | None = None  # of the weights
        self.streak: dict[str, int] = {}  # rule -> how often in a row what it looks for was there
        self.evaluations: list[EvaluationSigns] = []
        self.difference: str | None = None  # what check_generation() says
        self.steps = self.bad_steps = (
            0  # since the run was started or resumed; those that were not finite
        )
        self.first_bad = self.last_bad = 0  # of those, as far as the looks tell

    # -- what it is shown ------------------------------------------------------------------------------------------------

    def see_data(self) -> list[Finding]:
        return self._apply(self.DATA_RULES, 0)

    def see_step(self, signs: StepSigns) -> list[Finding]:
        self.signs = signs
        finite = [loss for loss in signs.losses if math.isfinite(loss)]
        if finite:
            mean = statistics.fmean(finite)
            variance = statistics.fmean((loss - mean) ** 2 for loss in finite)
            self._add_line(Line(signs.step, len(finite), mean, variance, signs.tokens_per_second))
        self.first_rms = self.first_rms or signs.weight_rms
        return self._apply(self.STEP_RULES, signs.step)

    def see_evaluation(self, signs: EvaluationSigns) -> list[Finding]:
        self.evaluations.append(signs)
        return self._apply(self.EVALUATION_RULES, signs.step)

    def see_generation(self, step: int, difference: str | None) -> list[Finding]:
        """difference: what nib.generation.check_generation() returns after the last step."""
        self.difference = difference
        return self._apply(self.GENERATION_RULES, step)

    def see_bad_steps(self, step: int, seen: Seen) -> list[Finding]:
        """Steps that were not finite, of which none is applied, in a run that goes on."""
        self.steps, self.bad_steps = self.steps + seen.steps, self.bad_steps + seen.new
        if seen.new:
            self.first_bad, self.last_bad = self.first_bad or seen.last, seen.last
        # Healthy runs have none, and float16's overflows are not counted. One bad batch of hundreds does no harm when it is left out.
        if (
            seen.ending
            or self.bad_steps < 3
            or self.bad_steps <= 0.01 * self.steps
            or self._found('not_finite')
        ):
            return []
        return self._name(
            'not_finite',
            step,
            f'{self.bad_steps} of {self.steps:,} steps had a loss or gradients that were not finite, and '
            f'were left out: the first by step {self.first_bad}, the last was step {self.last_bad}',
            'warning',
        )

    def see_nonfinite(self, step: int, sentence: str) -> list[Finding]:
        self.findings = [
            finding for finding in self.findings if not is_tolerated(finding)
        ]  # no longer
        return self._name('not_finite', step, sentence)

    def recall(self, records: Iterable[Mapping]):
        """Takes up what the records of metrics.jsonl say was found and evaluated before."""
        for record in records:
            if evaluation := EvaluationSigns.of_record(record):
                self.evaluations.append(evaluation)
            for key in record:
                name = key.removeprefix('finding/')
                if key.startswith('finding/') and name in TROUBLES:
                    self.findings.append(Finding.of_record(name, record['step'], record[key]))

    def rewind(self, step: int):
        """Forgets what it has seen after `step`, from where the run goes on."""
        self.findings = [finding for finding in self.findings if finding.step <= step]
        self.evaluations = [signs for signs in self.evaluations if signs.step <= step]
        lines, self.lines, self.windows, self.lowest, self._unsummed = self.lines, [], [], None, []
        for line in lines:
            if line.step <= step:
                self._add_line(line)
        self.streak.clear()

    def verdict(self, step: int) -> str:
        """The last word on a run of so many steps, a sentence."""
        if not self.findings:
            return f'healthy: nothing found in {step:,} step{"s" * (step != 1)}'
        by_severity = {
            severity: [finding.name for finding in self.findings if finding.severity == severity]
            for severity in SEVERITIES
        }
        return '; '.join(
            f'{severity}: {", ".join(names)}' for severity, names in by_severity.items() if names
        )

    def _apply(self, rules, step: int) -> list[Finding]:
        found = []
        for rule in rules:
            # Collapsed attention is the later sign of a rate too high, and mended alike: a name of its own would be two for one cause.
            name = 'lr_too_high' if rule == 'attention_collapsed' else rule
            if not self._found(name) and (evidence := getattr(self, rule)()):
                found += self._name(name, step, evidence)
        return found

    def _add_line(self, line: Line):
        """Sums up the losses as they come, so that a look costs the same however many there were."""
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
                del kept[1 : KEPT // 2 : 2]  # of the older half, every second goes

    def _found(self, *names: str) -> bool:
        return any(finding.name in names for finding in self.findings)

    def _name(
        self, name: str, step: int, evidence: str, severity: Severity | None = None
    ) -> list[Finding]:
        ruined = any(
            finding.name in ('diverging', 'not_finite') and not is_tolerated(finding)
            for finding in self.findings
        )
        if self._found(name) or ruined and name != 'not_finite':  # what follows is its doing
            return []
        self.findings.append(Finding.of(name, step, evidence, self.config, severity))
        return self.findings[-1:]

    def _lasts(self, rule: str, there: bool, times: int) -> bool:
        """Whether what a rule looks for has been there so many times in a row, this one included."""
        self.streak[rule] = self.streak.get(rule, 0) + 1 if there else 0
        return self.streak[rule] >= times

    # -- the data --------------------------------------------------------------------------------------------------------

    def tiny_vocabulary(self):
        data = self.data
        if (
            not self.trained
            and data.sampled > 4 * data.vocab_size
            and data.used < 0.05 * data.vocab_size
        ):
            return f'{data.used} of {data.vocab_size:,} tokens come up in {data.sampled:,} of the training text'

    def different_texts(self):
        # Twice as far as the training text's parts are from each other. The hundredth is for texts whose parts are all alike.
        data = self.data
        if data.distance > 2 * data.usual_distance + 0.01:
            return (
                f'the frequencies of the tokens in training and validation text differ by {data.distance:.3f} nats '
                f'(Jensen-Shannon), where parts of the training text differ by up to {data.usual_distance:.3f}'
            )

    def val_leaked(self):
        # Where so many tokens hold 30 nats, none of 8 million places has the same by chance; of a text that is mostly one token it may.
        if self.data.leaked > 0.25 and PROBE_LENGTH * self.data.entropy > 30.0:
            return f'{self.data.leaked:.0%} of the passages tried from the validation text stand in the training text, word for word'

    # -- each logged step ------------------------------------------------------------------------------------------------

    def targets_not_shifted(self):
        if self.signs.shifted < 0.99:
            return (
                f'{self.signs.shifted:.0%} of the targets are the next token of the input, and {self.signs.copied:.0%} are the '
                f'input itself'
            )

    def constant_batches(self):
        # Batches of a few tokens, or of one token mostly, are the same by chance: one of 50 nats and more is not.
        text = self.config['batch_size'] * self.config['block_size'] * self.data.entropy
        if self.signs.repeated == 1.0 and text > 50.0:
            return f'the batch of step {self.signs.step} is the one of the logged step before'

    def wrong_initial_loss(self):
        if self.signs.step == 1 and not self.trained and math.isfinite(self.signs.losses[0]):
            # And 0.15 where a text repeats its tokens, which a tied head's first guess finds: Python's indentation.
            tolerance = health.start_tolerance(self.config['n_embd'], self.tokens_per_step) + 0.15
            if judged := health.judge_start(self.signs.losses[0], self.data.vocab_size, tolerance):
                return judged[0].what

    def no_warmup(self):
        limit = health.update_limits(self.config['beta1'], first=True, learnt=self.trained)[1]
        ratio = self._largest_ratio()
        if (
            self.signs.step == 1
            and self.config['optimizer'] == 'adamw'
            and self.config['warmup_iters'] < 10
            and ratio > limit
        ):
            return f'the first step moved the weights by {ratio:.2g} of their size, at most {limit:.2g} is usual'

    def lr_too_high(self):
        ratio, limit = self._largest_ratio(), 2 * self._ratio_limits()[1]
        if self._lasts('lr_too_high', self.signs.step > 1 and ratio > limit, 2):
            return (
                f'a step moves the weights by {ratio:.2g} of their size, again and again, where 0.001 to 0.01 is usual, at learning '
                f'rate {self.signs.learning_rate:.2g}'
            )

    def lr_too_low(self):
        lr, full = self.signs.learning_rate, self.config['learning_rate']
        warming = self.signs.step <= self.config['warmup_iters']
        # What looks like small steps may be weights grown by large ones, or a schedule that has nearly ended.
        others = self._found('lr_too_high', 'no_warmup', 'vanishing_gradients')
        if (
            others
            or self.trained
            or not self.lines
            or self.signs.step < 10
            or not 0.0 < lr <= full
            or not warming
            and lr < 0.5 * full
        ):
            return None
        ratio = (
            self._largest_ratio() * full / lr
        )  # during the warm-up, what it will be at the full rate
        ignorant = (
            self.lines[-1].loss > self.data.entropy
        )  # one that has learnt may be resumed with a low rate on purpose
        if self._lasts('lr_too_low', ratio < self._ratio_limits()[0] and ignorant, 3):
            return (
                f'a step moves the weights by {ratio:.2g} of their size at the full learning rate {full:g}, where 0.001 to 0.01 is '
                f'usual'
            )
        # Or steps in the lower part of what is usual, which after a quarter of the run have not taught it what is easiest.
        if self.signs.step > 0.25 * self.config['max_iters'] and ratio < 0.003 and ignorant:
            return (
                f'a step moves the weights by {ratio:.2g} of their size, and after a quarter of the run the loss, '
                f'{self.lines[-1].loss:.3f}, is that of a model that does not know how often each token comes, '
                f'{self.data.entropy:.3f}'
            )

    def diverging(self):
        if (
            self.lowest is None or self._unsummed
        ):  # each window is judged once, however many lines it has
            return None
        now, lowest, guess = self.windows[-1], self.lowest, math.log(self.data.vocab_size)
        rise = now.loss - lowest.loss
        rises = self._lasts(
            'diverging',
            rise > max(0.15, 0.05 * lowest.loss, 4 * math.hypot(now.error, lowest.error)),
            2,
        )
        if (
            rises or lowest.loss + 0.5 < guess < now.loss - 0.2
        ):  # worse than a model that knows nothing, and it was better
            return f'the loss rises: {lowest.loss:.3f} at step {lowest.step}, {now.loss:.3f} at step {now.step}'

    def plateau(self):
        done = self.signs.step / self.config['max_iters']
        if done > 0.8 or self.signs.step < self.config['warmup_iters']:
            return None
        still = self.signs.step > 1 and self._largest_ratio() < 1e-7
        if self._lasts('plateau', still, 3):
            return f'nothing moves any more: the learning rate is {self.signs.learning_rate:.2g} after {done:.0%} of the run'
        # A quarter of the run without progress, with certainty: with the upper end of its error, less than half a percent.
        # Not between two windows, and not where the last one looks like divergence.
        if done < 0.25 or self._unsummed or self.streak.get('diverging'):
            return None
        windows = [
            window
            for window in self.windows
            if window.step > self.signs.step - 0.25 * self.config['max_iters']
        ]
        if len(windows) < 8:
            return None
        half = len(windows) // 2
        before, now = windows[:half], windows[half:]
        (loss_before, error_before), (loss_now, error_now) = mean_loss(before), mean_loss(now)
        if loss_before - loss_now + 2 * math.hypot(error_before, error_now) < 0.005 * now[-1].loss:
            return (
                f'the loss has not fallen since step {windows[0].step}: it is {now[-1].loss:.3f}, at learning rate '
                f'{self.signs.learning_rate:.2g}'
            )

    def exploding_gradients(self):
        _, high = health.grad_norm_limits(self.config['n_layer'], self.config['n_embd'], fresh=True)
        largest = max(
            self.signs.grad_norms, key=lambda norm: math.inf if math.isnan(norm) else norm
        )
        long = self._lasts('exploding_gradients', not largest <= high, 2)
        if (
            self.config['grad_clip'] == 0.0
            and self.signs.loss_scale is None
            and (long or not math.isfinite(largest))
        ):
            return f'the norm of the gradients is up to {largest:.3g}, where {high:.3g} is much, and nothing clips it'

    def vanishing_gradients(self):
        rms, norms = (
            self.signs.block_grad_rms,
            [norm for norm in self.signs.grad_norms if math.isfinite(norm)],
        )
        if not norms or not self.lines:  # not a step so far that was finite
            return None
        none = rms[:1] == [0.0]
        below = none or len(rms) > 2 and 0.0 < rms[-1] < math.inf and rms[0] < 1e-3 * rms[-1]
        # A short gradient is no trouble where all is learnt.
        low = health.GRAD_NORM[0] / health.SLACK
        short = max(norms) < low and self.lines[-1].loss > 0.9 * self.data.entropy
        if self._lasts('vanishing_gradients', self.signs.step > 1 and (below or short), 2):
            return (
                'no gradient reaches the first block'
                if none
                else f'the gradients of the first block are {rms[0]:.1g}, those of the last {rms[-1]:.1g}'
                if below
                else f'the norm of the gradients is {max(norms):.1g}, where 0.1 to 10 is usual, and little is learnt: the loss is '
                f'{self.lines[-1].loss:.3f}'
            )

    def all_clipped(self):
        clip = self.config['grad_clip']
        norms = [norm for norm in self.signs.grad_norms if math.isfinite(norm)]
        settled = self.signs.step >= min(
            max(self.config['warmup_iters'], 20), 0.1 * self.config['max_iters']
        )
        if clip and norms and self._lasts('all_clipped', settled and min(norms) > 5 * clip, 4):
            return f'every step is clipped: the norm of the gradients is {statistics.median(norms):.3g}, and grad_clip {clip:g}'

    def weight_decay_too_strong(self):
        shrunk = {
            group: self.signs.weight_rms[group] / self.first_rms[group]
            for group in LEARNING
            if self.first_rms.get(group)
        }
        group = min(shrunk, key=shrunk.get, default=None)
        if group and shrunk[group] < 0.75:
            return f'the weights of {group} have shrunk to {shrunk[group]:.2f} of their size at the start'

    def float16_underflow(self):
        if (
            self.signs.loss_scale is not None and self.signs.loss_scale < 1024
        ):  # it begins at 65536, and halves at an overflow
            return f'the loss scale of float16 has fallen to {self.signs.loss_scale:g}'

    def throughput_collapse(self):
        if (
            not self.lines or self.lines[-1].tokens_per_second >= 0.4 * self.fastest
        ):  # no median is above the fastest
            return None
        n, seconds = 0, 0.0
        while n < len(self.lines) and (n < 3 or seconds < 1.0):  # a shorter pause is the machine's
            n += 1
            seconds += self.lines[-n].n * self.tokens_per_step / self.lines[-n].tokens_per_second
        before, now = self.lines[1:-n], self.lines[-n:]
        if len(before) >= 3:
            usual = statistics.median(line.tokens_per_second for line in before)
            if max(line.tokens_per_second for line in now) < 0.4 * usual:
                return f'{now[-1].tokens_per_second:,.0f} tokens/s, where {usual:,.0f} were usual'

    # -- each evaluation -------------------------------------------------------------------------------------------------

    def attention_collapsed(self):
        now = self.evaluations[-1]
        if now.step and now.attention_logit > 200.0 and now.attention_entropy < 0.1:
            return (
                f'attention looks at one place only: its scores are up to {now.attention_logit:.3g}, its entropy '
                f'{now.attention_entropy:.1%} of the largest'
            )

    def dead_units(self):
        dead = self.evaluations[-1].dead_units
        if dead is not None and self._lasts('dead_units', dead > health.DEAD, 2):
            return f'{dead:.0%} of the units of an MLP are closed for every token'

    def overfitting(self):
        now, best = self.evaluations[-1], min(self.evaluations, key=lambda signs: signs.val_loss)
        # The error of a mean over so many tokens, whose losses have a standard deviation of some 1.5 nats. Those that rise are
        # of the same windows, so that little of it is left; the gap is between different ones.
        error = 1.5 / math.sqrt(
            self.config['eval_iters'] * self.config['batch_size'] * self.config['block_size']
        )
        rise, gap = now.val_loss - best.val_loss, now.val_loss - now.train_loss
        read = now.step * self.tokens_per_step / self.train_tokens
        rising = self._lasts(
            'overfitting',
            rise > max(0.01 * best.val_loss, error) and now.train_loss < best.train_loss,
            2,
        )
        if self._found('different_texts'):
            return None
        if rising or read > 2.0 and gap > max(0.1 * now.train_loss, 4 * error):
            return (
                f'train loss {now.train_loss:.3f}, validation loss {now.val_loss:.3f}, the best so far is {best.val_loss:.3f} at step '
                f'{best.step}; the text was read {read:.1f} times'
            )

    def underfitting(self):
        now = self.evaluations[-1]
        tokens = self.config['max_iters'] * self.tokens_per_step
        before = [signs for signs in self.evaluations[:-1] if signs.step >= 0.5 * now.step]
        if not before or tokens < 200 * self.n_params or self.trained:
            return None
        gap, gain = now.val_loss - now.train_loss, before[0].train_loss - now.train_loss
        if gap < 0.03 * now.train_loss and gain < 0.05 * now.train_loss:
            return (
                f'{tokens:,} tokens for {self.n_params:,} parameters, {tokens / self.n_params:,.0f} each, and train and validation '
                f'loss stand together at {now.train_loss:.3f} and {now.val_loss:.3f}'
            )

    def batch_too_small(self):
        known = [signs.noise_scale for signs in self.evaluations if signs.noise_scale is not None]
        # Training needs 1 + noise scale times the steps that it would need with batches without noise (McCandlish et al. 2018,
        # section 2.3 with B = 1): ten times is a waste of steps.
        signal = statistics.fmean(1 / (1 + noise) for noise in known) if known else 1.0
        if len(known) > 1 and signal < 1 / 11 and not self._found('vanishing_gradients'):
            scale = f'about {1 / signal - 1:,.0f}' if signal > 1e-3 else 'more than a thousand'
            return (
                f"a step's gradient is {1 - signal:.0%} noise: the noise scale is {scale} batches of {self.tokens_per_step:,} "
                f'token{"s" * (self.tokens_per_step > 1)}'
            )

    # -- after the last step ---------------------------------------------------------------------------------------------

    def generation_differs(self):
        return self.difference

    # -- of several rules ------------------------------------------------------------------------------------------------

    def _largest_ratio(self) -> float:
        return max(self.signs.update_ratio[group] for group in LEARNING)

    def _ratio_limits(self) -> tuple[float, float]:
        return health.update_limits(
            self.config['beta1'], first=False, learnt=self.trained, method=self.config['optimizer']
        )
