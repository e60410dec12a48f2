"""Config for the scripts: a block of annotated assignments, overridden by Python files and by flags.

The block at a script's top, `batch_size: int = 12  # sequences per micro step`, is the schema. In order:

    defaults, then config files as they stand (python train.py config/a.py config/b.py), then --key=value

Flags win wherever they stand, and the files already see them. A config file is the user's own Python and is executed;
a flag's value is read as a literal and never is. include('other.py') in a config file runs another one, named from the
folder of the first, as if its lines stood there.
"""

import ast
import difflib
import io
import os
import sys
import tokenize
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from nib.errors import UserError

# A key's type is the tuple of its alternatives: Python types, None and literal values,
# so `int | None` is (int, None) and `bool | Literal['auto']` is (bool, 'auto').
Type = tuple
Settle = Mapping[str, Callable]
NO_SETTLING: Settle = MappingProxyType({})
PYTHON_TYPES = {'int': int, 'float': float, 'str': str, 'bool': bool}
RESERVED = ('help', 'print_config', 'include')
CONFIG_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config')


@dataclass(frozen=True)
class Block:
    defaults: dict[str, object]
    types: dict[str, Type]
    comments: dict[str, str]
    headings: dict[str, str]  # first key of a group -> the comment line above it
    doc: str  # first paragraph of the script's docstring


def configure(
    script: str, argv: Sequence[str], settle: Settle = NO_SETTLING, base: str | None = None
) -> tuple[dict[str, object], dict[str, str]]:
    """A script's values and where each came from; --help and --print_config print and exit.

    base: another script, whose keys this one has too, after its own.
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
        print_help(script, block)
        raise SystemExit(0)
    printing = [item for item in argv if item in ('--print_config', '--print-config')]
    values, origins = resolve(
        block.defaults, block.types, [item for item in argv if item not in printing], settle
    )
    if printing:
        print_columns(
            [(f'{key} = {value!r}', f'# {origins[key]}') for key, value in values.items()]
        )
        raise SystemExit(0)
    return values, origins


def resolve(
    defaults: Mapping[str, object],
    types: Mapping[str, Type],
    argv: Sequence[str],
    settle: Settle = NO_SETTLING,
) -> tuple[dict[str, object], dict[str, str]]:
    """The value of every key and where it came from: 'default', 'config/x.py:12' or 'command line'.

    settle maps a key to a function that makes its value definite ('auto' -> 'cpu'), before any file sees it.
    """
    flags, files = parse_argv(argv, types)
    values = {**defaults, **flags}
    origins = {key: 'command line' if key in flags else 'default' for key in values}
    settle_keys(values, origins, settle, settle)
    for path in files:
        places = run_file(path, values, types, pinned=flags)
        origins.update(places)
        settle_keys(values, origins, settle, [key for key in settle if key in places])
    return values, origins


def settle_keys(values, origins, settle, keys):
    for key in keys:
        before, values[key] = values[key], settle[key](values[key])
        if values[key] != before:
            origins[key] += f' ({before})'


# ---------------------------------------------------------------------------
# The schema: a script's block


def read_block(path: str) -> Block:
    """Read a script's config block from its source; nothing is imported or run."""
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
                f'{where}: this name cannot be a key ({", ".join(RESERVED)} and _names are reserved)'
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
    """Comments by line: those that follow code, and those alone on a line (rulers of dashes as '')."""
    trailing, standalone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
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
    """The value as one of the type's alternatives; True is no int, 1 may be a float, 1e3 an int."""
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
    raise UserError(f'{where}: found {show(value)}, expected {describe(kind)}{hint}')


def read_text(text: str, kind: Type, where: str) -> object:
    """The value that a flag's text stands for; where the type has str, quotes are part of the text."""
    readings = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                'ignore'
            )  # about '\d' and the like, which are no business of a flag
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
    return ' | '.join(part.__name__ if isinstance(part, type) else repr(part) for part in kind)


def show(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # a user's own class, or an int of more digits than Python prints
        text = f'a value of type {type(value).__name__}'
    return text if len(text) <= 80 else text[:77] + '...'


def suggest(name: str, names: Sequence[str], form: str = '{}') -> str:
    nearest = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {form.format(nearest[0])}?' if nearest else ''


# ---------------------------------------------------------------------------
# Flags and files


def parse_argv(
    argv: Sequence[str], types: Mapping[str, Type]
) -> tuple[dict[str, object], list[str]]:
    """Flags by key, and the config files in their order."""
    flags: dict[str, object] = {}
    files, items = [], list(argv)
    while items:
        item = items.pop(0)
        if not item.startswith('--'):
            files.append(check_file(item, types))
            continue
        name, equals, text = item.removeprefix('--').partition('=')
        key = name.replace('-', '_')
        if key not in types and key.removeprefix('no_') in types and not equals:
            key = key.removeprefix('no_')
            if bool not in types[key]:
                raise UserError(
                    f'{item}: {key} is no switch but {describe(types[key])}; type --{key}=value'
                )
            flags[key] = False
        elif key not in types:
            raise UserError(
                f'--{name}: no such key{suggest(key, list(types), "--{}")} (--help lists all keys)'
            )
        elif not equals and bool in types[key] and not (items and is_value(items[0], types[key])):
            flags[key] = True
        else:
            if not equals and (not items or items[0].startswith('--')):
                raise UserError(
                    f'--{name}: found no value, expected {describe(types[key])}; type --{key}=value'
                )
            flags[key] = read_text(text if equals else items.pop(0), types[key], f'--{name}')
    return flags, files


def is_value(item: str, kind: Type) -> bool:
    """Whether what follows a bare switch is its value (--compile false) and not the next item."""
    try:
        read_text(item, kind, '')
    except UserError:
        return False
    return not item.startswith('--') and not item.endswith('.py')


def check_file(path: str, types: Mapping[str, Type]) -> str:
    if os.path.exists(path) and path.endswith('.py'):
        return path
    if os.path.exists(
        path
    ):  # a text, or a run's folder: not to be executed because somebody forgot the flag's name
        key = (
            'input'
            if 'input' in types
            else 'out_dir'
            if 'out_dir' in types and os.path.isdir(path)
            else None
        )
        raise UserError(
            f'{path} is no config file, whose name ends in .py'
            + (f'; did you mean --{key}={path}?' if key else ' (flags are typed --key=value)')
        )
    flag = path.lstrip('-')
    if flag.partition('=')[0].replace('-', '_') in types:
        raise UserError(f'{path}: no such config file; did you mean --{flag}?')
    candidates = list_python(os.path.dirname(path)) + list_python(CONFIG_FOLDER)
    nearby = {os.path.basename(file): file for file in candidates}
    nearest = difflib.get_close_matches(os.path.basename(path), nearby, n=1)
    hint = f'; did you mean {nearby[nearest[0]]}?' if nearest else ' (flags are typed --key=value)'
    raise UserError(f'{path}: no such config file{hint}')


def list_python(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder or '.'))
    except (OSError, ValueError):
        return []
    shown = os.path.relpath(folder) if os.path.isabs(folder) else folder
    return [os.path.join(shown, name) for name in names if name.endswith('.py')]


class Namespace(dict):
    """What config files see and assign to; pinned keys stay as they are, of the others it notes the places."""

    def __init__(self, values, pinned):
        super().__init__(values)
        self.pinned, self.places = pinned, {}
        self.imports, self.running = (
            set(),
            [],
        )  # names that imports made; the files in execution, innermost last

    def __setitem__(self, name, value):
        if name not in self.pinned:
            super().__setitem__(name, value)
            frame = sys._getframe(1)  # the caller is the config file's own frame
            self.places[name] = f'{frame.f_code.co_filename}:{frame.f_lineno}'

    def execute(self, path: str):
        """Run a file's statements here; UserError with the place where one fails."""
        _, tree = read_python(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):  # its assignments would go past __setitem__
                raise UserError(
                    f'{path}:{node.lineno}: found a global statement, expected assignments at the top level'
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
            line = (
                lines[-1] if lines else getattr(error, 'lineno', 1)
            )  # a SyntaxError of compile's has no frame
            reason = f'{type(error).__name__}: {error}'.removesuffix(': ')
            raise UserError(f'{path}:{line}: {reason}') from None
        self.running.pop()


def run_file(
    path: str, values: dict, types: Mapping[str, Type], pinned: Mapping[str, object]
) -> dict[str, str]:
    """Execute a config file on the values, in place; returns the place where each key was last assigned."""
    namespace = Namespace(values, pinned)
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
            hint = suggest(name, list(types))
            raise UserError(
                f"{place}: {name}: no such key{hint} (a name of the file's own begins with _)"
            )
    return {
        name: place
        for name, place in namespace.places.items()
        if name in types and name in namespace
    }


def read_python(path: str) -> tuple[str, ast.Module]:
    try:
        with open(path, encoding='utf-8-sig') as file:
            source = file.read()
        return source, ast.parse(source, path)
    except SyntaxError as error:
        reason = f':{error.lineno or 1}: SyntaxError: {error.msg}; a config file is Python, such as: batch_size = 12'
    except UnicodeDecodeError as error:
        reason = f': found bytes that are no UTF-8 ({error.reason}), expected a Python file'
    except (OSError, ValueError, MemoryError, RecursionError) as error:
        reason = f': cannot be read: {getattr(error, "strerror", None) or error}'
    raise UserError(path + reason)


# ---------------------------------------------------------------------------
# What --help and --print_config show


def print_help(script: str, block: Block) -> None:
    shown = os.path.relpath(script)
    print(
        f'{block.doc}\n\nusage: python {shown} [config/file.py ...] [--key=value ...] [--print_config]'
    )
    rows = []
    for key, default in block.defaults.items():
        if key in block.headings:
            rows += [('', ''), (block.headings[key], '')]
        rows.append((f'  --{key}: {describe(block.types[key])} = {default!r}', block.comments[key]))
    print_columns(rows)


def print_columns(rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(left) for left, right in rows if right and len(left) <= 56), default=0)
    for left, right in rows:
        print(f'{left:{width}}  {right}'.rstrip())
