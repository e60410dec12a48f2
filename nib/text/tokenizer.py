"""Tokenizers: text to token ids and back. Every checkpoint contains its tokenizer as JSON.

nib/text/gpt2.py, nib/text/hf_tokenizer.py and nib/text/vocabulary.py hold those of GPT-2, of open
models and of other programs. All tokenizers have:

    vocab_size
    end_of_text         the id that follows each document, or None
    spells_end_of_text  whether END_OF_TEXT in a prompt means its characters, as it did in training
    encode(text)        token ids (n,), uint32
    encode_texts(texts) token ids of several texts, one after the other. texts: pairs of a text and
                        whether it ends a document, so that end_of_text follows
    decode(ids)         text, with U+FFFD for bytes that are not UTF-8
    decode_bytes(ids)   for output token by token: tokens may share the bytes of a character
    to_json()           what tokenizer_from_json reads

Methods raise UserError for a text that has no tokens, and for ids that are not in the vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nib.errors import UserError
from nib.text.gpt2 import Gpt2Tokenizer, is_gpt2_stored
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.vocabulary import (
    END_OF_TEXT,
    IdTokenizer,
    VocabularyTokenizer,
    checked_ids,
    spelling,
    utf8,
)


@dataclass(frozen=True)
class CharTokenizer:
    """One token for each distinct character of a text, numbered by code point.

    has_end_of_text: adds an end-of-text token with the last id.
    """

    characters: str
    has_end_of_text: bool = False
    spells_end_of_text: bool = False

    @classmethod
    def train(cls, text: str, has_end_of_text: bool = False) -> 'CharTokenizer':
        return cls(''.join(sorted(set(text))), has_end_of_text)

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + self.has_end_of_text

    @property
    def end_of_text(self) -> int | None:
        return len(self.characters) if self.has_end_of_text else None

    def encode(self, text: str) -> np.ndarray:
        known, wanted = _code_points(self.characters), _code_points(text)
        ids = np.searchsorted(known, wanted).astype(np.uint32)
        missing = ids >= len(known)
        missing[~missing] = known[ids[~missing]] != wanted[~missing]
        if missing.any():
            first = int(missing.argmax())
            distinct = ', '.join(repr(chr(point)) for point in np.unique(wanted[missing])[:5])
            raise UserError(
                f'the text contains characters that are not in the vocabulary of '
                f'{len(self.characters)} characters: {distinct} (the first at offset {first}); '
                f'remove them, or train on a text that contains them'
            )
        return ids

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        return _one_by_one(self, texts)

    def decode(self, ids) -> str:
        ids = checked_ids(ids, self.vocab_size)
        characters = _code_points(self.characters)
        return END_OF_TEXT.join(
            characters[part].tobytes().decode('utf-32-le', 'surrogatepass')
            for part in _texts(ids, len(characters))
        )

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode('utf-8', 'surrogatepass')

    def to_json(self) -> dict:
        # Low surrogates first: after a high one, a JSON parser would join the two into a character.
        ordered = sorted(
            self.characters,
            key=lambda character: (not '\udc00' <= character <= '\udfff', character),
        )
        described: dict = {'kind': 'char', 'characters': ''.join(ordered)}
        if self.has_end_of_text:
            described['has_end_of_text'] = True
        return described | spelling(self)


@dataclass(frozen=True)
class ByteTokenizer:
    """One token for each byte of UTF-8, numbered by its value; 256 is the end-of-text token."""

    spells_end_of_text: bool = False
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint32)

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        return _one_by_one(self, texts)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_bytes(self, ids) -> bytes:
        ids = checked_ids(ids, self.vocab_size)
        return END_OF_TEXT.encode().join(
            part.astype(np.uint8).tobytes() for part in _texts(ids, self.end_of_text)
        )

    def to_json(self) -> dict:
        return {'kind': 'byte'} | spelling(self)


Tokenizer = (
    CharTokenizer | ByteTokenizer | Gpt2Tokenizer | HfTokenizer | VocabularyTokenizer | IdTokenizer
)


def tokenizer_from_json(data: dict) -> Tokenizer:
    """Creates the tokenizer that to_json() described. Raises UserError if data is not valid."""
    spells = isinstance(data, dict) and data.get('spells_end_of_text') is True
    match data:
        case {'kind': 'char', 'characters': str(characters)}:
            has_end_of_text = data.get('has_end_of_text') is True
            tokenizer = CharTokenizer(''.join(sorted(set(characters))), has_end_of_text, spells)
            if tokenizer.to_json() == data:
                return tokenizer
        case {'kind': 'byte'}:
            return ByteTokenizer(spells)
        case {'kind': 'gpt2'}:
            return Gpt2Tokenizer(spells)
        case {'kind': 'hf', 'content': str(content), 'vocab_size': int(size)} if size > 0:
            end = data.get('end_of_text')
            if end is None or isinstance(end, int) and 0 <= end < size:
                return HfTokenizer(content, size, end, spells)
            raise UserError(f'invalid tokenizer: its end_of_text is {end!r}')
        case {'kind': 'vocabulary', 'tokens': list(tokens)}:
            if all(isinstance(token, str) for token in tokens) and len(set(tokens)) == len(tokens):
                return VocabularyTokenizer(tuple(tokens))
            raise UserError('invalid tokenizer: its tokens are not distinct texts')
        case {'kind': 'ids', 'vocab_size': int(size)} if size > 0:
            return IdTokenizer(size)
        case {'kind': kind} if kind != 'char':
            raise UserError(
                f"unknown tokenizer kind {kind!r}: this version knows 'char', 'byte', 'gpt2', "
                f"'hf', 'vocabulary' and 'ids'"
            )
    raise UserError('invalid tokenizer: its characters are not distinct and in order')


def encode_prompt(tokenizer: Tokenizer, text: str, flag: str) -> list[int]:
    """Encodes a text that a person typed.

    END_OF_TEXT in it stands for the end-of-text token, unless the tokenizer lacks or spells it. A
    beginning-of-text token comes first if the tokenizer has one.
    Raises UserError, which begins with `flag`, if the tokenizer cannot encode the text.
    """
    is_plain = tokenizer.end_of_text is None or tokenizer.spells_end_of_text
    first, *others = [text] if is_plain else text.split(END_OF_TEXT)
    try:
        begin, between = [], [tokenizer.end_of_text]
        if isinstance(tokenizer, HfTokenizer):
            begin, between = tokenizer.first_ids, tokenizer.between
        ids = [*begin, *tokenizer.encode(first).tolist()]
        for part in others:
            ids += [*between, *tokenizer.encode(part).tolist()]
    except UserError as error:
        if is_plain and END_OF_TEXT in text:
            raise UserError(
                f'{flag}: the vocabulary of this model has no {END_OF_TEXT} token, because it was '
                f'trained on a single text in which no document ends; leave {END_OF_TEXT} out'
            ) from None  # in a notebook, the first error would hide this one
        raise UserError(f'{flag}: {error}') from None
    return ids


def count_bytes(tokenizer: Tokenizer, ids: np.ndarray, begins: bool) -> int:
    """Returns how many bytes of text token ids stand for.

    The tokens between documents have none, and neither has a space that encoding has added.
    begins: whether the first of the ids begins a text.
    Raises UserError if the tokenizer's library or files are missing.
    """
    if isinstance(tokenizer, Gpt2Tokenizer) and not is_gpt2_stored():
        raise UserError("GPT-2's vocabulary is missing")  # not worth a download
    between, adds_space = [tokenizer.end_of_text], False
    if isinstance(tokenizer, HfTokenizer):
        between, adds_space = [*between, *tokenizer.between], tokenizer.adds_space
    ends = np.flatnonzero(np.isin(ids, [number for number in between if number is not None]))
    n_bytes = 0
    for start, end in zip([0, *(ends + 1)], [*ends, len(ids)]):
        text = tokenizer.decode_bytes(ids[start:end])
        n_bytes += len(text)
        n_bytes -= adds_space and (start > 0 or begins) and text.startswith(b' ')
    return n_bytes


def _one_by_one(tokenizer: Tokenizer, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
    parts = [np.empty(0, np.uint32)]
    for text, ends in texts:
        parts.append(tokenizer.encode(text))
        if ends and tokenizer.end_of_text is not None:
            parts.append(np.array([tokenizer.end_of_text], np.uint32))
    return np.concatenate(parts)


def _texts(ids: np.ndarray, end_of_text: int) -> list[np.ndarray]:
    """Splits ids at the end-of-text tokens."""
    ends = np.flatnonzero(ids == end_of_text)
    return [ids[start:end] for start, end in zip([0, *(ends + 1)], [*ends, len(ids)])]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
