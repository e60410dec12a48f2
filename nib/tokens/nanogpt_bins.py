"""What nanoGPT's prepare.py says of its bins: meta.pkl for characters, nothing for GPT-2's tokens."""

import pickle
from pathlib import Path

from nib.errors import UserError
from nib.text.tokenizer import CharTokenizer, Gpt2Tokenizer


class _Unpickler(pickle.Unpickler):
    """Reads numbers, texts and containers of them; whatever would call something of a module is refused."""

    def find_class(self, module, name):
        raise UserError(f'it asks for {module}.{name}, which could run code and was refused')


def read_tokenizer(folder: Path) -> CharTokenizer | Gpt2Tokenizer:
    """The tokenizer of bins without a meta.json. UserError for a meta.pkl that is not of nanoGPT's kind."""
    path = folder / 'meta.pkl'
    if not path.exists():
        return Gpt2Tokenizer()
    try:
        with open(path, 'rb') as file:
            meta = _Unpickler(file).load()
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    except Exception as error:  # damaged, a pickle can raise almost anything
        raise UserError(f'{path} cannot be read ({type(error).__name__}: {error})') from error
    match meta:
        case {'vocab_size': int(size), 'itos': dict(itos), 'stoi': dict(stoi)} if (
            size == len(itos) == len(stoi)
        ):
            characters = list(itos.values())
            ordered = all(
                isinstance(c, str) and len(c) == 1 for c in characters
            ) and characters == sorted(set(characters))
            if (
                ordered
                and list(itos) == list(range(size))
                and stoi == {c: number for number, c in itos.items()}
            ):
                return CharTokenizer(''.join(characters))
    raise UserError(
        f'{path} is not of the kind that nanoGPT writes: vocab_size, itos and stoi, which number characters in '
        f'the order of their code points'
    )
