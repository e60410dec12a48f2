"""Incomplete bins: a stopped run continues to the same result, and is never taken for complete."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from small_tokenizers import byte_fallback

from nib.errors import UserError
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import ByteTokenizer
from nib.tokens import encode, unfinished
from nib.tokens.dataset import is_prepared, open_dataset
from nib.tokens.write import write_dataset

SOURCE = {'text': 'made up'}
COUNT = 40
# A run on the same pieces that saves after each one. The reader 'waiting' stops at the 25th piece.
PROGRAM = """
import sys, time
from nib.errors import run_script
from nib.text.tokenizer import ByteTokenizer
from nib.tokens import encode, unfinished
from nib.tokens.write import write_dataset
unfinished.JOURNAL_SECONDS, encode.BATCH, encode.SERIAL_BATCHES = 0, 1, 1000

def read_pieces(start):
    for number in range(start, 40):
        yield ('train', 'val')[number % 4 == 0], f'document {number} ' * 50, True

def waiting(start):
    for number, piece in enumerate(read_pieces(start), start):
        if number == 25:
            print('waiting', flush=True)
            time.sleep(600)
        yield piece

run_script(lambda argv: write_dataset(sys.argv[1], {reader}, ByteTokenizer(), {source}) and None)
"""


def read_pieces(start, count=COUNT):
    for number in range(start, count):
        yield ('train', 'val')[number % 4 == 0], f'document {number} ' * 50, True


def write(folder, reader=read_pieces, source=SOURCE):
    return write_dataset(folder, reader, ByteTokenizer(), source)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    write(folder)
    return folder


def program(reader, source=SOURCE) -> list[str]:
    return [
        sys.executable,
        '-c',
        PROGRAM.replace('{reader}', reader).replace('{source}', repr(source)),
    ]


def start_program(folder, source=SOURCE):
    run = subprocess.Popen(
        [*program('waiting', source), str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == 'waiting\n'
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_was_and_ends_as_if_never_stopped(whole, tmp_path, number):
    run = start_program(tmp_path)
    run.send_signal(number)
    said = run.communicate()[1]
    assert (
        run.returncode == (130 if number == signal.SIGINT else -number) and 'Traceback' not in said
    )
    assert not is_prepared(tmp_path)
    with open(tmp_path / '.train.bin.unfinished', 'ab') as file:
        file.write(b'a batch that the journal does not know of')
    for name in ('.meta.json.1.tmp', '..journal.json.1.tmp'):
        (tmp_path / name).write_bytes(b'of a killed process')

    starts = []
    meta = write(tmp_path, lambda start: starts.append(start) or read_pieces(start))

    assert starts == [25]
    assert contents(tmp_path) == contents(whole)
    assert meta == json.loads((whole / 'meta.json').read_text())


def test_a_run_goes_on_within_a_document(tmp_path, monkeypatch):
    """A tokenizer like SentencePiece puts a space in front of a document, not of the rest of it."""
    monkeypatch.setattr(encode, 'BATCH', 1)
    tokenizer = HfTokenizer.read(byte_fallback().to_str(), '</s>')
    pieces = [('val', ' the cat', False), ('train', ' the', False), ('train', ' cat', True)]

    def stopping(start):
        yield from pieces[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, stopping, tokenizer, SOURCE)
    write_dataset(tmp_path, lambda start: iter(pieces[start:]), tokenizer, SOURCE)
    ids = np.fromfile(tmp_path / 'train.bin', '<u2')
    assert ids.tolist() == [*tokenizer.encode(' the cat'), *tokenizer.between]


@pytest.mark.skipif(os.name == 'nt', reason='Windows cannot open a folder')
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, disk):
    write(tmp_path)
    inodes = {name: (tmp_path / name).stat().st_ino for name in contents(tmp_path)}
    described = disk.index('meta.json')  # after which the journal no longer counts
    assert all(inode in disk[:described] for inode in inodes.values())
    last = max(map(disk.index, ('train.bin', 'val.bin')))
    assert described < last and tmp_path.stat().st_ino in disk[last:]


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stopped')
    run = start_program(folder)
    run.kill()
    run.communicate()
    return folder


@pytest.mark.parametrize('change', ['source', 'journal', 'bin', 'no bin'])
def test_what_another_run_left_is_not_gone_on_with(whole, stopped, tmp_path, change):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    if change == 'journal':
        (tmp_path / '.journal.json').write_text('{"key":')
    elif change == 'bin':  # shorter than the journal says, by a byte
        journal = json.loads((tmp_path / '.journal.json').read_text())
        os.truncate(tmp_path / '.train.bin.unfinished', 2 * journal['tokens']['train'] - 1)
    elif change == 'no bin':
        (tmp_path / '.val.bin.unfinished').unlink()
    starts = []
    write(
        tmp_path,
        lambda start: starts.append(start) or read_pieces(start),
        {'text': 'other'} if change == 'source' else SOURCE,
    )
    assert starts == [0]
    assert (tmp_path / 'train.bin').read_bytes() == (whole / 'train.bin').read_bytes()


def test_what_two_other_runs_left_is_not_mixed_up(whole, stopped, tmp_path):
    """The second run overwrites the first one's bins and is killed before it has a journal."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    second = program('waiting', {})
    second[-1] = second[-1].replace(
        'JOURNAL_SECONDS, encode.BATCH, encode.SERIAL_BATCHES = 0',
        'JOURNAL_SECONDS, encode.BATCH, encode.SERIAL_BATCHES = 600',
    )
    run = subprocess.Popen([*second, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == 'waiting\n'
    run.kill()
    run.communicate()
    with open(tmp_path / '.train.bin.unfinished', 'ab') as file:
        file.write(bytes(100_000))  # long enough for the first one's journal
    (tmp_path / '.val.bin.unfinished').write_bytes(bytes(100_000))
    write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_the_old_dataset_is_whole_until_the_new_one_is(whole, tmp_path):
    write(tmp_path)
    run = start_program(tmp_path, {})
    assert open_dataset(tmp_path, 16).fingerprint == open_dataset(whole, 16).fingerprint
    run.kill()
    run.communicate()


class Crash(BaseException):
    pass


@pytest.mark.parametrize('at', range(8))
def test_a_crash_while_the_files_are_put_in_place_leaves_the_old_the_new_or_nothing(
    whole, tmp_path, monkeypatch, at
):
    """At each step in turn: none is mistaken for nanoGPT's bins, which have no meta.json."""
    write(tmp_path, lambda start: read_pieces(start, 20), {'text': 'old'})
    (tmp_path / 'meta.pkl').write_bytes(b'of other bins')
    old, steps = open_dataset(tmp_path, 16).fingerprint, 0

    def crashing(function):
        def step(*args, **options):
            nonlocal steps
            steps += 1
            if steps > at:
                raise Crash
            return function(*args, **options)

        return step

    monkeypatch.setattr(
        unfinished.UnfinishedBins,
        'finish',
        with_crashes(unfinished.UnfinishedBins.finish, crashing, monkeypatch),
    )
    with pytest.raises(Crash):
        write(tmp_path)
    monkeypatch.undo()

    if is_prepared(tmp_path):
        assert open_dataset(tmp_path, 16).fingerprint in (old, open_dataset(whole, 16).fingerprint)
    write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def with_crashes(finish, crashing, monkeypatch):
    """finish() whose every change to the folder goes through crashing()."""

    def wrapped(self, meta):
        for owner, name in ((os, 'replace'), (type(self.folder), 'unlink')):
            monkeypatch.setattr(owner, name, crashing(getattr(owner, name)))
        finish(self, meta)

    return wrapped


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(whole, tmp_path):
    resource = pytest.importorskip('resource')  # not on Windows

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = subprocess.run(
        [*program('read_pieces'), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 2 and re.fullmatch(
        r'error: .*cannot be written \(File too large\).*\n', done.stderr
    )
    starts = []
    write(tmp_path, lambda start: starts.append(start) or read_pieces(start))
    assert starts[0] > 0 and contents(tmp_path) == contents(whole)


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path):
    def failing(start):
        raise UserError('no text')

    with pytest.raises(UserError, match='no text'):
        write(tmp_path, failing)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'taken').write_text('a file')
    with pytest.raises(UserError, match='taken.*--out_dir'):
        write(tmp_path / 'taken')


@pytest.mark.parametrize('source, is_kept', [({'trained_tokens': 300}, True), (SOURCE, False)])
def test_a_stop_before_the_first_piece_keeps_a_trained_tokenizer_and_nothing_else(
    tmp_path, source, is_kept
):
    key = {'source': source, 'tokenizer': 'took minutes'}
    with pytest.raises(KeyboardInterrupt), unfinished.UnfinishedBins(tmp_path, key, itemsize=2):
        raise KeyboardInterrupt
    assert unfinished.read_key(tmp_path) == (key if is_kept else {})
    assert not list(tmp_path.glob('*.unfinished')) and not list(tmp_path.glob('.*.bin*'))
