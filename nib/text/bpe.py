"""GPT-2's byte pair encoding of much text: tiktoken encodes each distinct word once, and a table knows it from then on.

GPT-2 cuts a text into words and encodes each for itself (Radford et al. 2019, section 2.2), so a word has the same tokens
wherever it stands. Few words make up most of any text: what is left to do is to cut and to look up, and numpy does either for
thousands of words at a time. The tokens are those that tiktoken gives for the whole text, whatever the text is.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import tiktoken

# Bytes that UTF-8 never has stand between texts, as words of no token, and of the end-of-text token.
_CUT, _END = b'\xfe', b'\xff'
# What the character that a byte belongs to is to GPT-2's pattern. cut_words relies on this order.
_SEPARATOR, _WHITE, _LETTER, _NUMBER, _OTHER, _UNSEEN = range(6)

_TOGETHER = 1 << 18  # bytes of text that are cut at once: few enough for a processor's cache
_WORDS = 1 << 15  # words that are looked up at once
_PADDING = 16  # bytes after the last word, as words are read sixteen bytes at a time

# A word's entry in the table: its key, and its tokens, which are the pool's `count` ones from `first` on. The key is the word
# itself, its bytes and how many, so that no two words have the same.
_ENTRY = np.dtype([('low', '<u8'), ('high', '<u8'), ('first', '<i8'), ('count', '<i8')])
_LONGEST = 15  # bytes of a word that fits into a key
# By a word's length: the mask of its first eight bytes, that of the other seven, and the length in the last byte.
_LOW = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(_LONGEST + 2)], '<u8')
_HIGH = np.array([(1 << 8 * min(max(size - 8, 0), 7)) - 1 for size in range(_LONGEST + 2)], '<u8')
_LENGTH = np.array([size << 56 for size in range(_LONGEST + 2)], '<u8')
_BITS = 20  # the table has 2 ** _BITS places, and begins anew when half of them are taken
_BYTES = 1 << 23  # or when its words have this many


class WordTable:
    """Encodes texts, and knows their words from then on. Its memory is bounded: when the table is full, it begins anew."""

    def __init__(self, encoding: tiktoken.Encoding, end_of_text: int):
        self.encoding, self.end_of_text = encoding, end_of_text
        self.kinds = CharacterKinds(encoding)
        self._clear()

    def _clear(self):
        # Entries of words that are too long for a key stand behind the places; a dict says where.
        self.places = 1 << _BITS
        self.entries, self.long_words = np.zeros(self.places * 3 // 2 + _WORDS, _ENTRY), {}
        self.pool, self.n_ids = np.empty(_BYTES, np.uint16), 0
        self.n_words = self.n_bytes = 0

    def encode(self, texts: Iterable[tuple[bytes, bool]]) -> np.ndarray:
        """Token ids, uint16, of texts in UTF-8, each with whether the end-of-text token follows it."""
        return np.concatenate(
            [np.empty(0, np.uint16), *(ids for data in _join(texts) for ids in self._encode(data))]
        )

    def _encode(self, data: bytes) -> Iterator[np.ndarray]:
        kinds, *wide = self.kinds.of_bytes(data)
        starts = np.flatnonzero(cut_words(np.frombuffer(data, np.uint8), kinds, *wide))
        for first in range(0, len(starts) - _PADDING, _WORDS):
            last = min(first + _WORDS, len(starts) - _PADDING)
            yield self._look_up(data, kinds, starts[first:last], starts[first + 1 : last + 1])

    def _look_up(
        self, data: bytes, kinds: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        """Token ids of the words of data that start and end there."""
        if self.n_words >= self.places // 2 or self.n_bytes >= _BYTES:
            self._clear()
        eight = np.ndarray(
            len(data) - 7, '<u8', data, strides=(1,)
        )  # the eight bytes from every byte on
        size = np.minimum(ends - starts, _LONGEST + 1)
        low = eight[starts] & _LOW.take(size)
        high = eight[starts + 8] & _HIGH.take(size) | _LENGTH.take(size)
        # Where to search first: the upper bits of products with odd numbers, which depend on all bits of the key.
        mixed = low * np.uint64(0x9E3779B97F4A7C15) + high * np.uint64(0xC2B2AE3D27D4EB4F)
        places = (mixed >> np.uint64(64 - _BITS)).astype(np.int64)
        entries = self.entries.take(places)
        rest = np.flatnonzero((entries['low'] != low) | (entries['high'] != high))
        if len(rest):
            places = self._find(
                data, kinds, starts[rest], ends[rest], low[rest], high[rest], places[rest]
            )
            entries[rest] = self.entries.take(places)
        count = entries['count']
        index = np.repeat(entries['first'] - np.cumsum(count) + count, count)
        index += np.arange(len(index))
        return self.pool.take(index)

    def _find(self, data, kinds, starts, ends, low, high, places) -> np.ndarray:
        """Places of the words that are not where their search begins; those that are nowhere are added."""
        known, new = self.entries, [np.empty(0, np.int64)]
        left = np.flatnonzero(ends - starts <= _LONGEST)
        while len(left):  # linear probing: all that are left go one place further
            here = places[left]
            free = left[known['high'][here] == 0]
            # Of those that meet at a free place the one that is written last takes it.
            known['first'][places[free]] = free
            takers = free[known['first'][places[free]] == free]
            known['low'][places[takers]], known['high'][places[takers]] = low[takers], high[takers]
            new.append(takers)
            left = left[(known['low'][here] != low[left]) | (known['high'][here] != high[left])]
            places[left] = (places[left] + 1) % self.places
        long = np.flatnonzero(ends - starts > _LONGEST)
        words = [data[start:end] for start, end in zip(starts[long].tolist(), ends[long].tolist())]
        for number, word in zip(long, words):
            if word not in self.long_words:
                self.long_words[word] = self.places + len(self.long_words)
                new.append(number[None])
        places[long] = [self.long_words[word] for word in words]
        new = np.concatenate(new)
        if len(new):
            self._add(data, kinds, starts[new], ends[new], places[new])
        return places

    def _add(self, data, kinds, starts, ends, places):
        """Encodes new words."""
        self.n_words += len(places)
        self.n_bytes += int((ends - starts).sum())
        last = kinds[ends - 1]
        # Most go together, as a call takes longer than a word, and with something between them that no word of theirs holds.
        for these, mark in (((last == _LETTER) | (last == _OTHER), b'1'), (last == _NUMBER, b'a')):
            words = [
                data[start:end] for start, end in zip(starts[these].tolist(), ends[these].tolist())
            ]
            ids = self._tiktoken(mark.join([*words, b'']))
            stops = np.flatnonzero(ids == self._tiktoken(mark))
            firsts = np.append(0, stops + 1)[:-1]
            self.entries['first'][places[these]] = self._store(ids) + firsts
            self.entries['count'][places[these]] = stops - firsts
        these = last <= _WHITE
        for start, end, place in zip(
            starts[these].tolist(), ends[these].tolist(), places[these].tolist()
        ):
            word = data[start:end]
            ids = (
                [] if word == _CUT else [self.end_of_text] if word == _END else self._tiktoken(word)
            )
            self.entries['first'][place], self.entries['count'][place] = self._store(ids), len(ids)

    def _tiktoken(self, text: bytes) -> np.ndarray:
        return self.encoding.encode_to_numpy(text.decode(), disallowed_special=())

    def _store(self, ids) -> int:
        """Puts ids into the pool; returns where the first one is."""
        first, self.n_ids = self.n_ids, self.n_ids + len(ids)
        if self.n_ids > len(self.pool):
            self.pool = np.concatenate([self.pool, np.empty(self.n_ids, np.uint16)])
        self.pool[first : self.n_ids] = ids
        return first


def _join(texts: Iterable[tuple[bytes, bool]]) -> Iterator[bytes]:
    """Texts with separators between them, _TOGETHER bytes or more at a time."""
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
    """What characters are to GPT-2's pattern: letters, numbers, white space or others.

    tiktoken's regular expressions are asked, as their Unicode may be of another year than Python's: in a vocabulary whose only
    merges are of a, 1 or ! with any byte, such a merge shows that a character is in one word with that sign.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        every_byte = [bytes([byte]) for byte in range(256)]
        tokens = every_byte + [sign + byte for sign in (b'a', b'1', b'!') for byte in every_byte]
        self.asked = tiktoken.Encoding(
            'kinds',
            pat_str=encoding._pat_str,
            special_tokens={},
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        )
        self.of_point = np.full(0x110000, _UNSEEN, np.uint8)
        self._ask(range(128))
        self.of_byte = self.of_point[:128].tobytes() + bytes([_UNSEEN] * 126 + [_SEPARATOR] * 2)

    def _ask(self, points: Iterable[int]):
        for point in points:
            self.of_point[point] = next(
                (
                    kind
                    for sign, kind in (('a', _LETTER), ('1', _NUMBER), ('!', _OTHER))
                    if self.asked.encode_ordinary(sign + chr(point))[0] > 255
                ),
                _WHITE,
            )

    def of_bytes(self, data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The kind of every byte's character, uint8; where white-space characters of several bytes have their first byte, and
        where their last."""
        kinds = np.frombuffer(bytearray(data.translate(self.of_byte)), np.uint8)
        beyond = np.flatnonzero(kinds == _UNSEEN)  # all bytes of all characters that are not ASCII
        points = np.frombuffer(
            np.frombuffer(data, np.uint8)[beyond].tobytes().decode().encode('utf-32-le'), '<u4'
        )
        self._ask(np.unique(points[self.of_point[points] == _UNSEEN]).tolist())
        of_point = self.of_point[points]
        size = 2 + (points >= 0x800) + (points >= 0x10000)  # in UTF-8
        kinds[beyond] = np.repeat(of_point, size)
        white = np.flatnonzero(of_point == _WHITE)
        last = (np.cumsum(size) - 1)[white]
        return kinds, beyond[last - size[white] + 1], beyond[last]


def cut_words(
    data: np.ndarray, kinds: np.ndarray, wide_first: np.ndarray, wide_last: np.ndarray
) -> np.ndarray:
    r"""Which bytes begin a word, by GPT-2's pattern:

        '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    data: UTF-8 with a separator before it and _PADDING of them behind it, uint8. The others: see CharacterKinds.of_bytes.
    """
    starts = np.ones(len(data), bool)
    # ` ?\p{L}+` and its like, `\s+`: a word is of one kind. But it takes in the space before it, and begins there.
    starts[1:] = (kinds[1:] != kinds[:-1]) & (data[:-1] != ord(' '))
    starts |= kinds == _SEPARATOR
    # `\s+(?!\S)`: the last of several white-space characters before another word does not belong to those before it.
    white = kinds == _WHITE
    starts[1:-1] |= white[:-2] & white[1:-1] & (kinds[2:] > _WHITE)
    # Where it has several bytes, the line above has found the last of them.
    starts[wide_first] |= starts[wide_last]
    starts[wide_last] = False
    # `'(?:[sdmt]|ll|ve|re)`: before all else, where a word would begin with the quote.
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
