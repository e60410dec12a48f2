"""Fast GPT-2 byte pair encoding: tiktoken encodes each distinct word once, a table does the rest.

GPT-2 splits a text into words and encodes each word independently (Radford et al. 2019, section
2.2), so a word always has the same tokens. A few words make up most of any text. What remains is to
split and to look up, and numpy does both for thousands of words at a time. The result is always
identical to tiktoken's encoding of the whole text.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import tiktoken

# Bytes that never occur in UTF-8 separate the texts. Each is a word of its own: _CUT has no tokens,
# _END has the end-of-text token.
_CUT, _END = b'\xfe', b'\xff'
# How GPT-2's pattern classifies the character a byte belongs to. cut_words relies on this order.
_SEPARATOR, _WHITE, _LETTER, _NUMBER, _OTHER, _UNSEEN = range(6)

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

    Memory is bounded: a full table is cleared.
    """

    def __init__(self, encoding: tiktoken.Encoding, end_of_text: int):
        self.encoding, self.end_of_text = encoding, end_of_text
        self.kinds = CharacterKinds(encoding)
        self._clear()

    def _clear(self):
        # Words too long for a key have their entries after the hash table's slots; long_words maps
        # each of them to its entry.
        self.places = 1 << _BITS
        self.entries = np.zeros(self.places * 3 // 2 + _WORDS, _ENTRY)
        self.long_words = {}
        self.pool, self.n_ids = np.empty(_BYTES, np.uint16), 0
        self.n_words = self.n_bytes = 0

    def encode(self, texts: Iterable[tuple[bytes, bool]]) -> np.ndarray:
        """Encode texts, one after the other.

        texts: pairs of UTF-8 bytes and whether the end-of-text token follows them.
        Returns token ids, uint16.
        """
        parts = [ids for data in _join(texts) for ids in self._encode(data)]
        return np.concatenate([np.empty(0, np.uint16), *parts])

    def _encode(self, data: bytes) -> Iterator[np.ndarray]:
        kinds, *wide = self.kinds.of_bytes(data)
        starts = np.flatnonzero(cut_words(np.frombuffer(data, np.uint8), kinds, *wide))
        for first in range(0, len(starts) - _PADDING, _WORDS):
            last = min(first + _WORDS, len(starts) - _PADDING)
            yield self._look_up(data, kinds, starts[first:last], starts[first + 1 : last + 1])

    def _look_up(
        self, data: bytes, kinds: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
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
            self._find(data, kinds, starts[rest], ends[rest], low[rest], high[rest], places)
            entries[rest] = self.entries.take(places)
        count = entries['count']
        index = np.repeat(entries['first'] - np.cumsum(count) + count, count)
        index += np.arange(len(index))
        return self.pool.take(index)

    def _find(self, data, kinds, starts, ends, low, high, places):
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
            self._add(data, kinds, starts[new], ends[new], places[new])

    def _add(self, data, kinds, starts, ends, places):
        """Encodes new words and fills in their entries."""
        self.n_words += len(places)
        self.n_bytes += int((ends - starts).sum())
        last = kinds[ends - 1]
        # One call encodes many words, because a call costs more than a word. A mark separates them:
        # a character that cannot be part of such a word.
        for these, mark in (((last == _LETTER) | (last == _OTHER), b'1'), (last == _NUMBER, b'a')):
            words = [
                data[start:end] for start, end in zip(starts[these].tolist(), ends[these].tolist())
            ]
            ids = self._tiktoken(mark.join([*words, b'']))
            stops = np.flatnonzero(ids == self._tiktoken(mark))
            firsts = np.append(0, stops + 1)[:-1]
            self.entries['first'][places[these]] = self._store(ids) + firsts
            self.entries['count'][places[these]] = stops - firsts
        for number in np.flatnonzero(last <= _WHITE).tolist():
            word = data[starts[number] : ends[number]]
            if word == _CUT:
                ids = []
            elif word == _END:
                ids = [self.end_of_text]
            else:
                ids = self._tiktoken(word)
            self.entries['first'][places[number]] = self._store(ids)
            self.entries['count'][places[number]] = len(ids)

    def _tiktoken(self, text: bytes) -> np.ndarray:
        return self.encoding.encode_to_numpy(text.decode(), disallowed_special=())

    def _store(self, ids) -> int:
        """Appends ids to the pool; returns the index of the first one."""
        first, self.n_ids = self.n_ids, self.n_ids + len(ids)
        if self.n_ids > len(self.pool):
            self.pool = np.concatenate([self.pool, np.empty(self.n_ids, np.uint16)])
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


class CharacterKinds:
    """How GPT-2's pattern classifies characters: letters, numbers, white space or others.

    tiktoken's regular expressions decide, as their version of Unicode may differ from Python's.
    They are probed with a vocabulary that merges only `a`, `1` or `!` with any one byte: a merge
    shows that the pattern keeps the character in one word with that sign.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        every_byte = [bytes([byte]) for byte in range(256)]
        tokens = every_byte + [sign + byte for sign in (b'a', b'1', b'!') for byte in every_byte]
        self.probe = tiktoken.Encoding(
            'kinds',
            pat_str=encoding._pat_str,
            special_tokens={},
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        )
        self.of_point = np.full(0x110000, _UNSEEN, np.uint8)
        self._classify(range(128))
        self.of_byte = self.of_point[:128].tobytes() + bytes([_UNSEEN] * 126 + [_SEPARATOR] * 2)

    def _classify(self, points: Iterable[int]):
        for point in points:
            self.of_point[point] = _WHITE
            for sign, kind in (('a', _LETTER), ('1', _NUMBER), ('!', _OTHER)):
                if self.probe.encode_ordinary(sign + chr(point))[0] > 255:
                    self.of_point[point] = kind
                    break

    def of_bytes(self, data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classify every byte by the character it belongs to.

        Returns the kinds, uint8 (len(data),), and the offsets of the first and of the last byte of
        every white-space character that has several bytes.
        """
        kinds = np.frombuffer(bytearray(data.translate(self.of_byte)), np.uint8)
        beyond = np.flatnonzero(kinds == _UNSEEN)  # all bytes of all non-ASCII characters
        characters = np.frombuffer(data, np.uint8)[beyond].tobytes().decode()
        points = np.frombuffer(characters.encode('utf-32-le'), '<u4')
        self._classify(np.unique(points[self.of_point[points] == _UNSEEN]).tolist())
        of_point = self.of_point[points]
        size = 2 + (points >= 0x800) + (points >= 0x10000)  # in UTF-8
        kinds[beyond] = np.repeat(of_point, size)
        white = np.flatnonzero(of_point == _WHITE)
        last = (np.cumsum(size) - 1)[white]
        return kinds, beyond[last - size[white] + 1], beyond[last]


def cut_words(
    data: np.ndarray, kinds: np.ndarray, wide_first: np.ndarray, wide_last: np.ndarray
) -> np.ndarray:
    r"""Find the bytes that begin a word according to GPT-2's pattern.

    The pattern is '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    data: uint8, UTF-8 with one separator before it and _PADDING separators after it.
    kinds, wide_first, wide_last: from CharacterKinds.of_bytes.
    Returns bool (len(data),).
    """
    starts = np.ones(len(data), bool)
    # ` ?\p{L}+` and the like, and `\s+`: a word has one kind, but begins with the space before it.
    starts[1:] = (kinds[1:] != kinds[:-1]) & (data[:-1] != ord(' '))
    starts |= kinds == _SEPARATOR
    # `\s+(?!\S)`: the last of several white-space characters before a word begins a new word.
    white = kinds == _WHITE
    starts[1:-1] |= white[:-2] & white[1:-1] & (kinds[2:] > _WHITE)
    # If that character has several bytes, its last byte is now marked: mark its first byte instead.
    starts[wide_first] |= starts[wide_last]
    starts[wide_last] = False
    # `'(?:[sdmt]|ll|ve|re)` has priority wherever a word would begin with the quote.
    quotes = np.flatnonzero(data == ord("'"))
    quotes = quotes[starts[quotes]]
    second, third = data[quotes + 1], data[quotes + 2]
    one = quotes[
        (second == ord('s')) | (second == ord('d')) | (second == ord('m')) | (second == ord('t'))
    ]
    two = quotes[
        (second == ord('l')) & (third == ord('l'))
        | ((second == ord('v')) | (second == ord('r'))) & (third == ord('e'))
    ]
    starts[one + 1] = starts[two + 1] = False
    starts[one + 2] = starts[two + 3] = True
    return starts
