"""Tokenizers of vocabularies that another program has made."""

import json

import pytest

from nib.errors import UserError
from nib.text.tokenizer import encode_prompt, tokenizer_from_json
from nib.text.vocabulary import IdTokenizer, VocabularyTokenizer

WORDS = VocabularyTokenizer(('cat', 'the', '\n', 'sat', 'category'))
CHARACTERS = VocabularyTokenizer(tuple('cab'))
PIECES = VocabularyTokenizer((' ', 'a', 'ab', 'abc', 'b', 'é', '<5>'))
IDS = IdTokenizer(1000)


@pytest.mark.parametrize(
    'tokenizer, text, ids',
    [
        (WORDS, 'the cat\nsat  category', [1, 0, 2, 3, 4]),
        (CHARACTERS, 'abcca', [1, 2, 0, 0, 1]),
        (PIECES, 'abcab éa<5>', [3, 2, 0, 5, 1, 6]),  # the longest token that fits
        (IDS, '12 7\n999', [12, 7, 999]),
    ],
)
def test_text_becomes_ids_and_ids_become_text_that_gives_them_again(tokenizer, text, ids):
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids
    assert b''.join(tokenizer.decode_bytes([number]) for number in ids).decode() == (
        tokenizer.decode(ids)
    )
    assert tokenizer.encode_texts([(text, True), ('', False), (text, True)]).tolist() == ids * 2


def test_characters_are_decoded_as_their_own_itos_decodes_them():
    """As nanoGPT's scripts do: ''.join([itos[i] for i in l])."""
    itos = {0: 'z', 1: 'a', 2: ' ', 3: 'é'}
    tokenizer = VocabularyTokenizer(tuple(itos.values()))
    ids = [3, 2, 1, 0, 0, 2]
    assert tokenizer.decode(ids) == ''.join(itos[number] for number in ids)


@pytest.mark.parametrize('tokenizer', [WORDS, CHARACTERS, PIECES, IDS])
def test_they_travel_as_json(tokenizer):
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer and again.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
    'tokenizer, text, words',
    [
        (WORDS, 'the dog', ["--start: the text contains 'dog' (at offset 4)", '5 tokens', "'cat'"]),
        (WORDS, 'cats', ["'cats'"]),
        (WORDS, ' ', ['contains none of the tokens']),
        (CHARACTERS, 'abd', ["'d' (at offset 2)"]),
        (IDS, '\n', ['type ids from 0 to 999']),
        (IDS, '1 -2', ['type ids from 0 to 999']),
        (IDS, '1 ²', ['type ids']),
        (IDS, '1000', ['0 to 999']),
        (IDS, '9' * 5000, ['type ids']),
    ],
)
def test_a_prompt_that_it_cannot_express_is_one_line(tokenizer, text, words):
    with pytest.raises(UserError) as error:
        encode_prompt(tokenizer, text, '--start')
    assert all(word in str(error.value) for word in words) and len(str(error.value)) < 300


@pytest.mark.parametrize('tokenizer', [WORDS, CHARACTERS, IDS])
def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for ids in ([tokenizer.vocab_size], [-1]):
        with pytest.raises(UserError, match='ids 0 to'):
            tokenizer.decode(ids)
    assert tokenizer.encode('').tolist() == [] and tokenizer.decode([]) == ''


@pytest.mark.parametrize(
    'data',
    [
        {'kind': 'vocabulary', 'tokens': ['a', 'a']},
        {'kind': 'vocabulary', 'tokens': ['a', 1]},
        {'kind': 'vocabulary', 'tokens': 'ab'},
        {'kind': 'ids', 'vocab_size': 0},
        {'kind': 'ids'},
    ],
)
def test_json_that_describes_none_of_them_is_refused(data):
    with pytest.raises(UserError, match='tokenizer'):
        tokenizer_from_json(data)
