"""Tokenizers trained on a text: deterministic, exact, and what they are trained on."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CORPUS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nib.errors import UserError
from nib.text import train_bpe
from nib.text.tokenizer import encode_prompt, tokenizer_from_json

TRAINED = train_bpe.train_bpe(CORPUS, 290)


def test_the_same_text_gives_the_same_tokenizer():
    assert train_bpe.train_bpe(iter(CORPUS), 290) == TRAINED
    assert train_bpe.train_bpe(CORPUS, 280) != TRAINED


def test_it_has_every_byte_the_merges_asked_for_and_the_end_of_text():
    assert TRAINED.vocab_size == 290 and TRAINED.end_of_text == 289
    described = json.loads(TRAINED.content)
    assert len(described['model']['merges']) == 290 - 257
    assert {TRAINED.decode_bytes([number]) for number in range(289)} >= {
        bytes([byte]) for byte in range(256)
    }
    assert tokenizer_from_json(TRAINED.to_json()) == TRAINED


def test_merges_are_those_of_the_most_frequent_pairs():
    described = json.loads(train_bpe.train_bpe(['ab ab ab xy'] * 2, 259).content)
    assert described['model']['merges'] == [['a', 'b'], ['Ġ', 'ab']]


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_and_has_the_ids_of_transformers(text):
    ids = TRAINED.encode_texts([(text, False)])
    assert TRAINED.decode(ids) == text
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(TRAINED.content))
    assert ids.tolist() == theirs.encode(text)


@pytest.mark.parametrize(
    'text, words',
    [
        ("I'd SHE'LL can't", ['I', "'d", ' SHE', "'LL", ' can', "'t"]),
        ('x.shape (y)', ['x', '.shape', ' (', 'y', ')']),
        ('1234567 8', ['123', '456', '7', ' ', '8']),
        ('end...\n\n  next', ['end', '...\n\n', ' ', ' next']),
        ('a \n \n b  ', ['a', ' \n \n', ' b', '  ']),
        ('мир 中文!', ['мир', ' 中文', '!']),
    ],
)
def test_how_a_text_is_split(text, words):
    split = Tokenizer.from_str(TRAINED.content).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == words


def test_the_end_of_text_is_a_token_in_prompts_and_characters_on_request():
    assert encode_prompt(TRAINED, '<|endoftext|>', '--start') == [289]
    spelled = tokenizer_from_json(TRAINED.to_json() | {'spells_end_of_text': True})
    ids = encode_prompt(spelled, '<|endoftext|>', '--start')
    assert 289 not in ids and spelled.decode(ids) == '<|endoftext|>'


def test_a_text_with_too_few_pairs_is_refused_with_the_number_that_it_has():
    with pytest.raises(UserError, match='--vocab_size=257 or less'):
        train_bpe.train_bpe(['abc'], 300)
    assert train_bpe.train_bpe(['abc'], 257).vocab_size == 257


def by_the_library(texts, vocab_size) -> dict:
    """The tokenizers library's own trainer."""
    described = json.loads(train_bpe.train_bpe([''], 257).content)
    trained = Tokenizer.from_str(json.dumps(described | {'added_tokens': []}))
    trained.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return json.loads(trained.to_str())['model']


SOURCES = [path.read_text() for path in sorted(Path(train_bpe.__file__).parent.glob('*.py'))]


@pytest.mark.parametrize('texts', [SOURCES, CORPUS, ['a' * n + ' ba' * n for n in range(40)]])
def test_the_merges_are_those_of_the_library(texts):
    expected = by_the_library(texts, 1500)
    ours = train_bpe.train_bpe(texts, len(expected['vocab']) + 1)
    assert json.loads(ours.content)['model'] == expected


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.text('abc', max_size=9), max_size=30))
def test_so_are_those_of_words_with_repeated_letters(words):
    expected = by_the_library([' '.join(words)], 300)
    if len(expected['merges']) + 256 > len(expected['vocab']):
        return  # two merges with one text: the library merges the pairs of its first list only
    ours = train_bpe.train_bpe([' '.join(words)], len(expected['vocab']) + 1)
    assert json.loads(ours.content)['model'] == expected


def test_words_are_counted_however_the_text_is_divided(monkeypatch):
    expected = train_bpe.count_parts(SOURCES)
    assert expected[b' return'] == sum(
        len(re.findall(' return(?![a-z])', text)) for text in SOURCES
    )
    monkeypatch.setattr(train_bpe, '_TOGETHER', 100)
    assert train_bpe.count_parts(SOURCES) == expected
    monkeypatch.setattr(train_bpe, '_MOST_BYTES', 4000)  # the table is cleared again and again
    monkeypatch.setattr(train_bpe, '_add', add_all)
    assert train_bpe.count_parts(SOURCES) == expected


def add_all(counts, parts, seen):
    for part, n in zip(parts, seen.tolist()):
        counts[part] += n
    return counts


@pytest.mark.parametrize('bound', [{'_MOST_WORDS': 100}, {'_MOST_BYTES': 500}])
def test_of_too_many_words_the_frequent_ones_remain(monkeypatch, bound):
    for name, most in bound.items():
        monkeypatch.setattr(train_bpe, name, most)
    monkeypatch.setattr(train_bpe, '_TOGETHER', 2000)
    rare = [f' the cat {number * 7919}' for number in range(2000)]
    found = train_bpe.count_parts(rare)
    assert len(found) <= 100 and sum(map(len, found)) <= 4000
    assert found[b' the'] == found[b' cat'] == 2000
    numbers = [int(part) // 7919 for part in found if part.strip().isdigit()]
    assert min(numbers) < 500 and max(numbers) > 1500  # a sample of the others, from everywhere
    assert sum(number < 1000 for number in numbers) > len(numbers) / 5


def test_a_failure_to_read_the_text_is_the_failure_of_training():
    def texts():
        yield 'abab'
        raise UserError('notes.txt cannot be read')

    with pytest.raises(UserError, match='notes.txt cannot be read'):
        train_bpe.train_bpe(texts(), 300)
