"""A run that another one replaces is kept until the new run has saved its first checkpoint."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from nib.checkpoint import store
from nib.errors import UserError

FILES = 'config.json metrics.jsonl latest best report.html tensorboard wandb_id'.split()


def set_aside(out_dir):
    """Moves the checkpoints, the config and the records of a run into its subfolder .replaced.

    Nothing happens if the run has no checkpoints. Raises UserError if a file cannot be moved; then
    all of them stay where they are.
    """
    out_dir = Path(out_dir)
    moving = out_dir / store.MOVING
    if not store.exists(out_dir):
        return
    try:
        moving.mkdir()
        files = (out_dir / name for name in FILES)
        for path in [*filter(Path.exists, files), *store.step_folders(out_dir)]:
            os.rename(path, moving / path.name)
        os.rename(moving, out_dir / store.ASIDE)
    except OSError as error:
        with suppress(OSError):
            put_back(out_dir)
        raise UserError(
            f'the run in {out_dir} cannot be set aside ({error.strerror}): choose another --out_dir'
        ) from error


def put_back(out_dir):
    """Undoes set_aside(), unless the new run has saved a checkpoint since.

    It also completes what a crash has interrupted. Raises OSError if that is impossible.
    """
    aside, moving = Path(out_dir) / store.ASIDE, Path(out_dir) / store.MOVING
    if store.exists(out_dir) and not moving.exists():
        delete_set_aside(out_dir)
    elif aside.exists() and not moving.exists():
        os.rename(aside, moving)  # from now on, it belongs to the run again
    if moving.exists():
        for path in moving.iterdir():
            target = moving.parent / path.name  # perhaps of the new run
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        moving.rmdir()


def is_interrupted(out_dir) -> bool:
    """Returns whether a run was set aside, and the new one has saved nothing."""
    folders = (Path(out_dir) / store.ASIDE, Path(out_dir) / store.MOVING)
    return not store.exists(out_dir) and any(map(store.exists, folders))


def delete_set_aside(out_dir):
    shutil.rmtree(Path(out_dir) / store.ASIDE, ignore_errors=True)
