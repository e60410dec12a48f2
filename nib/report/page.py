"""Shows runs as one self-contained page: verdict, findings, curves, samples and config."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nib.doctor.finding import Finding
from nib.doctor.problems import SEVERITIES
from nib.files import atomic_write
from nib.report.charts import (
    BUCKETS,
    DARK,
    LIGHT,
    SEVERITY_COLORS,
    Flag,
    text,
    time_axis,
    to_html,
    to_json,
)
from nib.report.compare import comparison_section
from nib.report.config_table import config_section
from nib.report.curves import charts_of, memory_unit
from nib.report.history import Run, read_runs
from nib.report.pngs import save_png

SAMPLES = 6  # at most, for each run


# -- the page --------------------------------------------------------------------------------------


def write_report(folders: Sequence, defaults: Mapping, page, png: bool = False) -> int:
    """Writes the page and, with png, each chart as a PNG into a folder named like the page.

    defaults: the default values of train.py's keys.
    Returns the number of PNGs. Raises ImportError, after writing the page, if matplotlib is missing
    or broken.
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
    """Writes the report at the end of a run. If that fails, it prints a warning."""
    page = Path(out_dir) / 'report.html'
    try:
        write_report([out_dir], defaults, page)
        say(f'report: {page}')
    except Exception as error:
        warn(f'{page} could not be written: {type(error).__name__}: {" ".join(str(error).split())}')


def build_page(runs: Sequence[Run], defaults: Mapping, watching: bool = False) -> str:
    """Returns the whole page as HTML, with all text from files escaped."""
    charts, flags, here = charts_of(runs), flags_of(runs), Path(__file__)
    title = ', '.join(run.name for run in runs) if len(runs) <= 3 else f'{len(runs)} runs'
    figures = ''.join(map(to_html, charts))
    overview = comparison_section(runs) if len(runs) > 1 else summary(runs[0])
    light = ';'.join(f'--c{index}:{color}' for index, color in enumerate(LIGHT))
    dark = ';'.join(f'--c{index}:{color}' for index, color in enumerate(DARK))
    severities = ';'.join(f'--{severity}:{color}' for severity, color in SEVERITY_COLORS.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'">\
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>{text(title)}: nibGPT report</title>
<style>:root{{{light};{severities}}}
@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}
{(here.with_name('page.css')).read_text(encoding='utf-8')}</style></head>
<body{' data-watching' if watching else ''}><main id="page">
<header><h1>{text(title)}</h1><p class="quiet" id="live" role="status"></p></header>
{overview}
{findings_section(runs)}
<section><h2>Curves</h2>{toolbar(runs, flags)}<div class="charts">{figures}</div>
<noscript><p>The charts need JavaScript; metrics.jsonl has their values.</p></noscript>
{'' if charts else '<p class="quiet">Nothing has been recorded yet.</p>'}</section>
{samples_section(runs)}
{config_section(runs, defaults)}
{''.join(provenance_section(run, len(runs)) for run in runs)}
</main><script>{(here.with_name('page.js')).read_text(encoding='utf-8')}</script></body></html>
"""


def toolbar(runs, flags: Sequence[Flag]) -> str:
    """Returns the controls of all charts, with what page.js needs to know about the runs."""
    data, units = {}, {'step', 'tokens', 'hours'}
    for run in runs:
        elapsed = run.elapsed
        if len(elapsed) < 2:
            units.discard('hours')
        if not run.tokens_per_step:
            units.discard('tokens')
        times = thin(elapsed)
        data[run.name if len(runs) > 1 else ''] = {
            'tokens': run.tokens_per_step,
            'steps': list(times),
            'hours': [round(seconds / 3600, 6) for seconds in times.values()],
        }
    places = [[flag.run, flag.step, flag.number, flag.name, flag.severity] for flag in flags]
    content = to_json({'runs': data, 'units': sorted(units), 'flags': places})
    return f"""<form id="toolbar" aria-label="all charts">
<label>x axis <select name="x"><option value="step">steps</option>\
<option>tokens</option><option value="hours">time in hours</option></select></label>
<label><input type="checkbox" name="logX"> logarithmic x</label>
<label>y axis <select name="y"><option value="auto">automatic</option>\
<option>linear</option><option value="log">logarithmic</option></select></label>
<label><input type="checkbox" name="fall"> include the initial drop</label>
<label>smoothing <input type="range" name="smoothing" min="0" max="0.98" step="0.02" value="0">\
</label>
<label>from <input name="from" size="6" inputmode="decimal" autocomplete="off"></label>
<label>to <input name="to" size="6" inputmode="decimal" autocomplete="off"></label>
<button type="reset">reset</button>
<small>Drag over a chart to zoom in; double-click to zoom out.</small>
<script type="application/json">{content}</script></form>"""


def thin(elapsed: Mapping[int, float]) -> dict[int, float]:
    """Returns times between which page.js interpolates, within 1/500 of the run's duration."""
    seconds = np.array([*elapsed.values()])
    buckets = (BUCKETS * seconds / (seconds.max(initial=0) or 1)).astype(int)
    is_border = buckets[1:] != buckets[:-1]
    kept = np.append(True, is_border) | np.append(is_border, True)  # ends of each bucket
    return {step: time for (step, time), keep in zip(elapsed.items(), kept) if keep}


def numbered_findings(runs) -> list[tuple[int, Run, Finding]]:
    """Returns all findings, numbered, in the page's order: the most severe first, then by step."""
    found = [(run, one) for run in runs for one in run.findings]
    found.sort(key=lambda pair: (SEVERITIES.index(pair[1].severity), pair[1].step))
    return [(number, run, one) for number, (run, one) in enumerate(found, 1)]


def flags_of(runs) -> list[Flag]:
    """Returns all findings as flags on the time axis, sorted by step."""
    flags = []
    for number, run, one in numbered_findings(runs):
        name = f'{run.name}: {one.name}' if len(runs) > 1 else one.name
        owner = run.name if len(runs) > 1 else ''
        flags.append(Flag(one.step, number, one.severity, name, owner))
    return sorted(flags, key=lambda flag: flag.step)


def summary(run: Run) -> str:
    """Returns a run's verdict and its most important figures."""
    worst, verdict = run.verdict()
    planned = run.config.get('max_iters')
    going = f' of {planned:,}' if type(planned) is int and run.step < planned else ''
    facts = [('steps', f'{run.step:,}', going.strip())]
    if best := run.best():
        bits = run.numbers.get('bits_per_byte/val', {}).get(best[0])
        detail = f'at step {best[0]:,}' + (f'; {bits:.4f} bits per byte' if bits else '')
        facts.append(('best validation loss', f'{best[1]:.4f}', detail))
    if whole := run.values('loss/val_whole'):
        facts.append(('whole validation split', f'{whole[-1]:.4f}', 'nats per token, at the end'))
    if speed := run.values('tokens_per_second'):
        facts.append(('tokens/s', f'{statistics.median(speed):,.0f}', 'median'))
    if memory := run.values('peak_memory'):
        factor, unit = memory_unit([run])
        facts.append(('peak memory', f'{factor * max(memory):,.4g} {unit}', ''))
    tiles = ''.join(
        f'<li><span>{name}</span><b>{value}</b><small>{detail}</small></li>'
        for name, value, detail in facts
    )
    unread = ''
    if run.unread:
        lines = f'{run.unread:,} line{"s" * (run.unread > 1)}'
        log = text(run.folder / 'metrics.jsonl')
        unread = f'<p class="quiet">{lines} of {log} could not be read.</p>'
    return (
        f'<section><p class="verdict {worst}">{text(verdict)}</p>'
        f'<ul class="tiles">{tiles}</ul>{unread}</section>'
    )


def findings_section(runs) -> str:
    items = []
    for number, run, one in numbered_findings(runs):
        causes = ''.join(f'<li>{text(cause)}</li>' for cause in one.causes)
        causes = f'<p>Likely causes, most likely first:</p><ol>{causes}</ol>' if causes else ''
        changes = '; '.join(
            f'<code>{text(change)}</code>' if ' = ' in change else text(change)
            for change in one.changes
        )
        changes = f'<p>Change: {changes}</p>' if changes else ''
        where = f'{text(run.name)}, ' if len(runs) > 1 else ''
        items.append(
            f'<li class="finding {one.severity}" id="finding-{number}">'
            f'<h3><span class="badge {one.severity}">{number}</span>{text(one.name)} '
            f'<small>{one.severity}, {where}step {one.step:,}</small></h3>'
            f'<p>{text(one.evidence)}</p>{causes}{changes}</li>'
        )
    if not items:
        return ''
    return f'<section><h2>Findings</h2><ul class="findings">{"".join(items)}</ul></section>'


def samples_section(runs) -> str:
    """Returns samples of a few evaluations, from first to last, or the last one of each run."""
    items = ''
    for run in runs:
        found = list(run.texts.get('sample', {}).items())
        last, count = len(found) - 1, min(SAMPLES, len(found))
        chosen = [found[round(index * last / max(1, count - 1))] for index in range(count)]
        name = f'{text(run.name)}, ' if len(runs) > 1 else ''
        for step, sample in chosen if len(runs) == 1 else found[-1:]:
            items += f'<li><h3>{name}step {step:,}</h3><pre>{text(sample)}</pre></li>'
    if not items:
        return ''
    return f'<section><h2>Samples</h2><ul class="samples">{items}</ul></section>'


def provenance_section(run: Run, count: int) -> str:
    """Returns where a run comes from: its starts, machine, versions, model and dataset."""
    rows = ''.join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>'
        for name, value in run.origin()
    )
    if not rows:
        return ''
    table = f'<div class="wide"><table class="origin">{rows}</table></div>'
    if count == 1:
        return f'<section><h2>Origin</h2>{table}</section>'
    name = text(run.name)
    return f'<details><summary>Origin of {name}</summary>{table}</details>'
