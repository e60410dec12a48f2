"""Checkpoints: written completely or not at all, and read only if their digests match.

    out_dir/step-00000250/  model.safetensors  optimizer.safetensors  state.json
    out_dir/latest  out_dir/best     each holds the name of a step folder

A checkpoint is written under a temporary name, synced and renamed. Only then does `latest` or
`best` name it. A folder with a step's name is therefore a complete checkpoint, whenever the
machine stopped. Deleting a checkpoint begins with renaming it, too.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from nib.checkpoint import tensorfile
from nib.checkpoint.paths import explain, is_checkpoint, run_of
from nib.errors import NO_ROOM, UserError, warn
from nib.files import atomic_write, clear_temporaries, sync_folder
from nib.machine.ranks import Ranks

FORMAT = 1
_TEMPORARY = '.tmp-'  # prefix of folders that are being written or deleted
ASIDE = '.replaced'  # subfolder for a run that is being replaced
MOVING = '.replaced-moving'  # the same while its files are moved there or back
_REPLACED = '.tmp-replaced-'  # prefix of a step's folder while another one takes its place
_STEP_FOLDER = re.compile(r'step-(\d{8,})')


class Damaged(Exception):
    """A checkpoint's files are not what was saved; the message says which file and how."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose state.json is intact. Tensors are read and checked on demand."""

    path: Path
    state: dict

    @property
    def step(self) -> int:
        return self.state['step']

    def check_dataset(self, dataset, fingerprint: str):
        """Raises UserError if this checkpoint was trained on a dataset with another fingerprint."""
        name, own = self.state['dataset'], self.state['dataset_fingerprint']
        if own != fingerprint:
            bins = f'resume with the same bins (--dataset={name})'
            if Path(dataset).name == name:  # it has changed since, or is another one
                bins = (
                    'resume with the same bins (--data_dir=PATH, if they are elsewhere), prepare '
                    'them again from the same text, with the same tokenizer'
                )
            raise UserError(
                f'{self.path} was trained on {name} with the fingerprint {own[:16]}, but {dataset} '
                f'has {fingerprint[:16]}: {bins}, or start a new run in another --out_dir, or with '
                f'--overwrite instead of --init_from=resume'
            )

    def describe_step(self) -> str:
        """Returns the step, and whether it is the best one of a run with newer ones."""
        run = self.path.parent
        newest = max(map(_step_of, step_folders(run)), default=self.step)
        is_best = self.step < newest and self.step == _named(run, 'best')
        return f'step {self.step}' + f' (the best; the newest is step {newest})' * is_best

    def check_ranks(self, ranks: Ranks):
        """Raises UserError if the processes of the run have read different checkpoints."""
        ranks.check_same(
            {'the step of the checkpoint': self.step},
            f'make sure that all of them can read {self.path.parent}',
        )

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Returns the tensors of 'model' or 'optimizer', on the CPU.

        Raises Damaged if the file is not the one that was saved.
        """
        path = self.path / f'{name}.safetensors'
        try:
            return tensorfile.read(path, self.state['files'][path.name])
        except OSError as error:
            raise Damaged(f'{path}: {error.strerror}') from error
        except tensorfile.Altered as error:
            raise Damaged(str(error)) from error


def save(out_dir, step: int, model: dict, optimizer: dict, state: dict) -> Path:
    """Writes the checkpoint of `step` and points `latest` to it.

    model, optimizer: name -> tensor on the CPU. state: values that JSON can represent. Raises
    UserError if writing fails; earlier checkpoints stay intact.
    """
    try:
        return _save(out_dir, step, model, optimizer, state)
    except OSError as error:
        again = f'no earlier one exists: {_remedy(error)}, then start again'
        if exists(out_dir):
            again = (
                f'earlier ones are intact: {_remedy(error)}, then resume with --init_from=resume'
            )
        raise UserError(
            f'the checkpoint of step {step} could not be written to {out_dir} ({error.strerror}); '
            f'{again}'
        ) from error


def _remedy(error: OSError | Damaged) -> str:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return 'free some space'
    named = isinstance(error, OSError) and (error.filename2 or error.filename)
    return f'fix {named or "this"}'


def _save(out_dir, step: int, model: dict, optimizer: dict, state: dict) -> Path:
    final = Path(out_dir) / _name(step)
    temporary = final.with_name(_TEMPORARY + final.name)
    replaced = final.with_name(_REPLACED + final.name)
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
            os.rename(final, replaced)  # it still counts under this name until the next rename
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
    """Updates state.json of the checkpoint of `step` after its evaluation.

    train_state: the new state['train']. best: whether to point `best` to this checkpoint. Raises
    UserError if the file cannot be written; the checkpoint is then unchanged.
    """
    folder = Path(out_dir) / _name(step)
    try:
        state = {**_read_state(folder), 'train': train_state}
        # `best` first: after a crash between the two, the state still says that this step is not
        # evaluated, so a resumed run evaluates it again.
        if best:
            point(out_dir, 'best', folder)
        _write_state(folder, state)
    except (OSError, Damaged) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f'the evaluation of step {step} could not be recorded in {folder} ({reason}): '
            f'{_remedy(error)}, then resume with --init_from=resume'
        ) from error


def point(out_dir, name: str, step_folder: Path):
    """Atomically points `name` ('latest' or 'best') to a step folder."""
    with atomic_write(Path(out_dir) / name) as file:
        file.write(step_folder.name.encode() + b'\n')


def prune(out_dir, step: int, keep_last: int, keep_every: int = 0, damaged: Set[int] = frozenset()):
    """Deletes old checkpoints, up to `step`, which must be complete.

    Keeps `step` itself, the newest `keep_last`, those whose step is a multiple of `keep_every`, and
    what `latest` and `best` name. Newer checkpoints than `step` are not touched.

    damaged: steps known to be unusable, which do not count among those to keep. Raises UserError if
    a checkpoint cannot be deleted.
    """
    out_dir = Path(out_dir)
    folders = {
        _step_of(folder): folder for folder in step_folders(out_dir) if _step_of(folder) <= step
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
    """Returns the steps after `step` that have a folder."""
    return {newer for newer in map(_step_of, step_folders(Path(out_dir))) if newer > step}


def exists(out_dir) -> bool:
    """Returns whether out_dir contains a checkpoint."""
    return bool(step_folders(Path(out_dir)))


def newest(out_dir) -> Checkpoint | None:
    """Returns the newest checkpoint with an intact state.json, without reading its tensors."""
    for folder in step_folders(Path(out_dir)):
        with suppress(Damaged):
            return Checkpoint(folder, _read_state(folder))
    return None


def locate(path, which: str) -> tuple[Path, str]:
    """Returns the folder of a run and the checkpoint to read, for load().

    path: this folder, or that of a single checkpoint, which then replaces `which`.
    """
    whole = Path(os.path.abspath(path))
    return (run_of(whole), str(_step_of(whole))) if is_checkpoint(whole) else (Path(path), which)


def load(
    out_dir,
    which: str = 'latest',
    read: tuple[str, ...] = ('model', 'optimizer'),
    warn: Callable[[str], None] = warn,
    check: Callable[[Checkpoint, dict], None] = lambda checkpoint, tensors: None,
) -> tuple[Checkpoint, dict]:
    """Reads a checkpoint; returns it and its tensors as {'model': {...}, 'optimizer': {...}}.

    which: 'latest', 'best' or a step number. read: names of the tensor files to read. check: raises
    Damaged if an intact checkpoint cannot be used for another reason.

    If the checkpoint is damaged, the newest intact one is used instead, with a warning, unless
    `which` is a step number. Raises UserError if there is none. This function only reads, so it can
    be used while the run is active.
    """
    out_dir = Path(out_dir)
    if not out_dir.is_dir():
        raise UserError(explain(out_dir))
    damages = []
    for folder in _candidates(out_dir, which, warn):
        try:
            checkpoint = Checkpoint(folder, _read_state(folder))
            tensors = {name: checkpoint.tensors(name) for name in read}
            check(checkpoint, tensors)
        except Damaged as error:
            if not folder.exists():  # the active run has just replaced or deleted it
                return load(out_dir, which, read, warn, check)
            damages.append(str(error))
            continue
        for damage in damages:
            warn(
                f'warning: skipping an unusable checkpoint: {damage}; using step {checkpoint.step}'
            )
        return checkpoint, tensors
    for aside in (out_dir / ASIDE, out_dir / MOVING):
        if exists(aside):
            damages.append(f'the run that was to be replaced is in {aside}: use this folder')
    if not damages:
        raise UserError(explain(out_dir))
    raise UserError(f'{out_dir} contains no usable checkpoint: {"; ".join(damages)}')


def _candidates(out_dir: Path, which: str, warn: Callable[[str], None]) -> list[Path]:
    """Returns the folders to try, in order. Raises UserError if `which` is invalid."""
    folders = step_folders(out_dir)
    if which == 'latest':
        return folders  # not what `latest` names: a crash may have left it behind the newest
    if which == 'best':
        best = _named(out_dir, 'best')
        if best is None and folders:
            warn(f'{out_dir} has no best checkpoint yet: using the newest')
        # A stable sort: the best one, then newest first.
        return sorted(folders, key=lambda folder: _step_of(folder) != best)
    which = which.removeprefix('step-')
    if not (which.isascii() and which.isdecimal() and len(which) < 20):
        raise UserError(f"which is {which!r}: it must be 'latest', 'best' or a step number")
    if wanted := [folder for folder in folders if _step_of(folder) == int(which)]:
        return wanted
    existing = ', '.join(str(_step_of(folder)) for folder in folders) or 'none'
    raise UserError(f'{out_dir} contains no checkpoint of step {which}; it has: {existing}')


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
    # The bytes are compared too, because JSON can represent the same values in different bytes.
    if digest != _digest(state) or content != _encode(state):
        raise Damaged(f'{path}: its content is not what was saved (SHA-256 differs)')
    if state['format'] != FORMAT:
        raise Damaged(f'{path}: format {state["format"]}, this version reads {FORMAT}')
    if state['step'] != _step_of(folder):
        raise Damaged(f'{path}: it belongs to step {state["step"]}')
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


def step_folders(out_dir: Path) -> list[Path]:
    """Returns the step folders, newest first.

    A folder that was being replaced counts if a crash left no other one of its step.
    """
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
    """Returns the step that `latest` or `best` names."""
    try:
        match = _STEP_FOLDER.fullmatch((out_dir / name).read_text().strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) if match else None


def _delete(folder: Path):
    """Deletes a step folder, after renaming it: half-deleted, it must not look complete."""
    doomed = folder.with_name(f'{_TEMPORARY}deleted-{folder.name}')
    shutil.rmtree(doomed, ignore_errors=True)  # may be left from a crash
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(out_dir: Path):
    """Removes what a crash left during a write or deletion; undoes an interrupted replacement."""
    for folder in step_folders(out_dir):
        if folder.name.startswith(_REPLACED):
            os.rename(folder, out_dir / _name(_step_of(folder)))
        else:
            clear_temporaries(folder, 'state.json')
    for path in out_dir.glob(f'{_TEMPORARY}*'):
        shutil.rmtree(path, ignore_errors=True)
    clear_temporaries(out_dir, 'latest', 'best', 'config.json', 'metrics.jsonl')
