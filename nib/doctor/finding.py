"""A trouble that the doctor has found in a run: what is printed, recorded and read again."""

from collections.abc import Mapping
from dataclasses import dataclass

from nib.doctor.troubles import SEVERITIES, TROUBLES, Severity, select_advice


@dataclass(frozen=True)
class Finding:
    """A trouble that the doctor has found at a step of a run."""

    name: str  # of the trouble
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

        name: a key of TROUBLES. severity: overrides that of the trouble.
        """
        trouble = TROUBLES[name]
        return cls(
            name,
            step,
            severity or trouble.severity,
            evidence,
            select_advice(trouble.causes, config),
            select_advice(trouble.changes, config),
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
            severity = TROUBLES[name].severity if name in TROUBLES else 'note'

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
