"""The config of the scripts: annotated assignments, overridden by Python files and flags.

The block of assignments at the top of a script says which keys exist (nib/schema.py). Values come
from, in this order:

    the defaults, then config files (python train.py config/a.py config/b.py), then --key=value

A resumed run's own config stands between the defaults and the files. Flags win wherever they appear
on the command line, and config files already see their values. A config file is the user's own
Python code and is executed; the value of a flag is read as a literal and never executed. In a
config file, include('other.py') runs another one as if its lines were there. Its path is relative
to the first file.
"""

import ast
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from nib.errors import UserError, collecting, run_script
from nib.hints import (
    check_file,
    hint_at_name,
    nearest_file,
    no_such_keys,
    print_columns,
    print_help,
)
from nib.schema import Block, Type, fit, in_words, read_block, read_python, read_text

Settle = Mapping[str, Callable]
Recall = Callable[[Mapping, Mapping], tuple[Mapping, str]]
NO_SETTLING: Settle = MappingProxyType({})
TEXTS = ('start', 'stop')  # keys whose value is a text, in which ~ is not a home folder
DASHES = ('-', '\u2013', '\u2014')  # word processors write the last two instead of --


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
        block = block.extended(read_block(os.path.join(os.path.dirname(script), base)))
    if '--help' in argv or '-h' in argv:
        print_help(script, block, positional)
        raise SystemExit(0)
    printing = [item for item in argv if item in ('--print_config', '--print-config')]
    values, origins = resolve(block, [item for item in argv if item not in printing], settle)
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
    block: Block, argv: Sequence[str], settle: Settle = NO_SETTLING
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the value of every key and where it comes from.

    The latter is 'default', 'config/x.py:12' or 'command line'. settle: key -> function that
    replaces its value by a definite one ('auto' -> 'cpu') before a config file sees it. A ~ at the
    beginning of a path, also in a list with commas, becomes the home folder.

    If a key allows 'auto' but has another default, 'auto' keeps the value that it would replace and
    adds ' (auto)' to where it comes from. The script adapts that value.

    Raises UserError with one message for everything wrong with the flags and the config files.
    """
    problems: list[str] = []
    flags, files = parse_argv(argv, block, problems)
    may_be_auto = {key for key, kind in block.types.items() if 'auto' in kind}
    adapted = {key for key in may_be_auto if block.defaults[key] != 'auto'}
    autos = [key for key in adapted if flags.get(key) == 'auto']
    for key in autos:
        del flags[key]
    values = {**block.defaults, **flags}
    origins = {key: 'command line' if key in flags else 'default' for key in values}
    with collecting(problems):
        settle_keys(values, origins, settle, settle)
    for path in files:
        with collecting(problems):
            places = run_file(path, Namespace(values, flags, adapted), block, values, problems)
            origins.update(places)
            settle_keys(values, origins, settle, [key for key in settle if key in places])
    if problems:
        raise UserError('; '.join(problems))
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


# -- flags and files -------------------------------------------------------------------------------


def parse_argv(
    argv: Sequence[str], block: Block, problems: list[str]
) -> tuple[dict[str, object], list[str]]:
    """Returns flags by key, and the config files in order; adds what is wrong to `problems`."""
    types = block.types
    flags: dict[str, object] = {}
    files: list[str] = []
    unknown: dict[str, str] = {}
    items = list(argv)
    while items:
        item = items.pop(0)
        if not item.startswith(DASHES):
            with collecting(problems):
                files.append(check_file(os.path.expanduser(item), types))
            continue
        flag, equals, text = item.partition('=')
        key = flag.removeprefix('--').replace('-', '_')
        if key not in types and key.removeprefix('no_') in types and not equals:
            key = key.removeprefix('no_')
            if bool in types[key]:
                flags[key] = False
            else:
                problems.append(
                    f'{item}: {key} is not a switch but {in_words(types[key])}; type --{key}=value'
                )
        elif key not in types:
            unknown[flag] = key
            if not equals and items and not items[0].startswith('--'):
                items.pop(0)  # its value
        elif not equals and bool in types[key] and not (items and is_value(items[0], types[key])):
            flags[key] = True
        elif not equals and (not items or items[0].startswith('--')):
            problems.append(
                f'{flag}: found no value, expected {in_words(types[key])}; type --{key}=value'
            )
        else:
            with collecting(problems):
                flags[key] = read_text(text if equals else items.pop(0), types[key], flag)
    if unknown:
        problems.append(no_such_keys(unknown, block, '--help lists all keys', '--{}'))
    return flags, files


def is_value(item: str, kind: Type) -> bool:
    """Returns whether the item after a switch is its value, as in --compile false."""
    try:
        read_text(item, kind, '')
    except UserError:
        return False
    return not item.startswith('--') and not item.endswith('.py')


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
        for statement in _statements(tree):
            if _sets_nothing(statement):
                raise UserError(
                    f'{path}:{statement.lineno}: found {ast.unparse(statement)!r}, which sets '
                    f'nothing; expected an assignment, such as: batch_size = 12'
                )
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
            if not os.path.exists(other):
                near = nearest_file(other)
                typed = os.path.relpath(near or other, os.path.dirname(path) or '.')
                hint = f'; did you mean include({typed!r})?' * bool(near)
                raise ValueError(f'{other}: no such config file{hint}')
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
            raise UserError(f'{path}:{line}: {reason}{hint_at_name(error, self)}') from None
        self.running.pop()


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Yields the statements below a node that are in no function or class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _statements(child)


def _sets_nothing(node: ast.stmt) -> bool:
    """Returns whether a statement has no effect, such as batch_size: 12 or batch_size == 12."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    if not isinstance(node, ast.Expr):
        return False
    is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return not is_text and not any(isinstance(part, ast.Call) for part in ast.walk(node))


def run_file(
    path: str, namespace: Namespace, block: Block, values: dict, problems: list[str]
) -> dict[str, str]:
    """Runs a config file; updates values and problems; returns where keys were last assigned."""
    types = block.types
    namespace.execute(path)
    unknown: dict[str, str] = {}
    for name, value in namespace.items():
        place = namespace.places.get(name, path)
        if name in namespace.places and name in types:
            with collecting(problems):
                values[name] = fit(value, types[name], f'{place}: {name}')
        elif (
            name not in types
            and name not in namespace.imports
            and not name.startswith('_')
            and (name != 'include' or name in namespace.places)
        ):
            unknown[f'{place}: {name}'] = name
    if unknown:
        problems.append(no_such_keys(unknown, block, "the file's own names must begin with _"))
    return {
        name: place
        for name, place in namespace.places.items()
        if name in types and name in namespace
    }


def refuse_to_run(argv):
    raise UserError(
        'configurator.py is imported, not executed: call configurator.configure(__file__, argv), '
        'as sample.py does'
    )


if __name__ == '__main__':  # also in a script that executes this file, as those of nanoGPT do
    run_script(refuse_to_run)
