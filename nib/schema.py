"""The schema of a config: the block of annotated assignments at the top of a script.

A line such as `batch_size: int = 12  # sequences per micro step` gives a key its name, type,
default and meaning. The scripts are read, not imported.
"""

import ast
import difflib
import io
import math
import sys
import tokenize
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from nib.errors import UserError

# The type of a key is a tuple of alternatives: Python types, None and literal values.
# `int | None` is (int, None), and `bool | Literal['auto']` is (bool, 'auto').
Type = tuple
PYTHON_TYPES = {'int': int, 'float': float, 'str': str, 'bool': bool}
# How a person names a type, where it is not the name of a choice.
IN_WORDS = {int: ['an integer'], float: ['a number'], str: ['a text'], bool: ['True', 'False']}
RESERVED = ('help', 'print_config', 'include')


@dataclass(frozen=True)
class Block:
    """The config block of a script."""

    defaults: dict[str, object]
    types: dict[str, Type]
    comments: dict[str, str]
    headings: dict[str, str]  # first key of a group -> the comment line above it
    doc: str  # first paragraph of the script's docstring

    def extended(self, other: 'Block') -> 'Block':
        """Returns this block with the keys of another script below its own."""
        return Block(
            self.defaults | other.defaults,
            self.types | other.types,
            self.comments | other.comments,
            self.headings | other.headings,
            self.doc,
        )


def read_block(path: str) -> Block:
    """Reads a script's config block from its source, without importing or running it."""
    source, tree = read_python(path)
    trailing, standalone = read_comments(source)
    block = Block({}, {}, {}, {}, (ast.get_docstring(tree) or '').split('\n\n')[0])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        if isinstance(node, ast.Assign):
            check_constants(path, node)
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
        lines = range(node.end_lineno or 0, node.lineno - 1, -1)  # a value may be wrapped
        block.comments[key] = next((trailing[n] for n in lines if n in trailing), '')
        line = node.lineno - 1
        while standalone.get(line) == '':  # a ruler
            line -= 1
        if line in standalone:
            block.headings[key] = standalone[line]
    return block


def check_constants(path: str, node: ast.Assign):
    """Raises UserError if an assignment without a type looks like a key, as in nanoGPT."""
    for part in chain.from_iterable(map(ast.walk, node.targets)):  # also of x, y = 1, 2
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id[0].islower():
            raise UserError(
                f'{path}:{node.lineno}: {part.id}: found {ast.unparse(node)}, expected a type if '
                f'it is a key ({part.id}: float = 0.5), or capitals if it is a constant'
            )


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


def read_python(path: str) -> tuple[str, ast.Module]:
    """Returns the source of a Python file and its syntax tree. Raises UserError if it has none."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            source = file.read()
        return source, ast.parse(source, path)
    except SyntaxError as error:
        what = error.msg.partition('. Maybe')[0]  # for batch-size = 12, Python suggests ==
        reason = (
            f':{error.lineno or 1}: SyntaxError: {what}; a config file is Python code, such as: '
            f'batch_size = 12'
        )
    except UnicodeDecodeError as error:
        reason = f': found bytes that are not UTF-8 ({error.reason}), expected a Python file'
    except (OSError, ValueError, MemoryError, RecursionError) as error:
        reason = f': cannot be read: {getattr(error, "strerror", None) or error}'
    raise UserError(path + reason)


def is_auto(origin: str) -> bool:
    """Returns whether a value, of which configurator.configure gives the origin, was 'auto'."""
    return origin.endswith('(auto)')


# -- values ----------------------------------------------------------------------------------------


def fit(value: object, kind: Type, where: str) -> object:
    """Returns the value converted to one of the type's alternatives.

    True is not an int, but 1 may become a float, and 1e3 an int. Raises UserError if nothing fits.
    """
    if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item'):  # NumPy's, or a tensor
        value = value.item()
    if type(value) is int and value.bit_length() > 14_000:  # Python prints at most 4,300 digits
        raise UserError(
            f'{where}: found a number of more than 4,000 digits, expected {in_words(kind)}'
        )
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


def check_range(values: Mapping, *keys: str, least: float, below: float = math.inf):
    """Raises UserError unless each value is at least `least` and less than `below`."""
    for key in keys:
        if not least <= values[key] < below:
            limit = ' and finite' if isinstance(values[key], float) else ''
            limit = f' and less than {below:,}' if below < math.inf else limit
            raise UserError(f'{key} is {values[key]}: it must be at least {least}{limit}')


def describe(kind: Type) -> str:
    """Returns the type as it is written in a script."""
    return ' | '.join(part.__name__ if isinstance(part, type) else repr(part) for part in kind)


def in_words(kind: Type) -> str:
    """Returns the type as an error message names it."""
    *first, last = [word for part in kind for word in IN_WORDS.get(part, [repr(part)])]
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
