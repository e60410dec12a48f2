"""Tokenizers: what is encoded comes back, and what cannot be is named."""
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nib.errors import UserError
from nib.tokenizer import CharTokenizer, tokenizer_from_json

ANY_CHARACTER = st.text(st.characters(exclude_categories=()))  # lone surrogates too


@given(ANY_CHARACTER)
def test_decoding_gives_back_the_text(text):
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ANY_CHARACTER)
def test_ids_are_places_among_the_sorted_characters(text):
    characters = sorted(set(text))
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.vocab_size == len(characters)
    assert tokenizer.encode(text).tolist() == [characters.index(character) for character in text]


@given(ANY_CHARACTER)
def test_a_tokenizer_comes_back_from_a_json_file(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / 'tokenizer.json'
    path.write_text(json.dumps(CharTokenizer.train(text).to_json()), encoding='utf-8')
    assert tokenizer_from_json(json.loads(path.read_text(encoding='utf-8'))) == CharTokenizer.train(text)


def test_surrogates_of_both_kinds_stay_apart_in_json():
    """In order they would be neighbours, which JSON reads as one character."""
    tokenizer = CharTokenizer.train('a\udc00\ud800\udbff\udfff\uffff🙂')
    assert tokenizer.vocab_size == 7
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


@pytest.mark.parametrize('known', ['ac', 'acz'])  # b is between two known characters, the smiley above all of them
def test_unknown_characters_are_named_with_the_place_of_the_first(known):
    with pytest.raises(UserError, match=r"'b', '🙂' \(the first at offset 2\)"):
        CharTokenizer(known).encode('ac🙂ab')


def test_without_a_vocabulary_every_character_is_unknown():
    assert CharTokenizer('').encode('').tolist() == []
    with pytest.raises(UserError, match="'x'.*offset 0"):
        CharTokenizer('').encode('x')


@pytest.mark.parametrize('ids', [[3], [0, -1], np.array([2**32 - 1], dtype=np.uint32)])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(UserError, match='0 to 2'):
        CharTokenizer('abc').decode(ids)


def test_ids_of_any_integer_type_are_decoded():
    for ids in ([2, 0], np.array([2, 0], dtype=np.uint16), np.array([2, 0], dtype=np.int64)):
        assert CharTokenizer('abc').decode(ids) == 'ca'


@pytest.mark.parametrize('data', [
    {'kind': 'runes', 'characters': 'abc'}, {'kind': 'char'}, {'kind': 'char', 'characters': ['a']},
    {'kind': 'char', 'characters': 'ba'}, {'kind': 'char', 'characters': 'aa'}, {}, [], None])
def test_a_broken_description_is_refused(data):
    with pytest.raises(UserError, match='tokenizer'):
        tokenizer_from_json(data)
