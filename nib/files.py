"""Files that are written completely or not at all."""

import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from nib.errors import NO_ROOM, NOT_WRITTEN, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

ROOT = Path(__file__).resolve().parent.parent
# What to type if a dataset cannot be written to its folder. A run may prepare it, too.
ELSEWHERE = 'name another folder with --out_dir=PATH (in train.py, --data_dir=PATH)'


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a binary file that replaces `path` once it is complete and on the disk.

    On any error, the existing file at `path` stays unchanged, and nothing else is left behind.
    """
    path = Path(path)
    temporary = path.with_name(_temporary_name(path.name, os.getpid()))
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # its folder may be missing
            temporary.unlink(missing_ok=True)
        _name_path(error, temporary, path)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `path` once it is complete.

    On any error, nothing is left behind. path: must not exist.
    """
    path = Path(path)
    temporary = path.with_name(_temporary_name(path.name, os.getpid()))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name_path(error, temporary, path)
        raise


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Within this context, the error of a full disk names the path, which the system does not."""
    try:
        yield
    except OSError as error:
        _name_path(error, Path(path), Path(path))
        raise


def _name_path(error: BaseException, temporary: Path, path: Path):
    """Makes an error of a write to `temporary` name `path`, which the user knows."""
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in NO_ROOM or str(error.filename).startswith(str(temporary)):
            error.filename = str(path)
    elif re.search(NOT_WRITTEN, str(error)):  # of a library
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
            f'{path} could not be written completely: free some space, or choose another path; '
            f'the message was: {reason}'
        ) from error


def clear_temporaries(folder: str | os.PathLike, *names: str):
    """Removes temporary files of these names that processes left when they were killed."""
    for name in names:
        for path in Path(folder).glob(_temporary_name(name, '*')):
            if path.name != _temporary_name(name, os.getpid()):
                path.unlink(missing_ok=True)


def _temporary_name(name: str, process: int | str) -> str:
    return f'.{name}.{process}.tmp'


class FolderLock:
    """A lock on a folder, held from take() until release() or the end of the process.

    The file .lock names its holder. Only the system's lock on that file counts, so the file of a
    dead process does no harm. On a file system without locks, every process gets the lock.
    """

    NAME = '.lock'

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / self.NAME
        self.file: IO[str] | None = None

    def take(self) -> bool:
        """Takes the lock, or returns False if another process has it.

        Raises OSError if the folder cannot be written.
        """
        while True:
            file = open(self.path, 'a+')  # noqa: SIM115, closed by release()
            if not _lock(file):
                file.close()
                return False
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    self.file = file
                    return True
            file.close()  # the holder has removed this file since it was opened

    def sign(self):
        """Names this process as the holder."""
        self.file.truncate(0)
        self.file.write(json.dumps({'host': socket.gethostname(), 'pid': os.getpid()}) + '\n')
        self.file.flush()

    def holder(self) -> str:
        found = read_json(self.path)
        if {'host', 'pid'} <= found.keys():
            return f'host {found["host"]}, pid {found["pid"]}'
        return 'unknown process'

    def release(self, remove: bool = False):
        """Releases the lock. remove: whether to remove the file, too."""
        if not self.file:
            return
        file, self.file = self.file, None
        # On a full disk, sign() may have left something to write. Windows removes no open file.
        with suppress(OSError), file:  # closed whatever happens: other processes wait for it
            if remove:
                self.path.unlink()


def _lock(file: IO[str]) -> bool:
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # Windows locks bytes, which others cannot read then: this one is behind the text.
            file.seek(1 << 30)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a network file system that does not support locks
        pass
    return True


def sync_folder(folder: str | os.PathLike):
    """Makes renames in a folder survive a power failure."""
    if os.name == 'nt':  # Windows cannot open a folder, and does not need to
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def shown(path: str | os.PathLike) -> str:
    """Returns a path as a person would type it: relative, if it is in the working directory."""
    try:
        relative = os.path.relpath(path)
    except FileNotFoundError:  # the working directory has been deleted
        return os.fspath(path)
    return os.fspath(path) if relative.startswith('..') else relative


def check_writable(path: str | os.PathLike, key: str):
    """Raises UserError if a folder or a new file cannot be written. Creates nothing.

    key: the name of the key that the path is the value of.
    """
    whole = Path(os.path.abspath(path))
    existing = next(one for one in (whole, *whole.parents) if one.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(
            f'{key} {path} cannot be written, because {shown(existing)} is not a folder that you '
            f'can write to: choose another --{key}'
        )


def command(script: str) -> str:
    """Returns the start of a command that runs a script of this project in the working directory.

    script: its path in the project.
    """
    python = sys.executable or 'python'
    name = os.path.basename(python)  # enough if the shell finds the same Python
    return shlex.join([name if shutil.which(name) == python else python, script_path(script)])


def script_path(script: str) -> str:
    """Returns the path of a script of this project; of the running one, as the user typed it."""
    path, typed = ROOT / script, sys.argv[0]
    with suppress(FileNotFoundError):  # the working directory has been deleted
        if os.path.realpath(typed) == os.path.realpath(path):
            return typed
    return shown(path)


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file, or an empty one if the file holds no valid object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
