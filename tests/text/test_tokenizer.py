"""Tokenizers: what is encoded comes back, and what cannot be encoded is named."""

import hashlib
import json
import sys
import time

import numpy as np
import pytest
from conftest import run_script
from hypothesis import given
from hypothesis import strategies as st

from nib.errors import UserError
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.tokenizer import ByteTokenizer, CharTokenizer, encode_prompt, tokenizer_from_json

ANY_CHARACTER = st.text(st.characters(exclude_categories=()))  # lone surrogates too
TYPED = st.lists(
    st.sampled_from(['the bee', ' ', '\n', '€', '🙂', "don't", '<|endoftext|>', '<|', 'x'])
).map(''.join)
NO_NETWORK = dict.fromkeys(('https_proxy', 'HTTPS_PROXY'), 'http://127.0.0.1:1')


@given(ANY_CHARACTER, st.booleans())
def test_characters_come_back(text, has_end_of_text):
    tokenizer = CharTokenizer.train(text, has_end_of_text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode('utf-8', 'surrogatepass')


@given(st.text() | TYPED)
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text() | TYPED)
def test_gpt2_tokens_come_back(small_gpt2, text):
    tokenizer = Gpt2Tokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32 and tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()


@given(st.text() | TYPED)
def test_tokens_of_the_real_gpt2_come_back(real_gpt2, text):
    assert Gpt2Tokenizer().decode(Gpt2Tokenizer().encode(text)) == text


def test_gpt2_has_the_tokens_that_openai_published(real_gpt2):
    tokenizer = Gpt2Tokenizer()
    assert tokenizer.encode('hello world').tolist() == [31373, 995]
    assert tokenizer.encode('<|endoftext|>').tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.decode([50256, 0]) == '<|endoftext|>!'


@given(ANY_CHARACTER)
def test_ids_are_places_among_the_sorted_characters(text):
    characters = sorted(set(text))
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.vocab_size == len(characters) and tokenizer.end_of_text is None
    assert tokenizer.encode(text).tolist() == [characters.index(character) for character in text]


@pytest.mark.parametrize(
    'tokenizer, vocab_size, end',
    [
        (CharTokenizer('abc', True), 4, 3),
        (ByteTokenizer(), 257, 256),
        (Gpt2Tokenizer(), 50257, 50256),
    ],
)
def test_the_end_of_text_is_the_last_token_and_is_shown(small_gpt2, tokenizer, vocab_size, end):
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (vocab_size, end)
    ids = [end, *tokenizer.encode('ab'), end, end, *tokenizer.encode('c')]
    assert tokenizer.decode(ids) == '<|endoftext|>ab<|endoftext|><|endoftext|>c'
    assert tokenizer.decode_bytes(np.array(ids, dtype=np.uint16)) == tokenizer.decode(ids).encode()


@pytest.mark.parametrize(
    'tokenizer', [CharTokenizer.train('<|endoftext|>ab', True), ByteTokenizer(), Gpt2Tokenizer()]
)
def test_the_end_of_text_stands_for_its_token_in_a_prompt_and_for_its_characters_in_a_text(
    small_gpt2, tokenizer
):
    end = tokenizer.end_of_text
    a, b = tokenizer.encode('a').tolist(), tokenizer.encode('b').tolist()
    assert encode_prompt(tokenizer, 'a<|endoftext|>b<|endoftext|>', '--start') == [*a, end, *b, end]
    assert encode_prompt(tokenizer, '', '--start') == []
    ids = tokenizer.encode('a<|endoftext|>b')
    assert end not in ids and tokenizer.decode(ids) == 'a<|endoftext|>b'


def test_a_prompt_of_a_tokenizer_without_end_of_text_is_plain_text():
    tokenizer = CharTokenizer.train('<|endoftext|>')
    assert (
        encode_prompt(tokenizer, '<|endoftext|>', '--start')
        == tokenizer.encode('<|endoftext|>').tolist()
    )


@pytest.mark.parametrize('tokenizer', [ByteTokenizer(), Gpt2Tokenizer()])
def test_what_utf8_cannot_hold_is_replaced_and_half_characters_are_shown(small_gpt2, tokenizer):
    assert tokenizer.decode(tokenizer.encode('a\ud800b\ud83d\ude42')) == 'a\ufffdb🙂'
    assert tokenizer.decode(tokenizer.encode('€')[:-1]) == '\ufffd'


@given(ANY_CHARACTER, st.booleans())
def test_a_char_tokenizer_comes_back_from_a_json_file(tmp_path_factory, text, has_end_of_text):
    path = tmp_path_factory.getbasetemp() / 'tokenizer.json'
    tokenizer = CharTokenizer.train(text, has_end_of_text)
    path.write_text(json.dumps(tokenizer.to_json()), encoding='utf-8')
    assert tokenizer_from_json(json.loads(path.read_text(encoding='utf-8'))) == tokenizer


@pytest.mark.parametrize('tokenizer', [ByteTokenizer(), Gpt2Tokenizer()])
def test_the_others_come_back_from_json(tokenizer):
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


def test_the_json_of_a_char_tokenizer_without_end_of_text_is_as_it_was():
    """Checkpoints and datasets of the first version are read."""
    assert CharTokenizer('abc').to_json() == {'kind': 'char', 'characters': 'abc'}


def test_surrogates_of_both_kinds_stay_apart_in_json():
    """In order they would be neighbors, which JSON reads as one character."""
    tokenizer = CharTokenizer.train('a\udc00\ud800\udbff\udfff\uffff🙂')
    assert tokenizer.vocab_size == 7
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


@pytest.mark.parametrize(
    'known', ['ac', 'acz']
)  # b is between two known characters, the smiley above all of them
def test_unknown_characters_are_named_with_the_place_of_the_first(known):
    with pytest.raises(UserError, match=r"'b', '🙂' \(the first at offset 2\)"):
        CharTokenizer(known).encode('ac🙂ab')


def test_without_a_vocabulary_every_character_is_unknown():
    assert CharTokenizer('').encode('').tolist() == []
    with pytest.raises(UserError, match="'x'.*offset 0"):
        CharTokenizer('').encode('x')


@pytest.mark.parametrize(
    'tokenizer, ids, last',
    [
        (CharTokenizer('abc'), [3], 2),
        (CharTokenizer('abc'), [0, -1], 2),
        (CharTokenizer('abc', True), [4], 3),
        (CharTokenizer('abc'), np.array([2**32 - 1], dtype=np.uint32), 2),
        (ByteTokenizer(), [257], 256),
        (Gpt2Tokenizer(), [50257], 50256),
        (Gpt2Tokenizer(), [-1], 50256),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(small_gpt2, tokenizer, ids, last):
    with pytest.raises(UserError, match=f'0 to {last}'):
        tokenizer.decode(ids)


def test_ids_of_any_integer_type_are_decoded():
    for ids in ([2, 0], np.array([2, 0], dtype=np.uint16), np.array([2, 0], dtype=np.int64)):
        assert CharTokenizer('abc').decode(ids) == 'ca'


@pytest.mark.parametrize(
    'data',
    [
        {'kind': 'runes', 'characters': 'abc'},
        {'kind': 'char'},
        {'kind': 'char', 'characters': ['a']},
        {'kind': 'char', 'characters': 'ba'},
        {'kind': 'char', 'characters': 'aa'},
        {'kind': 'char', 'characters': 'ab', 'has_end_of_text': 1},
        {},
        [],
        None,
    ],
)
def test_a_broken_description_is_refused(data):
    with pytest.raises(UserError, match='tokenizer'):
        tokenizer_from_json(data)


@pytest.mark.slow
@pytest.mark.parametrize('cached', [None, b'not the vocabulary'])
def test_gpt2_without_its_files_and_a_network_is_one_line_that_says_which_and_where(
    tmp_path, cached
):
    addresses = [
        f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        for name in ('vocab.bpe', 'encoder.json')
    ]
    names = [hashlib.sha1(address.encode()).hexdigest() for address in addresses]
    if cached:
        for name in names:
            (tmp_path / name).write_bytes(cached)
    began = time.monotonic()
    done = run_script(
        '-c',
        'from nib.errors import run_script; from nib.text.gpt2 import Gpt2Tokenizer; '
        'run_script(lambda argv: Gpt2Tokenizer().encode("x"))',
        env={**NO_NETWORK, 'TIKTOKEN_CACHE_DIR': str(tmp_path)},
    )
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and 'Traceback' not in done.stderr
    )
    for word in ('TIKTOKEN_CACHE_DIR', *addresses, *names):
        assert word in done.stderr
    assert time.monotonic() - began < 120


def test_a_tokenizer_needs_tiktoken_only_once_it_encodes():
    done = run_script(
        '-c',
        'import sys; from nib.text.tokenizer import *; Gpt2Tokenizer(); '
        'sys.exit("tiktoken" in sys.modules)',
        python=sys.executable,
    )
    assert done.returncode == 0, done.stderr
