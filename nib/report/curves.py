"""The charts that show what runs have recorded."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from nib.doctor import health
from nib.report.charts import NEUTRAL, Chart, Mark, Series
from nib.report.history import Run

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


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Returns all charts that have records, including one for each kind of unknown metric.

    With one run, each series has a color. Several runs have a chart for each name, in which each
    run has a color and a look.
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
    """Returns the series in the color and look of its run; 20 runs differ."""
    if series.look == 'dots':
        return replace(series, color=series.color % NEUTRAL)
    look = LOOKS[series.color // NEUTRAL % len(LOOKS)]
    return replace(series, color=series.color % NEUTRAL, look=look, pale=False)


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
            color = number if len(runs) > 1 else place
            look = LOOKS[place % len(LOOKS)]
            owner = run.name if len(runs) > 1 else ''
            found.append(Series(shown, list(points), values, color, look, run=owner, **options))
    return tuple(found)


def loss_chart(runs) -> Chart:
    steps = curves(runs, {'loss/step': "a step's batch"}, pale=True)
    steps = tuple(replace(one, color=NEUTRAL) for one in steps) if len(runs) == 1 else steps
    evaluated = curves(runs, {'loss/val': 'validation', 'loss/train': 'training'}, dotted=True)
    # The validation loss comes last, so that it is drawn above the others.
    evaluated = tuple(sorted(evaluated, key=lambda one: one.name == 'validation'))
    marks = []
    for color, run in enumerate(runs):
        if best := run.best():
            step, loss = best
            label = f'best {loss:.4f} at step {step:,}' if len(runs) == 1 else ''
            marks.append(
                Mark(step, loss, label, color % NEUTRAL, run.name if len(runs) > 1 else '')
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
            color = number if len(runs) > 1 else 1
            owner = run.name if len(runs) > 1 else ''
            values = list(clipped.values())
            norms.append(Series('clipped', list(clipped), values, color, 'dots', run=owner))
    level = (limits[0], f'grad_clip {limits[0]:g}') if len(set(limits)) == 1 and limits[0] else None
    return Chart('gradient_norm', 'Gradient norm', 'before clipping', tuple(norms), level=level)
