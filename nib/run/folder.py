"""A run's folder: its lock and its config.json."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from nib.checkpoint import store
from nib.errors import UserError
from nib.files import FolderLock, atomic_write, read_json


class RunLock:
    """A lock on out_dir, held from take() until release() or the end of the process."""

    def __init__(self, out_dir):
        self.out_dir = Path(out_dir)
        self._lock = FolderLock(out_dir)

    def take(self, new_run: bool):
        """Takes the lock, and creates the folder if it is missing.

        new_run: whether the folder must not contain a run yet. Raises UserError if it does, if
        another process has the lock, or if the folder cannot be written. Existing files are then
        left unchanged.
        """
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            if not self._lock.take():
                raise UserError(
                    f'{self.out_dir} belongs to a run that is still active '
                    f'({self._lock.holder()}): stop that run, or choose another --out_dir'
                )
            if new_run:
                self.check_new()
            self._lock.sign()
            store.clear_leftovers(self.out_dir)
        except UserError:
            self.release()
            raise
        except OSError as error:
            raise UserError(
                f'out_dir {self.out_dir} cannot be written: {error.strerror}; '
                f'choose another --out_dir'
            ) from error

    def check_new(self):
        """Raises UserError if the folder contains a run."""
        if store.exists(self.out_dir):
            raise UserError(
                f'{self.out_dir} already contains a run: resume it (--init_from=resume), '
                f'choose another --out_dir, or replace it (--overwrite)'
            )

    def release(self):
        self._lock.release()


def write_config(out_dir, config: Mapping, origins: Mapping, step: int, changes: Mapping):
    """Writes config.json.

    config: the values that the run uses. origins: where each value comes from. changes: key ->
    [value before, value now], for a run resumed at `step`; they are appended to earlier changes.
    """
    path = Path(out_dir) / 'config.json'
    earlier = read_json(path).get('changes', []) if step else []
    history = earlier if isinstance(earlier, list) else []
    if changes:
        history = [*history, {'step': step, 'changes': changes}]
    content = {'config': config, 'origins': origins, 'changes': history, 'launch': _launch()}
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def restarted_by_torchrun(out_dir) -> bool:
    """Returns whether torchrun (--max-restarts) has restarted this run after a checkpoint.

    Call it on rank 0 only, because config.json records the torchrun of rank 0.
    """
    return (
        int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) > 0
        and read_json(Path(out_dir) / 'config.json').get('launch') == _launch()
        and store.exists(out_dir)
    )


def _launch() -> str | None:
    """Identifies the torchrun that started this process, the same in all its restarts.

    Returns None without torchrun.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return None
    return f'{os.environ["TORCHELASTIC_RUN_ID"]} {socket.gethostname()} {os.getppid()}'
