"""Datasets on disk: what is written is read back, and a damaged one is refused before the first step."""
import hashlib
import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nib import corpus
from nib.errors import UserError
from nib.tokenizer import CharTokenizer

TEXT = 'To be, or not to be: that is the question.\n' * 20
BLOCK_SIZE = 16


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'hamlet'
    corpus.write_char_dataset(folder, TEXT, {'text': 'Hamlet'})
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / 'hamlet')


def change_meta(folder, **changes):
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, **changes}))


def change_split(folder, split, **changes):
    splits = json.loads((folder / 'meta.json').read_text())['splits']
    change_meta(folder, splits={**splits, split: {**splits[split], **changes}})


def replace_bin(folder, split, ids, dtype='<u2'):
    """Other tokens, with a meta.json that agrees to them."""
    content = np.array(ids, dtype=dtype).tobytes()
    (folder / f'{split}.bin').write_bytes(content)
    change_split(folder, split, tokens=len(ids), sha256=hashlib.sha256(content).hexdigest())


def test_a_dataset_opens_as_it_was_written(whole):
    data = corpus.open_dataset(whole, BLOCK_SIZE)
    cut = int(len(TEXT) * 0.9)
    assert data.name == 'hamlet' and data.vocab_size == len(set(TEXT)) and data.meta['source'] == {'text': 'Hamlet'}
    assert data.tokenizer.decode(data.train) == TEXT[:cut] and data.tokenizer.decode(data.val) == TEXT[cut:]
    assert isinstance(data.train, np.memmap) and data.split('train') is data.train and data.split('val') is data.val
    assert data.bits_per_byte(math.log(2), 'train') == pytest.approx(1)


def test_bins_are_plain_little_endian_ids_as_nanogpt_has_them(whole):
    characters = sorted(set(TEXT))
    expected = b''.join(characters.index(character).to_bytes(2, 'little') for character in TEXT)
    assert (whole / 'train.bin').read_bytes() + (whole / 'val.bin').read_bytes() == expected
    assert sorted(path.name for path in whole.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


def test_bits_per_byte_counts_utf8_bytes(tmp_path):
    corpus.write_char_dataset(tmp_path, 'aé€🙂' * 100, {})
    data = corpus.open_dataset(tmp_path, BLOCK_SIZE)
    assert data.bits_per_byte(math.log(2), 'train') == data.bits_per_byte(math.log(2)) == pytest.approx(4 / (1 + 2 + 3 + 4))


@pytest.mark.parametrize('vocab_size, dtype', [(65_536, 'uint16'), (65_537, 'uint32')])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    characters = ''.join(map(chr, range(vocab_size)))
    tokenizer = CharTokenizer(characters)
    corpus.write_dataset(tmp_path, {'train': characters, 'val': characters[-40:]}, tokenizer, {})
    data = corpus.open_dataset(tmp_path, BLOCK_SIZE)
    assert data.meta['dtype'] == data.train.dtype.name == dtype
    assert data.train.tolist() == list(range(vocab_size)) and data.val[-1] == vocab_size - 1


@given(st.integers(min_value=20, max_value=10_000))
def test_a_text_is_cut_where_nanogpt_cuts_it(length):
    text = ('0123456789' * 1000)[:length]
    train, val = corpus.split_text(text)
    assert train + val == text and len(train) == int(length * 0.9)


@pytest.mark.parametrize('text', ['', 'a', 'abc'])
def test_a_text_too_short_to_split_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=f'{len(text)} characters'):
        corpus.write_char_dataset(tmp_path / 'short', text, {})
    assert not corpus.is_prepared(tmp_path / 'short')


def test_the_fingerprint_is_of_the_tokens_and_nothing_else(tmp_path):
    def fingerprint(name, text, source):
        corpus.write_char_dataset(tmp_path / name, text, source)
        return corpus.open_dataset(tmp_path / name, BLOCK_SIZE).fingerprint

    first = fingerprint('first', TEXT, {})
    assert fingerprint('second', TEXT, {'text': 'from elsewhere'}) == first
    assert fingerprint('third', TEXT[1:], {}) != first
    assert fingerprint('fourth', TEXT[:-1] + '!', {}) != first


def test_writing_again_takes_the_place_of_the_old(folder):
    corpus.write_char_dataset(folder, TEXT.upper(), {})
    assert corpus.open_dataset(folder, BLOCK_SIZE).tokenizer.characters == ''.join(sorted(set(TEXT.upper())))


def test_writing_that_is_cut_short_leaves_no_dataset_that_opens(folder):
    """The new train.bin is there, the old val.bin too: without meta.json nobody takes them for one dataset."""
    with pytest.raises(UserError, match='vocabulary'):
        corpus.write_dataset(folder, {'train': 'aaaa', 'val': 'b'}, CharTokenizer('a'), {})
    assert sorted(path.name for path in folder.iterdir()) == ['train.bin', 'val.bin']
    assert not corpus.is_prepared(folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'taken').write_text('a file')
    with pytest.raises(UserError, match='taken.*--out_dir'):
        corpus.write_char_dataset(tmp_path / 'taken', TEXT, {})


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.json'])
def test_a_dataset_lacking_a_file_is_not_prepared(folder, name):
    assert corpus.is_prepared(folder)
    (folder / name).unlink()
    assert not corpus.is_prepared(folder)


DAMAGE = {
    'no folder': (shutil.rmtree, 'train.bin is missing'),
    'no train.bin': (lambda folder: (folder / 'train.bin').unlink(), 'train.bin is missing'),
    'no val.bin': (lambda folder: (folder / 'val.bin').unlink(), 'val.bin is missing'),
    'no meta.json': (lambda folder: (folder / 'meta.json').unlink(), 'meta.json is missing'),
    'empty meta': (lambda folder: (folder / 'meta.json').write_bytes(b''), 'meta.json is not JSON'),
    'half a meta': (lambda folder: (folder / 'meta.json').write_bytes((folder / 'meta.json').read_bytes()[:99]),
                    'meta.json is not JSON'),
    'meta not UTF-8': (lambda folder: (folder / 'meta.json').write_bytes(b'"\xff"'), 'meta.json is not JSON'),
    'meta a list': (lambda folder: (folder / 'meta.json').write_text('[1]'), 'meta.json does not describe'),
    'another format': (lambda folder: change_meta(folder, format=2), 'meta.json does not describe.*format 1'),
    'unknown dtype': (lambda folder: change_meta(folder, dtype='int8'), 'meta.json does not describe'),
    'mistyped vocab_size': (lambda folder: change_meta(folder, vocab_size='20'), 'meta.json does not describe'),
    'no splits': (lambda folder: change_meta(folder, splits={}), 'meta.json does not describe'),
    'mistyped tokens': (lambda folder: change_split(folder, 'val', tokens=None), 'meta.json does not describe'),
    'unknown tokenizer': (lambda folder: change_meta(folder, tokenizer={'kind': 'runes'}), "meta.json: .*'runes'"),
    'broken tokenizer': (lambda folder: change_meta(folder, tokenizer={}), 'meta.json: the tokenizer is broken'),
    'vocab_size lies': (lambda folder: change_meta(folder, vocab_size=99), 'meta.json: vocab_size 99'),
    'odd size': (lambda folder: (folder / 'train.bin').write_bytes(b'abc'), 'train.bin has 3 bytes.*2-byte'),
    'empty bin': (lambda folder: (folder / 'val.bin').write_bytes(b''), 'val.bin has 0 bytes'),
    'cut bin': (lambda folder: (folder / 'train.bin').write_bytes(bytes(100)), 'train.bin holds 50 tokens.*774'),
    'changed bin': (lambda folder: (folder / 'val.bin').write_bytes(bytes((folder / 'val.bin').stat().st_size)),
                    'val.bin.*SHA-256'),
    'digest lies': (lambda folder: change_split(folder, 'train', sha256='0' * 64), 'train.bin.*SHA-256'),
    'id too large': (lambda folder: replace_bin(folder, 'val', [0, 1] * 20 + [500, 501]),
                     'val.bin: token id 500 at offset 40'),
}


@pytest.mark.parametrize('damage, said', DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_dataset_is_refused_in_one_line_with_the_remedy(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=f'{said}.*prepare.py') as error:
        corpus.open_dataset(folder, BLOCK_SIZE)
    assert '\n' not in str(error.value)


def test_a_split_shorter_than_a_block_is_refused(folder):
    replace_bin(folder, 'val', [1] * BLOCK_SIZE)
    with pytest.raises(UserError, match='val.bin holds 16 tokens.*--block_size'):
        corpus.open_dataset(folder, BLOCK_SIZE)
    replace_bin(folder, 'val', [1] * (BLOCK_SIZE + 1))
    assert len(corpus.open_dataset(folder, BLOCK_SIZE).val) == BLOCK_SIZE + 1


def test_bins_are_checked_in_pieces_to_the_last_token(folder, monkeypatch):
    """The pieces are made small, so that the bad id is in the last of many."""
    monkeypatch.setattr(corpus, '_CHUNK', 7)
    corpus.open_dataset(folder, BLOCK_SIZE)
    replace_bin(folder, 'train', [0] * 700 + [500])
    with pytest.raises(UserError, match='id 500 at offset 700'):
        corpus.open_dataset(folder, BLOCK_SIZE)


def test_a_large_bin_is_opened_without_reading_it_through(folder, monkeypatch):
    monkeypatch.setattr(corpus, 'CHECKED_BYTES', 100)
    replace_bin(folder, 'train', [500] * 700)
    assert corpus.open_dataset(folder, BLOCK_SIZE).train[0] == 500
