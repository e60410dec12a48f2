"""Finds the tokenizer of bins without a meta.json: nanoGPT's, and those that others made for it."""

import pickle
from pathlib import Path

from nib.errors import UserError
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.tokenizer import CharTokenizer, Tokenizer
from nib.text.vocabulary import IdTokenizer, VocabularyTokenizer, without_surrogates

PADDED_GPT2 = 50304  # the size to which nanoGPT pads GPT-2's vocabulary
_MOST = 1 << 24  # tokens in a vocabulary


class _Unpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them. Refuses to import anything."""

    def find_class(self, module, name):
        if (module, name) in (('collections', 'OrderedDict'), ('collections', 'Counter')):
            return dict
        is_numpy = module.partition('.')[0] == 'numpy'
        raise UserError(
            f'refused to import {module}.{name}, which could run code'
            f'{": convert NumPy values with int() or .tolist()" * is_numpy}'
        )


def data_folders(start: str | Path) -> tuple[Path, ...]:
    """Returns where the datasets of nanoGPT may be: data/ above a checkpoint, beside it, or here.

    start: its file or folder, or another init_from.
    """
    parent = Path(start).parent
    return parent.parent / 'data', parent / 'data', Path('data')


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of bins without a meta.json: that of meta.pkl, else GPT-2's.

    vocab_size: the number of tokens, if there is no meta.pkl; 0: GPT-2's. 50,257 tokens without
    texts are GPT-2's.
    Raises UserError if meta.pkl is invalid.
    """
    path = folder / 'meta.pkl'
    if not path.exists():
        return _of_size(vocab_size or Gpt2Tokenizer.vocab_size)
    try:
        with open(path, 'rb') as file:
            return _make_tokenizer(_Unpickler(file).load())
    except UserError as error:
        problem = str(error)
    except Exception as error:  # a damaged pickle can raise almost anything
        problem = f'cannot be read ({type(error).__name__}: {error})'
    raise UserError(
        f'{path}: {problem}; expected a dict with vocab_size, itos and stoi, or with vocab_size '
        f'alone'
    )


def _make_tokenizer(meta) -> Tokenizer:
    """Returns the tokenizer that nanoGPT's meta.pkl describes. Raises UserError if it does not."""
    if not isinstance(meta, dict):
        raise UserError(f'found {type(meta).__name__}')
    size, itos, stoi = (meta.get(key) for key in ('vocab_size', 'itos', 'stoi'))
    if isinstance(itos, list | tuple):
        itos = dict(enumerate(itos))
    if itos is None and isinstance(stoi, dict):
        itos = {number: token for token, number in stoi.items()}
    if itos is None and 'itos' not in meta and 'stoi' not in meta:
        itos = {}
    if not isinstance(itos, dict) or not all(type(number) is int for number in itos):
        raise UserError('itos is not a dict of tokens by id, or a list of tokens')
    if size is None and itos:
        size = max(itos) + 1
    if type(size) is not int or not 1 <= size <= _MOST:
        raise UserError(f'vocab_size is {size!r:.40}')
    if itos and not 0 <= min(itos) <= max(itos) < size:
        raise UserError(f'itos has ids {min(itos)} to {max(itos)}, but vocab_size is {size}')
    if stoi is not None:
        wrong = [number for number, token in itos.items() if stoi.get(token) != number]
        if wrong:
            raise UserError(f'itos and stoi disagree about id {wrong[0]}')
    if not itos:
        return _of_size(size)
    # Ids without a token appear as <id>.
    tokens = [_text_of(itos[n]) if n in itos else f'<{n}>' for n in range(size)]
    if all(len(token) == 1 for token in tokens) and tokens == sorted(set(tokens)):
        return CharTokenizer(''.join(tokens))
    distinct = len(set(tokens)) == size
    return VocabularyTokenizer(tuple(tokens)) if distinct else IdTokenizer(size)


def _of_size(vocab_size: int) -> Tokenizer:
    is_gpt2 = vocab_size == Gpt2Tokenizer.vocab_size
    return Gpt2Tokenizer() if is_gpt2 else IdTokenizer(vocab_size)


def _text_of(token) -> str:
    return without_surrogates(token if isinstance(token, str) else str(token))
