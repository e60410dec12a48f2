"""Runs as one page that needs nothing else: the verdict and findings, curves, samples and config, from what is in out_dir."""
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from nib.charts import DARK, LIGHT, SEVERITIES, SEVERITY_COLOURS, Axis, Chart, Flag, Mark, Series, save_png, time_axis, to_html
from nib.errors import UserError
from nib.files import atomic_write

UPDATE_BAND = {'adamw': (0.001, 0.01), 'muon': (0.001, 0.05)}  # those of nib/health.py, which needs torch
GROUPS = ('embedding', 'attention', 'mlp', 'head')
SAMPLES = 6  # shown of a run
LATEST_STEP = 1 << 53  # a larger one is no step
LOOKS = ('line', 'dashed', 'dotted', 'mixed')
# A chart each, of one figure or of several: key, title, unit, {name in metrics.jsonl: what it is called}, factor, further options.
PLAIN = (
    ('throughput', 'Throughput', 'tokens per second', {'tokens_per_second': 'tokens/s'}, 1, {'from_zero': True}),
    ('mfu', 'Model FLOPs utilisation', 'percent', {'mfu': 'MFU'}, 100, {'from_zero': True}),
    ('memory', 'Peak memory', 'MB', {'peak_memory': 'memory'}, 1e-6, {'from_zero': True}),
    ('noise_scale', 'Gradient noise scale', 'batches', {'noise_scale': 'noise scale'}, 1, {}),
    ('units', 'Dead units and attention entropy', 'percent',
     {'dead_units': 'dead units, of the layer that has most', 'attention_entropy': 'attention entropy, of the largest possible'},
     100, {'from_zero': True}),
    ('attention_logit', 'Largest attention logit', 'before softmax', {'attention_logit': 'largest logit'}, 1, {}),
    ('activations', 'Activations', 'standard deviation', {'activation_std': 'largest of the layers'}, 1, {}),
)


@dataclass(frozen=True)
class Finding:
    """What the doctor has found in a run."""
    name: str
    step: int
    severity: str  # one of SEVERITIES
    evidence: str
    causes: list[str]  # the likeliest first
    changes: list[str]  # 'key = value'


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder. A number that was not finite is None."""
    name: str
    folder: Path
    numbers: dict[str, dict[int, float | None]]  # name -> step -> value, by step
    texts: dict[str, dict[int, str]]
    unread: int = 0  # lines of metrics.jsonl that hold no record
    config: dict = field(default_factory=dict)
    origins: dict = field(default_factory=dict)

    @property
    def step(self) -> int:
        return max((step for values in (*self.numbers.values(), *self.texts.values()) for step in values), default=0)

    def findings(self) -> list[Finding]:
        found = [parse_finding(name.removeprefix('finding/'), step, text) for name, texts in self.texts.items()
                 if name.startswith('finding/') for step, text in texts.items()]
        return sorted(found, key=lambda one: (one.step, SEVERITIES.index(one.severity)))

    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        losses = {step: loss for step, loss in self.numbers.get('loss/val', {}).items() if loss is not None}
        return min(losses.items(), key=lambda item: item[1]) if losses else None

    def values(self, name: str) -> list[float]:
        return [value for value in self.numbers.get(name, {}).values() if value is not None]


# -- what a run has left ---------------------------------------------------------------------------------------------

def read_run(folder, name: str = '') -> Run:
    """UserError where the folder holds no run. What is damaged in it is left out and counted."""
    folder = Path(folder)
    log = folder / 'metrics.jsonl'
    if not log.exists() and not (folder / 'config.json').exists():
        raise UserError(f'--out_dir={folder}: ' + ('no run is there (it holds neither metrics.jsonl nor config.json); name the '
                        'folder that train.py wrote to' if folder.is_dir() else 'no such folder; name the one that train.py wrote to'))
    numbers, texts, unread = read_records(log)
    config = read_json(folder / 'config.json')
    return Run(name or folder.resolve().name, folder, numbers, texts, unread,
               *(part if isinstance(part := config.get(key), dict) else {} for key in ('config', 'origins')))


def read_records(path: Path) -> tuple[dict, dict, int]:
    """Numbers and texts of metrics.jsonl, by name and step, and how many of its lines hold no record. Of two values of a step
    the later stands. The last line may be cut: its run is still writing it, or was killed."""
    numbers, texts, unread = {}, {}, 0
    lines = path.read_bytes().decode(errors='replace').split('\n') if path.exists() else []
    for index, line in enumerate(lines):
        try:
            record = json.loads(line)
            step = record.pop('step')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            unread += bool(line.strip()) and index < len(lines) - 1
            continue
        if type(step) is not int or not 0 <= step < LATEST_STEP:
            unread += 1
            continue
        for name, value in record.items():
            if isinstance(value, str):
                texts.setdefault(name, {})[step] = value
            elif value is None or type(value) in (int, float):
                numbers.setdefault(name, {})[step] = value if value is not None and abs(value) < 1e300 else None
    by_step = [{name: dict(sorted(values.items())) for name, values in kind.items()} for kind in (numbers, texts)]
    return *by_step, unread


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_runs(folders: Sequence) -> list[Run]:
    """Runs under the names of their folders, or their whole paths where two folders have one name."""
    names = [Path(folder).resolve().name for folder in folders]
    return [read_run(folder, str(folder) if names.count(name) > 1 else name) for folder, name in zip(folders, names)]


def parse_finding(name: str, step: int, text: str) -> Finding:
    """'warning: evidence. Likely causes, the likeliest first: a; b. Change: key = value; key = value.' and what is like it."""
    head, _, change = text.partition(' Change: ')
    head, _, causes = head.partition(' Likely causes, the likeliest first: ')
    severity, colon, evidence = head.partition(': ')
    if not colon or severity not in SEVERITIES:
        severity, evidence = 'note', head
    return Finding(name, step, severity, evidence, *([part.strip() for part in one.strip().rstrip('.').split(';') if part.strip()]
                                                     for one in (causes, change)))


# -- which charts ----------------------------------------------------------------------------------------------------

def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """All charts for which there are records. One run's series have a colour each, several runs a colour a run."""
    charts = [loss_chart(runs),
              Chart('learning_rate', 'Learning rate', '', curves(runs, {'learning_rate': 'learning rate'})),
              gradient_chart(runs),
              Chart('update_ratios', 'Update ratios', 'size of a step / size of the weights',
                    curves(runs, {f'update_ratio/{group}': group for group in GROUPS}), log=True,
                    band=UPDATE_BAND['muon' if any(run.config.get('optimizer') == 'muon' for run in runs) else 'adamw'])]
    charts += [Chart(key, title, unit, curves(runs, names, factor), **options)
               for key, title, unit, names, factor, options in PLAIN]
    return [chart for chart in charts if chart.series]


def curves(runs, names: Mapping[str, str], factor: float = 1, **options) -> tuple[Series, ...]:
    """A series for each run and name that has records."""
    found = []
    for colour, run in enumerate(runs):
        for place, (name, shown) in enumerate(names.items()):
            if points := run.numbers.get(name):
                values = [None if value is None else factor * value for value in points.values()]
                found.append(Series(label(runs, run, shown), list(points), values, colour if len(runs) > 1 else place,
                                    **{'look': LOOKS[place % len(LOOKS)], **options}))
    return tuple(found)


def label(runs, run, shown: str) -> str:
    return f'{run.name}: {shown}' if len(runs) > 1 else shown


def loss_chart(runs) -> Chart:
    evaluated = curves(runs, {'loss/val': 'validation', 'loss/train': 'training'}, dotted=True)
    steps = curves(runs, {'loss/step': 'a step\'s batch'}, pale=True)
    steps = tuple(Series(**{**vars(one), 'colour': 2}) for one in steps) if len(runs) == 1 else steps
    marks = [Mark(*run.best(), f'best {run.best()[1]:.4f}', colour if len(runs) > 1 else 0)
             for colour, run in enumerate(runs) if run.best()]
    return Chart('loss', 'Loss', 'nats per token', evaluated + steps, tuple(marks))


def gradient_chart(runs) -> Chart:
    norms = list(curves(runs, {'grad_norm': 'gradient norm'}))
    limits = {run.config.get('grad_clip') for run in runs}
    for colour, run in enumerate(runs):
        norm = run.numbers.get('grad_norm', {})
        clipped = {step: norm[step] for step, share in run.numbers.get('clipped', {}).items() if share and norm.get(step)}
        if clipped:
            norms.append(Series(label(runs, run, 'some steps since the last point clipped'), list(clipped), list(clipped.values()),
                                colour if len(runs) > 1 else 1, 'dots'))
    limit = limits.pop() if len(limits) == 1 else None
    level = (float(limit), f'grad_clip {limit:g}') if type(limit) in (int, float) and 0 < limit < 1e300 else None
    return Chart('gradient_norm', 'Gradient norm', 'before clipping', tuple(norms), level=level)


# -- the page --------------------------------------------------------------------------------------------------------

def write_report(folders: Sequence, defaults: Mapping, page, png: bool = False) -> int:
    """Writes the page, and where png is, each chart as a PNG into a folder of its name; returns the number of PNGs.

    defaults: of train.py's keys. ImportError where matplotlib is missing; the page is written then.
    """
    runs, page = read_runs(folders), Path(page)
    with atomic_write(page) as file:
        file.write(build_page(runs, defaults).encode(errors='replace'))
    charts = charts_of(runs) if png else []
    time, flags = time_axis(charts), flags_of(runs)
    for chart in charts:
        page.with_suffix('').mkdir(exist_ok=True)
        save_png(chart, time, flags, page.with_suffix('') / f'{chart.key}.png')
    return len(charts)


def write_after_run(out_dir, defaults: Mapping, say: Callable, warn: Callable):
    """What train.py does at its end. A run does not fail because its report does: that is one warning."""
    page = Path(out_dir) / 'report.html'
    try:
        write_report([out_dir], defaults, page)
        say(f'report: {page}')
    except Exception as error:
        warn(f'{page} could not be written: {type(error).__name__}: {" ".join(str(error).split())}')


def build_page(runs: Sequence[Run], defaults: Mapping, watching: bool = False) -> str:
    """The whole page. All text in it that comes from files is escaped."""
    charts, flags, here = charts_of(runs), flags_of(runs), Path(__file__)
    time = time_axis(charts)
    title = ', '.join(run.name for run in runs)
    colours = [f'{where}{{{";".join(f"--c{index}:{colour}" for index, colour in enumerate(colours))}}}{end}' for where, colours, end
               in ((':root', LIGHT, ''), ('@media (prefers-color-scheme: dark){:root', DARK, '}'))]
    colours.append(':root{' + ';'.join(f'--{severity}:{colour}' for severity, colour in SEVERITY_COLOURS.items()) + '}')
    return f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
img-src data:; connect-src 'self'"><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>{text(title)}: nibGPT report</title>
<style>{''.join(colours)}
{(here.with_name('report.css')).read_text(encoding='utf-8')}</style></head>
<body{' data-watching' if watching else ''}><main id="page">
<header><h1>{text(title)}</h1><p class="quiet" id="live"></p></header>
{''.join(summary(run, index, len(runs)) for index, run in enumerate(runs))}
{findings_section(runs)}
<section><h2>Curves</h2><div class="charts">{''.join(to_html(chart, time, flags) for chart in charts)}</div>
{'' if charts else '<p class="quiet">No figures are recorded yet.</p>'}</section>
{''.join(samples_section(runs, run) for run in runs)}
{config_section(runs, defaults)}
</main><script>{(here.with_name('report.js')).read_text(encoding='utf-8')}</script></body></html>
'''


def text(content) -> str:
    """Escaped for HTML; control characters, which HTML cannot hold, as a sign in their place."""
    return escape(re.sub(r'[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]', '\ufffd', str(content)))


def flags_of(runs) -> list[Flag]:
    """All findings, numbered as the page lists them; in the order of their steps."""
    found = [one for run in runs for one in run.findings()]
    return sorted((Flag(one.step, number, one.severity, one.name) for number, one in enumerate(found, 1)), key=lambda flag: flag.step)


def summary(run: Run, index: int, count: int) -> str:
    """The verdict and a run's figures."""
    found, planned = run.findings(), run.config.get('max_iters')
    verdict = ' '.join([*run.texts.get('verdict', {'': ''}).values()][-1:])
    worst = min((one.severity for one in found), key=SEVERITIES.index, default='')
    if not verdict:
        verdict = (f'{len(found)} finding{"s" * (len(found) > 1)} so far' if found else 'no verdict is recorded')
        worst = worst or 'unknown'
    going = f' of {planned:,}' if type(planned) is int and run.step < planned else ''
    facts = [('steps', f'{run.step:,}', going.strip())]
    if best := run.best():
        bits = run.numbers.get('bits_per_byte/val', {}).get(best[0])
        facts.append(('best validation loss', f'{best[1]:.4f}', f'at step {best[0]:,}' + (f'; {bits:.4f} bits per byte' if bits else '')))
    if whole := run.values('loss/val_whole'):
        facts.append(('whole validation split', f'{whole[-1]:.4f}', 'nats per token, at the end'))
    if speed := run.values('tokens_per_second'):
        facts.append(('tokens/s', f'{statistics.median(speed):,.0f}', 'the median'))
    if memory := run.values('peak_memory'):
        facts.append(('peak memory', f'{max(memory) / 1e6:,.0f} MB', ''))
    tiles = ''.join(f'<li><span>{name}</span><b>{value}</b><small>{detail}</small></li>' for name, value, detail in facts)
    unread = (f'<p class="quiet">{run.unread:,} line{"s" * (run.unread > 1)} of {text(run.folder / "metrics.jsonl")} could not be '
              'read.</p>') if run.unread else ''
    key = f'<svg class="key" viewBox="0 0 24 10"><path class="c{index % len(LIGHT)}" d="M0 5H24"/></svg>'
    return (f'<section>{f"<h2>{key}{text(run.name)}</h2>" if count > 1 else ""}<p class="verdict {worst or "healthy"}">{text(verdict)}</p>'
            f'<ul class="tiles">{tiles}</ul>{unread}</section>')


def findings_section(runs) -> str:
    found = [(run, one) for run in runs for one in run.findings()]
    items = []
    for number, (run, one) in enumerate(found, 1):
        causes = f'<p>Likely causes, the likeliest first:</p><ol>{"".join(f"<li>{text(cause)}</li>" for cause in one.causes)}</ol>'
        changes = f'<p>Change: {" ".join(f"<code>{text(change)}</code>" for change in one.changes)}</p>'
        where = f'{text(run.name)}, ' if len(runs) > 1 else ''
        items.append(f'<li class="finding {one.severity}" id="finding-{number}"><h3><span class="badge {one.severity}">{number}</span>'
                     f'{text(one.name)} <small>{one.severity}, {where}step {one.step:,}</small></h3><p>{text(one.evidence)}</p>'
                     f'{causes if one.causes else ""}{changes if one.changes else ""}</li>')
    return f'<section><h2>Findings</h2><ul class="findings">{"".join(items)}</ul></section>' if items else ''


def samples_section(runs, run: Run) -> str:
    """Samples of a few evaluations, the first and the last among them."""
    found = list(run.texts.get('sample', {}).items())
    count = min(SAMPLES, len(found))
    chosen = [found[round(index * (len(found) - 1) / max(1, count - 1))] for index in range(count)]
    items = ''.join(f'<li><h3>step {step:,}</h3><pre>{text(sample)}</pre></li>' for step, sample in chosen)
    return (f'<section><h2>Samples{f": {text(run.name)}" if len(runs) > 1 else ""}</h2><ul class="samples">{items}</ul></section>'
            if items else '')


def config_section(runs, defaults: Mapping) -> str:
    """The keys that differ from their defaults, or between the runs; and all others, folded up."""
    if not any(run.config for run in runs):
        return '<section><h2>Config</h2><p class="quiet">config.json is missing or damaged.</p></section>'

    def differs(run, key):
        chosen = not (defaults.get(key) == 'auto' and str(run.origins.get(key, 'default')).startswith('default'))
        return key in run.config and key in defaults and run.config[key] != defaults[key] and chosen

    def row(key):
        cells = ''.join(f'<td>{show_value(run.config, key)}</td>' for run in runs)
        values = [json.dumps(run.config.get(key)) for run in runs]
        origin = f'<td class="quiet">{text(runs[0].origins.get(key, ""))}</td>' if len(runs) == 1 else ''
        return (f'<tr{" class=apart" if len(set(values)) > 1 else ""}><th>{text(key)}</th>{cells}'
                f'<td class="quiet">{show_value(defaults, key)}</td>{origin}</tr>')

    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    changed = [key for key in keys if any(differs(run, key) for run in runs)
               or len({json.dumps(run.config.get(key)) for run in runs}) > 1]
    head = (f'<tr><th>key</th>{"".join(f"<th>{text(run.name)}</th>" for run in runs) if len(runs) > 1 else "<th>value</th>"}'
            f'<th>default</th>{"<th>set by</th>" if len(runs) == 1 else ""}</tr>')
    rest = ''.join(row(key) for key in keys if key not in changed)
    return (f'<section><h2>Config</h2><div class="wide"><table>{head}{"".join(row(key) for key in changed)}</table></div>'
            f'<details id="defaults"><summary>{len(keys) - len(changed)} keys have their default or settled by themselves</summary>'
            f'<div class="wide"><table>{head}{rest}</table></div></details></section>')


def show_value(values: Mapping, key) -> str:
    return f'<code>{text(repr(values[key]))}</code>' if key in values else ''
