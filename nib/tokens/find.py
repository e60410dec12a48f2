"""Finds the dataset of a run and prepares it if it is missing."""

import difflib
import inspect
import os
import runpy
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from nib.errors import UserError
from nib.files import command, shown
from nib.text.download import DownloadError
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.vocabulary import IdTokenizer
from nib.tokens.dataset import (
    SCRIPTS,
    SPLITS,
    TokenDataset,
    is_assumed,
    is_prepared,
    open_dataset,
    prepare_command,
)
from nib.tokens.nanogpt_bins import PADDED_GPT2, data_folders
from nib.tokens.unfinished import wait_for_others


class Unavailable(UserError):
    """A dataset of this project could not be downloaded, or may not be prepared by this run."""


def data_dir_of(data: TokenDataset) -> str:
    """Returns the data_dir that finds a dataset again from any working directory."""
    folder = os.path.abspath(data.folder.parent)
    return '' if folder == str(SCRIPTS) else folder


def open_or_prepare(values: Mapping, ranks, say: Callable[[str], None]) -> TokenDataset:
    """Opens a run's dataset. The first rank prepares it if it is missing; the others wait.

    values: train.py's config. Only if the dataset cannot be downloaded, its fallback_dataset is
    used instead, and a resumed run never prepares one. ranks: the Ranks of the run. say: prints a
    line.
    Raises Unavailable or another UserError if there is no dataset.
    """
    # relpath: messages show the folder as a person would type it.
    data_dir = Path(values['data_dir'] or os.path.relpath(SCRIPTS))
    name, fallback = values['dataset'], values['fallback_dataset']

    def prepare_or_fall_back() -> Path:
        if values['init_from'] == 'resume':
            return _find_trained_on(name, data_dir, values)
        try:
            return _prepare(name, data_dir, values, say)
        except DownloadError as error:
            if not fallback:
                raise Unavailable(
                    f'{error}; or use another text: --dataset=NAME, --fallback_dataset=NAME'
                ) from error
            say(
                f'*** TRAINING ON {fallback} INSTEAD OF {name}, WHICH COULD NOT BE DOWNLOADED ***\n'
                f'{error}; then repeat the command with --overwrite'
            )
            return _prepare(fallback, data_dir, values, say)

    folder = ranks.on_first(prepare_or_fall_back)
    data = open_dataset(folder, values['block_size'], values['vocab_size'])
    if is_assumed(folder) and not values['vocab_size']:
        say(
            f"{folder} has neither meta.json nor meta.pkl: its ids are assumed to be GPT-2's "
            f'tokens (if they are of another vocabulary, set --vocab_size=N, its number of tokens)'
        )
    if data.tokenizer == IdTokenizer(PADDED_GPT2):
        source = 'vocab_size' if is_assumed(folder) else folder / 'meta.pkl'
        say(
            f"note: {PADDED_GPT2:,} is GPT-2's vocabulary of {Gpt2Tokenizer.vocab_size:,} tokens, "
            f"as nanoGPT pads it: samples will be ids, not text; if the ids are GPT-2's tokens, "
            f'leave {source} out'
        )
    return data


def _find_trained_on(name: str, data_dir: Path, values: Mapping) -> Path:
    """Returns the folder of the dataset of a resumed run. Raises UserError if it is missing."""
    folder = data_dir / name
    if not is_prepared(folder):
        again = ''
        if data_dir.resolve() == SCRIPTS and (SCRIPTS / name / 'prepare.py').exists():
            again = f', or prepare it again with {command(f"data/{name}/prepare.py")}'
        how = f': name the folder that contains {name} with --data_dir=FOLDER{again}'
        raise UserError(
            f'{folder} has no train.bin and val.bin, and a resumed run needs the dataset that it '
            f'was trained on{_find_near(name, Path(values["out_dir"], "latest")) or how}'
        )
    return folder


def _find_near(name: str, start: str | Path) -> str:
    """Returns a question that names the data_dir in which a dataset is; '' if none is found.

    start: a checkpoint, or another init_from.
    """
    for folder in (*data_folders(start), Path(shown(SCRIPTS))):
        if is_prepared(folder / name):
            return f'; did you mean --data_dir={shlex.quote(str(folder))}?'
    return ''


def _prepare(name: str, data_dir: Path, values: Mapping, say: Callable[[str], None]) -> Path:
    """Prepares a dataset if it is missing; returns its folder. Raises UserError if it cannot."""
    folder = data_dir / name
    if not is_prepared(folder):
        wait_for_others(folder)
    if is_prepared(folder):
        return folder
    missing = next(path for split in SPLITS if not (path := folder / f'{split}.bin').exists())
    script = SCRIPTS / name / 'prepare.py'
    near = _find_near(name, values['init_from'])
    # A name that is a path could run a script that is not part of this project.
    if Path(name).name != name or not script.exists():
        raise UserError(f'{missing} is missing{near or _advise(name, data_dir)}')
    if not values['prepare_dataset']:
        others = ', '.join(_prepared(data_dir))
        first = f'{command("train.py")} config/train_shakespeare_char.py'
        here = f' (prepared: {others})' if others else f'; a small run to begin with: {first}'
        how = f': prepare it with {prepare_command(folder)}, or name another dataset, '
        raise Unavailable(f'{missing} is missing' + (near or f'{how}--dataset=NAME{here}'))
    say(f'preparing {name}')
    prepare = runpy.run_path(str(script)).get('main')  # None: it has done it, as in nanoGPT
    if prepare and inspect.signature(prepare).parameters:
        prepare([f'--out_dir={folder}'])
    if not is_prepared(folder):
        raise UserError(
            f'{shown(script)} has not written {folder}: run it yourself first, or give it a '
            f'main(argv) that takes --out_dir'
        )
    return folder


def _advise(name: str, data_dir: Path) -> str:
    """Returns what to do about a missing dataset that no script prepares."""
    elsewhere = Path(name).resolve()
    if elsewhere.suffix == '.bin':
        elsewhere = elsewhere.parent
    if is_prepared(elsewhere):
        parent, own_name = shlex.quote(str(elsewhere.parent)), shlex.quote(elsewhere.name)
        return f'; did you mean --data_dir={parent} --dataset={own_name}?'
    if elsewhere.exists() and not any((elsewhere / f'{split}.bin').exists() for split in SPLITS):
        prepare = f'{command("data/text/prepare.py")} --input={shlex.quote(name)}'
        return f'; if {name} is your text, prepare it with {prepare}, which prints the next command'
    config = Path(os.path.relpath(SCRIPTS.parent / 'config' / f'{name}.py'))
    if config.exists():
        return f'; the first lines of {config} say how to prepare it'
    scripts = {path.parent.name for path in SCRIPTS.glob('*/prepare.py')} - {'text'}
    prepared = set(_prepared(data_dir))
    nearest = difflib.get_close_matches(name, scripts | prepared, n=1)
    advice = f'; did you mean --dataset={nearest[0]}?' if nearest else '.'
    return (
        f'{advice} For your own text, prepare it with {prepare_command(data_dir / name)}; datasets '
        f'that are here or have a script: {", ".join(sorted(scripts | prepared))}'
    )


def _prepared(data_dir: Path) -> list[str]:
    """Returns the names of the datasets in a folder."""
    return sorted(path.parent.name for path in data_dir.glob('*/train.bin'))
