"""The tokenizer of an existing dataset, run or open model, for preparing a text for its model."""

import re
from pathlib import Path

from nib.errors import UserError
from nib.files import read_json
from nib.text.tokenizer import Tokenizer, tokenizer_from_json
from nib.tokens import nanogpt_bins


def read_tokenizer(name: str) -> Tokenizer:
    """Reads the tokenizer that --tokenizer names.

    name: the folder of a dataset, of a run (its best or latest checkpoint is read), of a checkpoint
    or of an open model; a tokenizer.json; or a hub id.
    Raises UserError if it is none of these, or if its description is not valid.
    """
    folder = Path(name)
    if (folder / 'meta.pkl').exists() and not (folder / 'meta.json').exists():
        return nanogpt_bins.read_tokenizer(folder, 0)
    for path in (folder / 'meta.json', *_states(folder)):
        described = read_json(path).get('tokenizer')
        if described is not None:
            try:
                return tokenizer_from_json(described)
            except UserError as error:
                raise UserError(f'{path}: {error}') from error
    is_hub_id = re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', name) and not folder.exists()
    if folder.exists() or is_hub_id:
        # These import torch, which takes a second.
        from nib.hub.files import Repository
        from nib.hub.tokenizer import read_file
        from nib.hub.tokenizer import read_tokenizer as read_from

        if folder.is_file():
            return read_file(folder, Repository(str(folder.parent), '--tokenizer'))
        repository = Repository(name, '--tokenizer')
        repository.find('config.json')  # fails at once without a network; others are tried again
        if found := read_from(repository, 0):
            return tokenizer_from_json(found)
    raise UserError(
        f"--tokenizer={name}: expected 'char', 'byte', 'gpt2', a tokenizer.json, the folder of a "
        f'dataset, of a run that has a checkpoint, or of a model with a tokenizer.json, or a hub id'
    )


def _states(folder: Path) -> list[Path]:
    """Returns where the state.json of a run or a checkpoint may be, most likely first."""
    names = []
    for name in ('best', 'latest'):
        if (folder / name).is_file():
            names.append((folder / name).read_text(errors='replace').strip())
    return [folder / 'state.json', *(folder / name / 'state.json' for name in names)]
