"""Datasets: what is written is read back; damaged ones are rejected before the first step."""

import hashlib
import json
import math
import pickle
import shutil
import sys

import numpy as np
import pytest

from benchmarks import loading
from benchmarks.measure import in_fresh_process
from nib.errors import UserError
from nib.text import documents
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.tokenizer import ByteTokenizer, CharTokenizer
from nib.text.vocabulary import VocabularyTokenizer
from nib.tokens import dataset, encode
from nib.tokens.batches import BatchLoader
from nib.tokens.write import write_char_dataset, write_dataset, write_text

TEXT = 'To be, or not to be: that is the question.\n' * 20
BLOCK_SIZE = 16


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'hamlet'
    write_char_dataset(folder, TEXT, {'text': 'Hamlet'})
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
    change_split(
        folder, split, tokens=len(ids), bytes=len(ids), sha256=hashlib.sha256(content).hexdigest()
    )


def test_a_dataset_opens_as_it_was_written(whole):
    data = dataset.open_dataset(whole, BLOCK_SIZE)
    cut = int(len(TEXT) * 0.9)
    assert (
        data.name == 'hamlet'
        and data.vocab_size == len(set(TEXT))
        and data.meta['source'] == {'text': 'Hamlet'}
    )
    assert (
        data.tokenizer.decode(data.train) == TEXT[:cut]
        and data.tokenizer.decode(data.val) == TEXT[cut:]
    )
    assert (
        isinstance(data.train, np.memmap)
        and data.split('train') is data.train
        and data.split('val') is data.val
    )
    assert data.bits_per_byte(math.log(2), 'train') == pytest.approx(1)


def test_bins_are_plain_little_endian_ids_as_nanogpt_has_them(whole):
    characters = sorted(set(TEXT))
    expected = b''.join(characters.index(character).to_bytes(2, 'little') for character in TEXT)
    assert (whole / 'train.bin').read_bytes() + (whole / 'val.bin').read_bytes() == expected
    assert sorted(path.name for path in whole.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


def test_bits_per_byte_counts_utf8_bytes(tmp_path):
    write_char_dataset(tmp_path, 'aé€🙂' * 100, {})
    data = dataset.open_dataset(tmp_path, BLOCK_SIZE)
    assert (
        data.bits_per_byte(math.log(2), 'train')
        == data.bits_per_byte(math.log(2))
        == pytest.approx(4 / (1 + 2 + 3 + 4))
    )


def split_pieces(train, val):
    return lambda start: [('train', train, False), ('val', val, False)][start:]


@pytest.mark.parametrize('vocab_size, dtype', [(65_536, 'uint16'), (65_537, 'uint32')])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    characters = ''.join(map(chr, range(vocab_size)))
    write_dataset(
        tmp_path, split_pieces(characters, characters[-40:]), CharTokenizer(characters), {}
    )
    data = dataset.open_dataset(tmp_path, BLOCK_SIZE)
    assert data.meta['dtype'] == data.train.dtype.name == dtype
    assert data.train.tolist() == list(range(vocab_size)) and data.val[-1] == vocab_size - 1


@pytest.mark.parametrize(
    'tokenizer', [CharTokenizer.train('abc', True), ByteTokenizer(), Gpt2Tokenizer()]
)
def test_documents_are_followed_by_the_end_of_text(small_gpt2, tmp_path, tokenizer):
    pieces = [
        ('train', 'ab', False),
        ('train', 'a', True),
        ('val', 'b', True),
        ('train', 'c', True),
    ]
    write_dataset(tmp_path, lambda start: pieces[start:], tokenizer, {})
    data = dataset.open_dataset(tmp_path, 1)
    assert data.tokenizer == tokenizer and data.vocab_size == tokenizer.vocab_size
    assert tokenizer.decode(data.train) == 'aba<|endoftext|>c<|endoftext|>'
    assert tokenizer.decode(data.val) == 'b<|endoftext|>'
    assert data.meta['splits']['train']['bytes'] == 4 and data.meta['splits']['val']['bytes'] == 1


def test_a_text_in_many_pieces_has_the_tokens_of_the_whole(small_gpt2, tmp_path, monkeypatch):
    whole = write_text(tmp_path / 'whole', TEXT, Gpt2Tokenizer(), {})
    monkeypatch.setattr(documents, 'PIECE', 50)
    monkeypatch.setattr(encode, 'BATCH', 100)
    monkeypatch.setattr(
        encode, 'SERIAL_BATCHES', 1000
    )  # the small vocabulary is in this process only
    assert write_text(tmp_path / 'pieces', TEXT, Gpt2Tokenizer(), {}) == whole
    assert whole['splits']['train']['tokens'] == len(
        Gpt2Tokenizer().encode(TEXT[: int(len(TEXT) * 0.9)])
    )


@pytest.mark.parametrize('text', ['', 'a', 'abc'])
def test_a_text_too_short_to_split_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=f'{len(text)} character'):
        write_char_dataset(tmp_path / 'short', text, {})
    assert not (tmp_path / 'short').exists()


def test_the_fingerprint_is_of_the_tokens_and_nothing_else(tmp_path):
    def fingerprint(name, text, source):
        write_char_dataset(tmp_path / name, text, source)
        return dataset.open_dataset(tmp_path / name, BLOCK_SIZE).fingerprint

    first = fingerprint('first', TEXT, {})
    assert fingerprint('second', TEXT, {'text': 'from elsewhere'}) == first
    assert fingerprint('third', TEXT[1:], {}) != first
    assert fingerprint('fourth', TEXT[:-1] + '!', {}) != first


def test_writing_again_takes_the_place_of_the_old(folder):
    write_char_dataset(folder, TEXT.upper(), {})
    assert dataset.open_dataset(folder, BLOCK_SIZE).tokenizer.characters == ''.join(
        sorted(set(TEXT.upper()))
    )


def test_a_text_that_cannot_be_encoded_leaves_the_old_dataset_as_it_was(folder):
    before = dataset.open_dataset(folder, BLOCK_SIZE).fingerprint
    with pytest.raises(UserError, match='vocabulary'):
        write_dataset(folder, split_pieces('aaaa', 'b'), CharTokenizer('a'), {})
    assert dataset.open_dataset(folder, BLOCK_SIZE).fingerprint == before
    assert sorted(path.name for path in folder.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('name', ['train.bin', 'val.bin'])
def test_a_dataset_lacking_a_bin_is_not_prepared(folder, name):
    assert dataset.is_prepared(folder)
    (folder / name).unlink()
    assert not dataset.is_prepared(folder)


def test_a_split_shorter_than_a_block_is_refused(folder):
    replace_bin(folder, 'val', [1] * BLOCK_SIZE)
    with pytest.raises(UserError, match='val.bin has 16 tokens.*--block_size'):
        dataset.open_dataset(folder, BLOCK_SIZE)
    replace_bin(folder, 'val', [1] * (BLOCK_SIZE + 1))
    assert len(dataset.open_dataset(folder, BLOCK_SIZE).val) == BLOCK_SIZE + 1


def test_bins_are_checked_in_pieces_to_the_last_token(folder, monkeypatch):
    """The pieces are made small, so that the bad id is in the last of many."""
    monkeypatch.setattr(dataset, '_CHUNK', 7)
    dataset.open_dataset(folder, BLOCK_SIZE)
    replace_bin(folder, 'train', [0] * 700 + [500])
    with pytest.raises(UserError, match='id 500 at offset 700'):
        dataset.open_dataset(folder, BLOCK_SIZE)


@pytest.fixture
def small_is_large(monkeypatch):
    """From 100 bytes on a bin is opened by four samples of five tokens."""
    for name, value in (('LARGE', 100), ('_SAMPLES', 4), ('_SAMPLE', 5)):
        monkeypatch.setattr(dataset, name, value)


def put_id(folder, place, id):
    ids = np.fromfile(folder / 'train.bin', '<u2')
    ids[place] = id
    ids.tofile(folder / 'train.bin')


@pytest.mark.parametrize('place', [0, 4, -1, -5])
def test_a_large_bin_with_a_bad_id_in_a_sample_is_refused(small_is_large, folder, place):
    put_id(folder, place, 500)
    with pytest.raises(
        UserError, match=f'train.bin: token id 500 at offset {place % int(len(TEXT) * 0.9)}'
    ):
        dataset.open_dataset(folder, BLOCK_SIZE)


def test_a_bad_id_between_the_samples_is_met_by_the_batch_that_holds_it(small_is_large, folder):
    put_id(folder, 100, 500)
    data = dataset.open_dataset(folder, BLOCK_SIZE)
    batches = BatchLoader(data.train, BLOCK_SIZE, 1, 1, 1, vocab_size=data.vocab_size)
    with pytest.raises(UserError, match='train.bin: token id 500 at offset 100'):
        for step in range(2 * batches.n_windows):
            batches.batch(step, 0)


def test_a_large_bin_with_holes_is_not_the_one_that_was_written(small_is_large, tmp_path):
    """An interrupted copy may leave zeros in place of the rest, and they are valid ids."""
    write_char_dataset(tmp_path, TEXT, {})
    put_id(tmp_path, slice(400, None), 0)
    with pytest.raises(UserError, match='train.bin is not the file that meta.json describes'):
        dataset.open_dataset(tmp_path, BLOCK_SIZE)


def test_a_large_dataset_opens_as_it_was_written_and_has_one_fingerprint_whoever_wrote_it(
    small_is_large, tmp_path
):
    write_char_dataset(tmp_path, TEXT, {})
    data = dataset.open_dataset(tmp_path, BLOCK_SIZE)
    assert data.bits_per_byte(math.log(2), 'train') == pytest.approx(1)
    (tmp_path / 'meta.json').unlink()
    (tmp_path / 'meta.pkl').write_bytes(
        pickle.dumps(
            {
                'vocab_size': data.vocab_size,
                'itos': dict(enumerate(data.tokenizer.characters)),
                'stoi': {
                    character: number for number, character in enumerate(data.tokenizer.characters)
                },
            }
        )
    )
    same = dataset.open_dataset(tmp_path, BLOCK_SIZE)
    assert (
        same.fingerprint == data.fingerprint and same.bits_per_byte(1.0) is None
    )  # nobody has counted the bytes
    put_id(tmp_path, -1, data.train[-1] ^ 1)
    assert dataset.open_dataset(tmp_path, BLOCK_SIZE).fingerprint != data.fingerprint


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != 'linux', reason='other systems write out the zeros of a sparse file'
)
def test_20_gb_cost_what_2_mb_cost(tmp_path):
    """Opens each size in its own process and reads 1,000 batches, which touch 49 MB of pages."""
    for name, n_bytes in loading.SIZES.items():
        loading.make_dataset(tmp_path / name, n_bytes)
    assert len(dataset.open_dataset(tmp_path / '20 GB', BLOCK_SIZE).train) == 10_000_000_000
    small, large = (
        in_fresh_process(loading.TIME_LOADING, str(tmp_path / name)) for name in loading.SIZES
    )
    assert large['ms to open it'] < small['ms to open it'] + 500
    assert large['ms training batch'] < small['ms training batch'] + 1
    assert large['memory of all that, MB'] < small['memory of all that, MB'] + 150


def test_how_to_make_a_dataset_anew_depends_on_what_makes_it(tmp_path):
    with pytest.raises(UserError, match='python3? data/shakespeare_char/prepare.py'):
        dataset.open_dataset(tmp_path / 'shakespeare_char', BLOCK_SIZE)
    with pytest.raises(
        UserError, match='python3? data/text/prepare.py --input=PATH --out_dir=.*notes'
    ):
        dataset.open_dataset(tmp_path / 'notes', BLOCK_SIZE)


# -- bins that nanoGPT made ------------------------------------------------------------------------

CHARACTERS = sorted(set(TEXT + 'é€'))
META = {
    'vocab_size': len(CHARACTERS),
    'itos': dict(enumerate(CHARACTERS)),
    'stoi': {character: number for number, character in enumerate(CHARACTERS)},
}


@pytest.fixture
def nanogpt(tmp_path):
    """What nanoGPT's data/shakespeare_char/prepare.py writes, of another text."""
    text = TEXT + 'é€'
    for split, part in (('train', TEXT), ('val', text[-50:])):
        np.array([META['stoi'][character] for character in part], dtype=np.uint16).tofile(
            tmp_path / f'{split}.bin'
        )
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(META))
    return tmp_path


def test_bins_of_nanogpt_with_characters_are_read_as_they_are(nanogpt):
    assert dataset.is_prepared(nanogpt)
    data = dataset.open_dataset(nanogpt, BLOCK_SIZE)
    assert data.vocab_size == len(CHARACTERS) and data.tokenizer == CharTokenizer(
        ''.join(CHARACTERS)
    )
    assert (
        data.tokenizer.decode(data.train) == TEXT
        and data.tokenizer.decode(data.val) == (TEXT + 'é€')[-50:]
    )
    assert data.bits_per_byte(math.log(2)) == pytest.approx(
        50 / (48 + 2 + 3)
    )  # é takes two bytes and € three
    assert sorted(path.name for path in nanogpt.iterdir()) == ['meta.pkl', 'train.bin', 'val.bin']


def test_bins_of_nanogpt_without_a_description_are_gpt2_tokens(nanogpt):
    (nanogpt / 'meta.pkl').unlink()
    np.array([50256, 0, 1] * 20, dtype=np.uint16).tofile(nanogpt / 'val.bin')
    data = dataset.open_dataset(nanogpt, BLOCK_SIZE)
    assert data.vocab_size == 50257 and data.tokenizer == Gpt2Tokenizer() and data.val[0] == 50256
    assert data.bits_per_byte(1.0) is None  # nobody has counted the bytes
    np.array([50257] * 20, dtype=np.uint16).tofile(nanogpt / 'val.bin')
    with pytest.raises(UserError, match='val.bin: token id 50257'):
        dataset.open_dataset(nanogpt, BLOCK_SIZE)


def test_the_same_tokens_have_the_same_fingerprint_whoever_wrote_them(nanogpt, tmp_path):
    text = TEXT + 'é€'
    write_dataset(tmp_path / 'own', split_pieces(TEXT, text[-50:]), CharTokenizer.train(text), {})
    assert (
        dataset.open_dataset(tmp_path / 'own', BLOCK_SIZE).fingerprint
        == dataset.open_dataset(nanogpt, BLOCK_SIZE).fingerprint
    )


def test_a_new_dataset_takes_the_place_of_nanogpt_s(nanogpt):
    """Its meta.pkl would be wrong about the new bins."""
    write_char_dataset(nanogpt, TEXT.upper(), {})
    assert dataset.open_dataset(nanogpt, BLOCK_SIZE).tokenizer == CharTokenizer.train(TEXT.upper())
    assert not (nanogpt / 'meta.pkl').exists()


@pytest.mark.parametrize('n', [17, 201])
def test_the_splits_of_a_text_of_words_are_whole_words(tmp_path, n, monkeypatch, run_main):
    """A part of a word may be another word of the vocabulary."""
    tokenizer = VocabularyTokenizer(('n1', 'n10', 'n100', '0', '00'))
    write_text(tmp_path, 'n100 ' * n, tokenizer, {})
    data = dataset.open_dataset(tmp_path, 1)
    assert data.train.tolist() + data.val.tolist() == [2] * n and len(data.val)
    monkeypatch.setattr(documents, 'PIECE', 50)
    (tmp_path / 'words.txt').write_text(' '.join(['n100'] * n))
    flags = [f'--input={tmp_path / "words.txt"}', f'--tokenizer={tmp_path}']
    done = run_main('data/text/prepare.py', *flags, f'--out_dir={tmp_path / "again"}')
    assert done.returncode == 0, done.stderr
    again = dataset.open_dataset(tmp_path / 'again', 1)
    assert again.train.tolist() + again.val.tolist() == [2] * n
