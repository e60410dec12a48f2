"""Finding the dataset that a run asks for, and making it where it is missing."""

import os
import runpy
from collections.abc import Callable
from pathlib import Path

from nib.errors import UserError
from nib.tokens.dataset import SPLITS, TokenDataset, is_prepared, open_dataset

SCRIPTS = Path(__file__).resolve().parents[2] / 'data'  # SCRIPTS/NAME/prepare.py makes a dataset


def open_or_prepare(
    name: str,
    fallback: str,
    data_dir: str,
    may_prepare: bool,
    block_size: int,
    ranks,
    say: Callable[[str], None],
) -> TokenDataset:
    """The checked dataset `name`, made first where it is missing and may be; where that fails, `fallback` likewise.

    data_dir: folder of the datasets; empty: where the prepare scripts are. ranks: the Ranks of the run, of which the
    first makes it while the others wait.
    UserError where there is no dataset to train on.
    """
    folder = (
        Path(data_dir) if data_dir else Path(os.path.relpath(SCRIPTS))
    )  # as a person would type it

    def prepare(name: str) -> str:
        if is_prepared(folder / name):
            return name
        missing = next(
            path
            for path in (folder / name / f'{split}.bin' for split in SPLITS)
            if not path.exists()
        )
        script = SCRIPTS / name / 'prepare.py'
        if (
            Path(name).name != name or not script.exists()
        ):  # a path leads to scripts that are not this project's
            known = ', '.join(
                sorted({path.parent.name for path in SCRIPTS.glob('*/prepare.py')} - {'text'})
            )
            raise UserError(
                f'{missing} is missing: python data/text/prepare.py --input=PATH --name={name} makes '
                f'it of your own text; datasets with a script of their own: {known}'
            )
        if not may_prepare:
            raise UserError(
                f'{missing} is missing: make it with python data/{name}/prepare.py'
                + (f' --out_dir={folder / name}' if data_dir else '')
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
                    f'{error}; or train on another text: --dataset=NAME, --fallback_dataset=NAME'
                ) from error
            say(
                f'*** TRAINING ON {fallback} INSTEAD OF {name}, WHICH COULD NOT BE PREPARED: {error}; then repeat the command '
                f'with --overwrite ***'
            )
            return prepare(fallback)

    return open_dataset(folder / ranks.on_first(prepare_or_fall_back), block_size)
