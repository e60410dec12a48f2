"""Checkpoints that are written whole or not at all, and read only when their digests hold.

    out_dir/step-00000250/  model.safetensors  optimizer.safetensors  state.json
    out_dir/latest  out_dir/best     each holds the name of a step directory

A checkpoint is written under a temporary name, synced, renamed, and only then named by `latest` or `best`. So a directory
with a step's name is a whole checkpoint, whenever the machine stopped; deleting one begins with renaming it, too.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from nib.checkpoint import tensorfile
from nib.errors import UserError
from nib.files import atomic_write, clear_temporaries, sync_folder

FORMAT = 1
_TEMPORARY = '.tmp-'  # of directories that are being written or deleted
_ASIDE = '.old-'  # of checkpoints of a run that is being replaced
_REPLACED = '.tmp-replaced-'  # of a step's directory while another takes its place
_TRAIN_FIRST = 'train first: python train.py CONFIG --out_dir='
_STEP_FOLDER = re.compile(r'step-(\d{8,})')


class Damaged(Exception):
    """A checkpoint whose files are not what was saved; the message says which and how."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose state.json has passed its digest. Tensors are read, and checked, when asked for."""

    path: Path
    state: dict

    @property
    def step(self) -> int:
        return self.state['step']

    def check_dataset(self, dataset, fingerprint: str):
        """UserError where this checkpoint is of a dataset with another fingerprint."""
        if self.state['dataset_fingerprint'] != fingerprint:
            raise UserError(
                f'{self.path} was trained on {self.state["dataset"]} with the fingerprint '
                f'{self.state["dataset_fingerprint"][:16]}, but {dataset} has {fingerprint[:16]}: resume with the same '
                f'bins (--dataset={self.state["dataset"]}), or start a new run, in another --out_dir or with '
                f'--overwrite in place of --init_from=resume'
            )

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of 'model' or 'optimizer', on the CPU. Damaged where the file is not the one saved."""
        path = self.path / f'{name}.safetensors'
        try:
            return tensorfile.read(path, self.state['files'][path.name])
        except OSError as error:
            raise Damaged(f'{path}: {error.strerror}') from error
        except tensorfile.Altered as error:
            raise Damaged(str(error)) from error


def save(out_dir, step: int, model: dict, optimizer: dict, state: dict) -> Path:
    """Writes the checkpoint of `step` and lets `latest` point to it. UserError where that fails; those before stay whole.

    model, optimizer: name -> tensor on the CPU. state: anything that JSON holds.
    """
    try:
        return _save(out_dir, step, model, optimizer, state)
    except OSError as error:
        raise UserError(
            f'the checkpoint of step {step} could not be written to {out_dir} ({error.strerror}); those before '
            f'it are whole: make room, then go on with --init_from=resume'
        ) from error


def _save(out_dir, step: int, model: dict, optimizer: dict, state: dict) -> Path:
    final = Path(out_dir) / _name(step)
    temporary, replaced = (
        final.with_name(_TEMPORARY + final.name),
        final.with_name(_REPLACED + final.name),
    )
    final.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(final.parent)
    try:
        temporary.mkdir()
        digests = {
            f'{name}.safetensors': tensorfile.write(temporary / f'{name}.safetensors', tensors)
            for name, tensors in (('model', model), ('optimizer', optimizer))
        }
        _write_state(temporary, {'format': FORMAT, 'step': step, **state, 'files': digests})
        if final.exists():  # the same step saved again, after resuming from an earlier one
            os.rename(
                final, replaced
            )  # under this name it still counts, until the next line is done
        os.rename(temporary, final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if replaced.exists():
        _delete(replaced)
    point(final.parent, 'latest', final)
    return final


def record_evaluation(out_dir, step: int, train_state: dict, best: bool):
    """Writes what was learnt about the checkpoint of `step` since it was saved into its state.json, and names it `best`.
    UserError where that cannot be written; the checkpoint stays what it was."""
    folder = Path(out_dir) / _name(step)
    try:
        state = {**_read_state(folder), 'train': train_state}
        if best:  # first: cut here, the state says that this step is not evaluated yet, and a resumed run makes up for it
            point(out_dir, 'best', folder)
        _write_state(folder, state)
    except (OSError, Damaged) as error:
        raise UserError(
            f'the evaluation of step {step} could not be recorded in {folder} ({error}): make room, then go on '
            f'with --init_from=resume'
        ) from error


def point(out_dir, name: str, step_folder: Path):
    """Lets `name` ('latest', 'best') stand for this step directory, atomically."""
    with atomic_write(Path(out_dir) / name) as file:
        file.write(step_folder.name.encode() + b'\n')


def prune(out_dir, step: int, keep_last: int, keep_every: int = 0, damaged: Set[int] = frozenset()):
    """Deletes the checkpoints up to `step`, which is whole, but itself, the newest `keep_last`, those of every `keep_every`
    steps, and what `latest` and `best` name. Leaves what is newer than `step` alone.

    damaged: steps known to be unusable, which are none of those to keep. UserError where something cannot be deleted.
    """
    out_dir = Path(out_dir)
    folders = {
        _step_of(folder): folder for folder in _step_folders(out_dir) if _step_of(folder) <= step
    }
    whole = [older for older in folders if older not in damaged]
    kept = {
        step,
        *whole[:keep_last],
        *(older for older in whole if keep_every and older % keep_every == 0),
        _named(out_dir, 'latest'),
        _named(out_dir, 'best'),
    }
    try:
        for older in folders.keys() - kept:
            _delete(folders[older])
    except OSError as error:
        raise UserError(
            f'an older checkpoint in {out_dir} cannot be deleted ({error.strerror})'
        ) from error


def steps_after(out_dir, step: int) -> set[int]:
    """The steps after `step` that there are directories of."""
    return {newer for newer in map(_step_of, _step_folders(Path(out_dir))) if newer > step}


def exists(out_dir) -> bool:
    """Whether out_dir holds any checkpoint."""
    return bool(_step_folders(Path(out_dir)))


def set_aside(out_dir):
    """Takes the checkpoints of a run that is being replaced out of the way. They are there, as `.old-step-N`, until
    delete_set_aside(): a new run may end before it has saved anything. UserError where that cannot be."""
    try:
        for name in ('latest', 'best'):
            (Path(out_dir) / name).unlink(missing_ok=True)
        for folder in _step_folders(Path(out_dir)):
            aside = folder.with_name(_ASIDE + _name(_step_of(folder)))
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
    except OSError as error:
        raise UserError(
            f'the run in {out_dir} cannot be set aside ({error.strerror}): choose another --out_dir'
        ) from error


def delete_set_aside(out_dir):
    for folder in Path(out_dir).glob(f'{_ASIDE}*'):
        shutil.rmtree(folder, ignore_errors=True)


def load(
    out_dir,
    which: str = 'latest',
    read: tuple[str, ...] = ('model', 'optimizer'),
    warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    check: Callable[[Checkpoint, dict], None] = lambda checkpoint, tensors: None,
) -> tuple[Checkpoint, dict]:
    """Reads a checkpoint; returns it and its tensors as {'model': {...}, 'optimizer': {...}}, as `read` asks.

    which: 'latest', 'best' or a step number. check: raises Damaged where a checkpoint that holds what was saved cannot be
    used all the same. A damaged one is passed over for the newest good one, with a warning, unless a step was asked for by
    number. UserError when none is left. Only reads, so that it may look into a run that goes on.
    """
    out_dir = Path(out_dir)
    if not out_dir.is_dir():
        raise UserError(f'out_dir {out_dir}: there is no such folder; {_TRAIN_FIRST}{out_dir}')
    damages = []
    for folder in _candidates(out_dir, which, warn):
        try:
            checkpoint = Checkpoint(folder, _read_state(folder))
            tensors = {name: checkpoint.tensors(name) for name in read}
            check(checkpoint, tensors)
        except Damaged as damage:
            if (
                not folder.exists()
            ):  # the run has replaced or deleted it meanwhile, so there are others now
                return load(out_dir, which, read, warn, check)
            damages.append(str(damage))
            continue
        for damage in damages:
            warn(
                f'warning: passing over a damaged checkpoint: {damage}; using step {checkpoint.step}'
            )
        return checkpoint, tensors
    if aside := sorted(out_dir.glob(f'{_ASIDE}*')):
        damages.append(
            f'one of the run that was replaced is still in {aside[-1]}: rename it to '
            f'{aside[-1].name.removeprefix(_ASIDE)} to have it back'
        )
    raise UserError(
        f'{out_dir} holds no checkpoint that can be used'
        + (': ' + '; '.join(damages) if damages else f'; {_TRAIN_FIRST}{out_dir}')
    )


def _candidates(out_dir: Path, which: str, warn: Callable[[str], None]) -> list[Path]:
    """The directories that may be what is asked for, the likeliest first. UserError where that is none's name."""
    folders = _step_folders(out_dir)
    if (
        which == 'latest'
    ):  # the newest, not what `latest` names: a crash may have come between the two
        return folders
    if which == 'best':
        best = _named(out_dir, 'best')
        if best is None and folders:
            warn(f'{out_dir} has no best checkpoint yet: taking the newest')
        return sorted(
            folders, key=lambda folder: _step_of(folder) != best
        )  # stable: the best, then newest first
    if not (which.isascii() and which.isdecimal() and len(which) < 20):
        raise UserError(f"checkpoint {which!r}: it is 'latest', 'best' or a step number")
    if wanted := [folder for folder in folders if _step_of(folder) == int(which)]:
        return wanted
    raise UserError(
        f'{out_dir} holds no checkpoint of step {which}; it has: '
        + (', '.join(str(_step_of(folder)) for folder in folders) or 'none')
    )


def _read_state(folder: Path) -> dict:
    path = folder / 'state.json'
    try:
        content = path.read_bytes()
        state = json.loads(content)
        digest = state.pop('sha256')
    except OSError as error:
        raise Damaged(f'{path}: {error.strerror}') from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{path}: not a checkpoint's state") from error
    if digest != _digest(state) or content != _encode(
        state
    ):  # JSON can say the same in other bytes
        raise Damaged(f'{path}: its content is not what was saved (SHA-256 differs)')
    if state['format'] != FORMAT:
        raise Damaged(f'{path}: format {state["format"]}, this version reads {FORMAT}')
    if state['step'] != _step_of(folder):
        raise Damaged(f'{path}: it is of step {state["step"]}')
    return state


def _write_state(folder: Path, state: dict):
    with atomic_write(folder / 'state.json') as file:
        file.write(_encode(state))


def _encode(state: dict) -> bytes:
    return json.dumps({**state, 'sha256': _digest(state)}, indent=1).encode()


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _name(step: int) -> str:
    return f'step-{step:08d}'


def _step_of(folder: Path) -> int:
    return int(_STEP_FOLDER.fullmatch(folder.name.removeprefix(_REPLACED))[1])


def _step_folders(out_dir: Path) -> list[Path]:
    """Step directories, newest first. One that was being replaced stands for its step where a crash left no other."""
    if not out_dir.is_dir():
        return []
    names = {path.name for path in out_dir.iterdir()}
    present = [
        name
        for name in names
        if _STEP_FOLDER.fullmatch(name.removeprefix(_REPLACED))
        and (not name.startswith(_REPLACED) or name.removeprefix(_REPLACED) not in names)
    ]
    return sorted((out_dir / name for name in present), key=_step_of, reverse=True)


def _named(out_dir: Path, name: str) -> int | None:
    """The step that `latest` or `best` names."""
    try:
        match = _STEP_FOLDER.fullmatch((out_dir / name).read_text().strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) if match else None


def _delete(folder: Path):
    """Deletes a step directory. Renamed first, a half-deleted one is never taken for a checkpoint."""
    doomed = folder.with_name(f'{_TEMPORARY}deleted-{folder.name}')
    shutil.rmtree(doomed, ignore_errors=True)  # what a crash may have left
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(out_dir: Path):
    """Removes what a crash in the midst of writing or deleting left; where one came in the midst of replacing, undoes it."""
    for folder in _step_folders(out_dir):
        if folder.name.startswith(_REPLACED):
            os.rename(folder, out_dir / _name(_step_of(folder)))
        else:
            clear_temporaries(folder, 'state.json')
    for path in out_dir.glob(f'{_TEMPORARY}*'):
        shutil.rmtree(path, ignore_errors=True)
    clear_temporaries(out_dir, 'latest', 'best', 'config.json', 'metrics.jsonl')
