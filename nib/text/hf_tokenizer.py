"""A tokenizer.json of Hugging Face's tokenizers library, the format of most open models.

The library encodes. Decoding is done here, token by token, as output while generating needs it: the
bytes of a token do not depend on its neighbors. nib/text/tokenizer.py describes the methods.
"""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nib.errors import UserError
from nib.text.vocabulary import END_OF_TEXT, checked_ids, without_surrogates

# Names of an end-of-text token, if no other file of the model names it.
_ENDS = (END_OF_TEXT, '<|end_of_text|>', '</s>', '<eos>')


@dataclass(frozen=True)
class HfTokenizer:
    """A tokenizer.json. Special and added tokens in a text are tokens, as in transformers.

    content: the file. spells_end_of_text: special tokens in a text are ordinary characters instead.
    The tokenizers library is only needed to encode and decode; methods raise UserError without it.
    """

    content: str
    vocab_size: int
    end_of_text: int | None
    spells_end_of_text: bool = False

    @classmethod
    def read(cls, content: str, end_of_text: str | int | None = None) -> 'HfTokenizer':
        """Returns the tokenizer of a file's content.

        end_of_text: that token or its id; None: the special token with a usual name.
        Raises UserError if the content is not valid or cannot be decoded token by token.
        """
        library, tokens = _load(content, False)
        if isinstance(end_of_text, int):
            ids = [end_of_text]
        else:
            names = _ENDS if end_of_text is None else (end_of_text,)
            ids = [library.token_to_id(name) for name in names]
        known = [number for number in ids if number is not None and 0 <= number < len(tokens)]
        return cls(content, len(tokens), known[0] if known else None)

    @property
    def first_ids(self) -> list[int]:
        """The tokens in front of every text: the beginning-of-text token if the model has one."""
        library, _ = self._loaded()
        return [number for number in library.encode('').ids if number != self.end_of_text]

    @property
    def adds_space(self) -> bool:
        """Whether encoding puts a space in front of a text, as SentencePiece does."""
        return self.decode_bytes(self.encode('a')).startswith(b' ')

    def encode(self, text: str) -> np.ndarray:
        """Returns token ids, uint32, without first_ids. Raises UserError for unknown characters."""
        return self._encode([text])[0]

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        """Returns token ids, uint32.

        texts: pairs of a text and whether it ends a document. end_of_text follows a document, then
        the first_ids of the next one.
        """
        texts = list(texts)
        between = [] if self.end_of_text is None else [self.end_of_text]
        between += self.first_ids
        # A document is cut before white space. What continues it gets no further space.
        adds_space = self.adds_space
        continues = [
            adds_space and text[:1].isspace() and not (number and texts[number - 1][1])
            for number, (text, _) in enumerate(texts)
        ]
        encoded = self._encode(
            [
                text.removeprefix(' ') if continuing else text
                for (text, _), continuing in zip(texts, continues)
            ]
        )
        parts = [np.empty(0, np.uint32)]
        for (text, ends), continuing, ids in zip(texts, continues, encoded):
            is_extra = continuing and text[0] != ' ' and self.decode_bytes(ids[:1]) == b' '
            parts.append(ids[1:] if is_extra else ids)
            if ends:
                parts.append(np.array(between, np.uint32))
        return np.concatenate(parts)

    def decode(self, ids) -> str:
        """Returns the text of token ids, with U+FFFD for bytes that are not valid UTF-8.

        Raises UserError if an id is not in the vocabulary.
        """
        text = self.decode_bytes(ids).decode('utf-8', 'replace')
        return text.removeprefix(' ') if self.adds_space else text

    def decode_bytes(self, ids) -> bytes:
        """Returns the bytes of token ids. They begin with the space that encoding has added."""
        ids = checked_ids(ids, self.vocab_size).tolist()
        _, tokens = self._loaded()
        end = END_OF_TEXT.encode()
        return b''.join(end if number == self.end_of_text else tokens[number] for number in ids)

    def to_json(self) -> dict:
        described = {
            'kind': 'hf',
            'vocab_size': self.vocab_size,
            'end_of_text': self.end_of_text,
            'content': self.content,
        }
        return described | ({'spells_end_of_text': True} if self.spells_end_of_text else {})

    def token(self, number: int) -> str:
        """Returns the name of a token in the file."""
        return self._loaded()[0].id_to_token(number)

    def _loaded(self):
        library, tokens = _load(self.content, self.spells_end_of_text)
        if len(tokens) != self.vocab_size:
            raise UserError(
                f'invalid tokenizer: its file has {len(tokens):,} tokens, but vocab_size is '
                f'{self.vocab_size:,}'
            )
        return library, tokens

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        library, _ = self._loaded()
        texts = [without_surrogates(text) for text in texts]
        try:
            encoded = library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library has no class of its own for its errors
            raise UserError(f'the tokenizer cannot encode the text: {error}') from error
        return [np.array(encoding.ids, np.uint32) for encoding in encoded]


@functools.lru_cache(maxsize=4)
def _load(content: str, spells_end_of_text: bool) -> tuple:
    """Returns the library's tokenizer, and the bytes of every token by its id."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(
            'this tokenizer needs a package that is not installed: pip install tokenizers'
        ) from error
    try:
        library = Tokenizer.from_str(content)
        decoder = json.loads(content).get('decoder')
    except Exception as error:  # the library has no class of its own for its errors
        raise UserError(f'not a valid tokenizer.json ({error})') from error
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = spells_end_of_text
    vocabulary = library.get_vocab(with_added_tokens=True)
    added = {number: token.content for number, token in library.get_added_tokens_decoder().items()}
    steps = _steps(decoder)
    tokens = [b''] * (1 + max(vocabulary.values(), default=-1))  # ids may have gaps
    for token, number in vocabulary.items():
        tokens[number] = _bytes(token, steps, number in added)
    return library, tokens


def _steps(decoder: dict | None) -> list[dict]:
    """Returns the steps of a decoder. Raises UserError for one that looks at several tokens."""
    match decoder:
        case {'type': 'Sequence', 'decoders': list(decoders)}:
            return [step for part in decoders for step in _steps(part)]
        case {'type': 'Strip', 'content': ' ', 'start': 0 | 1, 'stop': 0} | {'type': 'Fuse'}:
            return []  # adds_space does the former
        case {'type': 'ByteLevel' | 'ByteFallback' | 'Metaspace'} | {
            'type': 'Replace',
            'pattern': {'String': str()},
            'content': str(),
        }:
            return [decoder]
    kind = decoder.get('type') if isinstance(decoder, dict) else decoder
    raise UserError(
        f'the tokenizer has the decoder {kind!r}: only byte-level tokenizers and those like '
        f'SentencePiece can be used'
    )


def _bytes(token: str, steps: list[dict], is_added: bool) -> bytes:
    """Returns what a token stands for."""
    for step in steps:
        if step['type'] == 'Replace':
            token = token.replace(step['pattern']['String'], step['content'])
        elif step['type'] == 'Metaspace':
            token = token.replace(step['replacement'], ' ')
        elif step['type'] == 'ByteFallback' and re.fullmatch('<0x[0-9A-Fa-f]{2}>', token):
            return bytes([int(token[3:5], 16)])
        elif step['type'] == 'ByteLevel' and not is_added:
            names = byte_names()
            if all(character in names for character in token):
                return bytes(names[character] for character in token)
    return token.encode()


@functools.cache
def byte_names() -> dict[str, int]:
    """Returns the printable character that stands for each byte in GPT-2's vocabulary -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    names = {byte: byte for byte in printable} | {b: 256 + n for n, b in enumerate(others)}
    return {chr(names[byte]): byte for byte in range(256)}
