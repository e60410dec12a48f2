"""Reads what a run recorded in its folder, even if parts are damaged."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

from nib.checkpoint.paths import explain, is_run
from nib.doctor.finding import Finding
from nib.doctor.problems import SEVERITIES
from nib.errors import UserError
from nib.files import read_json
from nib.run.metrics import read_records

LATEST = 1e11  # a later time, in seconds since 1970, is damaged


@dataclass(frozen=True)
class Run:
    """What a run recorded in its folder. A number that was not finite is None."""

    name: str
    folder: Path
    numbers: dict[str, dict[int, float | None]]  # name -> step -> value, sorted by step
    texts: dict[str, dict[int, str]]  # name -> step -> text
    findings: list[Finding]
    unread: int = 0  # lines of metrics.jsonl that are not records
    config: dict = field(default_factory=dict)
    origins: dict = field(default_factory=dict)  # config key -> where its value came from
    # Config changes on resuming: {'step': step, 'changes': {key: [before, after]}}
    changes: list = field(default_factory=list)

    provenance: dict = field(default_factory=dict)  # nib.run.provenance

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step; 0 if the config is not known."""
        keys = ('gradient_accumulation_steps', 'batch_size', 'block_size')
        sizes = [self.config.get(key) for key in keys]
        return math.prod(sizes) if all(type(size) is int for size in sizes) else 0

    @cached_property
    def elapsed(self) -> dict[int, float]:
        """The seconds from the first record to that of each step, without pauses before resumes."""
        times = [
            (step, time)
            for step, time in self.numbers.get('time', {}).items()
            if time is not None and 0 <= time < LATEST
        ]
        starts = []
        with suppress(KeyError, TypeError, ValueError):  # config.json is damaged
            dates = [start['date'] for start in self.provenance.get('starts', [])]
            starts = [datetime.fromisoformat(date).timestamp() for date in dates]
        elapsed, pauses = {}, 0.0
        for (_, before), (step, now) in zip(times[:1] + times, times):
            resumed = [start for start in starts if before < start <= now]
            pauses += max(resumed, default=before) - before
            elapsed[step] = now - times[0][1] - pauses
        return elapsed

    @property
    def seconds(self) -> float | None:
        """The time from the first to the last record, without pauses."""
        return max(self.elapsed.values(), default=None)

    @property
    def step(self) -> int:
        """The last step that has a record."""
        last = [next(reversed(values)) for values in self.numbers.values()]
        last += [next(reversed(values)) for values in self.texts.values()]
        return max(last, default=0)

    def best(self) -> tuple[int, float] | None:
        """Returns step and value of the lowest validation loss."""
        losses = self.numbers.get('loss/val', {}).items()
        finite = [(step, loss) for step, loss in losses if loss is not None]
        return min(finite, key=lambda item: item[1]) if finite else None

    def verdict(self) -> tuple[str, str]:
        """Returns the severity of the worst finding ('healthy', 'unknown'), and the verdict."""
        found = self.findings
        judged, verdict = next(reversed(self.texts.get('verdict', {}).items()), (0, ''))
        worst = 'healthy' if verdict.startswith('healthy') else 'unknown'
        worst = min((one.severity for one in found), key=SEVERITIES.index, default=worst)
        if not verdict and found:
            return worst, f'{len(found)} finding{"s" * (len(found) > 1)} so far'
        if verdict and judged < self.step:  # the run has been resumed since then
            return worst, f'at step {judged:,}: {verdict}'
        return worst, verdict or 'no verdict recorded'

    def origin(self) -> list[tuple[str, str]]:
        """Returns names and values of what is known about the run's origin."""
        rows = []
        if self.seconds is not None:
            rows.append(('duration', show_seconds(self.seconds)))
        if self.tokens_per_step:
            rows.append(('tokens seen', f'{self.step * self.tokens_per_step:,}'))
        for name, value in self.provenance.items():
            if name == 'starts' and isinstance(value, list):
                starts = [start for start in value if isinstance(start, dict)]
                for start in starts:
                    first = f'start at step {start.get("step")}: ' if len(starts) > 1 else ''
                    facts = {key: value for key, value in start.items() if key != 'step'}
                    rows += [(first + key, show_fact(fact)) for key, fact in facts.items()]
            else:
                rows.append((name, show_fact(value)))
        return rows

    def values(self, name: str) -> list[float]:
        """Returns the finite values with this name, in the order of their steps."""
        return [value for value in self.numbers.get(name, {}).values() if value is not None]


def differs(runs: Sequence[Run], key: str) -> bool:
    """Returns whether runs have different values of a config key."""
    return len({json.dumps(run.config.get(key)) for run in runs}) > 1


def show_seconds(seconds: float) -> str:
    """Formats a duration: 45 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds} s'
    if seconds < 3600:
        return f'{seconds // 60} min {seconds % 60} s'
    return f'{seconds // 3600} h {seconds % 3600 // 60} min'


def show_fact(value) -> str:
    """Formats a value of config.json: a number with separators, a mapping as 'name value, ...'."""
    if isinstance(value, dict):
        return ', '.join(f'{name} {show_fact(one)}' for name, one in value.items())
    return f'{value:,}' if type(value) is int else str(value)


# -- reading a run ---------------------------------------------------------------------------------


def read_run(folder, name: str = '') -> Run:
    """Reads a run, skipping damaged records and counting them.

    name: shown on the page; empty: the folder's name.
    Raises UserError if the folder does not contain a run.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise UserError(explain(folder))
    numbers, texts, findings, unread = sort_records(folder / 'metrics.jsonl')
    record = read_json(folder / 'config.json')
    keys = ('config', 'origins', 'changes', 'provenance')
    config, origins, changes, provenance = map(record.get, keys)
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        numbers=numbers,
        texts=texts,
        findings=findings,
        unread=unread,
        config=config if type(config) is dict else {},
        origins=origins if type(origins) is dict else {},
        changes=changes if type(changes) is list else [],
        provenance=provenance if type(provenance) is dict else {},
    )


def sort_records(path: Path) -> tuple[dict, dict, list[Finding], int]:
    """Returns the numbers, texts and findings of metrics.jsonl, and its number of bad lines.

    Numbers and texts map a name to {step: value}, sorted by step. The last value of a step counts.
    """
    numbers, texts, recorded = defaultdict(dict), defaultdict(dict), defaultdict(dict)
    records, unread = read_records(path)
    records.sort(key=lambda record: record['step'])
    for record in records:
        step = record.pop('step')
        for name, value in record.items():
            if value is None or type(value) in (int, float):
                finite = value is not None and abs(value) < 1e300
                numbers[name][step] = value if finite else None
            elif name.startswith('finding/') and isinstance(value, (str, dict)):
                recorded[name.removeprefix('finding/')][step] = value
            elif isinstance(value, str):
                texts[name][step] = value
    findings = [
        Finding.of_record(name, step, value)
        for name, by_step in recorded.items()
        for step, value in by_step.items()
    ]
    return dict(numbers), dict(texts), findings, unread


def read_runs(folders: Sequence) -> list[Run]:
    """Reads runs. A run has its folder's name, or its path if two folders have the same name."""
    names = [Path(folder).resolve().name for folder in folders]
    return [
        read_run(folder, str(folder) if names.count(name) > 1 else name)
        for folder, name in zip(folders, names)
    ]
