"""The doctor of a run: remembers its vital signs and reports each problem once, with the evidence.

nib/doctor/rules.py says which signs mean a problem.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nib.doctor import rules
from nib.doctor.finding import Finding
from nib.doctor.problems import FACTS, PROBLEMS, SEVERITIES, Severity
from nib.doctor.texts import DataSigns
from nib.doctor.vitals import EvaluationSigns, StepSigns
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
        self.unsummed: list[Line] = []  # lines that are not in a window yet
        self.vital_signs: StepSigns | None = None  # of the last logged step
        self.first_rms: dict[str, float] | None = None  # of the weights
        self.streak: dict[str, int] = {}  # rule -> how many times in a row its sign was present
        self.evaluations: list[EvaluationSigns] = []
        self.difference: str | None = None  # result of check_generation()
        self.cores_taken = False  # whether the run is slow because it waits for cores
        self.starts_low = False  # whether the first loss is below that of a uniform guess
        self.gradients_lost = False  # whether they do not reach the optimizer
        self.steps = 0  # since the run was started or resumed
        self.bad_steps = 0  # of these, the non-finite ones
        self.first_bad = self.last_bad = 0  # the first and the last one that is known
        self.returned_to: int | None = None  # the step of the rewind after the last bad step

    # -- input -------------------------------------------------------------------------------------

    def see_data(self) -> list[Finding]:
        return self._apply(rules.DATA_RULES, 0)

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
        return self._apply(rules.STEP_RULES, vital_signs.step)

    def see_evaluation(self, vital_signs: EvaluationSigns) -> list[Finding]:
        self.evaluations.append(vital_signs)
        return self._apply(rules.EVALUATION_RULES, vital_signs.step)

    def see_generation(self, step: int, difference: str | None) -> list[Finding]:
        """difference: result of nib.generation.check.check_generation() after the last step."""
        self.difference = difference
        return self._apply(rules.GENERATION_RULES, step)

    def see_bad_steps(self, step: int, seen: Seen) -> list[Finding]:
        """Counts the non-finite steps that a run has skipped, if it continues."""
        self.steps, self.bad_steps = self.steps + seen.steps, self.bad_steps + seen.new
        if seen.new:
            self.first_bad, self.last_bad = self.first_bad or seen.last, seen.last
            self.returned_to = None
        # Healthy runs have no such steps, and overflows in float16 do not count. Skipping one bad
        # batch in hundreds does no harm.
        many = self.bad_steps >= 3 and self.bad_steps > 0.01 * self.steps
        if seen.ending or not many:
            return []
        evidence = (
            f'{self.bad_steps} of {self.steps:,} steps had a non-finite loss or gradient and were '
            f'skipped, the first no later than step {self.first_bad}, the last at step '
            f'{self.last_bad}'
        )
        if self.returned_to is not None:
            evidence += f'; then the run returned to step {self.returned_to}'
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
                if key.startswith('finding/') and name in PROBLEMS:
                    self.findings.append(Finding.of_record(name, record['step'], record[key]))

    def rewind(self, step: int) -> list[Finding]:
        """Forgets what it has seen after `step`, from which the run continues.

        Skipped steps are still counted. If they have been reported after `step`, the finding moves
        to `step` and is returned, to be recorded again.
        """
        self.returned_to = step
        moved = [
            replace(
                finding,
                step=step,
                evidence=f'{finding.evidence}; then the run returned to step {step}',
            )
            for finding in self.findings
            if finding.step > step and is_tolerated(finding)
        ]
        self.findings = [finding for finding in self.findings if finding.step <= step] + moved
        self.evaluations = [signs for signs in self.evaluations if signs.step <= step]
        lines = self.lines
        self.lines, self.windows, self.lowest, self.unsummed = [], [], None, []
        for line in lines:
            if line.step <= step:
                self._add_line(line)
        self.streak.clear()
        return moved

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

    def _apply(self, functions: Iterable[Callable], step: int) -> list[Finding]:
        found = []
        for rule in functions:
            name, severity = rules.NAMES.get(rule, (rule.__name__, None))
            if not self.found(name) and (evidence := rule(self)):
                found += self._report(name, step, evidence, severity)
        return found

    def _add_line(self, line: Line):
        """Adds a line to the current window, so that the cost of a rule stays constant."""
        self.lines.append(line)
        self.fastest = max(self.fastest, line.tokens_per_second)
        self.unsummed.append(line)
        if sum(line.n for line in self.unsummed) >= 10:
            if self.windows and (self.lowest is None or self.windows[-1].loss < self.lowest.loss):
                self.lowest = self.windows[-1]
            self.windows.append(LossWindow.over(self.unsummed))
            self.unsummed = []
        for kept in (self.lines, self.windows):
            if len(kept) > KEPT:
                del kept[1 : KEPT // 2 : 2]  # every second one of the older half

    def found(self, *names: str) -> bool:
        return any(finding.name in names for finding in self.findings)

    def _report(
        self, name: str, step: int, evidence: str, severity: Severity | None = None
    ) -> list[Finding]:
        """Adds a finding, unless it is known, or a consequence of a run that is ruined already."""
        ruined = any(
            finding.name in ('diverging', 'not_finite') and not is_tolerated(finding)
            for finding in self.findings
        )
        if self.found(name) or ruined and name != 'not_finite':
            return []
        facts = {fact: getattr(self, fact) for fact in FACTS}
        finding = Finding.of(name, step, evidence, {**self.config, **facts}, severity)
        self.findings.append(finding)
        return [finding]

    def lasts(self, rule: str, present: bool, times: int) -> bool:
        """Returns whether the sign of a rule is present for the `times`-th time in a row."""
        self.streak[rule] = self.streak.get(rule, 0) + 1 if present else 0
        return self.streak[rule] >= times
