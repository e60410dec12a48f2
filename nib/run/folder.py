"""A run's folder: its lock and its config.json."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from nib.checkpoint import store
from nib.checkpoint.paths import explain, is_checkpoint, is_hugging_face
from nib.checkpoint.replacing import is_interrupted, put_back
from nib.errors import UserError
from nib.files import FolderLock, atomic_write, check_writable, read_json
from nib.schema import is_auto

# What a command says about itself, and not about the run.
OF_THE_COMMAND = ('out_dir', 'init_from', 'overwrite', 'eval_only')
# Chosen for the machine or computed from other keys, unless they were set. Checkpoints of older
# versions do not say which.
OFTEN_AUTO = ('device', 'dtype', 'compile', 'lr_decay_iters', 'min_lr')


def recall_config(values: Mapping, origins: Mapping) -> tuple[dict, str]:
    """Returns what a resumed run takes from its newest checkpoint, and the name of this origin.

    These are the keys that neither the command line nor a config file sets. A value that was 'auto'
    is not taken, except for batch_size: it is chosen again. values, origins: those of
    configurator.configure.
    """
    if values['init_from'] != 'resume':
        return {}, ''
    out_dir = Path(values['out_dir'])  # its subfolders hold a run that will be put back
    folders = (out_dir, out_dir / store.ASIDE, out_dir / store.MOVING)
    saved = next(filter(None, map(store.newest, folders)), None)
    if not saved:
        return {}, ''
    before = saved.state['config']
    chosen = saved.state.get('origins', dict.fromkeys(OFTEN_AUTO, '(auto)'))
    taken = {
        key: value
        for key, value in before.items()
        if key not in OF_THE_COMMAND
        and origins.get(key, '').startswith('default')
        and (value != values[key] or origins[key] != 'default')
        and (key == 'batch_size' or not is_auto(chosen.get(key, '')))
    }
    if 'device' in taken and before.get('ranks', 1) > 1:
        taken['device'] = taken['device'].partition(':')[0]  # it was that of rank 0
    # A config file still names the dataset that the fallback has replaced, or leaves the name open.
    fell_back = before['dataset'] == before.get('fallback_dataset')
    if origins['dataset'] != 'command line' and (fell_back or not values['dataset']):
        taken['dataset'] = before['dataset']
    return taken, f'checkpoint of step {saved.step}'


class RunLock:
    """A lock on out_dir, held from take() until release() or the end of the process."""

    _folder: os.stat_result  # that of take()

    def __init__(self, out_dir):
        self.out_dir = Path(out_dir)
        self._lock = FolderLock(out_dir)

    def take(self, new_run: bool):
        """Takes the lock, and creates the folder if it is missing.

        new_run: whether the folder must not contain a run yet. Raises UserError if it does, if
        another process has the lock, or if the folder cannot be written. Existing files are then
        left unchanged.
        """
        if is_checkpoint(Path(os.path.abspath(self.out_dir))) or is_hugging_face(self.out_dir):
            raise UserError(f'{explain(self.out_dir)}; choose another --out_dir for a new run')
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            if not self._lock.take():
                raise UserError(
                    f'{self.out_dir} belongs to a run that is still active '
                    f'({self._lock.holder()}): stop that run, or choose another --out_dir'
                )
            put_back(self.out_dir)
            if new_run and store.exists(self.out_dir):
                raise UserError(
                    f'{self.out_dir} already contains a run: resume it (--init_from=resume), '
                    f'choose another --out_dir, or replace it (--overwrite)'
                )
            self._lock.sign()
            self._folder = os.stat(self.out_dir)
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
        """Raises UserError if the folder contains a run or cannot be written. Creates nothing."""
        check_writable(self.out_dir, 'out_dir')
        if store.exists(self.out_dir) or is_interrupted(self.out_dir):
            self.take(new_run=True)  # says whether that run is still active

    def is_lost(self) -> bool:
        """Returns whether the folder has been removed or renamed since take()."""
        try:
            return not os.path.samestat(self._folder, os.stat(self.out_dir))
        except (FileNotFoundError, NotADirectoryError):
            return True

    def release(self):
        self._lock.release()


def write_config(
    out_dir, config: Mapping, origins: Mapping, step: int, changes: Mapping, provenance: Mapping
):
    """Writes config.json.

    config: the values that the run uses. origins: where each value comes from. changes: key ->
    [value before, value now], for a run resumed at `step`; they are appended to earlier changes.
    provenance: of nib.run.provenance; its 'starts' are appended to those before `step`.
    """
    path = Path(out_dir) / 'config.json'
    before = read_json(path) if step else {}
    earlier = before.get('changes', [])
    history = earlier if isinstance(earlier, list) else []
    known = before.get('provenance')
    starts = known.get('starts') if isinstance(known, dict) else None
    if isinstance(starts, list):
        provenance = {**provenance, 'starts': [*starts, *provenance.get('starts', [])]}
    if changes:
        history = [*history, {'step': step, 'changes': changes}]
    content = {
        'config': config,
        'origins': origins,
        'changes': history,
        'launch': _launch(),
        'provenance': provenance,
    }
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
