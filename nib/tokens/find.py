"""Finds the dataset of a run and prepares it if it is missing."""

import os
import runpy
from collections.abc import Callable
from pathlib import Path

from nib.errors import UserError
from nib.files import command
from nib.tokens.dataset import SPLITS, TokenDataset, is_prepared, open_dataset

SCRIPTS = Path(__file__).resolve().parents[2] / 'data'  # SCRIPTS/NAME/prepare.py prepares NAME


def data_dir_of(data: TokenDataset) -> str:
    """Returns the data_dir that finds a dataset again from any working directory."""
    folder = os.path.abspath(data.folder.parent)
    return '' if folder == str(SCRIPTS) else folder


def check_trained_on(name: str, data_dir: str):
    """Raises UserError if the dataset that a resumed run was trained on is missing."""
    folder = Path(data_dir or os.path.relpath(SCRIPTS)) / name
    if not is_prepared(folder):
        again = ''
        if not data_dir and (SCRIPTS / name / 'prepare.py').exists():
            again = f', or prepare it again with python data/{name}/prepare.py'
        raise UserError(
            f'{folder} has no train.bin and val.bin, and a resumed run needs the dataset that it '
            f'was trained on: name the folder that contains {name} with --data_dir=FOLDER{again}'
        )


def open_or_prepare(
    name: str,
    fallback: str,
    data_dir: str,
    may_prepare: bool,
    block_size: int,
    ranks,
    say: Callable[[str], None],
) -> TokenDataset:
    """Open the dataset `name`, or `fallback` if `name` is missing and cannot be prepared.

    data_dir: folder of the datasets; empty: the folder of the prepare scripts.
    may_prepare: whether a missing dataset is prepared by its script.
    ranks: the Ranks of the run. The first rank prepares the dataset, the others wait.
    say: prints a line.
    Raises UserError if no dataset is available.
    """
    # relpath: messages show the folder as a person would type it.
    folder = Path(data_dir) if data_dir else Path(os.path.relpath(SCRIPTS))

    def prepare(name: str) -> str:
        if is_prepared(folder / name):
            return name
        bins = [folder / name / f'{split}.bin' for split in SPLITS]
        missing = next(path for path in bins if not path.exists())
        script = SCRIPTS / name / 'prepare.py'
        # A name that is a path could run a script that is not part of this project.
        if Path(name).name != name or not script.exists():
            scripts = {path.parent.name for path in SCRIPTS.glob('*/prepare.py')} - {'text'}
            raise UserError(
                f'{missing} is missing: for your own text, prepare it with '
                f'{command("data/text/prepare.py")} --input=PATH --name={name}; datasets that have '
                'a script: ' + ', '.join(sorted(scripts))
            )
        if not may_prepare:
            into = f' --out_dir={folder / name}' if data_dir else ''
            raise UserError(
                f'{missing} is missing: prepare it with {command(f"data/{name}/prepare.py")}{into}'
            )
        say(f'preparing {name}')
        runpy.run_path(str(script))['main']([f'--out_dir={folder / name}'])
        return name

    def prepare_or_fall_back() -> str:
        try:
            return prepare(name)
        except UserError as error:
            if not fallback:
                raise UserError(
                    f'{error}; or use another text: --dataset=NAME, --fallback_dataset=NAME'
                ) from error
            say(
                f'*** TRAINING ON {fallback} INSTEAD OF {name}, WHICH COULD NOT BE PREPARED: '
                f'{error}; then repeat the command with --overwrite ***'
            )
            return prepare(fallback)

    return open_dataset(folder / ranks.on_first(prepare_or_fall_back), block_size)
