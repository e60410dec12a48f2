"""The tokenizer of an existing dataset or run, for preparing another text for its model."""

from pathlib import Path

from nib.errors import UserError
from nib.files import read_json
from nib.text.tokenizer import Tokenizer, tokenizer_from_json
from nib.tokens import nanogpt_bins


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a dataset, a run (its best or latest checkpoint) or a checkpoint.

    Raises UserError if the folder is none of these, or if its description is not valid.
    """
    if (folder / 'meta.pkl').exists() and not (folder / 'meta.json').exists():
        return nanogpt_bins.read_tokenizer(folder, 0)
    for path in (folder / 'meta.json', *_states(folder)):
        described = read_json(path).get('tokenizer')
        if described is not None:
            try:
                return tokenizer_from_json(described)
            except UserError as error:
                raise UserError(f'{path}: {error}') from error
    raise UserError(
        f"--tokenizer={folder}: expected 'char', 'byte', 'gpt2', or the folder of a dataset or a "
        f'run that has a checkpoint'
    )


def _states(folder: Path) -> list[Path]:
    """Returns where the state.json of a run or a checkpoint may be, most likely first."""
    names = []
    for name in ('best', 'latest'):
        if (folder / name).is_file():
            names.append((folder / name).read_text(errors='replace').strip())
    return [folder / 'state.json', *(folder / name / 'state.json' for name in names)]
