"""Bits per byte: all nats of an evaluation over all bytes of the text that it has predicted."""

import math
import sys

import numpy as np
import pytest
import torch
from small_tokenizers import byte_fallback, qwen

from nib.machine.ranks import Ranks
from nib.text import hf_tokenizer, tokenizer
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import ByteTokenizer
from nib.text.train_bpe import train_bpe
from nib.tokens.batches import BatchLoader
from nib.tokens.dataset import open_dataset
from nib.tokens.write import write_dataset
from train import evaluate

BLOCK_SIZE = 16
DOCUMENTS = [
    'Ὦ Ῥωμαῖε! The thin theatre, the bell.\n' * 30,
    ' the cat 🙂 sat',
    'é' * 7,
    'on the mat',
]


class Unigram(torch.nn.Module):
    """Predicts each token with a fixed probability, whatever comes before it."""

    def __init__(self, probabilities: np.ndarray):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, x, y):
        logits = self.logits.expand(y.numel(), -1)
        return torch.nn.functional.cross_entropy(logits, y.flatten())


def write(folder, encoder, documents=DOCUMENTS):
    pieces = [('train', 'the cat ' * 30, True)]
    pieces += [('val', text, True) for text in documents]
    write_dataset(folder, lambda start: iter(pieces[start:]), encoder, {})
    return open_dataset(folder, BLOCK_SIZE)


def whole_loss(data, probabilities) -> float:
    batches = BatchLoader(data.train, BLOCK_SIZE, 3, 0, 1).eval_batches(data.val)
    return evaluate(Unigram(probabilities), batches, torch.autocast('cpu', enabled=False), Ranks())


def make(kind, documents):
    match kind:
        case 'char':
            characters = ''.join(sorted({*''.join(documents), *'the cat '}))
            return tokenizer.CharTokenizer(characters, has_end_of_text=True)
        case 'byte':
            return ByteTokenizer()
        case 'gpt2':
            return Gpt2Tokenizer()
        case 'bpe':
            return train_bpe(documents, 280)
        case 'file':
            return HfTokenizer.read(byte_fallback().to_str(), '</s>')


@pytest.mark.parametrize('kind', ['char', 'byte', 'gpt2', 'bpe', 'file'])
@pytest.mark.parametrize('tail', ['', ' cut in the middle of 🙂🙂'])
def test_they_are_the_nats_over_the_bytes_of_the_predicted_tokens(small_gpt2, tmp_path, kind, tail):
    encoder = make(kind, [*DOCUMENTS, 'in the middle of'])
    data = write(tmp_path, encoder, [*DOCUMENTS[:-1], DOCUMENTS[-1] + tail.replace('cut', 'sat')])
    probabilities = np.arange(1, data.vocab_size + 1) / np.arange(1, data.vocab_size + 1).sum()
    predicted = data.val[1 : 1 + (len(data.val) - 1) // BLOCK_SIZE * BLOCK_SIZE].tolist()
    nats = -sum(math.log(probabilities[token]) for token in predicted)
    n_bytes, begins = 0, False
    for token in predicted:  # counted token by token; a document has no bytes but its own
        is_mark = token == encoder.end_of_text or kind == 'file' and token in encoder.first_ids
        is_space_added = kind == 'file' and begins  # by SentencePiece
        n_bytes += 0 if is_mark else len(encoder.decode_bytes([token])) - is_space_added
        begins = is_mark
    loss = whole_loss(data, probabilities)
    bits = data.bits_per_byte(loss, block_size=BLOCK_SIZE)
    assert bits == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert f'({bits:.4f} bits per byte)' in data.describe_loss(loss, BLOCK_SIZE)
    # A sample of windows is taken to have the bytes per token of the whole split, and says so.
    counts = data.meta['splits']['val']
    sampled = loss / math.log(2) * counts['tokens'] / counts['bytes']
    assert data.bits_per_byte(loss) == pytest.approx(sampled, rel=1e-6)
    assert f'(about {sampled:.4f} bits per byte)' in data.describe_loss(loss)


def test_a_uniform_guess_among_bytes_has_eight(tmp_path):
    pieces = [(split, ''.join(DOCUMENTS), False) for split in ('train', 'val')]
    write_dataset(tmp_path, lambda start: iter(pieces[start:]), ByteTokenizer(), {})
    data = open_dataset(tmp_path, BLOCK_SIZE)
    uniform = np.array([1 / 256] * 256 + [1e-300])  # the end-of-text token never comes
    loss = whole_loss(data, uniform)
    assert data.bits_per_byte(loss, block_size=BLOCK_SIZE) == pytest.approx(8, rel=1e-6)
    assert '(8.0000 bits per byte)' in data.describe_loss(loss)  # every token has one byte


def test_characters_have_the_bytes_that_they_have_in_utf8(tmp_path):
    text = 'a€' + 'é' * 32 + '🙂🙂'  # predicted: € and 31 é; neither a nor what follows
    data = write(tmp_path, make('char', [text]), [text])
    uniform = np.full(data.vocab_size, 1 / data.vocab_size)
    bits = data.bits_per_byte(whole_loss(data, uniform), block_size=BLOCK_SIZE)
    assert bits == pytest.approx(32 * math.log2(data.vocab_size) / (3 + 31 * 2), rel=1e-6)


def test_normalization_does_not_change_the_bytes_of_the_text(tmp_path):
    encoder = HfTokenizer.read(qwen().to_str())
    text = 'xe\u0301' * 99 + 'x'  # e and an accent: three bytes, which NFC makes two
    data = write(tmp_path, encoder, [text])
    left = data.val[1 + (len(data.val) - 1) // BLOCK_SIZE * BLOCK_SIZE :]
    shown = encoder.decode_bytes(left).removesuffix(b'<|endoftext|>')
    n_bytes = len(text.encode()) - 1 - len(shown)
    predicted = (len(data.val) - 1) // BLOCK_SIZE * BLOCK_SIZE
    bits = data.bits_per_byte(math.log(2), block_size=BLOCK_SIZE)
    assert bits == pytest.approx(predicted / n_bytes, rel=1e-6)


def test_without_the_vocabulary_they_are_an_estimate(small_gpt2, tmp_path, monkeypatch):
    for number, encoder in enumerate((Gpt2Tokenizer(), make('bpe', DOCUMENTS))):
        data = write(tmp_path / str(number), encoder)
        assert '(about ' not in data.describe_loss(1.0, BLOCK_SIZE)
        with monkeypatch.context() as missing:
            missing.setattr(tokenizer, 'is_gpt2_stored', lambda: False)
            missing.setitem(sys.modules, 'tokenizers', None)
            hf_tokenizer._load.cache_clear()
            assert '(about ' in data.describe_loss(1.0, BLOCK_SIZE)
