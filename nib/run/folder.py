"""A run's folder: whether a run may write to it, who holds it, and the config.json in it."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from nib.checkpoint import store
from nib.errors import UserError
from nib.files import atomic_write, read_json

try:
    import fcntl
except ImportError:  # Windows: two runs in one out_dir are not noticed there
    fcntl = None


class RunLock:
    """The right to write to out_dir, from take() until release() or the process's end.

    The file says who has it, and stays; without the system's lock on it, it means nothing: a dead run's is stale.
    """

    def __init__(self, out_dir):
        self.out_dir = Path(out_dir)
        self.file = None

    def take(self, new_run: bool):
        """Makes the folder where it is missing. UserError where it cannot be written, another process is at it (its host and
        pid are named), or a new run meets an old one; nothing has been written then."""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.file = open(self.out_dir / '.lock', 'a+')
            if not _lock(self.file):
                raise UserError(
                    f'{self.out_dir} belongs to a run that is still going ({self._holder()}): stop that one, or '
                    f'choose another --out_dir'
                )
            if new_run and store.exists(self.out_dir):
                raise UserError(
                    f'{self.out_dir} holds a run already: go on with it (--init_from=resume), choose another '
                    f'--out_dir, or replace it (--overwrite)'
                )
            self.file.truncate(0)
            self.file.write(json.dumps({'host': socket.gethostname(), 'pid': os.getpid()}) + '\n')
            self.file.flush()
            store.clear_leftovers(self.out_dir)
        except OSError as error:
            raise UserError(
                f'out_dir {self.out_dir} cannot be written: {error.strerror}; choose another --out_dir'
            ) from error

    def release(self):
        if self.file:
            self.file.close()
            self.file = None

    def _holder(self) -> str:
        try:
            self.file.seek(0)
            holder = json.loads(self.file.read())
            return f'host {holder["host"]}, pid {holder["pid"]}'
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 'it has not said which'


def _lock(file) -> bool:
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        pass
    return True


def write_config(out_dir, config: Mapping, origins: Mapping, step: int, changes: Mapping):
    """Writes config.json: the values that the run uses, where each came from, and what changed at which resume.

    changes: key -> [value before, value now], of a run resumed at `step`.
    """
    history = read_json(Path(out_dir) / 'config.json').get('changes', []) if step else []
    history = [
        *(history if isinstance(history, list) else []),
        *([{'step': step, 'changes': changes}] if changes else []),
    ]
    with atomic_write(Path(out_dir) / 'config.json') as file:
        file.write(
            json.dumps(
                {'config': config, 'origins': origins, 'changes': history, 'launch': _launch()},
                indent=1,
            ).encode()
        )


def restarted_by_torchrun(out_dir) -> bool:
    """Whether torchrun (--max-restarts) has started this very run anew, and there is a checkpoint to go on from.

    Ask rank 0 alone: only its torchrun is known to be the one that has started the run.
    """
    return (
        int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
        and read_json(Path(out_dir) / 'config.json').get('launch') == _launch()
        and store.exists(out_dir)
    )


def _launch() -> str | None:
    """The torchrun that has started this process: the same in all its restarts, and no other's; None without torchrun."""
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        return f'{os.environ["TORCHELASTIC_RUN_ID"]} {socket.gethostname()} {os.getppid()}'
