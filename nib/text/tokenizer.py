"""Text to token ids and back; every tokenizer is saved as JSON and travels with the checkpoint.

All have vocab_size, end_of_text (the id that follows each of several documents, or None), encode, encode_texts (of several
texts, one after the other), decode, decode_bytes (for text that is shown token by token, as a character's bytes may be shared
out over tokens) and to_json.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nib.errors import UserError
from nib.text.download import download

END_OF_TEXT = '<|endoftext|>'  # how the end-of-text token is shown, and typed in a prompt
# What tiktoken reads GPT-2's vocabulary from: name -> SHA-256.
GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
GPT2_FILES = {
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}


@dataclass(frozen=True)
class CharTokenizer:
    """One token for each character of the text that it was made from, numbered in the order of their code points.

    has_end_of_text: one more token, numbered last.
    """

    characters: str
    has_end_of_text: bool = False

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
        """Token ids (len(text),), uint32. UserError names the characters that the vocabulary lacks."""
        known, wanted = _code_points(self.characters), _code_points(text)
        ids = np.searchsorted(known, wanted).astype(np.uint32)
        missing = ids >= len(known)
        missing[~missing] = known[ids[~missing]] != wanted[~missing]
        if missing.any():
            first = int(missing.argmax())
            distinct = ', '.join(repr(chr(point)) for point in np.unique(wanted[missing])[:5])
            raise UserError(
                f'the text holds characters that are not among the {len(self.characters)} of the vocabulary: '
                f'{distinct} (the first at offset {first}); leave them out, or train on a text that has them'
            )
        return ids

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        """Token ids, uint32. With each text comes whether the end-of-text token follows it."""
        return _one_by_one(self, texts)

    def decode(self, ids) -> str:
        """The text of token ids. UserError for an id that is not in the vocabulary."""
        ids = _checked(ids, self.vocab_size)
        characters = _code_points(self.characters)
        return END_OF_TEXT.join(
            characters[part].tobytes().decode('utf-32-le', 'surrogatepass')
            for part in _texts(ids, len(characters))
        )

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode('utf-8', 'surrogatepass')

    def to_json(self) -> dict:
        # Low surrogates first: right after a high one, JSON's reader would take the two for one character.
        ordered = sorted(
            self.characters,
            key=lambda character: (not '\udc00' <= character <= '\udfff', character),
        )
        return {'kind': 'char', 'characters': ''.join(ordered)} | (
            {'has_end_of_text': True} if self.has_end_of_text else {}
        )


@dataclass(frozen=True)
class ByteTokenizer:
    """One token for each byte of the text's UTF-8, numbered by its value, and 256 for the end of a text."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32, as many as the text has bytes."""
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint32)

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        """Token ids, uint32. With each text comes whether the end-of-text token follows it."""
        return _one_by_one(self, texts)

    def decode(self, ids) -> str:
        """The text of token ids; bytes that are no UTF-8 as U+FFFD. UserError for an id that is not in the vocabulary."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_bytes(self, ids) -> bytes:
        ids = _checked(ids, self.vocab_size)
        return END_OF_TEXT.encode().join(
            part.astype(np.uint8).tobytes() for part in _texts(ids, self.end_of_text)
        )

    def to_json(self) -> dict:
        return {'kind': 'byte'}


@dataclass(frozen=True)
class Gpt2Tokenizer:
    """GPT-2's byte pair encoding (Radford et al. 2019), as tiktoken computes it; nib/text/bpe.py makes it fast.

    Its vocabulary is two files that are fetched when it first encodes or decodes; UserError then where they cannot be.
    """

    vocab_size = 50257
    end_of_text = 50256

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32. END_OF_TEXT in the text is read as the characters that it is."""
        return self.encode_texts([(text, False)]).astype(np.uint32)

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        """Token ids, uint16. With each text comes whether the end-of-text token follows it."""
        return _word_table(load_gpt2(), self.end_of_text).encode(
            (_utf8(text), ends) for text, ends in texts
        )

    def decode(self, ids) -> str:
        """The text of token ids; bytes that are no UTF-8 as U+FFFD. UserError for an id that is not in the vocabulary."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_bytes(self, ids) -> bytes:
        return load_gpt2().decode_bytes(_checked(ids, self.vocab_size).tolist())

    def to_json(self) -> dict:
        return {'kind': 'gpt2'}


Tokenizer = CharTokenizer | ByteTokenizer | Gpt2Tokenizer


def tokenizer_from_json(data: dict) -> Tokenizer:
    """The tokenizer that to_json() described. UserError where that is no tokenizer."""
    match data:
        case {'kind': 'char', 'characters': str(characters)}:
            tokenizer = CharTokenizer.train(characters, data.get('has_end_of_text') is True)
            if tokenizer.to_json() == data:
                return tokenizer
        case {'kind': 'byte'}:
            return ByteTokenizer()
        case {'kind': 'gpt2'}:
            return Gpt2Tokenizer()
        case {'kind': kind} if kind != 'char':
            raise UserError(
                f"tokenizer of kind {kind!r}: this version knows 'char', 'byte' and 'gpt2'"
            )
    raise UserError(
        'the tokenizer is broken: a char tokenizer has its distinct characters in order'
    )


def encode_prompt(tokenizer: Tokenizer, text: str, flag: str) -> list[int]:
    """Token ids of a text that a person typed: END_OF_TEXT stands for that token where the tokenizer has one. UserError,
    which begins with the flag, where the tokenizer cannot write the text."""
    first, *others = [text] if tokenizer.end_of_text is None else text.split(END_OF_TEXT)
    try:
        ids = tokenizer.encode(first).tolist()
        for part in others:
            ids += [tokenizer.end_of_text, *tokenizer.encode(part).tolist()]
    except UserError as error:
        raise UserError(f'{flag}: {error}') from error
    return ids


def without_surrogates(text: str) -> str:
    """Pairs of surrogates as the character that they stand for, lone ones, which UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text).encode()


def _one_by_one(tokenizer: Tokenizer, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
    parts = [np.empty(0, np.uint32)]
    for text, ends in texts:
        parts += [tokenizer.encode(text), np.array([tokenizer.end_of_text] * ends, np.uint32)]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=1)
def _word_table(encoding, end_of_text: int):
    from nib.text.bpe import WordTable  # here: it needs tiktoken

    return WordTable(encoding, end_of_text)


@functools.cache
def load_gpt2():
    """tiktoken's GPT-2 encoding. UserError where its two files are not at hand and cannot be fetched.

    They are fetched here: tiktoken's own download has no timeout and would hang where a network swallows packets.
    """
    import tiktoken  # here: most runs never encode with it

    folder = Path(
        os.environ.get('TIKTOKEN_CACHE_DIR')
        or os.environ.get('DATA_GYM_CACHE_DIR')
        or Path(tempfile.gettempdir(), 'data-gym-cache')
    )  # where tiktoken looks, in its order
    names = {file: hashlib.sha1((GPT2_URL + file).encode()).hexdigest() for file in GPT2_FILES}
    try:
        for file, digest in GPT2_FILES.items():
            path = folder / names[file]
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                folder.mkdir(parents=True, exist_ok=True)
                download([GPT2_URL + file], path, digest, max_bytes=2_000_000)
    except (UserError, OSError) as error:
        wanted = ' and '.join(f'{GPT2_URL}{file} as {name}' for file, name in names.items())
        raise UserError(
            f"GPT-2's vocabulary is missing ({error}); fetch it elsewhere into a folder, {wanted}, and set "
            f'the environment variable TIKTOKEN_CACHE_DIR to that folder'
        ) from error
    os.environ['TIKTOKEN_CACHE_DIR'] = str(
        folder
    )  # set to '', it would make tiktoken download again
    return tiktoken.get_encoding('gpt2')


def _checked(ids, vocab_size: int) -> np.ndarray:
    """ids as int64. UserError where one is not in the vocabulary."""
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(
            f'token ids from {ids.min()} to {ids.max()}: the vocabulary has 0 to {vocab_size - 1}'
        )
    return ids


def _texts(ids: np.ndarray, end_of_text: int) -> list[np.ndarray]:
    """The runs of ids before, between and after those that end a text."""
    ends = np.flatnonzero(ids == end_of_text)
    return [ids[start:end] for start, end in zip([0, *(ends + 1)], [*ends, len(ids)])]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
