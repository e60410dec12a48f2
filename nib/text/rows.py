"""Rows of .jsonl and .parquet files: each has the text of a document in one of its fields."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nib.errors import UserError, optional
from nib.text import reading
from nib.text.vocabulary import without_surrogates

_TOGETHER = 1000  # rows of a .parquet file read at once


def read_rows(file: Path, field: str, say: Callable[[str], None]) -> Iterator[str]:
    """Yields the text of every row of a .jsonl or .parquet file as it is, also if it is empty.

    say: see reading.decode.
    Raises UserError, which names the file and the row, if something cannot be read.
    """
    yield from READERS[file.suffix.lower()](file, field, say)


def _read_jsonl(file: Path, field: str, say: Callable[[str], None]) -> Iterator[str]:
    for number, line in enumerate(_lines(reading.read_file(file, say)), 1):
        if not line.strip():
            continue
        where = f'{file}:{number}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = str(error)
            if isinstance(error, json.JSONDecodeError):  # its text always says line 1
                why = f'{error.msg.removesuffix(" at")} at column {error.colno}'
            raise UserError(f'{where}: not valid JSON ({why}); {_one_object(file)}') from error
        if not isinstance(row, dict):
            kind = 'array' if isinstance(row, list) else type(row).__name__
            raise UserError(f'{where}: a JSON {kind}, not an object; {_one_object(file)}')
        if field not in row:
            raise _missing(where, field, row)
        yield _document(row[field], field, where)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    parts = []
    for chunk in chunks:
        first, *others = chunk.split('\n')
        parts.append(first)
        for line in others:
            yield ''.join(parts)
            parts = [line]
    yield ''.join(parts)


def _one_object(file: Path) -> str:
    return (
        f'every line must be a JSON object; if the file is an array of them, or an object has '
        f'several lines, {reading.advice(file, ".json")}'
    )


def _read_parquet(file: Path, field: str, say: Callable[[str], None]) -> Iterator[str]:
    with optional('pyarrow', str(file)):
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise _missing(file, field, columns)
            if columns.count(field) > 1:
                raise UserError(
                    f'{file}: {columns.count(field)} columns are named {field!r}; rename one, '
                    f'or use --field=NAME to name another column'
                )
            for batch in table.iter_batches(_TOGETHER, columns=[field]):
                for value in batch.column(field).to_pylist():
                    yield _document(value, field, file)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f'{file} cannot be read: {error.strerror or error}') from error
    except (pyarrow.ArrowException, ValueError) as error:  # invalid UTF-8 is a ValueError
        raise UserError(f'{file} is not a valid .parquet file ({error}); recreate it') from error


READERS = {'.jsonl': _read_jsonl, '.parquet': _read_parquet}


def _document(value, field: str, where) -> str:
    if not isinstance(value, str | None):
        raise UserError(
            f'{where}: field {field!r} has type {type(value).__name__}, not text; '
            f'use --field=NAME to name another field'
        )
    return without_surrogates(value or '')


def _missing(where, field: str, names: Iterable[str]) -> UserError:
    found = ', '.join(map(repr, names)) or 'none'
    return UserError(
        f'{where}: no field {field!r} (fields: {found}); use --field=NAME to name the text field'
    )
