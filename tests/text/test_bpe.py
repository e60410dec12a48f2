"""The word table: for any text tiktoken's ids for the whole text, in little memory."""

import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import split_like

from nib.text import bpe, gpt2, hf_tokenizer
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.hf_tokenizer import HfTokenizer

END = 50256
# Edge cases of the pattern and the table's sizes, and characters of every kind and UTF-8 length.
PARTS = [
    "'",
    "''",
    "'s",
    "'S",
    "'t",
    "'m",
    "'d",
    "'l",
    "'ll",
    "'ve",
    "'re",
    "'r",
    "'v",
    '’s',
    '"',
    ' ',
    '  ',
    ' ' * 20,
    '\n',
    '\r\n',
    '\t',
    '\v',
    '\f',
    '\x1c',
    '\x85',
    '\xa0',
    '\u1680',
    '\u2003',
    '\u2028',
    '\u3000',
    '\u200b',
    '\u200d',
    '\u180e',
    '\ufeff',
    '\x00',
    '\x00\x00',
    '\x1b',
    '\x7f',
    'a',
    's',
    're',
    'the',
    ' the',
    'word',
    'Wort',
    'é',
    'e\u0301',
    'ß',
    'ﬁ',
    'Ω',
    'ж',
    'א',
    'ع',
    'मी',
    'ไทย',
    '中文',
    '日本',
    '한',
    '𐍈',
    '𠀀',
    '0',
    '1',
    '42',
    '٣',
    '७',
    '½',
    '²',
    'Ⅷ',
    '〇',
    '㊷',
    '𝟙',
    '!',
    '...',
    '—',
    '“',
    '€',
    '\ufffd',
    '\ue000',
    '\uffff',
    '\U0010ffff',
    '🙂',
    '👩\u200d🔬',
    '🏳\ufe0f',
    '<|endoftext|>',
    'abcdefg',
    'abcdefgh',
    'x' * 15,
    'x' * 16,
    'x' * 17,
    'x' * 255,
    'x' * 271,
    '9' * 300,
]
TEXTS = st.text() | st.lists(st.sampled_from(PARTS), max_size=12).map(''.join)
MORE = settings(max_examples=400)


def same_as_tiktoken(texts):
    """Fails if the ids of texts, each with whether it ends, differ from tiktoken's."""
    expected = [
        id for text, ends in texts for id in gpt2.load_gpt2().encode_ordinary(text) + [END] * ends
    ]
    ids = Gpt2Tokenizer().encode_texts(texts)
    assert ids.dtype == np.uint16 and ids.tolist() == expected


@MORE
@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=4))
def test_any_text_has_the_ids_of_tiktoken(real_gpt2, texts):
    same_as_tiktoken(texts)


@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=4))
def test_so_it_has_with_another_vocabulary(small_gpt2, texts):
    same_as_tiktoken(texts)


SPLITS = ('gpt2', 'smollm', 'llama', 'qwen', 'ours')
LIBRARY = {splits: split_like(splits) for splits in SPLITS}
OURS = {
    splits: HfTokenizer.read(library.to_str(), '<|end|>') for splits, library in LIBRARY.items()
}
each_split = pytest.mark.parametrize('splits', SPLITS)


def same_as_the_library(splits, texts):
    """Fails if the word table is not used, or if its ids are not those of the library."""
    library, ours = LIBRARY[splits], OURS[splits]
    assert hf_tokenizer._words(ours.content, False, tuple(ours.between))
    expected = []
    for text, ends in texts:
        expected += library.encode(text).ids + [ours.end_of_text] * ends
    assert ours.encode_texts(texts).tolist() == expected


@each_split
@settings(max_examples=75)
@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=4))
def test_any_text_has_the_ids_of_the_tokenizers_library(splits, texts):
    same_as_the_library(splits, texts)


@each_split
def test_added_tokens_and_characters_that_normalization_changes_have_them(splits):
    texts = ['née', 'ne\u0301e', 'a née<|end|> b', 'e\u0301', '\u212b x', '<|end|><|end|>', '']
    same_as_the_library(splits, [(text, number % 2 == 0) for number, text in enumerate(texts)])


@each_split
def test_every_ascii_character_between_any_two_others_has_them(splits):
    beside = " \n1a'é\xa0"
    texts = [
        f'{before}{chr(point)}{after}x'
        for point in range(128)
        for before in beside
        for after in beside
    ]
    same_as_the_library(splits, [(''.join(texts), False), *((text, False) for text in texts)])


def around(character):
    """A text with a character beside every kind of neighbor."""
    c = character
    return f"{c} {c}a{c}1{c}!{c}'s{c}{c}  {c}\n{c}\n\n{c}'ll{c}\xa0{c} \xa0{c}"


@pytest.mark.slow
def test_every_character_of_the_basic_plane_has_the_ids_of_tiktoken(real_gpt2):
    same_as_tiktoken(
        [(around(chr(point)), True) for point in range(0x10000) if not 0xD800 <= point < 0xE000]
    )


def test_characters_beyond_it_have_them(real_gpt2):
    """Of each hundred the first, and those of the blocks of emoji and of mathematical digits."""
    points = {*range(0x10000, 0x110000, 100), *range(0x1F300, 0x1FB00), *range(0x1D7C0, 0x1D800)}
    same_as_tiktoken([(around(chr(point)), False) for point in sorted(points)])


def test_source_code_has_the_ids_of_tiktoken(real_gpt2):
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('[a-d]*.py'))
    same_as_tiktoken([(file.read_text(encoding='utf-8'), True) for file in files])


def made_up_words(count, longest):
    draw = random.Random(0)
    return [''.join(draw.choices('abcdé中0123!', k=draw.randint(1, longest))) for _ in range(count)]


@pytest.fixture
def small_table(monkeypatch):
    """A table of 64 slots, with many collisions and soon full, for 16 words at a time."""
    monkeypatch.setattr(bpe, '_BITS', 6)
    monkeypatch.setattr(bpe, '_WORDS', 16)
    monkeypatch.setattr(bpe, '_TOGETHER', 100)
    gpt2._gpt2_table.cache_clear()
    yield
    gpt2._gpt2_table.cache_clear()


@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=8))
def test_a_table_that_is_full_gives_the_same_ids(real_gpt2, small_table, texts):
    same_as_tiktoken([*texts, *texts])


@pytest.mark.slow
def test_a_table_grows_no_further_than_its_bound(small_gpt2, small_table, monkeypatch):
    monkeypatch.setattr(bpe, '_BYTES', 400)
    table = gpt2._gpt2_table(gpt2.load_gpt2())
    size = len(table.entries)
    most_words = most_bytes = restarts = 0
    for word in made_up_words(5000, 40):
        before = table.n_words
        table.encode([(word.encode(), True)])
        restarts += table.n_words < before
        most_words, most_bytes = max(most_words, table.n_words), max(most_bytes, table.n_bytes)
        assert (
            len(table.long_words) <= table.n_words
            and len(table.entries) == size
            and len(table.pool) < 2000
        )
    assert restarts > 100 and most_words < 32 + 40 and most_bytes < 400 + 40 * 4


def test_a_word_is_encoded_once(small_gpt2, monkeypatch):
    table = gpt2._gpt2_table(gpt2.load_gpt2())
    words = ' '.join(made_up_words(3000, 30))
    asked = []
    ask = table.encode_words
    monkeypatch.setattr(table, 'encode_words', lambda words: asked.extend(words) or ask(words))
    first = table.encode([(words.encode(), False)])
    assert len(asked) == len(set(asked)) > 1000
    asked.clear()
    assert table.encode([(words.encode(), False)]).tolist() == first.tolist() and not asked


def test_a_run_of_millions_of_spaces_is_encoded(small_gpt2):
    """Which tiktoken's regular expressions alone cannot cut."""
    ids = Gpt2Tokenizer().encode(' ' * 3_000_000 + 'x')
    four, two = 264, 263  # the vocabulary's merges
    assert ids.tolist() == [four] * 749_999 + [two, ord(' '), ord(' '), ord('x')]
