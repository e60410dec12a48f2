"""Reads what a run recorded in its folder, even if parts are damaged, and selects its charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nib.checkpoint.wrong_folder import explain, is_run
from nib.doctor import health
from nib.doctor.troubles import Finding
from nib.errors import UserError
from nib.files import read_json
from nib.report.charts import NEUTRAL, Chart, Mark, Series
from nib.run.metrics import read_records

GROUPS = ('embedding', 'attention', 'mlp', 'head')
LOOKS = ('line', 'dashed', 'dotted', 'mixed')
DEAD_UNITS = 'dead units, in the worst layer'
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

    @property
    def step(self) -> int:
        """The last step that has a record."""
        steps = [max(values) for values in self.numbers.values() if values]
        steps += [max(values) for values in self.texts.values() if values]
        return max(steps, default=0)

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

    def values(self, name: str) -> list[float]:
        """Returns the finite values with this name, in the order of their steps."""
        return [value for value in self.numbers.get(name, {}).values() if value is not None]


# -- reading a run ---------------------------------------------------------------------------------


def read_run(folder, name: str = '') -> Run:
    """Read a run, skipping damaged records and counting them.

    name: shown on the page; empty: the folder's name.
    Raises UserError if the folder does not contain a run.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise UserError(explain(folder))
    numbers, texts, findings, unread = sort_records(folder / 'metrics.jsonl')
    record = read_json(folder / 'config.json')
    config, origins, changes = (record.get(key) for key in ('config', 'origins', 'changes'))
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
    )


def sort_records(path: Path) -> tuple[dict, dict, dict, int]:
    """Return the numbers, texts and findings of metrics.jsonl, and its number of bad lines.

    Each of the three maps a name to {step: value}, sorted by step. The last value of a step
    counts.
    """
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
                finite = value is not None and abs(value) < 1e300
                numbers.setdefault(name, {})[step] = value if finite else None
    for kind in (numbers, texts, findings):
        for name, values in kind.items():
            kind[name] = dict(sorted(values.items()))
    return numbers, texts, findings, unread


def read_runs(folders: Sequence) -> list[Run]:
    """Reads runs. A run has its folder's name, or its path if two folders have the same name."""
    names = [Path(folder).resolve().name for folder in folders]
    return [
        read_run(folder, str(folder) if names.count(name) > 1 else name)
        for folder, name in zip(folders, names)
    ]


# -- the charts ------------------------------------------------------------------------------------


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return all charts that have records.

    With one run each series has a colour, with several runs each run has a colour.
    """
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
        Chart('update_ratios', 'Update ratios', size, ratios, log=True, band=band),
        memory_chart(runs),
        Chart('throughput', 'Throughput', 'tokens per second', speed, from_zero=True),
        Chart('mfu', 'Model FLOPs utilisation', 'percent', mfu, from_zero=True),
        Chart('noise_scale', 'Gradient noise scale', 'batches', noise),
        Chart('units', entropy, 'percent', units, from_zero=True),
        Chart('attention_logit', 'Largest attention logit', 'before softmax', logit),
        Chart('activations', 'Activations', 'standard deviation', activations),
    ]
    return [chart for chart in charts if chart.series]


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
            marks.append(Mark(step, loss, label, colour))
    return Chart('loss', 'Loss', 'nats per token', steps + evaluated, tuple(marks))


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
    limits = set()
    for number, run in enumerate(runs):
        limit = run.config.get('grad_clip')
        limit = float(limit) if type(limit) in (int, float) and 0 < limit < 1e300 else None
        limits.add(limit)
        shares = run.numbers.get('clipped', {})
        clipped = {}
        for step, value in run.numbers.get('grad_norm', {}).items():
            if value is None:
                continue
            if shares.get(step, limit is not None and value > limit):
                clipped[step] = value
        if clipped:
            shown = 'clipped since the previous point' if shares else 'clipped'
            colour = number if len(runs) > 1 else 1
            owner = run.name if len(runs) > 1 else ''
            values = list(clipped.values())
            norms.append(Series(shown, list(clipped), values, colour, 'dots', run=owner))
    limit = limits.pop() if len(limits) == 1 else None
    level = (limit, f'grad_clip {limit:g}') if limit else None
    return Chart('gradient_norm', 'Gradient norm', 'before clipping', tuple(norms), level=level)
