"""Reads what a run recorded in its folder, even if parts are damaged, and selects its charts."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path

from nib.checkpoint.wrong_folder import explain, is_run
from nib.doctor import health
from nib.doctor.troubles import SEVERITIES, Finding
from nib.errors import UserError
from nib.files import read_json
from nib.report.charts import NEUTRAL, Chart, Mark, Series
from nib.run.metrics import read_records

GROUPS = ('embedding', 'attention', 'mlp', 'head')
# Metrics that have their own chart, or none.
KNOWN = re.compile(
    r'time|tokens|learning_rate|grad_norm|clipped|tokens_per_second|mfu|noise_scale|dead_units'
    r'|attention_\w+|activation_std|peak_memory|seconds/evaluation|bits_per_byte/.*'
    r'|loss/(step|mean|max|train|val|val_whole)|update_ratio/(embedding|attention|mlp|head)'
)
LOOKS = ('line', 'dashed', 'dotted', 'mixed')
DEAD_UNITS = 'dead units, in the worst layer'
SINCE = 'nats per token, since the previous point'
ENTROPY = 'attention entropy, relative to its maximum'


@dataclass(frozen=True)
class Run:
    """What a run recorded in its folder. A number that was not finite is None."""

    name: str
    folder: Path
    numbers: dict[str, dict[int, float | None]]  # name -> step -> value, sorted by step
    texts: dict[str, dict[int, str]]  # name -> step -> text
    objects: dict[str, dict[int, dict | str]]  # 'finding/NAME' -> step -> record
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
        times = [item for item in self.numbers.get('time', {}).items() if item[1] is not None]
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

    def findings(self) -> list[Finding]:
        return [
            Finding.of_record(name.removeprefix('finding/'), step, recorded)
            for name, found in self.objects.items()
            for step, recorded in found.items()
        ]

    def best(self) -> tuple[int, float] | None:
        """Returns step and value of the lowest validation loss."""
        losses = self.numbers.get('loss/val', {}).items()
        finite = [(step, loss) for step, loss in losses if loss is not None]
        return min(finite, key=lambda item: item[1]) if finite else None

    def verdict(self) -> tuple[str, str]:
        """Returns the severity of the worst finding ('healthy', 'unknown'), and the verdict."""
        found = self.findings()
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
                    rows += [(first + key, show_fact(one)) for key, one in start.items()]
            else:
                rows.append((name, show_fact(value)))
        return rows

    def values(self, name: str) -> list[float]:
        """Returns the finite values with this name, in the order of their steps."""
        return [value for value in self.numbers.get(name, {}).values() if value is not None]


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
        objects=findings,
        unread=unread,
        config=config if type(config) is dict else {},
        origins=origins if type(origins) is dict else {},
        changes=changes if type(changes) is list else [],
        provenance=provenance if type(provenance) is dict else {},
    )


def sort_records(path: Path) -> tuple[dict, dict, dict, int]:
    """Returns the numbers, texts and findings of metrics.jsonl, and its number of bad lines.

    Each of the three maps a name to {step: value}, sorted by step. The last value of a step
    counts.
    """
    numbers, texts, findings = defaultdict(dict), defaultdict(dict), defaultdict(dict)
    records, unread = read_records(path)
    records.sort(key=lambda record: record['step'])
    for record in records:
        step = record.pop('step')
        for name, value in record.items():
            if value is None or type(value) in (int, float):
                finite = value is not None and abs(value) < 1e300
                numbers[name][step] = value if finite else None
            elif name.startswith('finding/') and isinstance(value, (str, dict)):
                findings[name][step] = value
            elif isinstance(value, str):
                texts[name][step] = value
    return dict(numbers), dict(texts), dict(findings), unread


def read_runs(folders: Sequence) -> list[Run]:
    """Reads runs. A run has its folder's name, or its path if two folders have the same name."""
    names = [Path(folder).resolve().name for folder in folders]
    return [
        read_run(folder, str(folder) if names.count(name) > 1 else name)
        for folder, name in zip(folders, names)
    ]


# -- the charts ------------------------------------------------------------------------------------


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Returns all charts that have records, including one for each kind of unknown metric.

    With one run, each series has a colour. Several runs have a chart for each name, in which each
    run has a colour and a look.
    """
    clipped = curves(runs, {'clipped': 'clipped steps'}, factor=100)
    between = curves(runs, {'loss/mean': 'mean', 'loss/max': 'largest'})
    rate = curves(runs, {'learning_rate': 'learning rate'})
    ratios = curves(runs, {f'update_ratio/{group}': group for group in GROUPS})
    size = 'size of a step / size of the weights'
    speed = curves(runs, {'tokens_per_second': 'tokens/s'})
    mfu = curves(runs, {'mfu': 'MFU'}, factor=100)
    noise = curves(runs, {'noise_scale': 'noise scale'})
    units = curves(runs, {'dead_units': DEAD_UNITS, 'attention_entropy': ENTROPY}, factor=100)
    logit = curves(runs, {'attention_logit': 'largest logit'})
    activations = curves(runs, {'activation_std': 'largest of all layers'})
    entropy = 'Dead units and attention entropy'
    band = update_band(runs)
    charts = [
        loss_chart(runs),
        Chart('learning_rate', 'Learning rate', '', rate),
        gradient_chart(runs),
        Chart(
            'clipped', 'Clipped steps', 'percent, since the previous point', clipped, from_zero=True
        ),
        Chart('step_losses', 'Loss of all steps', SINCE, between, falls=True),
        Chart('update_ratios', 'Update ratios', size, ratios, log=True, band=band),
        memory_chart(runs),
        Chart('throughput', 'Throughput', 'tokens per second', speed, from_zero=True),
        Chart('mfu', 'Model FLOPs utilization', 'percent', mfu, from_zero=True),
        Chart('noise_scale', 'Gradient noise scale', 'batches', noise),
        Chart('units', entropy, 'percent', units, from_zero=True),
        Chart('attention_logit', 'Largest attention logit', 'before softmax', logit),
        Chart('activations', 'Activations', 'standard deviation', activations),
    ]
    charts += other_charts(runs, {chart.title.lower() for chart in charts})
    if len(runs) > 1:
        charts = [part for chart in charts for part in split(chart)]
    return [chart for chart in charts if chart.series]


def other_charts(runs, taken: set[str]) -> list[Chart]:
    """Returns charts of the metrics that are not known here; GROUP/NAME is drawn with its group.

    taken: titles that other charts have.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.numbers):
        if not KNOWN.fullmatch(name):
            group, _, rest = name.rpartition('/')
            groups.setdefault(group or name, {})[name] = rest
    return [
        Chart(
            f'other{index}',
            (group + '/...' * (group in taken)) if len(names) > 1 else next(iter(names)),
            '',
            curves(runs, names),
        )
        for index, (group, names) in enumerate(groups.items())
    ]


def split(chart: Chart) -> list[Chart]:
    """Splits a chart of several runs into one for each name, validation first."""
    names = list(dict.fromkeys(series.name for series in chart.series if series.look != 'dots'))
    if len(names) < 2:
        return [replace(chart, series=tuple(map(style_of_run, chart.series)))]
    names.sort(key=lambda name: name != 'validation')
    return [
        replace(
            chart,
            key=f'{chart.key}_{index}' if index else chart.key,
            title=f'{chart.title}: {name}',
            series=tuple(style_of_run(one) for one in chart.series if one.name == name),
            marks=() if index else chart.marks,
        )
        for index, name in enumerate(names)
    ]


def style_of_run(series: Series) -> Series:
    """Returns the series in the colour and look of its run; 20 runs differ."""
    if series.look == 'dots':
        return replace(series, colour=series.colour % NEUTRAL)
    look = LOOKS[series.colour // NEUTRAL % len(LOOKS)]
    return replace(series, colour=series.colour % NEUTRAL, look=look, pale=False)


def update_band(runs) -> tuple[float, float] | None:
    """Returns the healthy range of the runs' update ratios; None if it is not known."""
    ranges = [health.UPDATE_RANGES.get(str(run.config.get('optimizer', 'adamw'))) for run in runs]
    return max(ranges) if ranges and all(ranges) else None


def curves(runs, names: Mapping[str, str], factor: float = 1, **options) -> tuple[Series, ...]:
    """Returns a series for each run and name that has records.

    names: name in metrics.jsonl -> name in the chart. factor: for the values.
    options: further fields of Series.
    """
    found = []
    for number, run in enumerate(runs):
        for place, (name, shown) in enumerate(names.items()):
            points = run.numbers.get(name)
            if not points:
                continue
            values = [None if value is None else factor * value for value in points.values()]
            colour = number if len(runs) > 1 else place
            look = LOOKS[place % len(LOOKS)]
            owner = run.name if len(runs) > 1 else ''
            found.append(Series(shown, list(points), values, colour, look, run=owner, **options))
    return tuple(found)


def loss_chart(runs) -> Chart:
    steps = curves(runs, {'loss/step': "a step's batch"}, pale=True)
    steps = tuple(replace(one, colour=NEUTRAL) for one in steps) if len(runs) == 1 else steps
    evaluated = curves(runs, {'loss/val': 'validation', 'loss/train': 'training'}, dotted=True)
    # The validation loss comes last, so that it is drawn above the others.
    evaluated = tuple(sorted(evaluated, key=lambda one: one.name == 'validation'))
    marks = []
    for colour, run in enumerate(runs):
        if best := run.best():
            step, loss = best
            label = f'best {loss:.4f} at step {step:,}' if len(runs) == 1 else ''
            marks.append(
                Mark(step, loss, label, colour % NEUTRAL, run.name if len(runs) > 1 else '')
            )
    return Chart('loss', 'Loss', 'nats per token', steps + evaluated, tuple(marks), falls=True)


def memory_chart(runs) -> Chart:
    factor, unit = memory_unit(runs)
    memory = curves(runs, {'peak_memory': 'memory'}, factor)
    return Chart('memory', 'Peak memory', unit, memory, from_zero=True)


def memory_unit(runs) -> tuple[float, str]:
    """Returns a unit for the runs' memory, and the factor that converts bytes to it."""
    most = max((value for run in runs for value in run.values('peak_memory')), default=0)
    return (1e-9, 'GB') if most >= 1e10 else (1e-6, 'MB')


def gradient_chart(runs) -> Chart:
    norms = list(curves(runs, {'grad_norm': 'gradient norm'}))
    limits = [run.config.get('grad_clip') for run in runs]
    limits = [
        float(limit) if type(limit) in (int, float) and 0 < limit < 1e300 else None
        for limit in limits
    ]
    for number, (run, limit) in enumerate(zip(runs, limits)):
        norm = run.numbers.get('grad_norm', {}).items()
        clipped = {step: one for step, one in norm if None not in (one, limit) and one > limit}
        if clipped:
            colour = number if len(runs) > 1 else 1
            owner = run.name if len(runs) > 1 else ''
            values = list(clipped.values())
            norms.append(Series('clipped', list(clipped), values, colour, 'dots', run=owner))
    level = (limits[0], f'grad_clip {limits[0]:g}') if len(set(limits)) == 1 and limits[0] else None
    return Chart('gradient_norm', 'Gradient norm', 'before clipping', tuple(norms), level=level)
