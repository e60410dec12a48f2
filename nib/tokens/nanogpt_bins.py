"""Finds the tokenizer of bins made by nanoGPT: in meta.pkl for characters, else GPT-2's."""

import pickle
from pathlib import Path

from nib.errors import UserError
from nib.text.tokenizer import CharTokenizer, Gpt2Tokenizer


class _Unpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them. Refuses to import anything."""

    def find_class(self, module, name):
        raise UserError(f'refused to import {module}.{name}, which could run code')


def read_tokenizer(folder: Path) -> CharTokenizer | Gpt2Tokenizer:
    """Return the tokenizer of bins without a meta.json. Raises UserError if meta.pkl is invalid."""
    path = folder / 'meta.pkl'
    if not path.exists():
        return Gpt2Tokenizer()
    try:
        with open(path, 'rb') as file:
            meta = _Unpickler(file).load()
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f'{path} cannot be read ({type(error).__name__}: {error})') from error
    match meta:
        case {'vocab_size': int(size), 'itos': dict(itos), 'stoi': dict(stoi)} if (
            size == len(itos) == len(stoi)
        ):
            characters = list(itos.values())
            if all(isinstance(c, str) and len(c) == 1 for c in characters):
                inverse = {character: number for number, character in itos.items()}
                numbered = list(itos) == list(range(size)) and stoi == inverse
                if numbered and characters == sorted(inverse):
                    return CharTokenizer(''.join(characters))
    raise UserError(
        f'{path} is not a meta.pkl of nanoGPT: expected vocab_size, itos and stoi, with characters '
        f'numbered in the order of their code points'
    )
