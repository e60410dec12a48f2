"""Trains a tokenizer on a text: byte-level byte pair encoding (Sennrich et al. 2016).

The words of the text are counted first, then merges are found among the distinct words. So memory
is bounded: rare words of a long text are dropped. The trainer of the tokenizers library finds the
same merges, but it splits all of the text with a regular expression and keeps every distinct word.
"""

import heapq
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from nib.errors import UserError
from nib.text.bpe import GPT4_SPLITS, WordTable
from nib.text.hf_tokenizer import HfTokenizer, byte_names, import_library
from nib.text.vocabulary import END_OF_TEXT, without_surrogates

# How a text is split into words, which merges do not cross. It splits as GPT-4 and Llama 3 do.
PATTERN = (
    r"(?i:'(?:[dmst]|ll|re|ve))"  # English contractions
    r'|[^\r\n\p{L}\p{N}]?\p{L}+'  # letters, with the space or the sign before them
    r'|\p{N}{1,3}'  # up to three digits
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*'  # signs, with a space before and line ends after them
    r'|\s*[\r\n]+'  # line ends, with the spaces before them
    r'|\s+(?!\S)'  # spaces, but the last one belongs to the word after it
    r'|\s+'
)
SMALLEST, LARGEST = 257, 1 << 20  # tokens: every byte and END_OF_TEXT; what fits into memory
_MOST_WORDS = 1 << 20  # distinct words; if there are more, rare ones make room for others
_MOST_BYTES = 1 << 24  # of these words together
_TOGETHER = 1 << 20  # characters counted at once
_BITS = 20  # of a token id in a pair
_BETWEEN, _MERGED = -1, -2  # instead of a token id: between words; part of the token before it


def train_bpe(texts: Iterable[str], vocab_size: int) -> HfTokenizer:
    """Train a tokenizer on texts. The same texts always give the same tokenizer.

    A merge needs a pair of tokens that occurs at least twice. END_OF_TEXT is the last token.
    Raises UserError if the texts have too few pairs for vocab_size tokens.
    """
    library = import_library()
    split = library.pre_tokenizers.Split(library.Regex(PATTERN), 'isolated')
    words = Counter[str]()
    for part, n in count_parts(texts).items():
        for word, _ in split.pre_tokenize_str(part.decode()):
            words[word] += n
    tokens, merges = find_merges(words, vocab_size - 1)
    trained = library.Tokenizer(
        library.models.BPE({token: number for number, token in enumerate(tokens)}, merges)
    )
    trained.pre_tokenizer = library.pre_tokenizers.Sequence(
        [split, library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trained.decoder = library.decoders.ByteLevel()
    trained.add_special_tokens([library.AddedToken(END_OF_TEXT, normalized=False)])
    found = trained.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f'--vocab_size={vocab_size}: the text has enough repeated pairs for only {found:,} '
            f'tokens; use --vocab_size={found} or less, or a longer text'
        )
    return HfTokenizer.read(trained.to_str())


def count_parts(texts: Iterable[str]) -> Counter[bytes]:
    """Count the parts of texts. A part is a word of PATTERN, or several."""
    counts, parts, seen = Counter[bytes](), [], np.zeros(0, np.int64)

    def number(new: list[str]) -> tuple[np.ndarray, np.ndarray]:
        parts.extend(part.encode() for part in new)
        return np.arange(len(parts) - len(new), len(parts)), np.ones(len(new), np.int64)

    # Every part has one "token", which is its number.
    table = WordTable(number, GPT4_SPLITS, [], np.uint32)
    for group in _grouped(texts):
        n = np.bincount(table.encode(group), minlength=len(parts))
        n[: len(seen)] += seen
        seen = n
        if 4 * len(parts) > _MOST_WORDS or 4 * table.n_bytes > _MOST_BYTES:
            counts = _add(counts, parts, seen)
            table.clear()
            parts.clear()
            seen = seen[:0]
    counts = _add(counts, parts, seen)
    counts.pop(b'', None)  # what separates two texts
    return counts


def _grouped(texts: Iterable[str]) -> Iterator[list[tuple[bytes, bool]]]:
    group, size = [], 0
    for text in texts:
        group.append((without_surrogates(text).encode(), False))
        size += len(text)
        if size >= _TOGETHER:
            yield group
            group, size = [], 0
    yield group


def _add(counts: Counter[bytes], parts: list[bytes], seen: np.ndarray) -> Counter[bytes]:
    """Adds counts of parts; returns the most frequent half of what fits if they are too many."""
    for part, n in zip(parts, seen.tolist()):
        counts[part] += n
    if len(counts) <= _MOST_WORDS and sum(map(len, counts)) <= _MOST_BYTES:
        return counts
    # Of equally frequent ones, a sample of the whole text: the same checksums remain every time.
    kept, n = list(counts), np.array([*counts.values()])
    checksums = np.array([zlib.crc32(part) for part in kept])
    order = np.lexsort((checksums, -n))[: _MOST_WORDS // 2]
    sizes = np.array([*map(len, kept)])[order]
    order = order[np.cumsum(sizes) <= _MOST_BYTES // 2]
    return Counter({kept[number]: counts[kept[number]] for number in order.tolist()})


def find_merges(words: Mapping[str, int], vocab_size: int) -> tuple[list[str], list[tuple]]:
    """Find the merges of byte pair encoding: again and again, the most frequent pair of tokens.

    words: distinct words and how often they occur. Of equally frequent pairs, the one with the
    smaller ids comes first.
    Returns all tokens, which are the 256 bytes and the merged ones, and the pairs that were merged,
    spelled in GPT-2's names of bytes. There are fewer than vocab_size if no pair occurs twice.
    """
    pairs = _Pairs(words)
    names = sorted(byte_names())
    tokens, numbers, merges = names, {name: number for number, name in enumerate(names)}, []
    heap = [(-n, key) for key, n in pairs.counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size:
        n, key = heapq.heappop(heap)
        if -n != pairs.counts[key]:  # another merge has changed it
            if pairs.counts[key] > 1:
                heapq.heappush(heap, (-pairs.counts[key], key))
            continue
        if n > -2:
            break
        first, second = key >> _BITS, key & (1 << _BITS) - 1
        token = tokens[first] + tokens[second]
        if token not in numbers:  # else other merges lead to the same text
            numbers[token] = len(tokens)
            tokens.append(token)
        merges.append((tokens[first], tokens[second]))
        for new in pairs.merge(first, second, numbers[token]):
            heapq.heappush(heap, (-pairs.counts[new], new))
    return tokens, merges


class _Pairs:
    """The tokens of all distinct words one after the other, and where each pair of them is.

    counts: pair -> how often it occurs in the text. A pair is first << _BITS | second.
    Tokens of a word are a linked list, so a merge changes only its surroundings.
    """

    def __init__(self, words: Mapping[str, int]):
        rank = np.empty(256, np.int32)
        for number, name in enumerate(sorted(byte_names())):
            rank[byte_names()[name]] = number
        spelled = [word.encode() for word in words]
        sizes = np.array([len(word) + 1 for word in spelled], np.int64)
        data = np.frombuffer(b'\xff'.join([*spelled, b'']), np.uint8)
        self.ids = np.where(data == 0xFF, _BETWEEN, rank[data]).astype(np.int32)
        self.word = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self.n = np.array([*words.values()], np.int64)
        self.next = np.arange(1, len(data) + 1, dtype=np.int32)
        self.previous = np.arange(-1, len(data) - 1, dtype=np.int32)
        self.counts = Counter[int]()
        self.places = defaultdict[int, list](list)
        starts = np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0)).astype(np.int32)
        self._count(starts)

    def _count(self, places: np.ndarray) -> list[int]:
        """Counts the pairs that begin at places; returns them."""
        keys, sums, groups = self._by_pair(places)
        for key, n, here in zip(keys, sums, groups):
            self.counts[key] += n
            self.places[key].append(here)
        return keys

    def _by_pair(self, places: np.ndarray) -> tuple[list[int], list[int], list[np.ndarray]]:
        """Returns the pairs that begin at places, how often they occur in the text, and where."""
        keys = self.ids[places].astype(np.int64) << _BITS | self.ids[self.next[places]]
        order = np.argsort(keys, kind='stable')
        keys, places = keys[order], places[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        sums = np.add.reduceat(self.n[self.word[places]], starts) if len(starts) else starts
        ends = [*starts[1:].tolist(), len(places)]
        groups = [places[start:end] for start, end in zip(starts.tolist(), ends)]
        return keys[starts].tolist(), sums.tolist(), groups

    def merge(self, first: int, second: int, token: int) -> list[int]:
        """Replaces a pair by a token; returns the pairs that this has created."""
        ids, key = self.ids, first << _BITS | second
        places = np.concatenate(self.places.pop(key))
        # Other merges have changed some of the places.
        places = places[(ids[places] == first) & (ids[self.next[places]] == second)]
        if first == second:
            places = self._every_other(np.sort(places))
        left, right = self.previous[places], self.next[places]
        after = self.next[right]
        ids[right] = _MERGED
        beside = left[ids[left] >= 0]  # not at the start of a word, nor in another of these places
        ids[right] = second
        has_after = ids[after] >= 0
        gone, n_gone, _ = self._by_pair(np.concatenate([beside, right[has_after]]))
        for pair, n in zip(gone, n_gone):
            self.counts[pair] -= n
        self.counts[key] = 0
        ids[places], ids[right] = token, _MERGED
        self.next[places], self.previous[after] = after, places
        return self._count(np.concatenate([beside, places[has_after]]))

    def _every_other(self, places: np.ndarray) -> np.ndarray:
        """Returns sorted places without those that overlap the one before: of aaa, the first."""
        index = np.arange(len(places))
        begins = np.ones(len(places), bool)
        begins[1:] = places[1:] != self.next[places[:-1]]
        run = np.maximum.accumulate(np.where(begins, index, 0))
        return places[(index - run) % 2 == 0]
