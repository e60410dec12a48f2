"""The report's section about the config: the keys that were set, and the others collapsed."""

from collections.abc import Mapping, Sequence

from nib.report.charts import text
from nib.report.history import Run, differs


def config_section(runs: Sequence[Run], defaults: Mapping) -> str:
    """Returns the keys that differ from defaults or between runs, and the others collapsed."""
    if not any(run.config for run in runs):
        missing = '<p class="quiet">config.json is missing or damaged.</p>'
        return f'<section><h2>Config</h2>{missing}</section>'
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    changed = [
        key
        for key in keys
        if differs(runs, key) or any(is_changed(run, key, defaults) for run in runs)
    ]
    others = [key for key in keys if key not in changed]
    lines = [line for run in runs for line in describe_changes(run, len(runs) > 1)]
    resumed = ''.join(f'<p>{text(line)}</p>' for line in lines)
    table = config_table('changed keys', changed, runs, defaults)
    rest = config_table('keys with their default values', others, runs, defaults)
    return (
        f'<section><h2>Config</h2>{resumed}{table}'
        f'<details id="defaults"><summary>{len(others)} more keys with their default '
        f'values</summary>{rest}</details></section>'
    )


def is_changed(run: Run, key: str, defaults: Mapping) -> bool:
    """Returns whether somebody has given a key another value than its default."""
    by_default = str(run.origins.get(key, 'default')).startswith('default')
    if defaults.get(key) == 'auto' and by_default:
        return False  # nobody has chosen the value that 'auto' stands for
    return key in run.config and key in defaults and run.config[key] != defaults[key]


def config_table(name: str, keys: Sequence[str], runs: Sequence[Run], defaults: Mapping) -> str:
    """Returns a table of these keys. name: for those who do not see it."""
    names = ['key', 'value', 'default', *(['set by'] if len(runs) == 1 else [])]
    columns = ''.join(f'<th scope="col">{name}</th>' for name in names)
    rows = ''.join(config_row(key, runs, defaults) for key in keys)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}">'
        f'<table class="config"><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody>'
        f'</table></div>'
    )


def config_row(key: str, runs: Sequence[Run], defaults: Mapping) -> str:
    apart = ' class=apart' if differs(runs, key) else ''
    origin = ''
    if len(runs) == 1:
        origin = f'<td class="quiet">{text(runs[0].origins.get(key, ""))}</td>'
    return (
        f'<tr{apart}><th scope="row">{text(key)}</th><td>{show_values(key, runs)}</td>'
        f'<td class="quiet">{show_value(defaults, key)}</td>{origin}</tr>'
    )


def show_values(key: str, runs: Sequence[Run]) -> str:
    """Returns the value that all runs have, or each value with the runs that have it."""
    shown: dict[str, list[str]] = {}
    for run in runs:
        shown.setdefault(show_value(run.config, key), []).append(text(run.name))
    if len(shown) == 1:
        return next(iter(shown))
    lines = (f'{value} <small>{", ".join(names)}</small>' for value, names in shown.items())
    return '<br>'.join(lines)


def show_value(values: Mapping, key) -> str:
    return f'<code>{text(repr(values[key]))}</code>' if key in values else ''


def describe_changes(run: Run, named: bool) -> list[str]:
    """Returns a line for each time the run was resumed with a changed config."""
    lines, name = [], f'{run.name} ' if named else ''
    try:
        for one in run.changes:
            changes = ', '.join(
                f'{key} {before!r} -> {after!r}' for key, (before, after) in one['changes'].items()
            )
            lines.append(f'{name}resumed at step {one["step"]:,} with {changes}')
    except (KeyError, TypeError, ValueError, AttributeError):
        return []  # config.json is damaged
    return lines
