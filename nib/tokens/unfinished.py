"""Writes bins batch by batch under temporary names, resumably, and renames them when complete."""

import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nib.errors import UserError
from nib.files import ELSEWHERE, FolderLock, atomic_write, clear_temporaries, read_json, sync_folder
from nib.tokens.encode import SPLITS, Encoded

JOURNAL_SECONDS = 5.0  # between two writes of the journal
_CHUNK = 1 << 24  # bytes
_POLL_SECONDS = 0.2  # between two attempts to take a lock


@contextmanager
def locked(folder: Path):
    """Creates a dataset's folder and keeps other processes from writing to it.

    Waits while another process holds the lock, and says so. Raises UserError if the folder cannot
    be written.
    """
    lock, waiting = FolderLock(folder), False
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while not lock.take():
            if not waiting:
                print(f'waiting for {lock.holder()}, which is preparing {folder}', file=sys.stderr)
            waiting = True
            time.sleep(_POLL_SECONDS)
        lock.sign()
    try:
        yield
    finally:
        lock.release(remove=True)


def wait_for_others(folder: Path):
    """Waits while another process prepares the dataset in this folder."""
    if (folder / FolderLock.NAME).exists():
        with locked(folder):
            pass


def remove_unfinished(folder: Path):
    """Removes what UnfinishedBins has left in a folder, when its dataset is complete."""
    *_, journal = _unfinished_files(folder)
    clear_temporaries(folder, 'meta.json', journal.name)
    for path in _unfinished_files(folder):
        path.unlink(missing_ok=True)


def read_key(folder: Path) -> dict:
    """Returns the key of the incomplete bins in a folder; an empty dict if there are none."""
    *_, journal = _unfinished_files(folder)
    key = read_json(journal).get('key')
    return key if isinstance(key, dict) else {}


def _unfinished_files(folder: Path) -> list[Path]:
    return [*(folder / f'.{split}.bin.unfinished' for split in SPLITS), folder / '.journal.json']


def read_digest(file: BinaryIO):
    """Reads a file to its end; returns its SHA-256, which can be updated."""
    digest = hashlib.sha256()
    while content := file.read(_CHUNK):
        digest.update(content)
    return digest


@contextmanager
def _writing(folder: Path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f'{folder} cannot be written ({error.strerror}): fix that and repeat the '
            f'command to continue, or {ELSEWHERE}'
        ) from error


class UnfinishedBins:
    """Incomplete bins, and a journal from which a stopped run continues.

    key: everything that determines the bins' content, as JSON. A journal with another key is
    discarded, and writing starts from the beginning.
    itemsize: bytes of a token id.
    """

    def __init__(self, folder: Path, key: dict, itemsize: int):
        self.folder, self.itemsize = folder, itemsize
        *bins, self.journal = _unfinished_files(folder)
        self.paths = dict(zip(SPLITS, bins))
        nothing: dict = {
            'key': key,
            'pieces': 0,
            'tokens': dict.fromkeys(SPLITS, 0),
            'bytes': dict.fromkeys(SPLITS, 0),
            'unfinished': '',
        }
        self.files, self.digests = {}, {}
        with _writing(self.folder):
            clear_temporaries(folder, 'meta.json', self.journal.name)
            self.done = self._read_journal(key) or nothing
            for split, path in self.paths.items():
                file = open(path, 'r+b' if path.exists() else 'w+b')  # noqa: SIM115 (stays open)
                self.files[split] = file
            for split, file in self.files.items():
                file.truncate(self.done['tokens'][split] * self.itemsize)
                self.digests[split] = read_digest(file)
        self.save()  # now, because the key may hold a tokenizer that took minutes to train

    def _read_journal(self, key: dict) -> dict | None:
        """Returns the journal, or None if it is missing, damaged, or does not fit key and bins."""
        try:
            done = json.loads(self.journal.read_bytes())
            for split, path in self.paths.items():
                if path.stat().st_size < done['tokens'][split] * self.itemsize:
                    return None
            counts = [done['pieces']]
            counts += [done[what][split] for what in ('tokens', 'bytes') for split in SPLITS]
            if not all(type(count) is int and count >= 0 for count in counts):
                return None
            is_known = done['unfinished'] in ('', *SPLITS)
            return done if is_known and done['key'] == json.loads(json.dumps(key)) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def add(self, encoded: Encoded):
        """Appends an encoded batch, and updates the journal every few seconds."""
        tokens, n_bytes = dict(self.done['tokens']), dict(self.done['bytes'])
        with _writing(self.folder):
            for split, ids in encoded.ids.items():
                self.files[split].write(ids)
                self.digests[split].update(ids)
                tokens[split] += len(ids) // self.itemsize
                n_bytes[split] += encoded.n_bytes[split]
            # One assignment, so that Ctrl-C leaves the counts from before or after this batch.
            self.done = {
                **self.done,
                'pieces': self.done['pieces'] + encoded.pieces,
                'tokens': tokens,
                'bytes': n_bytes,
                'unfinished': encoded.unfinished,
            }
            if time.monotonic() - self.saved > JOURNAL_SECONDS:
                self.save()

    def save(self):
        """Syncs the bins to disk, then writes the journal."""
        with _writing(self.folder):
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            with atomic_write(self.journal) as file:
                file.write(json.dumps(self.done).encode())
        self.saved = time.monotonic()

    def finish(self, meta: dict):
        """Writes meta.json and renames the bins.

        A crash in between leaves at most one bin, which cannot be mistaken for a dataset.
        """
        with _writing(self.folder):
            self.save()
            for file in self.files.values():
                file.close()
            for name in ('train.bin', 'val.bin', 'meta.pkl'):  # nanoGPT's meta.pkl: old bins only
                (self.folder / name).unlink(missing_ok=True)
            with atomic_write(self.folder / 'meta.json') as described:
                described.write(json.dumps(meta, indent=1).encode())
            for split, path in self.paths.items():
                os.replace(path, self.folder / f'{split}.bin')
            sync_folder(self.folder)
            self.journal.unlink()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Keeps what was written for the next run, even after Ctrl-C; removes empty files."""
        if all(file.closed for file in self.files.values()):  # finish() has been called
            return
        with suppress(UserError):  # the exception that led here says more
            if self.done['pieces']:
                self.save()
        for split, file in self.files.items():
            with suppress(OSError):
                file.close()
            if not self.done['pieces']:
                self.paths[split].unlink()
        if not self.done['pieces'] and 'trained_tokens' not in self.done['key'].get('source', {}):
            self.journal.unlink(missing_ok=True)
