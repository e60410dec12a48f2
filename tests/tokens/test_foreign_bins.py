"""Bins that other programs have made for nanoGPT, with a vocabulary of their own or none."""

import collections
import pickle

import numpy as np
import pytest
from conftest import SMALL_RUN

from nib.errors import UserError
from nib.machine.ranks import Ranks
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.tokenizer import CharTokenizer
from nib.text.vocabulary import IdTokenizer, VocabularyTokenizer
from nib.tokens.dataset import open_dataset
from nib.tokens.find import open_or_prepare

WORDS = ['the', 'cat', 'sat', '\n']


def make(folder, ids, meta=None, dtype='<u2'):
    folder.mkdir(exist_ok=True)
    for split in ('train', 'val'):
        np.asarray(ids, dtype).tofile(folder / f'{split}.bin')
    if meta is not None:
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


def both(tokens):
    return {
        'vocab_size': len(tokens),
        'itos': dict(enumerate(tokens)),
        'stoi': {token: number for number, token in enumerate(tokens)},
    }


@pytest.mark.parametrize(
    'meta, tokenizer',
    [
        ({'vocab_size': 4}, IdTokenizer(4)),
        ({'vocab_size': 4, 'note': 'chess'}, IdTokenizer(4)),
        (both('abcd'), CharTokenizer('abcd')),
        (both('dcba'), VocabularyTokenizer(tuple('dcba'))),
        (both(WORDS), VocabularyTokenizer(tuple(WORDS))),
        ({'itos': WORDS}, VocabularyTokenizer(tuple(WORDS))),
        ({'stoi': both(WORDS)['stoi']}, VocabularyTokenizer(tuple(WORDS))),
        (collections.OrderedDict(both(WORDS)), VocabularyTokenizer(tuple(WORDS))),
        (both([60, 62, 64, 65]), VocabularyTokenizer(('60', '62', '64', '65'))),  # notes
        (both(['1', 1, 2, 3]), IdTokenizer(4)),  # texts that cannot be told apart
        (both(WORDS) | {'vocab_size': 6}, VocabularyTokenizer((*WORDS, '<4>', '<5>'))),  # padded
        ({'vocab_size': 50257}, Gpt2Tokenizer()),
    ],
)
def test_a_meta_pkl_says_the_vocabulary(tmp_path, meta, tokenizer):
    data = open_dataset(make(tmp_path, [0, 1, 2, 3] * 20, meta), 16)
    assert data.tokenizer == tokenizer and data.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize('size, dtype', [(65_536, '<u2'), (65_537, '<u4')])
def test_a_large_vocabulary_has_wide_ids(tmp_path, size, dtype):
    ids = [size - 1, 0, 40_000, 5] * 20
    data = open_dataset(make(tmp_path, ids, {'vocab_size': size}, dtype), 16)
    assert data.train.tolist() == ids


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match='token id 3 at offset 3, but the vocabulary has 3 tokens'):
        open_dataset(make(tmp_path, [0, 1, 2, 3] * 20, {'vocab_size': 3}), 16)


@pytest.mark.parametrize(
    'meta, words',
    [
        ({'vocab_size': 3}, 'the vocabulary has 3 tokens'),
        ({'vocab_size': np.int64(4)}, 'refused .*numpy.*: convert NumPy values with int()'),
        (
            {'itos': np.array(WORDS)},
            r'refused .*: convert NumPy values with .* or \.tolist\(\); expected a dict',
        ),
        ({'decode': print}, 'refused to import builtins.print, which could run code; expected'),
    ],
)
def test_a_wrong_meta_pkl_can_be_replaced_by_a_flag_as_the_message_says(tmp_path, meta, words):
    make(tmp_path, [0, 1, 2, 3] * 20, meta)
    with pytest.raises(UserError, match=words) as error:
        open_dataset(tmp_path, 16)
    assert str(error.value).count('--vocab_size') == 1
    assert str(error.value).endswith(
        '; correct meta.pkl, or remove it and set --vocab_size=N, its number of tokens'
    )
    (tmp_path / 'meta.pkl').unlink()
    assert open_dataset(tmp_path, 16, vocab_size=4).tokenizer == IdTokenizer(4)


# Without a description: n ids, drawn evenly from so many.
@pytest.mark.parametrize(
    'n, size', [(20, 40), (100, 500), (1_000, 1_000), (30_000, 1_000), (1_000, 32_000)]
)
def test_bins_that_are_not_gpt2_s_tokens_are_refused_until_a_flag_says_what_they_are(
    tmp_path, n, size
):
    ids = np.random.default_rng(0).integers(size, size=n)
    make(tmp_path, ids)
    with pytest.raises(UserError, match=rf'from {ids.min()} to {ids.max()}, .*--vocab_size=N'):
        open_dataset(tmp_path, 16)
    data = open_dataset(tmp_path, 16, vocab_size=size)
    assert data.tokenizer == IdTokenizer(size)
    other = open_dataset(tmp_path, 16, vocab_size=50257)
    assert other.tokenizer == Gpt2Tokenizer() and other.fingerprint != data.fingerprint
    with pytest.raises(UserError, match='the vocabulary has 7 tokens'):
        open_dataset(tmp_path, 16, vocab_size=7)


def test_texts_in_gpt2_s_tokens_are_taken_for_what_they_are(real_gpt2, tmp_path):
    """Also short, repetitive and foreign ones, and code."""
    texts = [
        'To be, or not to be: that is the question.\n' * 20,
        ''.join(f'{number}+{number % 13}={number + number % 13}\n' for number in range(3000)),
        'Все счастливые семьи похожи друг на друга. ' * 50,
        '天地玄黄,宇宙洪荒。' * 500,
        'for i in range(10):\n    print(i)\n' * 100,
    ]
    for text in texts:
        make(tmp_path, Gpt2Tokenizer().encode(text))
        assert open_dataset(tmp_path, 16).tokenizer == Gpt2Tokenizer()


def test_a_flag_cannot_contradict_a_description(tmp_path):
    make(tmp_path, [0, 1, 2, 3] * 20, both(WORDS))
    assert open_dataset(tmp_path, 16, vocab_size=4).vocab_size == 4
    with pytest.raises(UserError, match='vocabulary of 4 tokens, but vocab_size is 5'):
        open_dataset(tmp_path, 16, vocab_size=5)


@pytest.fixture
def trained(tmp_path, run_main):
    """Trains on a dataset of these ids; returns a function that samples from the model."""
    import train as training

    def train_and_sample(ids, meta, *flags):
        make(tmp_path / 'foreign', ids, meta)
        out_dir = f'--out_dir={tmp_path / "run"}'
        small = [*SMALL_RUN, f'--data_dir={tmp_path}', '--dataset=foreign', out_dir]
        done = run_main(training, *small, '--sample_tokens=4', *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout, lambda *start: run_main(
            'sample.py',
            out_dir,
            '--device=cpu',
            *(f'--start={text}' for text in start),
            '--temperature=0',
            '--max_new_tokens=3',
            '--num_samples=1',
        )

    return train_and_sample


def test_a_model_of_words_learns_and_writes_them(trained):
    said, sample = trained([0, 1, 2, 3] * 200, both(WORDS))
    assert 'vocabulary 4' in said and '--- sample\n the cat sat\n the cat' in said
    assert sample('the cat').stdout == 'the cat sat\n the\n'
    assert "'dog'" in sample('the dog').stderr


def test_a_model_without_texts_is_prompted_with_ids(trained):
    said, sample = trained([5, 6, 7, 8] * 200, None, '--vocab_size=9')
    assert '--- sample\n 5 6 7 8' in said
    assert sample('5 6').stdout == '5 6 7 8 5\n'
    assert 'type ids from 0 to 8' in sample('hello').stderr
    assert sample().stdout.startswith('0 ')  # there is no line break to start from


def said_of(tmp_path, vocab_size, meta=None):
    ids = np.random.default_rng(0).integers(50257, size=100)
    make(tmp_path / 'foreign', ids, meta)
    said = []
    values = {
        'init_from': 'scratch',
        'dataset': 'foreign',
        'data_dir': str(tmp_path),
        'fallback_dataset': '',
        'prepare_dataset': False,
        'block_size': 16,
        'vocab_size': vocab_size,
    }
    open_or_prepare(values, Ranks(), said.append)
    return said


def test_what_is_assumed_is_said(tmp_path):
    (line,) = said_of(tmp_path, vocab_size=0)
    assert "its ids are assumed to be GPT-2's tokens" in line
    assert said_of(tmp_path, vocab_size=50257) == []  # nothing is assumed
    assert said_of(tmp_path, vocab_size=50305) == []


def test_a_padded_vocabulary_of_gpt2_has_no_text_and_says_so(tmp_path):
    (line,) = said_of(tmp_path, vocab_size=50304)
    assert 'samples will be ids' in line and 'leave vocab_size out' in line
    (line,) = said_of(tmp_path, vocab_size=0, meta={'vocab_size': 50304})
    assert f'leave {tmp_path / "foreign" / "meta.pkl"} out' in line
