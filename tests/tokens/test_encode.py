"""Encoding on all cores: same ids and order as serially, few texts in memory, no process left."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import PATIENCE
from small_tokenizers import byte_fallback, byte_level, metaspace

from nib.errors import UserError
from nib.text import documents
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import ByteTokenizer, CharTokenizer
from nib.tokens import encode
from nib.tokens.encode import BATCH, SERIAL_BATCHES, SPLITS, encode_all, encode_batch

UINT16 = np.dtype('<u2')


class DyingTokenizer(ByteTokenizer):
    """Ends the process that uses it, unless that is the first one."""

    def encode(self, text):
        if text.startswith('last'):
            os._exit(1)
        return super().encode(text)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """On one, no process is started."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 1}, raising=False)


def pieces(count, size=BATCH):
    """Pieces of a batch each; every third one goes into val."""
    for number in range(count):
        yield ('train', 'train', 'val')[number % 3], f'{number} '.ljust(size, 'x'), number % 2 == 0


def joined(results) -> dict[str, bytes]:
    bins = dict.fromkeys(SPLITS, b'')
    for result in results:
        for split, ids in result.ids.items():
            bins[split] += ids
    return bins


def test_the_end_of_text_follows_every_document_and_bytes_are_counted():
    done = encode_batch(
        [('train', 'né', False), ('val', 'v', True), ('train', 'w', True)],
        '',
        ByteTokenizer(),
        UINT16,
    )
    assert done.pieces == 3 and done.n_bytes == {'train': 4, 'val': 1}
    assert done.ids == {
        'train': np.array([110, 195, 169, 119, 256], '<u2').tobytes(),
        'val': np.array([118, 256], '<u2').tobytes(),
    }


def test_ids_above_65535_take_four_bytes():
    tokenizer = CharTokenizer(''.join(map(chr, range(65_600))))
    done = encode_batch([('train', chr(65_599), False)], '', tokenizer, np.dtype('<u4'))
    assert done.ids == {'train': (65_599).to_bytes(4, 'little')}


def test_small_pieces_go_together(monkeypatch):
    monkeypatch.setattr(encode, 'BATCH', 10)
    sizes = [
        [len(piece[1]) for piece in batch]
        for batch, _ in encode.batched(('train', 'x' * n, True) for n in (4, 4, 4, 30, 1, 1))
    ]
    assert sizes == [[4, 4, 4], [30], [1, 1]]


def test_a_small_text_starts_no_process(monkeypatch):
    monkeypatch.setattr(encode, 'ProcessPoolExecutor', None)
    assert (
        sum(result.pieces for result in encode_all(pieces(SERIAL_BATCHES), ByteTokenizer(), UINT16))
        == SERIAL_BATCHES
    )


def test_one_core_starts_no_process(monkeypatch):
    monkeypatch.setattr(encode, 'ProcessPoolExecutor', None)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {1}, raising=False)
    assert (
        sum(
            result.pieces
            for result in encode_all(pieces(SERIAL_BATCHES + 3), ByteTokenizer(), UINT16)
        )
        == SERIAL_BATCHES + 3
    )


def test_many_processes_give_what_one_gives_also_in_a_thread():
    count = SERIAL_BATCHES + 9
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(joined, encode_all(pieces(count), ByteTokenizer(), UINT16)).result()
    assert done == joined(
        encode_batch([piece], '', ByteTokenizer(), UINT16) for piece in pieces(count)
    )


SENTENCEPIECE = {
    'prepend': byte_fallback(),
    'first': metaspace('first'),
    'always': metaspace('always'),
    'byte level': byte_level(),
}
# What a tokenizer treats differently at the start of a text. No special token comes before white
# space, where a document may be cut: some tokenizers begin a new text after a special token.
words = st.sampled_from(
    ['the', 'cat,', 'sat.', 'née', '12', '▁', '🙂', '<s>the', 'a</s>b', '<|begin|>1', '<0x41>']
)
spaces = st.sampled_from([' ', '  ', '\n', ' \n', '\t', ''])
special = st.sampled_from(['', ' ', '\n', '<s>', '</s>', ' <s>', '<|begin|>'])
texts = st.lists(st.tuples(spaces, words, spaces).map(''.join), max_size=8).map(''.join)


@pytest.mark.parametrize('kind', SENTENCEPIECE)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SPLITS), texts | special), max_size=6), st.data())
def test_cut_documents_have_the_tokens_that_the_library_gives_the_whole_ones(kind, texts, data):
    library = SENTENCEPIECE[kind]
    tokenizer = HfTokenizer.read(library.to_str(), '</s>')
    expected = dict.fromkeys(SPLITS, b'')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, 'PIECE', 3)
        patch.setattr(documents, 'LONGEST', 100)
        patch.setattr(encode, 'BATCH', data.draw(st.integers(1, 30)))
        patch.setattr(encode, 'SERIAL_BATCHES', 1000)
        pieces = []
        for split, text in texts:
            pieces += [(split, *piece) for piece in documents.cut([(text, True)])]
            if text:
                ids = library.encode(text, add_special_tokens=False).ids
                expected[split] += np.array([*ids, *tokenizer.between], UINT16).tobytes()
        whole = list(encode_all(pieces, tokenizer, UINT16))
        assert joined(whole) == expected
        if whole:  # a stopped run continues after any batch
            n_done = data.draw(st.integers(1, len(whole)))
            rest = pieces[sum(done.pieces for done in whole[:n_done]) :]
            more = encode_all(rest, tokenizer, UINT16, whole[n_done - 1].unfinished)
            assert joined([*whole[:n_done], *more]) == expected


@pytest.mark.parametrize('kind', SENTENCEPIECE)
def test_empty_documents_are_between_the_same_tokens(kind):
    library = SENTENCEPIECE[kind]
    tokenizer = HfTokenizer.read(library.to_str(), '</s>')
    texts = ['', ' ', '', 'the cat', '', ' the']
    ids = [library.encode(text, add_special_tokens=False).ids for text in texts]
    expected = np.concatenate([[*part, *tokenizer.between] for part in ids])
    found = tokenizer.encode_texts([(text, True) for text in texts])
    assert found.tolist() == expected.tolist()


def test_texts_are_read_only_as_fast_as_they_are_encoded():
    read = 0

    def counted():
        nonlocal read
        for piece in pieces(200):
            read += 1
            yield piece

    cores = len(os.sched_getaffinity(0))
    done = 0
    for result in encode_all(counted(), ByteTokenizer(), UINT16):
        done += result.pieces
        assert read - done <= 2 * cores + 1
        if done == SERIAL_BATCHES + 20:
            break


def test_a_character_that_is_missing_is_named_from_another_process_too():
    with pytest.raises(UserError, match="'0'"):
        list(encode_all(pieces(SERIAL_BATCHES + 7), CharTokenizer(' x12345678'), UINT16))


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_with_one_line():
    last = [('train', 'last', False)]
    with pytest.raises(UserError, match='killed'):
        list(encode_all([*pieces(SERIAL_BATCHES), *last], DyingTokenizer(), UINT16))


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them():
    """Also if that one is killed and cannot tell them."""
    program = (
        'import itertools, sys, time; import numpy as np\n'
        'from nib.tokens.encode import *; from nib.text.tokenizer import *\n'
        'pieces = (("train", "x" * BATCH, False) for _ in itertools.count())\n'
        'for n, _ in enumerate(encode_all(pieces, ByteTokenizer(), np.dtype("<u2"))):\n'
        '    if n == SERIAL_BATCHES: print("started", flush=True); time.sleep(600)\n'
    )
    run = subprocess.Popen(
        [sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    assert run.stdout.readline() == b'started\n'
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + PATIENCE
    while living(run.pid):
        assert time.monotonic() < deadline, 'processes are left behind'
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='needs process groups')
def test_ctrl_c_does_not_reach_processes_that_are_starting():
    program = (
        'import os, signal; import numpy as np\n'
        'from nib.tokens.encode import *; from nib.text.tokenizer import *\n'
        'def pieces():\n'
        '    for n in range(SERIAL_BATCHES + 4):\n'
        '        if n > SERIAL_BATCHES: os.killpg(0, signal.SIGINT)\n'
        '        yield "train", "x" * BATCH, False\n'
        'heard = []; signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n'
        'done = list(encode_all(pieces(), ByteTokenizer(), np.dtype("<u2")))\n'
        'print(len(done) - SERIAL_BATCHES, len(heard))\n'
    )
    command = [sys.executable, '-c', program]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=PATIENCE
    )
    assert (run.stdout, run.stderr) == ('4 3\n', '')


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='needs process groups')
def test_more_ctrl_cs_end_quietly_while_processes_are_starting(tmp_path):
    """The first comes before any process has started, the others during the wait for them."""
    program = (
        'import os, signal, sys, threading, time; import numpy as np\n'
        'from nib.errors import run_script; from nib.tokens.encode import *\n'
        'from nib.text.tokenizer import *; from nib.tokens.write import write_dataset\n'
        'def press():\n'
        '    for _ in range(5): os.killpg(0, signal.SIGINT); time.sleep(0.02)\n'
        'def pieces(start):\n'
        '    for n in range(SERIAL_BATCHES + 4):\n'
        '        if n == SERIAL_BATCHES + 2: threading.Thread(target=press).start()\n'
        '        yield "train", "x" * BATCH, False\n'
        'run_script(lambda argv: write_dataset(argv[0], pieces, ByteTokenizer(), {}))\n'
    )
    command = [sys.executable, '-c', program, str(tmp_path / 'set')]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=PATIENCE
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, '', '')
    assert not any((tmp_path / 'set' / name).exists() for name in ('meta.json', 'train.bin'))


@pytest.mark.skipif(os.name == 'nt', reason='blocks signals')
@pytest.mark.parametrize('handled_by', ['this thread', 'another thread'])
def test_ctrl_c_while_a_process_starts_comes_after_it_has_started(handled_by):
    """The new process inherits the blocked signals; the system may give one to any thread."""
    started, blocked = False, None

    class Pool:
        def submit(self, *_):
            nonlocal started, blocked
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            if handled_by == 'another thread':
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # a handler would run here
                pass
            started = True

    def handler(*_):
        assert started
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            encode._submit(Pool(), ([], ''))
            for _ in range(100):  # another thread may get the signal a little later
                time.sleep(0.01)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def living(session: int) -> bool:
    """Whether any process of a session goes on."""
    try:
        os.killpg(session, signal.SIG_DFL)  # signal 0: asks, and does nothing
        return True
    except ProcessLookupError:
        return False
