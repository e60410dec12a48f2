"""Checkpoints that are written whole or not at all, and read only when their digests hold.

    out_dir/step-00000250/  model.safetensors  optimizer.safetensors  state.json
    out_dir/latest  out_dir/best     each holds the name of a step directory

A checkpoint is written under a temporary name, synced, renamed, and only then named by `latest` or `best`.
"""
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from nib.errors import UserError
from nib.files import atomic_write, sync_folder

FORMAT = 1
_STEP_FOLDER = re.compile(r'step-(\d{8,})')
_TEMPORARY = '.tmp-'


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
            raise UserError(f'{self.path} was trained on {self.state["dataset"]} as it was then, not on {dataset} as it is '
                            f'now: resume with the same bins (--dataset={self.state["dataset"]}), or start a new run in '
                            f'another --out_dir')

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of 'model' or 'optimizer', on the CPU. Damaged where the file is not the one saved."""
        file = f'{name}.safetensors'
        try:
            content = (self.path / file).read_bytes()
        except OSError as error:
            raise Damaged(f'{self.path / file}: {error.strerror}') from error
        if hashlib.sha256(content).hexdigest() != self.state['files'].get(file):
            raise Damaged(f'{self.path / file}: its content is not what was saved (SHA-256 differs)')
        return safetensors.torch.load(content)


def save(out_dir, step: int, model: dict, optimizer: dict, state: dict) -> Path:
    """Writes the checkpoint of `step` and lets `latest` point to it.

    model, optimizer: name -> tensor. state: anything that JSON holds. UserError where it cannot be written, which leaves
    what was there as it was.
    """
    try:
        return _save(out_dir, step, model, optimizer, state)
    except OSError as error:
        raise UserError(f'the checkpoint of step {step} could not be written to {out_dir} ({error.strerror}); those before it '
                        f'are whole: make room, then go on with --init_from=resume') from error


def _save(out_dir, step: int, model: dict, optimizer: dict, state: dict) -> Path:
    out_dir = Path(out_dir)
    final = out_dir / f'step-{step:08d}'
    temporary = out_dir / f'{_TEMPORARY}{final.name}'
    shutil.rmtree(temporary, ignore_errors=True)  # what a crash may have left
    temporary.mkdir(parents=True)
    try:
        digests = {}
        for name, tensors in (('model', model), ('optimizer', optimizer)):
            file = f'{name}.safetensors'
            content = safetensors.torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
            _write_synced(temporary / file, content)
            digests[file] = hashlib.sha256(content).hexdigest()
        state = {'format': FORMAT, 'step': step, **state, 'files': digests}
        _write_synced(temporary / 'state.json', _encode(state))
        sync_folder(temporary)
        if final.exists():  # the same step saved again, after resuming from an earlier one
            replaced = out_dir / f'{_TEMPORARY}replaced-{final.name}'
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
            os.rename(temporary, final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(temporary, final)
        sync_folder(out_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    point(out_dir, 'latest', final)
    return final


def record_evaluation(out_dir, step: int, train_state: dict, best: bool):
    """Writes what was learnt about the checkpoint of `step` since it was saved into its state.json, and names it `best`."""
    folder = Path(out_dir) / f'step-{step:08d}'
    state = {**_read_state(folder), 'train': train_state}
    with atomic_write(folder / 'state.json') as file:
        file.write(_encode(state))
    if best:
        point(out_dir, 'best', folder)


def point(out_dir, name: str, step_folder: Path):
    """Lets `name` ('latest', 'best') stand for this step directory, atomically."""
    with atomic_write(Path(out_dir) / name) as file:
        file.write(step_folder.name.encode() + b'\n')


def prune(out_dir, keep_last: int):
    """Deletes step directories but the newest `keep_last` and what `latest` and `best` name."""
    kept = {_named(Path(out_dir), name) for name in ('latest', 'best')}
    for folder in _step_folders(Path(out_dir))[keep_last:]:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def check_out_dir(out_dir, new_run: bool):
    """Makes the folder where it is missing. UserError where it cannot be written, or a new run meets an old one."""
    out_dir = Path(out_dir)
    if new_run and exists(out_dir):
        raise UserError(f'{out_dir} holds a run already: go on with it (--init_from=resume), choose another --out_dir, or '
                        f'replace it (--overwrite)')
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise UserError(f'out_dir {out_dir} cannot be written: {error.strerror}; choose another --out_dir') from error


def write_config(out_dir, record: dict):
    with atomic_write(Path(out_dir) / 'config.json') as file:
        file.write(json.dumps(record, indent=1).encode())


def exists(out_dir) -> bool:
    """Whether out_dir holds any checkpoint."""
    return bool(_step_folders(Path(out_dir)))


def remove_all(out_dir):
    """Deletes every checkpoint of out_dir, the names first, so that no name is left pointing nowhere."""
    for name in ('latest', 'best'):
        (Path(out_dir) / name).unlink(missing_ok=True)
    for folder in _step_folders(Path(out_dir)):
        shutil.rmtree(folder)


def load(out_dir, which: str = 'latest', read: tuple[str, ...] = ('model', 'optimizer'),
         warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> tuple[Checkpoint, dict]:
    """Reads a checkpoint; returns it and its tensors as {'model': {...}, 'optimizer': {...}}, as `read` asks.

    which: 'latest', 'best' or a step number. A damaged one is passed over for the newest good one, with a warning,
    unless a step was asked for by number. UserError when none is left.
    """
    out_dir = Path(out_dir)
    if not out_dir.is_dir():
        raise UserError(f'out_dir {out_dir}: there is no such folder; train first: python train.py CONFIG --out_dir={out_dir}')
    folders = _step_folders(out_dir)
    if which.isascii() and which.isdecimal() and len(which) < 20:
        if (wanted := out_dir / f'step-{int(which):08d}') not in folders:
            have = ', '.join(str(_step_of(folder)) for folder in folders) or 'none'
            raise UserError(f'{out_dir} holds no checkpoint of step {which}; it has: {have}')
        folders = [wanted]
    elif which in ('latest', 'best'):
        named = _named(out_dir, which)
        if which == 'best' and named is None and folders:
            warn(f'{out_dir} has no best checkpoint yet: taking the newest')
        folders = sorted(folders, key=lambda folder: folder != named)  # stable: the named one, then newest first
    else:
        raise UserError(f"checkpoint {which!r}: it is 'latest', 'best' or a step number")
    damages = []
    for folder in folders:
        try:
            checkpoint = Checkpoint(folder, _read_state(folder))
            tensors = {name: checkpoint.tensors(name) for name in read}
        except Damaged as damage:
            damages.append(str(damage))
            continue
        for damage in damages:
            warn(f'warning: passing over a damaged checkpoint: {damage}; using step {checkpoint.step}')
        return checkpoint, tensors
    raise UserError(f'{out_dir} holds no checkpoint that can be used' + (': ' + '; '.join(damages) if damages else
                    f'; train first: python train.py CONFIG --out_dir={out_dir}'))


def _read_state(folder: Path) -> dict:
    path = folder / 'state.json'
    try:
        state = json.loads(path.read_bytes())
        digest = state.pop('sha256')
    except OSError as error:
        raise Damaged(f'{path}: {error.strerror}') from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f'{path}: not a checkpoint\'s state') from error
    if digest != _digest(state):
        raise Damaged(f'{path}: its content is not what was saved (SHA-256 differs)')
    if state['format'] != FORMAT:
        raise Damaged(f'{path}: format {state["format"]}, this version reads {FORMAT}')
    if state['step'] != _step_of(folder):
        raise Damaged(f'{path}: it is of step {state["step"]}')
    return state


def _encode(state: dict) -> bytes:
    return json.dumps({**state, 'sha256': _digest(state)}, indent=1).encode()


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _step_of(folder: Path) -> int:
    return int(_STEP_FOLDER.fullmatch(folder.name)[1])


def _step_folders(out_dir: Path) -> list[Path]:
    """Step directories, newest first."""
    if not out_dir.is_dir():
        return []
    return sorted((path for path in out_dir.iterdir() if _STEP_FOLDER.fullmatch(path.name)), key=_step_of, reverse=True)


def _named(out_dir: Path, name: str) -> Path | None:
    try:
        text = (out_dir / name).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return out_dir / text if _STEP_FOLDER.fullmatch(text) else None  # never a path that leads out of out_dir


def _write_synced(path: Path, content: bytes):
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
