"""What a run has left in its folder, whatever of it is damaged, and the charts that show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nib.doctor import health
from nib.doctor.troubles import Finding
from nib.errors import UserError
from nib.files import read_json
from nib.report.charts import NEUTRAL, Chart, Mark, Series
from nib.run.metrics import read_records

GROUPS = ('embedding', 'attention', 'mlp', 'head')
LOOKS = ('line', 'dashed', 'dotted', 'mixed')
# A chart each: key, title, unit, {name in metrics.jsonl: what it is called}, factor, further options.
PLAIN = (
    (
        'throughput',
        'Throughput',
        'tokens per second',
        {'tokens_per_second': 'tokens/s'},
        1,
        {'from_zero': True},
    ),
    ('mfu', 'Model FLOPs utilisation', 'percent', {'mfu': 'MFU'}, 100, {'from_zero': True}),
    ('noise_scale', 'Gradient noise scale', 'batches', {'noise_scale': 'noise scale'}, 1, {}),
    (
        'units',
        'Dead units and attention entropy',
        'percent',
        {
            'dead_units': 'dead units, of the layer that has most',
            'attention_entropy': 'attention entropy, of the largest possible',
        },
        100,
        {'from_zero': True},
    ),
    (
        'attention_logit',
        'Largest attention logit',
        'before softmax',
        {'attention_logit': 'largest logit'},
        1,
        {},
    ),
    (
        'activations',
        'Activations',
        'standard deviation',
        {'activation_std': 'largest of the layers'},
        1,
        {},
    ),
)


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder. A number that was not finite is None."""

    name: str
    folder: Path
    numbers: dict[str, dict[int, float | None]]  # name -> step -> value, by step
    texts: dict[str, dict[int, str]]
    objects: dict[
        str, dict[int, dict | str]
    ]  # findings: 'finding/NAME' -> step -> what is recorded
    unread: int = 0  # lines of metrics.jsonl that hold no record
    config: dict = field(default_factory=dict)
    origins: dict = field(default_factory=dict)
    changes: list = field(
        default_factory=list
    )  # of its config, when it was resumed: {'step', 'changes': key -> [before, after]}

    @property
    def step(self) -> int:
        return max(
            (step for values in (*self.numbers.values(), *self.texts.values()) for step in values),
            default=0,
        )

    def findings(self) -> list[Finding]:
        return [
            Finding.of_record(name.removeprefix('finding/'), step, recorded)
            for name, found in self.objects.items()
            for step, recorded in found.items()
        ]

    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        losses = {
            step: loss
            for step, loss in self.numbers.get('loss/val', {}).items()
            if loss is not None
        }
        return min(losses.items(), key=lambda item: item[1]) if losses else None

    def values(self, name: str) -> list[float]:
        return [value for value in self.numbers.get(name, {}).values() if value is not None]


# -- what a run has left ---------------------------------------------------------------------------


def read_run(folder, name: str = '') -> Run:
    """UserError where the folder holds no run. What is damaged in it is left out and counted."""
    folder = Path(folder)
    log = folder / 'metrics.jsonl'
    if not log.exists() and not (folder / 'config.json').exists():
        what = (
            'no run is there, as it holds neither metrics.jsonl nor config.json'
            if folder.is_dir()
            else 'no such folder'
        )
        raise UserError(f'--out_dir={folder}: {what}; name the folder that train.py wrote to')
    *found, unread = sort_records(log)
    record = read_json(folder / 'config.json')
    parts = [
        part if type(part := record.get(key)) is kind else kind()
        for key, kind in (('config', dict), ('origins', dict), ('changes', list))
    ]
    return Run(name or folder.resolve().name, folder, *found, unread, *parts)


def sort_records(path: Path) -> tuple[dict, dict, dict, int]:
    """Numbers, texts and findings of metrics.jsonl, by name and step, and how many of its lines hold no record. Of two values
    of a step the later stands."""
    numbers, texts, findings = {}, {}, {}
    records, unread = read_records(path)
    for record in records:
        step = record.pop('step')
        for name, value in record.items():
            if name.startswith('finding/') and isinstance(value, (str, dict)):
                findings.setdefault(name, {})[step] = value
            elif isinstance(value, str):
                texts.setdefault(name, {})[step] = value
            elif value is None or type(value) in (int, float):
                numbers.setdefault(name, {})[step] = (
                    value if value is not None and abs(value) < 1e300 else None
                )
    by_step = [
        {name: dict(sorted(values.items())) for name, values in kind.items()}
        for kind in (numbers, texts, findings)
    ]
    return *by_step, unread


def read_runs(folders: Sequence) -> list[Run]:
    """Runs under the names of their folders, or their whole paths where two folders have one name."""
    names = [Path(folder).resolve().name for folder in folders]
    return [
        read_run(folder, str(folder) if names.count(name) > 1 else name)
        for folder, name in zip(folders, names)
    ]


# -- which charts ----------------------------------------------------------------------------------


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """All charts for which there are records. One run's series have a colour each, several runs a colour a run."""
    charts = [
        loss_chart(runs),
        Chart(
            'learning_rate', 'Learning rate', '', curves(runs, {'learning_rate': 'learning rate'})
        ),
        gradient_chart(runs),
        Chart(
            'update_ratios',
            'Update ratios',
            'size of a step / size of the weights',
            curves(runs, {f'update_ratio/{group}': group for group in GROUPS}),
            log=True,
            band=update_band(runs),
        ),
    ]
    charts += [memory_chart(runs)]
    charts += [
        Chart(key, title, unit, curves(runs, names, factor), **options)
        for key, title, unit, names, factor, options in PLAIN
    ]
    return [chart for chart in charts if chart.series]


def update_band(runs) -> tuple[float, float] | None:
    """The range that all runs' update ratios should be in; None if the usual one of an optimizer is not known."""
    ranges = [health.UPDATE_RANGES.get(str(run.config.get('optimizer', 'adamw'))) for run in runs]
    return max(ranges) if ranges and all(ranges) else None


def curves(runs, names: Mapping[str, str], factor: float = 1, **options) -> tuple[Series, ...]:
    """A series for each run and name that has records."""
    found = []
    for colour, run in enumerate(runs):
        for place, (name, shown) in enumerate(names.items()):
            if points := run.numbers.get(name):
                values = [None if value is None else factor * value for value in points.values()]
                found.append(
                    Series(
                        shown,
                        list(points),
                        values,
                        colour if len(runs) > 1 else place,
                        LOOKS[place % len(LOOKS)],
                        run=run.name if len(runs) > 1 else '',
                        **options,
                    )
                )
    return tuple(found)


def loss_chart(runs) -> Chart:
    steps = curves(runs, {'loss/step': "a step's batch"}, pale=True)
    steps = tuple(replace(one, colour=NEUTRAL) for one in steps) if len(runs) == 1 else steps
    evaluated = sorted(
        curves(runs, {'loss/val': 'validation', 'loss/train': 'training'}, dotted=True),
        key=lambda one: one.name == 'validation',
    )  # drawn last, above the others
    marks = [
        Mark(*best, f'best {best[1]:.4f} at step {best[0]:,}' if len(runs) == 1 else '', colour)
        for colour, run in enumerate(runs)
        if (best := run.best())
    ]
    return Chart('loss', 'Loss', 'nats per token', (*steps, *evaluated), tuple(marks))


def memory_chart(runs) -> Chart:
    factor, unit = memory_unit(runs)
    return Chart(
        'memory',
        'Peak memory',
        unit,
        curves(runs, {'peak_memory': 'memory'}, factor),
        from_zero=True,
    )


def memory_unit(runs) -> tuple[float, str]:
    """What bytes are multiplied by, and are then."""
    most = max((value for run in runs for value in run.values('peak_memory')), default=0)
    return (1e-9, 'GB') if most >= 1e10 else (1e-6, 'MB')


def gradient_chart(runs) -> Chart:
    norms = list(curves(runs, {'grad_norm': 'gradient norm'}))
    limits = set()
    for colour, run in enumerate(runs):
        limit = run.config.get('grad_clip')
        limit = float(limit) if type(limit) in (int, float) and 0 < limit < 1e300 else None
        limits.add(limit)
        shares = run.numbers.get('clipped', {})
        norm = {
            step: value
            for step, value in run.numbers.get('grad_norm', {}).items()
            if value is not None
        }
        clipped = {
            step: value
            for step, value in norm.items()
            if shares.get(step, limit is not None and value > limit)
        }
        if clipped:
            shown = 'clipped since the point before' if shares else 'clipped'
            norms.append(
                Series(
                    shown,
                    list(clipped),
                    list(clipped.values()),
                    colour if len(runs) > 1 else 1,
                    'dots',
                    run=run.name if len(runs) > 1 else '',
                )
            )
    limit = limits.pop() if len(limits) == 1 else None
    level = (limit, f'grad_clip {limit:g}') if limit else None
    return Chart('gradient_norm', 'Gradient norm', 'before clipping', tuple(norms), level=level)
