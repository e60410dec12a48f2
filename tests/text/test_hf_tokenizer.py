"""Tokenizers of tokenizer.json: the tokens of transformers, and bytes token by token."""

import json
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CORPUS, byte_fallback, byte_level, metaspace
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nib.errors import UserError
from nib.hub.tokenizer import write_tokenizer
from nib.text import documents, hf_tokenizer
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import encode_prompt, tokenizer_from_json
from nib.tokens import borrow

BUILT = {'byte_level': byte_level(), 'byte_fallback': byte_fallback(), 'metaspace': metaspace()}
ENDS = {'byte_level': '<|end|>', 'byte_fallback': '</s>', 'metaspace': '</s>'}
OURS = {name: HfTokenizer.read(built.to_str(), ENDS[name]) for name, built in BUILT.items()}
THEIRS = {name: PreTrainedTokenizerFast(tokenizer_object=built) for name, built in BUILT.items()}

each_kind = pytest.mark.parametrize('kind', BUILT)
# What the tokenizers treat differently: special tokens, ▁, spaces, bytes, names of bytes.
texts = st.lists(
    st.sampled_from([*' \n\tatcé🙂▁Ġ1', '  ', '\0', '<0x41>', '<s>', '<|begin|>', 'née', 'the cat'])
    | st.characters(exclude_categories=['Cs'])
).map(''.join)


@each_kind
@settings(max_examples=40)
@given(text=texts)
def test_ids_and_texts_equal_those_of_transformers(kind, text):
    ids = OURS[kind].encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == THEIRS[kind].encode(text, add_special_tokens=False)
    if 'née' not in text:  # ByteLevel takes é, in an added token, for the name of a byte
        assert OURS[kind].decode(ids) == THEIRS[kind].decode(ids)
    if kind == 'metaspace' and text.startswith(' '):
        return  # as in the library, the first space is taken for the one that encoding adds
    if kind == 'byte_level' or '▁' not in text and '<s>' not in text:
        assert OURS[kind].decode(ids) == text


@each_kind
@settings(max_examples=40)
@given(text=texts)
def test_the_bytes_of_single_tokens_are_those_of_the_whole(kind, text):
    ours = OURS[kind]
    ids = ours.encode(text)
    whole = ours.decode_bytes(ids)
    assert b''.join(ours.decode_bytes([number]) for number in ids) == whole
    assert whole.decode().removeprefix(' ' if ours.adds_space else '') == ours.decode(ids)


@each_kind
def test_special_and_added_tokens_are_tokens_and_characters_on_request(kind):
    ours = OURS[kind]
    end = ENDS[kind]
    assert ours.end_of_text == THEIRS[kind].convert_tokens_to_ids(end)
    assert ours.encode(f'a{end}')[-1] == ours.end_of_text
    assert ours.decode([ours.end_of_text]) == '<|endoftext|>'  # as with every other tokenizer
    as_characters = tokenizer_from_json(ours.to_json() | {'spells_end_of_text': True})
    assert ours.end_of_text not in as_characters.encode(f'a{end}')
    assert as_characters.decode(as_characters.encode(f'a{end}')) == f'a{end}'


@each_kind
def test_a_prompt_begins_as_with_transformers(kind):
    ids = encode_prompt(OURS[kind], 'the cat', '--start')
    assert ids == THEIRS[kind].encode('the cat')
    after_an_end = encode_prompt(OURS[kind], 'a<|endoftext|>the cat', '--start')
    assert after_an_end[-len(ids) - 1 :] == [OURS[kind].end_of_text, *ids]


@each_kind
def test_documents_are_separated_by_the_end_and_the_beginning_of_text(kind):
    ours, theirs = OURS[kind], THEIRS[kind]
    ids = ours.encode_texts([('the cat', True), (' the dog', True), ('sat', False)])
    expected = [*theirs.encode('the cat'), ours.end_of_text, *theirs.encode(' the dog')]
    expected += [ours.end_of_text, *theirs.encode('sat')]
    assert [*ours.first_ids, *ids] == expected


@each_kind
@pytest.mark.parametrize('space', [' ', '\n'])
def test_pieces_of_a_document_give_the_tokens_of_the_whole(kind, space):
    text = f'the cat,{space}sat' * (documents.PIECE // 4)
    pieces = list(documents.cut([(text, True)]))
    assert len(pieces) > 2
    expected = OURS[kind].encode_texts([(text, True)])
    assert np.array_equal(OURS[kind].encode_texts(pieces), expected)


@each_kind
def test_it_comes_back_from_json_and_pickle_and_is_loaded_once(kind):
    described = json.loads(json.dumps(OURS[kind].to_json()))
    back = tokenizer_from_json(described)
    assert back == OURS[kind] == pickle.loads(pickle.dumps(back))
    assert back.content == BUILT[kind].to_str()
    assert back._loaded()[0] is OURS[kind]._loaded()[0]


def test_gpt2_as_a_file_has_gpt2s_ids(real_gpt2, tmp_path):
    write_tokenizer(tmp_path, Gpt2Tokenizer(), 64)
    ours = borrow.read_tokenizer(str(tmp_path / 'tokenizer.json'))
    assert isinstance(ours, HfTokenizer) and ours.end_of_text == Gpt2Tokenizer.end_of_text
    pieces = [(f'{CORPUS[0]} \n\n\ta {number}', number % 3 == 0) for number in range(100)]
    assert np.array_equal(ours.encode_texts(pieces), Gpt2Tokenizer().encode_texts(pieces))


def test_invalid_utf8_and_lone_surrogates_are_replaced():
    for ours in OURS.values():
        assert ours.encode('a\ud800').tolist() == ours.encode('a\ufffd').tolist()
        assert ours.decode(ours.encode('🙂')[:-1]) == '\ufffd'


def test_truncation_and_padding_of_the_file_do_not_apply():
    built = byte_level()
    built.enable_truncation(2)
    built.enable_padding(length=50)
    ours = HfTokenizer.read(built.to_str())
    assert ours.encode(CORPUS[0]).tolist() == OURS['byte_level'].encode(CORPUS[0]).tolist()


def test_gaps_between_ids_and_ids_outside_the_vocabulary():
    described = json.loads(byte_level().to_str())
    described['added_tokens'][-1]['id'] += 5
    ours = HfTokenizer.read(json.dumps(described))
    size = BUILT['byte_level'].get_vocab_size()
    assert ours.vocab_size in (size, size + 5)
    assert ours.decode(range(ours.vocab_size))
    with pytest.raises(UserError, match='the vocabulary has ids 0 to'):
        ours.decode([ours.vocab_size])


def test_what_cannot_be_used_is_refused_in_one_line():
    wordpiece = Tokenizer(models.WordPiece({'a': 0, '##b': 1}, unk_token='a'))
    wordpiece.decoder = decoders.WordPiece()
    huge = json.loads(byte_level().to_str())
    huge['model']['vocab']['x'] = 1 << 31
    for content, words in (
        ('{', 'not a valid tokenizer.json'),
        ('[]', 'not a valid tokenizer.json'),
        (wordpiece.to_str(), "the decoder 'WordPiece'"),
        (Tokenizer(models.BPE()).to_str(), 'the decoder None'),
        (json.dumps(huge), 'its largest id is 2,147,483,648'),
    ):
        with pytest.raises(UserError, match=words) as raised:
            HfTokenizer.read(content)
        assert '\n' not in str(raised.value)
    described = OURS['byte_level'].to_json()
    with pytest.raises(UserError, match='its end_of_text is 99999'):
        tokenizer_from_json(described | {'end_of_text': 99999})
    with pytest.raises(UserError, match='but vocab_size is 7'):
        tokenizer_from_json(described | {'vocab_size': 7}).decode([0])


def test_without_the_library_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    (tmp_path / 'tokenizer.json').write_text(BUILT['byte_level'].to_str())
    hf_tokenizer._load.cache_clear()
    with pytest.raises(UserError, match='pip install tokenizers'):
        borrow.read_tokenizer(str(tmp_path))
    described = tokenizer_from_json(OURS['byte_level'].to_json())  # enough to train
    assert described.vocab_size == OURS['byte_level'].vocab_size


def test_the_end_of_text_is_the_token_that_the_files_of_a_model_name(tmp_path):
    (tmp_path / 'tokenizer.json').write_text(BUILT['byte_level'].to_str())

    def end():
        return borrow.read_tokenizer(str(tmp_path)).end_of_text

    assert end() is None
    (tmp_path / 'config.json').write_text('{"eos_token_id": 1}')
    assert end() == 1
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [0, 1]}')
    assert end() == 0
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<|begin|>"}}')
    assert end() == 1
    assert borrow.read_tokenizer(str(tmp_path / 'tokenizer.json')).end_of_text == 1
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "absent"}')
    assert end() is None
