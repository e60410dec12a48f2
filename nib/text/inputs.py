"""Finds the files of an input, and says which it has skipped."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nib.errors import UserError
from nib.text import reading, rows

ENDINGS = ('.txt', '.md', *rows.READERS)


def split_names(names: str) -> list[str]:
    """Returns names that are separated by commas; a path that exists may contain commas."""
    if os.path.exists(names):
        return [names]
    parts = [part.strip() for part in names.split(',')]
    return [os.path.expanduser(part) for part in parts if part]


def find_files(
    inputs: Sequence[str | os.PathLike], endings: Sequence[str] = ENDINGS
) -> tuple[list[Path], Counter[str]]:
    """Finds the files to read.

    inputs: files and folders. Folders are searched recursively, and so are links to folders, but
    not hidden files and folders.
    endings: of the files to read.
    Returns the files in order, each once, and what was skipped -> how many; see told.
    Raises UserError if an input is missing or cannot be read, or if there is nothing to read.
    """
    found: dict[tuple[int, int] | str, Path] = {}  # identity -> the first path that leads to it
    paths: list[tuple[Path, tuple[int, int] | str]] = []
    skipped = Counter[str]()
    for path in map(Path, inputs):
        state = _state(path)
        if state is None:
            raise UserError(
                f'{path}: no such file or folder; --input=PATH takes files and folders '
                f'on this machine, separated by commas'
            )
        if stat.S_ISDIR(state.st_mode):
            paths += _search(path, endings, skipped)
        elif not stat.S_ISREG(state.st_mode):
            raise reading.not_a_file(path, state.st_mode)
        elif path.suffix.lower() not in endings:
            known = path.suffix.lower() in ENDINGS
            raise UserError(
                f'{path}: unsupported file type (supported: {", ".join(endings)}); '
                + ('use data/text/prepare.py' if known else reading.advice(path))
            )
        else:
            paths.append((path, _identity(path, state)))
    for path, identity in paths:
        if found.setdefault(identity, path) != path:
            skipped['other path{s} to the same file'] += 1
    if not found:
        raise UserError(
            f'{", ".join(map(str, inputs))}: found no {", ".join(endings)} file there'
            + ''.join(f'; skipped {what}' for what in told(skipped))
        )
    return list(found.values()), skipped


def _search(
    folder: Path, endings: Sequence[str], skipped: Counter[str]
) -> Iterator[tuple[Path, tuple[int, int] | str]]:
    """Yields the files in a folder with these endings, and their identities."""

    def fail(error: OSError):
        raise UserError(
            f'{error.filename} cannot be read: {error.strerror}; make it readable, '
            f'or name only the folders to read'
        ) from error

    entered = {_identity(folder, os.stat(folder))}  # a link may lead back to a folder above it
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        skipped['hidden folder{s}'] += sum(name.startswith('.') for name in folders)
        skipped['hidden file{s}'] += sum(name.startswith('.') for name in names)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in list(folders):
            identity = _identity(Path(here, name), os.stat(Path(here, name)))
            if identity in entered:
                folders.remove(name)
            entered.add(identity)
        for path in [Path(here, name) for name in sorted(names) if not name.startswith('.')]:
            state = _state(path)
            if state is None:
                skipped['broken link{s}'] += 1
            elif not stat.S_ISREG(state.st_mode):
                skipped['pipe{s} or device{s}'] += 1
            elif path.suffix.lower() not in endings:
                skipped[f'file{{s}} of types other than {", ".join(endings)}'] += 1
            else:
                yield path, _identity(path, state)


def _state(path: Path) -> os.stat_result | None:
    """Returns what a path leads to; None if there is nothing."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:  # ELOOP: a link to itself
        if path.is_symlink():
            return None
        raise UserError(f'{path} cannot be read: {error.strerror}') from error


def _identity(path: Path, state: os.stat_result) -> tuple[int, int] | str:
    """Returns what all paths to one file have in common, links of both kinds included."""
    return (state.st_dev, state.st_ino) if state.st_ino else os.path.realpath(path)


def told(counts: Counter[str]) -> list[str]:
    """Returns counts for people: {'file{s} skipped': 2} -> ['2 files skipped']."""
    return [
        f'{count:,} ' + what.format(s='s' * (count > 1)) for what, count in counts.items() if count
    ]
