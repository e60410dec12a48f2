"""Tokenizers trained on a text: deterministic, exact, and what they are trained on."""

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CORPUS
from tokenizers import Tokenizer
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


@pytest.mark.parametrize('text', ['ACGT' * 75_000, ' ' * 300_000, '=' * 300_000, '\n' * 300_000])
def test_a_text_of_a_single_word_takes_no_longer_than_others(text):
    started = time.process_time()
    trained = train_bpe.train_bpe([text], 300)
    assert time.process_time() - started < 10  # with whole words: minutes
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize('length', [2, train_bpe.LONGEST])
def test_words_up_to_the_longest_give_the_merges_of_whole_words(length, monkeypatch):
    texts = [first + 'abc' * (length // 3) + ' \n' * length for first in 'xyz']
    limited = train_bpe.train_bpe(texts, 280)
    monkeypatch.setattr(train_bpe, 'LONGEST', 100_000)
    assert limited == train_bpe.train_bpe(texts, 280)


@settings(max_examples=60)
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


def test_a_text_with_too_few_pairs_gives_as_many_tokens_as_it_has():
    assert train_bpe.train_bpe(['abc'], 300) == train_bpe.train_bpe(['abc'], 257)
    assert train_bpe.train_bpe(['ab ab'], 300).vocab_size == 257 + len(['ab'])


def test_of_a_long_text_pieces_spread_over_it_are_taken(monkeypatch):
    texts = [f'{number:03}' * 10 for number in range(100)]
    assert list(train_bpe.spread(texts, 3000)) == texts
    monkeypatch.setattr(train_bpe, 'MOST', 1000)
    taken = [int(text[:3]) for text in train_bpe.spread(texts, 3000)]
    assert 32 <= len(taken) <= 33
    assert all(3 <= after - before <= 4 for before, after in pairwise(taken))


def test_a_failure_to_read_the_text_is_the_failure_of_training():
    def texts():
        yield 'abab'
        raise UserError('notes.txt cannot be read')

    with pytest.raises(UserError, match='notes.txt cannot be read'):
        train_bpe.train_bpe(texts(), 300)
