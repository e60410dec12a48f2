"""A problem that the doctor has found in a run: what is printed, recorded and read again."""

from collections.abc import Mapping
from dataclasses import dataclass

from nib.doctor.problems import PROBLEMS, SEVERITIES, Severity, select_advice


@dataclass(frozen=True)
class Finding:
    """A problem that the doctor has found at a step of a run."""

    name: str  # of the problem
    step: int
    severity: Severity
    evidence: str
    causes: tuple[str, ...] = ()  # most likely first
    changes: tuple[str, ...] = ()  # as 'key = value', or in words

    @classmethod
    def of(
        cls, name: str, step: int, evidence: str, config: Mapping, severity: Severity | None = None
    ) -> 'Finding':
        """Creates a finding with the advice for a config of train.py.

        name: a key of PROBLEMS. severity: overrides that of the problem.
        """
        problem = PROBLEMS[name]
        return cls(
            name,
            step,
            severity or problem.severity,
            evidence,
            select_advice(problem.causes, config),
            select_advice(problem.changes, config),
        )

    @classmethod
    def of_record(cls, name: str, step: int, recorded) -> 'Finding':
        """Reads the value of 'finding/NAME' in metrics.jsonl. Skips fields that are damaged.

        recorded: what record() returns, or a sentence, as older runs wrote it.
        """
        if not isinstance(recorded, dict):
            severity, _, evidence = str(recorded).partition(': ')
            if severity in SEVERITIES:
                recorded = {'severity': severity, 'evidence': evidence}
            else:
                recorded = {'evidence': str(recorded)}
        severity = recorded.get('severity')
        if severity not in SEVERITIES:
            severity = PROBLEMS[name].severity if name in PROBLEMS else 'note'

        def texts(key) -> tuple[str, ...]:
            entries = recorded.get(key)
            return tuple(map(str, entries)) if isinstance(entries, list) else ()

        evidence = str(recorded.get('evidence', ''))
        return cls(name, step, severity, evidence, texts('causes'), texts('changes'))

    def record(self) -> dict:
        """Returns what metrics.jsonl stores besides the name and the step."""
        return {
            'severity': self.severity,
            'evidence': self.evidence,
            'causes': list(self.causes),
            'changes': list(self.changes),
        }

    def __str__(self) -> str:
        return (
            f'{self.severity}: {self.evidence}. '
            f'Likely causes, most likely first: {"; ".join(self.causes)}. '
            f'Change: {"; ".join(self.changes)}'
        )
