"""The config of the scripts: annotated assignments, overridden by Python files and flags.

The block of assignments at the top of a script is the schema, for example
`batch_size: int = 12  # sequences per micro step`. Values come from, in this order:

    the defaults, then config files (python train.py config/a.py config/b.py), then --key=value

A resumed run's own config stands between the defaults and the files. Flags win wherever they appear
on the command line, and config files already see their values. A config file is the user's own
Python code and is executed; the value of a flag is read as a literal and never executed. In a
config file, include('other.py') runs another one as if its lines were there. Its path is relative
to the first file.
"""

import ast
import difflib
import io
import os
import re
import shutil
import sys
import textwrap
import tokenize
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nib.errors import UserError

# The type of a key is a tuple of alternatives: Python types, None and literal values.
# `int | None` is (int, None), and `bool | Literal['auto']` is (bool, 'auto').
Type = tuple
Settle = Mapping[str, Callable]
Recall = Callable[[Mapping, Mapping], tuple[Mapping, str]]
Comments = Mapping[str, str]
NO_SETTLING: Settle = MappingProxyType({})
NO_COMMENTS: Comments = MappingProxyType({})
PYTHON_TYPES = {'int': int, 'float': float, 'str': str, 'bool': bool}
# How a person names a type, where it is not the name of a choice.
IN_WORDS = {int: 'an integer', float: 'a number', str: 'a text', bool: 'True or False'}
RESERVED = ('help', 'print_config', 'include')
TEXTS = ('start', 'stop')  # keys whose value is a text, in which ~ is not a home folder
CONFIG_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config')


@dataclass(frozen=True)
class Block:
    """The config block of a script."""

    defaults: dict[str, object]
    types: dict[str, Type]
    comments: dict[str, str]
    headings: dict[str, str]  # first key of a group -> the comment line above it
    doc: str  # first paragraph of the script's docstring


def configure(
    script: str,
    argv: Sequence[str],
    settle: Settle = NO_SETTLING,
    base: str | None = None,
    recall: Recall | None = None,
    positional: str = 'config/file.py',
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a script's values and where each one comes from, for example 'command line'.

    settle: see resolve. base: another script, whose keys are added to this script's keys. recall:
    function of the values and origins; returns values that replace some of them, and their origin.
    positional: what --help calls the arguments without a flag.
    The origin of an 'auto' ends in '(auto)'. With --help and --print_config, it prints and exits.
    Raises UserError for an invalid argument.
    """
    block = read_block(script)
    if base:
        below = read_block(os.path.join(os.path.dirname(script), base))
        block = Block(
            block.defaults | below.defaults,
            block.types | below.types,
            block.comments | below.comments,
            block.headings | below.headings,
            block.doc,
        )
    if '--help' in argv or '-h' in argv:
        print_help(script, block, positional)
        raise SystemExit(0)
    printing = [item for item in argv if item in ('--print_config', '--print-config')]
    values, origins = resolve(
        block.defaults,
        block.types,
        [item for item in argv if item not in printing],
        settle,
        block.comments,
    )
    if recall:
        replace_values(values, origins, block.types, *recall(values, origins))
        settle_keys(values, origins, settle, settle)
    if printing:
        print_columns(
            [(f'{key} = {value!r}', f'# {origins[key]}') for key, value in values.items()]
        )
        raise SystemExit(0)
    for key, value in values.items():
        if value == 'auto':
            origins[key] += ' (auto)'
    return values, origins


def resolve(
    defaults: Mapping[str, object],
    types: Mapping[str, Type],
    argv: Sequence[str],
    settle: Settle = NO_SETTLING,
    comments: Comments = NO_COMMENTS,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the value of every key and where it comes from.

    The latter is 'default', 'config/x.py:12' or 'command line'. settle: key -> function that
    replaces its value by a definite one ('auto' -> 'cpu') before a config file sees it. comments:
    key -> what it means. A ~ at the beginning of a path, also in a list with commas, becomes the
    home folder.

    If a key allows 'auto' but has another default, 'auto' keeps the value that it would replace and
    adds ' (auto)' to where it comes from. The script adapts that value.
    """
    flags, files = parse_argv(argv, types, comments)
    adapted = {key for key in types if 'auto' in types[key] and defaults[key] != 'auto'}
    autos = [key for key in adapted if flags.get(key) == 'auto']
    for key in autos:
        del flags[key]
    values = {**defaults, **flags}
    origins = {key: 'command line' if key in flags else 'default' for key in values}
    settle_keys(values, origins, settle, settle)
    for path in files:
        places = run_file(path, values, types, flags, comments, adapted)
        origins.update(places)
        settle_keys(values, origins, settle, [key for key in settle if key in places])
    for key, value in values.items():
        if isinstance(value, str) and key not in TEXTS:
            values[key] = ','.join(map(os.path.expanduser, value.split(',')))
    return values, origins | dict.fromkeys(autos, 'command line (auto)')


def replace_values(values, origins, types, replacements, origin):
    """Replaces values, except by those that this version of the script does not accept."""
    for key, value in replacements.items():
        with suppress(KeyError, UserError):
            values[key], origins[key] = fit(value, types[key], ''), origin


def settle_keys(values, origins, settle, keys):
    for key in keys:
        before, values[key] = values[key], settle[key](values[key])
        if values[key] != before:
            origins[key] += f' ({before})'


# ---------------------------------------------------------------------------
# The schema: a script's block


def read_block(path: str) -> Block:
    """Reads a script's config block from its source, without importing or running it."""
    source, tree = read_python(path)
    trailing, standalone = read_comments(source)
    block = Block({}, {}, {}, {}, (ast.get_docstring(tree) or '').split('\n\n')[0])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        if not (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
        ):
            continue
        key, where = node.target.id, f'{path}:{node.lineno}: {node.target.id}'
        if key in RESERVED or key.startswith('_'):
            raise UserError(
                f'{where}: this name cannot be a key ({", ".join(RESERVED)} and _names are '
                f'reserved)'
            )
        try:
            block.types[key] = read_type(node.annotation)
            default = ast.literal_eval(node.value)
        except ValueError:
            raise UserError(
                f'{where}: found {ast.unparse(node)}, expected a literal default and a type'
                " made of int, float, str, bool, None and Literal['a', 'b'], joined by |"
            ) from None
        block.defaults[key] = fit(default, block.types[key], where)
        block.comments[key] = trailing.get(node.end_lineno, '')
        line = node.lineno - 1
        while standalone.get(line) == '':  # a ruler
            line -= 1
        if line in standalone:
            block.headings[key] = standalone[line]
    return block


def read_comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Returns a block's comments by line: those after code, and those on a line of their own.

    Rulers of dashes become ''.
    """
    trailing, standalone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[1] == 0 and token.string in ('async', 'class', 'def'):
            break  # after the block
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
            trailing[token.start[0]] = token.string.lstrip('#').strip()
        elif token.type == tokenize.COMMENT:
            standalone[token.start[0]] = token.string.strip('#-= ')
    return trailing, standalone


def read_type(node: ast.expr) -> Type:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return read_type(left) + read_type(right)
        case ast.Constant(value=None):
            return (None,)
        case ast.Name(id=name) if name in PYTHON_TYPES:
            return (PYTHON_TYPES[name],)
        case ast.Subscript(value=ast.Name(id='Literal'), slice=choices):
            choices = ast.literal_eval(choices)
            return choices if isinstance(choices, tuple) else (choices,)
    raise ValueError(ast.unparse(node))


# ---------------------------------------------------------------------------
# Values


def fit(value: object, kind: Type, where: str) -> object:
    """Returns the value converted to one of the type's alternatives.

    True is not an int, but 1 may become a float, and 1e3 an int. Raises UserError if nothing fits.
    """
    for alternative in kind:
        if type(value) is alternative or (
            type(value) is type(alternative) and value == alternative
        ):
            return value
    if type(value) is int and float in kind and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is float and int in kind and value.is_integer():
        return int(value)
    choices = [choice for choice in kind if isinstance(choice, str)]
    hint = suggest(value, choices, '{!r}') if isinstance(value, str) else ''
    raise UserError(f'{where}: found {show(value)}, expected {in_words(kind)}{hint}')


def read_text(text: str, kind: Type, where: str) -> object:
    """Returns the value that a flag's text stands for.

    If the type includes str, quotes are part of the text. Raises UserError if it does not fit.
    """
    readings = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about escapes such as '\d'
            readings.append(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    if str in kind:
        readings = [reading for reading in readings if not isinstance(reading, str)]
    if text.lower() in ('true', 'false'):
        readings.append(text.lower() == 'true')
    if float in kind and text.lower().lstrip('+-') in ('inf', 'nan'):
        readings.append(float(text))
    for reading in readings:
        try:
            return fit(reading, kind, where)
        except UserError:
            pass
    return fit(text, kind, where)


def describe(kind: Type) -> str:
    """Returns the type as it is written in a script."""
    return ' | '.join(part.__name__ if isinstance(part, type) else repr(part) for part in kind)


def in_words(kind: Type) -> str:
    """Returns the type as an error message names it."""
    *first, last = [IN_WORDS.get(part) or repr(part) for part in kind]
    return f'{", ".join(first)} or {last}' if first else last


def show(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # a user's own class, or an int with more digits than Python prints
        text = f'a value of type {type(value).__name__}'
    return text if len(text) <= 80 else text[:77] + '...'


def suggest(name: str, names: Sequence[str], form: str = '{}') -> str:
    nearest = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {form.format(nearest[0])}?' if nearest else ''


def suggest_key(name: str, types: Mapping[str, Type], comments: Comments, form='{}') -> str:
    """Returns a hint: keys with these initials or a similar spelling, or one that means this."""
    keys = [key for key in types if ''.join(re.findall('(?:^|_)(.)', key)) == name]
    keys = keys or difflib.get_close_matches(name, types, n=2, cutoff=0.66)
    keys = keys or find_by_meaning(name, types, comments)
    return f'; did you mean {" or ".join(map(form.format, keys))}?' if keys else ''


def find_by_meaning(name: str, types: Mapping[str, Type], comments: Comments) -> list[str]:
    """Returns the key whose name, choices and comment contain most of a name's parts, if half."""
    parts = [part for part in name.lower().split('_') if len(part) > 2]

    def n_found(key: str) -> int:
        choices = [choice for choice in types[key] if isinstance(choice, str)]
        text = ' '.join([key.replace('_', ' '), *choices, comments.get(key, '')])
        return sum(bool(re.search(rf'\b{re.escape(part)}', text.lower())) for part in parts)

    # Of several, the one with the shortest comment.
    best = max(types, key=lambda key: (n_found(key), -len(comments.get(key, '').split())))
    return [best] if parts and 2 * n_found(best) >= len(parts) else []


# ---------------------------------------------------------------------------
# Flags and files


def parse_argv(
    argv: Sequence[str], types: Mapping[str, Type], comments: Comments
) -> tuple[dict[str, object], list[str]]:
    """Returns flags by key, and the config files in order."""
    flags: dict[str, object] = {}
    files: list[str] = []
    items = list(argv)
    while items:
        item = items.pop(0)
        if not item.startswith('--'):
            files.append(check_file(os.path.expanduser(item), types))
            continue
        name, equals, text = item.removeprefix('--').partition('=')
        key = name.replace('-', '_')
        if key not in types and key.removeprefix('no_') in types and not equals:
            key = key.removeprefix('no_')
            if bool not in types[key]:
                raise UserError(
                    f'{item}: {key} is not a switch but {in_words(types[key])}; type --{key}=value'
                )
            flags[key] = False
        elif key not in types:
            hint = suggest_key(key, types, comments, '--{}')
            raise UserError(f'--{name}: no such key{hint} (--help lists all keys)')
        elif not equals and bool in types[key] and not (items and is_value(items[0], types[key])):
            flags[key] = True
        else:
            if not equals and (not items or items[0].startswith('--')):
                raise UserError(
                    f'--{name}: found no value, expected {in_words(types[key])}; type --{key}=value'
                )
            flags[key] = read_text(text if equals else items.pop(0), types[key], f'--{name}')
    return flags, files


def is_value(item: str, kind: Type) -> bool:
    """Returns whether the item after a switch is its value, as in --compile false."""
    try:
        read_text(item, kind, '')
    except UserError:
        return False
    return not item.startswith('--') and not item.endswith('.py')


def check_file(path: str, types: Mapping[str, Type]) -> str:
    """Returns the path of a config file. Raises UserError with a hint if it is not one."""
    if os.path.exists(path) and path.endswith('.py'):
        return path
    if os.path.exists(path):  # a text or a run's folder, for which the user forgot the flag
        hint = ' (flags are written --key=value)'
        if 'input' in types:
            hint = f'; did you mean --input={path}?'
        elif 'out_dir' in types and os.path.isdir(path):
            hint = f'; did you mean --out_dir={path}?'
        raise UserError(f'{path}: not a config file, because its name does not end in .py{hint}')
    flag = path.lstrip('-')
    if flag.partition('=')[0].replace('-', '_') in types:
        raise UserError(f'{path}: no such config file; did you mean --{flag}?')
    candidates = list_python(os.path.dirname(path)) + list_python(CONFIG_FOLDER)
    nearby = {os.path.basename(file): file for file in candidates}
    nearest = difflib.get_close_matches(os.path.basename(path), nearby, n=1)
    hint = (
        f'; did you mean {nearby[nearest[0]]}?' if nearest else ' (flags are written --key=value)'
    )
    raise UserError(f'{path}: no such config file{hint}')


def list_python(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder or '.'))
    except (OSError, ValueError):
        return []
    shown = os.path.relpath(folder) if os.path.isabs(folder) else folder
    return [os.path.join(shown, name) for name in names if name.endswith('.py')]


class Namespace(dict):
    """The namespace in which config files run.

    Pinned keys keep their values, and adapted keys if they are set to 'auto'. For all but the
    pinned keys, it records the place of the last assignment.
    """

    def __init__(self, values: Mapping, pinned: Mapping, adapted: Collection[str]):
        super().__init__(values)
        self.pinned, self.adapted = pinned, adapted
        self.places: dict[str, str] = {}
        self.imports: set[str] = set()  # names that import statements define
        self.running: list[str] = []  # the files that are being executed, innermost last

    def __setitem__(self, name, value):
        if name not in self.pinned:
            frame = sys._getframe(1)  # the frame of the config file
            self.places[name] = f'{frame.f_code.co_filename}:{frame.f_lineno}'
            if name in self.adapted and value == 'auto':
                self.places[name] += ' (auto)'
            else:
                super().__setitem__(name, value)

    def execute(self, path: str):
        """Runs a config file. Raises UserError with the place if a statement fails."""
        _, tree = read_python(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):  # its assignments would bypass __setitem__
                raise UserError(
                    f'{path}:{node.lineno}: found a global statement, expected assignments at the '
                    f'top level'
                )
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= {
                    (alias.asname or alias.name).partition('.')[0] for alias in node.names
                }

        def include(other):
            other = os.path.normpath(os.path.join(os.path.dirname(path), other))
            if other in self.running:
                raise ValueError(f'{other} includes itself')
            self.execute(other)
            self.update(own_names)

        own_names = {'__file__': path, 'include': include}
        self.update(own_names)
        self.running.append(os.path.normpath(path))
        try:
            exec(compile(tree, path, 'exec'), self, self)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            lines = [
                line
                for frame, line in traceback.walk_tb(error.__traceback__)
                if frame.f_code.co_filename == path
            ]
            # A SyntaxError of compile has no frame.
            line = lines[-1] if lines else getattr(error, 'lineno', 1)
            reason = f'{type(error).__name__}: {error}'.removesuffix(': ')
            raise UserError(f'{path}:{line}: {reason}') from None
        self.running.pop()


def run_file(
    path: str,
    values: dict,
    types: Mapping[str, Type],
    pinned: Mapping[str, object],
    comments: Comments,
    adapted: Collection[str],
) -> dict[str, str]:
    """Runs a config file and updates the values; returns where each key was last assigned."""
    namespace = Namespace(values, pinned, adapted)
    namespace.execute(path)
    for name, value in namespace.items():
        place = namespace.places.get(name, path)
        if name in namespace.places and name in types:
            values[name] = fit(value, types[name], f'{place}: {name}')
        elif (
            name not in types
            and name not in namespace.imports
            and not name.startswith('_')
            and name != 'include'
        ):
            hint = suggest_key(name, types, comments)
            raise UserError(
                f"{place}: {name}: no such key{hint} (the file's own names must begin with _)"
            )
    return {
        name: place
        for name, place in namespace.places.items()
        if name in types and name in namespace
    }


def read_python(path: str) -> tuple[str, ast.Module]:
    """Returns the source of a Python file and its syntax tree. Raises UserError if it has none."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            source = file.read()
        return source, ast.parse(source, path)
    except SyntaxError as error:
        reason = (
            f':{error.lineno or 1}: SyntaxError: {error.msg}; a config file is Python code, such '
            f'as: batch_size = 12'
        )
    except UnicodeDecodeError as error:
        reason = f': found bytes that are not UTF-8 ({error.reason}), expected a Python file'
    except (OSError, ValueError, MemoryError, RecursionError) as error:
        reason = f': cannot be read: {getattr(error, "strerror", None) or error}'
    raise UserError(path + reason)


# ---------------------------------------------------------------------------
# Output of --help and --print_config


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
