"""GPT-2's tokenizer for tests: the real one if its files exist, and a small one without files."""

import pytest

from nib.errors import UserError
from nib.text import gpt2, tokenizer

MERGES = [
    b'th',
    b'the',
    b' t',
    b' the',
    b'in',
    b' a',
    b'\n\n',
    b'  ',
    b'    ',
    b're',
    b'\xe2\x82',
    b' b',
    b' be',
]


@pytest.fixture(scope='session')
def real_gpt2():
    """Skips a test if GPT-2's two files are missing and cannot be downloaded."""
    try:
        gpt2.load_gpt2()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def small_gpt2(monkeypatch):
    """Replaces GPT-2's vocabulary, in this process, by all bytes and a few merges.

    The code and the rules for splitting a text are the same.
    """
    import tiktoken  # which is missing on a bare machine with a GPU
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {bytes([byte]): byte for byte in range(256)} | {
        merge: 256 + rank for rank, merge in enumerate(MERGES)
    }
    small = tiktoken.Encoding(
        'small',
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={'<|endoftext|>': 50256},
    )
    monkeypatch.setattr(gpt2, 'load_gpt2', lambda: small)
    for module in (gpt2, tokenizer):
        monkeypatch.setattr(module, 'is_gpt2_stored', lambda: True)
