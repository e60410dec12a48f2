"""Tokenizers of datasets that another program has made: a list of tokens, or nothing but ids.

They have no end-of-text token. nib/text/tokenizer.py describes the methods.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nib.errors import UserError

END_OF_TEXT = '<|endoftext|>'  # the end-of-text token in decoded text and in prompts


@dataclass(frozen=True)
class VocabularyTokenizer:
    """Any distinct texts as tokens, in the order of their ids: words, moves, notes.

    Text is cut at white space if the tokens are words, which have several characters and contain no
    space. Otherwise nothing is between the tokens, and the longest one that fits comes next.
    """

    tokens: tuple[str, ...]
    end_of_text = None
    spells_end_of_text = False

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def are_words(self) -> bool:
        return any(len(token) > 1 for token in self.tokens) and not any(
            ' ' in token for token in self.tokens
        )

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    def encode(self, text: str) -> np.ndarray:
        pieces = self._words(text) if self.are_words else self._longest(text)
        ids = [self._ids[piece] for piece in pieces]
        if text and not ids:
            raise UserError(f'the text contains none of the tokens, such as {self._examples()}')
        return np.array(ids, np.uint32)

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        return np.concatenate([np.empty(0, np.uint32), *(self.encode(text) for text, _ in texts)])

    def decode(self, ids) -> str:
        tokens = [self.tokens[number] for number in checked_ids(ids, self.vocab_size)]
        if self.are_words:
            tokens = [token if token.isspace() else ' ' + token for token in tokens]
        return ''.join(tokens)

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode('utf-8', 'surrogatepass')

    def to_json(self) -> dict:
        return {'kind': 'vocabulary', 'tokens': list(self.tokens)}

    def _words(self, text: str) -> Iterable[str]:
        for match in re.finditer(r'\S+|\s', text):
            if match[0] in self._ids:
                yield match[0]
            elif not match[0].isspace():
                raise self._unknown(match[0], match.start())

    def _longest(self, text: str) -> Iterable[str]:
        lengths = sorted({len(token) for token in self.tokens if token}, reverse=True)
        start = 0
        while start < len(text):
            candidates = (text[start : start + length] for length in lengths)
            piece = next((piece for piece in candidates if piece in self._ids), None)
            if piece is None:
                raise self._unknown(text[start], start)
            yield piece
            start += len(piece)

    def _unknown(self, piece: str, offset: int) -> UserError:
        return UserError(
            f'the text contains {piece!r} (at offset {offset}), which is not among the '
            f'{self.vocab_size:,} tokens of the vocabulary, such as {self._examples()}'
        )

    def _examples(self) -> str:
        shown = [token for token in self.tokens if token.strip()] or self.tokens
        return ', '.join(repr(token) for token in shown[:5])


@dataclass(frozen=True)
class IdTokenizer:
    """Tokens without a text: people read and write their ids, as in '12 7 103'."""

    vocab_size: int
    end_of_text = None
    spells_end_of_text = False

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        if text and not (words and all(re.fullmatch('[0-9]{1,9}', word) for word in words)):
            raise UserError(
                f'found {text[:40]!r}, but the tokens of this vocabulary have no text: type ids '
                f'from 0 to {self.vocab_size - 1}, separated by spaces, such as 0 1'
            )
        return checked_ids([int(word) for word in words], self.vocab_size).astype(np.uint32)

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        return np.concatenate([np.empty(0, np.uint32), *(self.encode(text) for text, _ in texts)])

    def decode(self, ids) -> str:
        return ''.join(f' {number}' for number in checked_ids(ids, self.vocab_size))

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode()

    def to_json(self) -> dict:
        return {'kind': 'ids', 'vocab_size': self.vocab_size}


def checked_ids(ids, vocab_size: int) -> np.ndarray:
    """Returns ids as int64. Raises UserError if one is not in the vocabulary."""
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(
            f'token ids range from {ids.min()} to {ids.max()}, but the vocabulary '
            f'has ids 0 to {vocab_size - 1}'
        )
    return ids


def without_surrogates(text: str) -> str:
    """Replaces surrogate pairs by their character, and lone surrogates by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def utf8(text: str) -> bytes:
    """Returns UTF-8, in which surrogates are replaced as by without_surrogates()."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text).encode()


def spelling(tokenizer) -> dict:
    """Returns what to_json() says about END_OF_TEXT in a text."""
    return {'spells_end_of_text': True} if tokenizer.spells_end_of_text else {}


def has_words(tokenizer) -> bool:
    """Returns whether half of a word is no token, or another one."""
    return isinstance(tokenizer, VocabularyTokenizer) and tokenizer.are_words
