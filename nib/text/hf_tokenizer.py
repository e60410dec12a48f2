"""A tokenizer.json of Hugging Face's tokenizers library, the format of most open models.

The library encodes, or for long texts nib/text/bpe.py, which asks it for each distinct word once.
Decoding is done here, token by token, as output while generating needs it: the bytes of a token do
not depend on its neighbors. nib/text/tokenizer.py describes the methods.
"""

import functools
import json
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from nib.errors import UserError, optional
from nib.text.bpe import GPT2_SPLITS, GPT4_SPLITS, WordTable
from nib.text.vocabulary import END_OF_TEXT, checked_ids, spelling, without_surrogates

_MOST = 1 << 24  # tokens; more is a damaged file
# Names of an end-of-text token, if no other file of the model names it.
_ENDS = (END_OF_TEXT, '<|end_of_text|>', '</s>', '<eos>')
# The patterns with which GPT-4, Llama 3, Qwen and train_bpe.py split a text. They differ in how
# they write contractions and in how many digits make up a word.
_GPT4_PATTERN = re.compile(
    r"\(\?i:[a-z'|()?:\[\]]+\)"
    + re.escape(r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}')
    + r'(\{1,3\}|\+)?'
    + re.escape(r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
)


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

    @functools.cached_property
    def first_ids(self) -> list[int]:
        """The tokens in front of every text: the beginning-of-text token if the model has one."""
        library, _ = self._loaded()
        text = library.encode('a', add_special_tokens=False).ids
        whole = library.encode('a').ids
        starts = range(len(whole) - len(text) + 1)
        return next((whole[:i] for i in starts if whole[i : i + len(text)] == text), [])

    @property
    def between(self) -> list[int]:
        """The tokens between two documents: end_of_text and first_ids, or one that is both."""
        if self.end_of_text is None or self.first_ids == [self.end_of_text]:
            return self.first_ids
        return [self.end_of_text, *self.first_ids]

    @property
    def adds_space(self) -> bool:
        """Whether encoding puts a space in front of a text, as SentencePiece does."""
        return self.decode_bytes(self.encode('a')).startswith(b' ')

    def encode(self, text: str) -> np.ndarray:
        """Returns token ids without first_ids."""
        return self._encode([text])[0]

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        """Returns token ids, uint16 or uint32.

        texts: pairs of a text and whether it ends a document. The first one begins a document, and
        what follows a text that does not end one continues it. end_of_text follows a document, then
        the first_ids of the next one.
        """
        words = _words(self.content, self.spells_end_of_text, tuple(self.between))
        if words is None:
            return self._by_library(list(texts))
        table, added, normalize = words
        parts, plain = [], []
        for given, ends in texts:
            text = without_surrogates(given)
            normal = normalize(text)
            if added.search(text) or normal is not text and added.search(normal):
                parts += [table.encode(plain), self._by_library([(text, ends)])]
                plain = []
            else:
                plain.append((normal.encode(), ends))
        return np.concatenate([*parts, table.encode(plain)])

    def _by_library(self, texts: list[tuple[str, bool]]) -> np.ndarray:
        between = np.array(self.between, np.uint32)
        begins = [True, *(ends for _, ends in texts[:-1])]
        beginnings = [text for (text, _), is_beginning in zip(texts, begins) if is_beginning]
        encoded = iter(self._encode(beginnings))
        parts = [np.empty(0, np.uint32)]
        for (text, ends), is_beginning in zip(texts, begins):
            parts.append(next(encoded) if is_beginning else self._encode_continuation(text))
            if ends:
                parts.append(between)
        return np.concatenate(parts)

    def _encode_continuation(self, text: str) -> np.ndarray:
        """Encodes the rest of a document, which gets no space as its beginning does."""
        for before in ('a', '.'):  # at least one of them shares no token with the text
            own, ids = self._encode([before, before + text])
            if np.array_equal(ids[: len(own)], own):
                return ids[len(own) :]
        return self.encode(text)

    def decode(self, ids) -> str:
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
        return described | spelling(self)

    def added_tokens(self) -> dict:
        """Returns id -> token, with content and special, of what is not in the model's vocabulary.

        They are recognized in a text before it is split into words.
        """
        return self._loaded()[0].get_added_tokens_decoder()

    def find(self, text: str, wanted: Container[int]) -> list[tuple[int, int]]:
        """Returns where a text contains tokens of these ids: (start, end) of each.

        Raises UserError for unknown characters.
        """
        library, _ = self._loaded()
        (encoded,) = _encodings(library.encode_batch, [text])
        return [span for number, span in zip(encoded.ids, encoded.offsets) if number in wanted]

    def encode_parts(self, parts: Sequence[str], unwanted: Container[int]) -> list[int]:
        """Returns the token ids of a text in parts; in every second one, no token is unwanted.

        It is encoded by characters, so that none are found there.
        """
        ids = self.encode(parts[0]).tolist()
        for spelled, part in zip(parts[1::2], parts[2::2], strict=True):
            for character in spelled:
                found = self._encode_continuation(character).tolist()
                ids += [number for number in found if number not in unwanted]
            ids += self._encode_continuation(part).tolist()
        return ids

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
        encoded = _encodings(library.encode_batch_fast, [*map(without_surrogates, texts)])
        return [np.array(encoding.ids, np.uint32) for encoding in encoded]


def _encodings(encode_batch: Callable, texts: list[str]) -> list:
    """Returns the library's encodings of texts. Raises UserError for unknown characters."""
    try:
        return encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the library has no class of its own for its errors
        raise UserError(f'the tokenizer cannot encode the text: {error}') from error


@functools.lru_cache(maxsize=4)
def _load(content: str, spells_end_of_text: bool) -> tuple:
    """Returns the library's tokenizer, and the bytes of every token by its id."""
    tokenizers = import_library()
    try:
        library = tokenizers.Tokenizer.from_str(content)
        decoder = json.loads(content).get('decoder')
    except Exception as error:  # the library has no class of its own for its errors
        raise UserError(f'not a valid tokenizer.json ({error})') from error
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = spells_end_of_text
    vocabulary = library.get_vocab(with_added_tokens=True)
    added = {number: token.content for number, token in library.get_added_tokens_decoder().items()}
    steps = _steps(decoder)
    largest = max(vocabulary.values(), default=-1)
    if largest >= _MOST:
        raise UserError(f'not a valid tokenizer.json (its largest id is {largest:,})')
    tokens = [b''] * (1 + largest)  # ids may have gaps
    for token, number in vocabulary.items():
        tokens[number] = _bytes(token, steps, number in added)
    return library, tokens


@functools.lru_cache(maxsize=1)
def _words(content: str, spells_end_of_text: bool, between: tuple[int, ...]) -> tuple | None:
    """Returns a word table, a pattern of the added tokens, and a function that normalizes text.

    The table does not know the added tokens. Returns None if it cannot be used for this tokenizer.
    """
    library, tokens = _load(content, spells_end_of_text)
    described = json.loads(library.to_str())
    splits = _known_splits(described)
    if splits is None:
        return None
    alone = described | {'added_tokens': [], 'normalizer': None, 'post_processor': None}
    model = import_library().Tokenizer.from_str(json.dumps(alone))
    dtype = np.uint16 if len(tokens) <= 1 << 16 else np.uint32

    def encode_words(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = model.encode_batch_fast(words, add_special_tokens=False)
        ids = [encoding.ids for encoding in encoded]
        return np.fromiter(chain.from_iterable(ids), dtype), np.array([*map(len, ids)], np.int64)

    def normalize(text: str) -> str:
        # No Unicode normalization changes ASCII.
        is_normal = library.normalizer is None or text.isascii()
        return text if is_normal else library.normalizer.normalize_str(text)

    names = {
        token.content
        for token in library.get_added_tokens_decoder().values()
        if not (token.special and spells_end_of_text)
    }
    names |= set(map(normalize, names))
    added = re.compile('|'.join(map(re.escape, sorted(names))) or '(?!)')
    return WordTable(encode_words, splits, between, dtype), added, normalize


def _known_splits(described: dict) -> bytes | None:
    """Returns where a tokenizer splits, for a word table; None if that is not known."""
    model, normalizer = described['model'], described['normalizer']
    if model['type'] != 'BPE' or model['dropout']:
        return None
    if normalizer and normalizer['type'] not in ('NFC', 'NFD', 'NFKC', 'NFKD'):
        return None
    first = described['pre_tokenizer'] or {}
    match first.get('pretokenizers', [first]):
        case [*digits, {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}]:
            if all(step['type'] == 'Digits' for step in digits):
                return GPT2_SPLITS
    return GPT4_SPLITS if _GPT4_PATTERN.fullmatch(split_pattern(first)) else None


def split_pattern(pre_tokenizer: dict) -> str:
    """Returns the pattern by which a byte-level tokenizer splits; '' if it splits differently."""
    match pre_tokenizer.get('pretokenizers'):
        case [
            {
                'type': 'Split',
                'pattern': {'Regex': pattern},
                'behavior': 'Isolated',
                'invert': False,
            },
            {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False},
        ]:
            return pattern
    return ''


def import_library():
    """Returns the tokenizers library. Raises UserError if it is not installed."""
    with optional('tokenizers', 'this tokenizer'):
        import tokenizers
    return tokenizers


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
        f'the tokenizer has the decoder {kind!r}: only byte-level and SentencePiece-like '
        f'tokenizers are supported'
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
