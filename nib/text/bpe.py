"""Fast byte pair encoding: each distinct word is encoded once and then looked up in a table.

A byte pair tokenizer splits a text into words and encodes each of them independently (Radford et
al. 2019, section 2.2), so a word always has the same tokens. A few words make up most of any text.
What remains is to split and to look up, and numpy does both for thousands of words at a time. The
result is always identical to the tokenizer's encoding of the whole text.

A word here may be several words of the tokenizer: it splits where a table of neighboring bytes says
that the tokenizer does so too, whatever comes before and after them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

# Bytes that never occur in UTF-8 separate the texts. Each is a word of its own: _CUT has no tokens,
# _END has the tokens between two documents.
_CUT, _END = b'\xfe', b'\xff'

_TOGETHER = 1 << 18  # bytes of text split at once: small enough for the processor's cache
_WORDS = 1 << 15  # words looked up at once
_PADDING = 16  # bytes after the last word, because words are read 16 bytes at a time

# A table entry: the word's key, and where its tokens are: pool[first : first + count]. The key
# holds the word's bytes and its length, so different words never share a key.
_ENTRY = np.dtype([('low', '<u8'), ('high', '<u8'), ('first', '<i8'), ('count', '<i8')])
_LONGEST = 15  # bytes of the longest word that fits into a key
# Indexed by word length: masks for the first eight bytes and the other seven, and the length itself
# in the last byte.
_LOW = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(_LONGEST + 2)], '<u8')
_HIGH = np.array([(1 << 8 * min(max(size - 8, 0), 7)) - 1 for size in range(_LONGEST + 2)], '<u8')
_LENGTH = np.array([size << 56 for size in range(_LONGEST + 2)], '<u8')
_BITS = 20  # the table has 2 ** _BITS slots and is cleared when half of them are in use
_BYTES = 1 << 23  # it is also cleared when its words add up to this many bytes


class WordTable:
    """Encodes texts and remembers the tokens of their words.

    encode_words: returns the token ids of several words one after the other, and their number for
    each word. splits: GPT2_SPLITS or GPT4_SPLITS. between: the ids between two documents.
    Memory is bounded: a full table is cleared.
    """

    def __init__(
        self,
        encode_words: Callable[[list[str]], tuple[np.ndarray, np.ndarray]],
        splits: bytes,
        between: Sequence[int],
        dtype: type[np.unsignedinteger],
    ):
        self.encode_words, self.splits = encode_words, splits
        self.between, self.dtype = between, dtype
        self._clear()

    def _clear(self):
        # Words too long for a key have their entries after the hash table's slots; long_words maps
        # each of them to its entry.
        self.places = 1 << _BITS
        self.entries = np.zeros(self.places * 3 // 2 + _WORDS, _ENTRY)
        self.long_words = {}
        self.pool, self.n_ids = np.empty(_BYTES, self.dtype), 0
        self.n_words = self.n_bytes = 0
        self._store(self.between)

    def encode(self, texts: Iterable[tuple[bytes, bool]]) -> np.ndarray:
        """Encodes texts, one after the other.

        texts: pairs of UTF-8 bytes and whether a document ends with them.
        Returns token ids, in self.dtype.
        """
        parts = [ids for data in _join(texts) for ids in self._encode(data)]
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def _encode(self, data: bytes) -> Iterator[np.ndarray]:
        starts = np.flatnonzero(word_starts(data, self.splits))
        for first in range(0, len(starts) - _PADDING, _WORDS):
            last = min(first + _WORDS, len(starts) - _PADDING)
            yield self._look_up(data, starts[first:last], starts[first + 1 : last + 1])

    def _look_up(self, data: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the token ids of the words data[start:end], one word for each start and end."""
        if self.n_words >= self.places // 2 or self.n_bytes >= _BYTES:
            self._clear()
        # Overlapping: element i holds the eight bytes from byte i on.
        eight = np.ndarray(len(data) - 7, '<u8', data, strides=(1,))
        size = np.minimum(ends - starts, _LONGEST + 1)
        low = eight[starts] & _LOW.take(size)
        high = eight[starts + 8] & _HIGH.take(size) | _LENGTH.take(size)
        # Multiplicative hashing: the upper bits of the products depend on every bit of the key.
        mixed = low * np.uint64(0x9E3779B97F4A7C15) + high * np.uint64(0xC2B2AE3D27D4EB4F)
        places = (mixed >> np.uint64(64 - _BITS)).astype(np.int64)
        entries = self.entries.take(places)
        rest = np.flatnonzero((entries['low'] != low) | (entries['high'] != high))
        if len(rest):
            places = places[rest]
            self._find(data, starts[rest], ends[rest], low[rest], high[rest], places)
            entries[rest] = self.entries.take(places)
        count = entries['count']
        index = np.repeat(entries['first'] - np.cumsum(count) + count, count)
        index += np.arange(len(index))
        return self.pool.take(index)

    def _find(self, data, starts, ends, low, high, places):
        """Moves places, in place, from the words' first slots to their entries; adds new words."""
        known = self.entries
        added = [np.empty(0, np.int64)]
        left = np.flatnonzero(ends - starts <= _LONGEST)
        while len(left):  # linear probing: every word that is left moves on by one slot
            here = places[left]
            free = left[known['high'][here] == 0]
            # If several words want the same free slot, the one written last gets it.
            known['first'][places[free]] = free
            takers = free[known['first'][places[free]] == free]
            known['low'][places[takers]], known['high'][places[takers]] = low[takers], high[takers]
            added.append(takers)
            left = left[(known['low'][here] != low[left]) | (known['high'][here] != high[left])]
            places[left] = (places[left] + 1) % self.places
        long = np.flatnonzero(ends - starts > _LONGEST)
        words = [data[start:end] for start, end in zip(starts[long].tolist(), ends[long].tolist())]
        for number, word in zip(long.tolist(), words):
            if word not in self.long_words:
                self.long_words[word] = self.places + len(self.long_words)
                added.append(np.array([number]))
        places[long] = [self.long_words[word] for word in words]
        new = np.concatenate(added)
        if len(new):
            self._add(data, starts[new], ends[new], places[new])

    def _add(self, data, starts, ends, places):
        """Encodes new words and fills in their entries."""
        self.n_words += len(places)
        self.n_bytes += int((ends - starts).sum())
        words = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist())]
        ids, count = self.encode_words(
            ['' if word in (_CUT, _END) else word.decode() for word in words]
        )
        self.entries['first'][places] = self._store(ids) + np.cumsum(count) - count
        self.entries['count'][places] = count
        end = places[[word == _END for word in words]]
        self.entries['first'][end], self.entries['count'][end] = 0, len(self.between)

    def _store(self, ids) -> int:
        """Appends ids to the pool; returns the index of the first one."""
        first, self.n_ids = self.n_ids, self.n_ids + len(ids)
        if self.n_ids > len(self.pool):
            self.pool = np.concatenate([self.pool, np.empty(self.n_ids, self.dtype)])
        self.pool[first : self.n_ids] = ids
        return first


def _join(texts: Iterable[tuple[bytes, bool]]) -> Iterator[bytes]:
    """Joins the texts with separators between them; yields at least _TOGETHER bytes at a time."""
    parts, size = [_CUT], 0
    for text, ends in texts:
        parts += [text, _END if ends else _CUT]
        size += len(text) + 1
        if size >= _TOGETHER:
            yield b''.join([*parts, _CUT * _PADDING])
            parts, size = [_CUT], 0
    if size:
        yield b''.join([*parts, _CUT * _PADDING])


# Kinds of bytes.
_SPACE, _TAB, _LINE, _WHITE, _LETTER, _DIGIT, _SIGN, _QUOTE, _OTHER, _SEPARATOR, _WIDE = range(11)
# White space beyond ASCII, and characters that were white space in older versions of Unicode.
_WIDE_WHITE = [
    chr(point).encode().ljust(3, b'\0')
    for point in (0x85, 0xA0, 0x1680, 0x180E, *range(0x2000, 0x200C), 0x2028, 0x2029, 0x202F)
    + (0x205F, 0x3000, 0xFEFF)
]
_WIDE_FIRST = {character[0] for character in _WIDE_WHITE}
_WIDE_CODES = [int.from_bytes(character, 'big') for character in _WIDE_WHITE]


def _kind(byte: int) -> int:
    character = chr(byte)
    if byte >= 0xFE:
        return _SEPARATOR
    if byte >= 0x80:
        return _WIDE if byte in _WIDE_FIRST else _OTHER
    if character in " \t\n'":
        return {' ': _SPACE, '\t': _TAB, '\n': _LINE, "'": _QUOTE}[character]
    if character.isspace():
        return _WHITE
    if character.isalpha():
        return _LETTER
    if character.isdigit():
        return _DIGIT
    return _SIGN if character.isprintable() else _OTHER


_KINDS = bytes(map(_kind, range(256)))

# What is known about two neighboring bytes: a word always begins at the first, or at the second.
_FIRST, _SECOND = 1, 2


def _splits(*known: tuple[Sequence[int], Sequence[int], int]) -> bytes:
    """Returns what is known about each pair of kinds: entry 16 * first + second."""
    table = bytearray(256)
    for first in range(_SEPARATOR + 1):
        table[16 * first + _SEPARATOR] = table[16 * _SEPARATOR + first] = _SECOND
    for firsts, seconds, what in known:
        for first in firsts:
            for second in seconds:
                table[16 * first + second] |= what
    return bytes(table)


_VISIBLE = (_LETTER, _DIGIT, _SIGN, _QUOTE, _OTHER)
_ALIKE = (
    (_VISIBLE, (_SPACE, _TAB), _SECOND),
    ((_LETTER,), (_DIGIT, _SIGN, _QUOTE), _SECOND),
    ((_DIGIT,), (_LETTER, _SIGN, _QUOTE), _SECOND),
    ((_SIGN, _QUOTE), (_DIGIT,), _SECOND),
    # The last of several white-space characters: ` ?` of the next word, or `\s+(?!\S)`.
    ((_SPACE, _TAB), (_LETTER, _SIGN, _QUOTE), _FIRST),
    ((_TAB,), (_SIGN, _QUOTE), _SECOND),
)
# '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, also after digits have
# been split off.
GPT2_SPLITS = _splits(
    *_ALIKE,
    (_VISIBLE, (_LINE,), _SECOND),
    ((_LINE,), (_LETTER, _SIGN, _QUOTE), _FIRST | _SECOND),
    ((_TAB,), (_LETTER,), _SECOND),
    ((_SIGN,), (_LETTER,), _SECOND),
)
# (?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*
# |\s*[\r\n]+|\s+(?!\S)|\s+, also with \p{N} or \p{N}+ instead of \p{N}{1,3}.
GPT4_SPLITS = _splits(
    *_ALIKE,
    ((_LETTER, _DIGIT), (_LINE,), _SECOND),
    ((_LINE,), _VISIBLE, _SECOND),
    ((_SPACE, _TAB), (_DIGIT,), _FIRST | _SECOND),
    ((_SPACE,), (_OTHER,), _FIRST),
)


def word_starts(data: bytes, splits: bytes) -> np.ndarray:
    """Finds bytes that begin a word of the tokenizer: not all of them, but no others.

    data: UTF-8 with a separator before it and _PADDING separators after it.
    Returns bool (len(data),).
    """
    kinds = np.frombuffer(bytearray(data.translate(_KINDS)), np.uint8)
    _mark_wide_white(np.frombuffer(data, np.uint8), kinds)
    pairs = (kinds[:-1] << 4 | kinds[1:]).tobytes().translate(splits)
    known = np.frombuffer(pairs, np.uint8)
    starts = np.ones(len(data), bool)
    starts[1:] = known & _SECOND
    starts[:-1] |= (known & _FIRST).view(bool)
    return starts


def _mark_wide_white(data: np.ndarray, kinds: np.ndarray):
    """Decides, in place, which characters that begin with a byte of kind _WIDE are white space."""
    first = np.flatnonzero(kinds == _WIDE)
    kinds[first] = _OTHER
    code = data[first].astype(np.uint32) << 16 | data[first + 1].astype(np.uint32) << 8
    has_three = code >= 0xE00000
    code |= np.where(has_three, data[first + 2], 0)
    white = np.isin(code, _WIDE_CODES)
    kinds[first[white]] = kinds[first[white] + 1] = _WHITE
    kinds[first[white & has_three] + 2] = _WHITE
