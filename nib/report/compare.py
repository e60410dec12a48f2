"""Compares runs: a table with a row for each, and charts of a swept key against the result."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nib.report.charts import DASHES, Axis, Chart, Series, show_number, text
from nib.report.curves import style_of_run
from nib.report.history import Run, differs, show_seconds
from nib.schema import is_auto

# Differ between runs, but are not what an experiment varies.
NOT_COMPARED = (
    'out_dir',
    'init_from',
    'overwrite',
    'ranks',
    'eval_interval',
    'log_interval',
    'keep_last',
    'keep_every',
    'sample_tokens',
    'tensorboard',
    'wandb_log',
    'wandb_project',
    'wandb_run_name',
    'report',
)


@dataclass(frozen=True)
class Cell:
    shown: str
    order: float | str = ''  # sorts the table; '' comes last


def compare(runs: Sequence[Run]) -> tuple[list[str], list[list[Cell]]]:
    """Returns the names of the columns, and a row for each run."""
    keys = differing_keys(runs)
    figures = ['best loss', 'final loss', 'tokens/s', 'time', 'steps', 'verdict']
    return ['run', *keys, *figures], [row_of(run, keys) for run in runs]


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Returns the config keys in which the runs differ, without those that follow from others."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in NOT_COMPARED)
    compared = [key for key in keys if not all(is_auto(str(run.origins.get(key))) for run in runs)]
    return [key for key in compared if differs(runs, key)]


def row_of(run: Run, keys: Sequence[str]) -> list[Cell]:
    def number(value, form='{:.4f}'):
        return Cell('' if value is None else form.format(value), '' if value is None else value)

    best, speed = run.best(), run.values('tokens_per_second')
    final = next(reversed(run.numbers.get('loss/val', {}).values()), None)
    seconds = run.seconds
    return [
        Cell(run.name, run.name),
        *(config_cell(run.config.get(key, '')) for key in keys),
        number(best and best[1]),
        number(final),
        number(statistics.median(speed) if speed else None, '{:,.0f}'),
        Cell('' if seconds is None else show_seconds(seconds), '' if seconds is None else seconds),
        number(run.step, '{:,}'),
        Cell(run.verdict()[1], run.verdict()[1]),
    ]


def config_cell(value) -> Cell:
    if type(value) in (int, float):
        return Cell(f'{value:g}' if type(value) is float else str(value), value)
    return Cell(str(value), str(value))


def comparison_section(runs: Sequence[Run]) -> str:
    """Returns the sortable table, in which a run can be switched off, and the swept keys."""
    names, rows = compare(runs)
    head = ''.join(
        f'<th scope="col"><button type="button">{text(name).replace("_", "_<wbr>")}</button></th>'
        for name in names
    )
    body = ''
    for number, (run, cells) in enumerate(zip(runs, rows)):
        first, *others = cells
        line = style_of_run(Series('', (), (), number))
        dashes = f' stroke-dasharray="{DASHES[line.look]}"' if DASHES[line.look] else ''
        key = (
            f'<svg class="key" viewBox="0 0 24 10" aria-hidden="true">'
            f'<path class="c{line.color}"{dashes} d="M0 5H24"/></svg>'
        )
        name = text(run.name)
        switch = (
            f'<label><input type="checkbox" checked data-run="{name}" autocomplete="off">'
            f'{key}<span>{name}</span></label>'
        )
        body += f'<tr><th scope="row" data-value="{text(first.order)}">{switch}</th>' + ''.join(
            f'<td data-value="{text(cell.order)}">{text(cell.shown)}</td>' for cell in others
        )
        body += '</tr>'
    label = 'tabindex="0" role="region" aria-label="table of the runs"'
    swept = ''.join(swept_chart(runs, key) for key in differing_keys(runs))
    return (
        f'<section><h2>Runs</h2><div class="wide" {label}><table class="runs"><thead><tr>{head}'
        f'</tr></thead><tbody>{body}</tbody></table></div><div class="charts">{swept}</div>'
        f'</section>'
    )


def swept_chart(runs: Sequence[Run], key: str) -> str:
    """Returns a chart of a numeric key against the best validation loss; '' if it has no points."""
    points = [
        (run.config[key], best[1], number)
        for number, run in enumerate(runs)
        if type(run.config.get(key)) in (int, float)
        and abs(run.config[key]) < 1e300
        and (best := run.best())
    ]
    values = sorted({value for value, _, _ in points})
    if len(values) < 2 or key == 'seed':
        return ''
    log = values[0] > 0 and values[-1] / values[0] >= 5
    across = Axis(values[0], values[-1], log)
    up = Chart(
        '', '', '', (Series('', range(len(points)), [loss for _, loss, _ in points]),)
    ).axis()

    def x(value):  # with room at both ends for the names of the ticks
        return round(5 + 90 * across.share(value), 2)

    def y(loss):
        return round(100 - 100 * up.share(loss), 2)

    drawn = ''.join(f'<path class="grid" d="M0 {10 * y(tick)}H1000"/>' for tick in up.ticks())
    texts = ''.join(
        f'<span class="y" style="top:{y(tick)}%">{show_number(tick)}</span>' for tick in up.ticks()
    )
    shown = values if len(values) <= 8 else values[:: len(values) // 5]
    texts += ''.join(
        f'<span class="x" style="left:{x(value)}%">{show_number(value)}</span>' for value in shown
    )
    for value, loss, number in points:
        color = style_of_run(Series('', (), (), number)).color
        drawn += f'<path class="c{color} dot" d="M{10 * x(value)} {10 * y(loss)}h0"/>'
    value, loss, _ = min(points, key=lambda point: point[1])
    words = f'best validation loss by {key}; lowest {loss:.4f} at {show_number(value)}'
    return (
        f'<figure class="chart swept"><figcaption>Best validation loss '
        f'<small>by {text(key)}; lowest at {show_number(value)}</small></figcaption>'
        f'<div class="plot" role="img" aria-label="{text(words)}"><svg viewBox="0 0 1000 1000" '
        f'preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>{texts}</div></figure>'
    )
