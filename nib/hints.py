"""The output of --help and --print_config, and hints at what a user may have meant."""

import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from nib.errors import UserError
from nib.files import ROOT
from nib.schema import Block, Type, describe

CONFIG_FOLDER = str(ROOT / 'config')
# Keys of nanoGPT's scripts that have another name or no counterpart here -> what to write instead.
NANOGPT_KEYS = {
    'always_save_checkpoint': 'leave it out, because a run keeps its newest and best checkpoint',
    'decay_lr': "leave it out; for False, set lr_schedule to 'constant' and warmup_iters to 0",
    'backend': 'leave it out, because processes use nccl on GPUs and gloo on CPUs',
    'real_data': 'leave it out, because bench.py measures random tokens if there is no dataset',
    'profile': 'leave it out, because bench.py always shows where the time of a step goes',
}
# Names that may be mistaken for keys -> what to write instead.
NOT_KEYS = {
    'config': 'the path of a config file needs no flag',
    'resume': 'write --init_from=resume',
    'include': "it is a function: write include('other.py')",
}


def print_help(script: str, block: Block, positional: str) -> None:
    """Prints what the script does, its usage and its keys, fitted to the terminal's width."""
    width = max(20, shutil.get_terminal_size().columns)
    usage = f'usage: python {os.path.relpath(script)} [{positional} ...] [--key=value ...]'
    usage = textwrap.fill(f'{usage} [--print_config]', width, subsequent_indent=' ' * 7)
    print(textwrap.fill(' '.join(block.doc.split()), width), usage, sep='\n\n', end='\n\n')
    keys = {
        key: f'  --{key}: {describe(block.types[key])} = {default!r}'
        for key, default in block.defaults.items()
    }
    # A comment stands beside its key if both have room, else below it.
    beside = [len(key) for key in keys.values() if 2 * len(key) < width]
    column = max(beside, default=0) + 2 if width >= 60 else 6
    for number, (key, shown) in enumerate(keys.items()):
        if key in block.headings:
            print('\n' * (number > 0) + textwrap.fill(block.headings[key], width))
        margin = ' ' * column
        comment = textwrap.wrap(
            block.comments[key],
            width,
            initial_indent=margin,
            subsequent_indent=margin,
            break_on_hyphens=False,
        )
        if comment and len(shown) <= column - 2:
            comment[0] = shown + comment[0][len(shown) :]
        else:
            comment.insert(0, textwrap.fill(shown, width, subsequent_indent=' ' * 6))
        print('\n'.join(comment))


def print_columns(rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(left) for left, right in rows if right and len(left) <= 56), default=0)
    for left, right in rows:
        print(f'{left:{width}}  {right}'.rstrip())


# -- hints -----------------------------------------------------------------------------------------


def no_such_keys(unknown: Mapping[str, str], block: Block, note: str, form: str = '{}') -> str:
    """Returns what is wrong with unknown keys, and which ones may be meant.

    unknown: where each one stands -> the key. note: for keys that are not nanoGPT's either.
    """
    problems = [f'{place}: {_no_such_key(name, block, form)}' for place, name in unknown.items()]
    is_nanogpt = set(unknown.values()) <= NANOGPT_KEYS.keys()
    return '; '.join(problems) + ('' if is_nanogpt else f' ({note})')


def _no_such_key(name: str, block: Block, form: str) -> str:
    """Candidates have these initials, a similar spelling, this first word or this meaning."""
    name = name.strip('_ \u2013\u2014')  # -name, a dash, and '--name = value'
    if name in NANOGPT_KEYS:
        return f'a key of nanoGPT: {NANOGPT_KEYS[name]}'
    if name in NOT_KEYS:
        return f'no such key; {NOT_KEYS[name]}'
    if name in block.types:
        return f'no such key; did you mean {form.format(name)}?'
    switch = name.removeprefix('no_')
    if switch != name and bool in block.types.get(switch, ()) and form.startswith('--'):
        return f'no such key; did you mean --no-{switch} or --{switch}?'
    keys = [key for key in block.types if ''.join(re.findall('(?:^|_)(.)', key)) == name]
    keys = keys or difflib.get_close_matches(name, block.types, n=2, cutoff=0.66)
    keys = keys or [key for key in block.types if key.startswith(f'{name}_')][:2]
    keys = keys or find_by_meaning(name, block)
    hint = f'; did you mean {" or ".join(map(form.format, keys))}?' if keys else ''
    return f'no such key{hint}'


def find_by_meaning(name: str, block: Block) -> list[str]:
    """Returns the key whose name, choices and comment contain most of a name's parts, if half."""
    parts = [part for part in name.lower().split('_') if len(part) > 2]

    def n_found(key: str) -> int:
        choices = [choice for choice in block.types[key] if isinstance(choice, str)]
        text = ' '.join([key.replace('_', ' '), *choices, block.comments[key]])
        return sum(bool(re.search(rf'\b{re.escape(part)}', text.lower())) for part in parts)

    # Of several, the one with the shortest comment.
    best = max(block.types, key=lambda key: (n_found(key), -len(block.comments[key].split())))
    return [best] if parts and 2 * n_found(best) >= len(parts) else []


def check_file(path: str, types: Mapping[str, Type]) -> str:
    """Returns the path of a config file. Raises UserError with a hint if it is not one."""
    quotes = '; a text with spaces needs quotes' if 'start' in types else ''
    usage = f' (flags are written --key=value{quotes})'
    if os.path.exists(path) and path.endswith('.py'):
        return path
    if os.path.exists(path):  # a text or a run's folder, for which the user forgot the flag
        hint = usage
        if 'input' in types:
            hint = f'; did you mean --input={path}? Separate several paths with commas'
        elif 'out_dir' in types and os.path.isdir(path):
            hint = f'; did you mean --out_dir={path}?'
        raise UserError(f'{path}: not a config file, because its name does not end in .py{hint}')
    if path.partition('=')[0].replace('-', '_') in types:
        raise UserError(f'{path}: no such config file; did you mean --{path}?')
    near = nearest_file(path)
    hint = f'; did you mean {near}?' if near else usage
    raise UserError(f'{path}: no such config file{hint}')


def nearest_file(path: str) -> str:
    """Returns the Python file, next to a missing one or in config/, that it may mean, or ''."""
    candidates = list_python(os.path.dirname(path)) + list_python(CONFIG_FOLDER)
    nearby = {os.path.basename(file): file for file in candidates}
    nearest = difflib.get_close_matches(os.path.basename(path), nearby, n=1)
    return nearby[nearest[0]] if nearest else ''


def hint_at_name(error: BaseException, names: Iterable[str]) -> str:
    """Returns a hint if a config file uses a name that is not defined."""
    name = error.name if type(error) is NameError else None
    if not name:
        return ''
    nearest = difflib.get_close_matches(name, ['True', 'False', 'None', *names], n=1)
    return f'; did you mean {" or ".join([*nearest, f"the text {name!r}"])}?'


def list_python(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder or '.'))
    except (OSError, ValueError):
        return []
    shown = os.path.relpath(folder) if os.path.isabs(folder) else folder
    return [os.path.join(shown, name) for name in names if name.endswith('.py')]
