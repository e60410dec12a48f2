"""Bins in the making: appended to batch by batch, gone on with after a kill, put in place when all is there."""

import hashlib
import json
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from nib.errors import UserError
from nib.files import atomic_write, sync_folder
from nib.tokens.encode import SPLITS, Encoded

JOURNAL_SECONDS = 5.0  # between two notes of how far the writing is
_CHUNK = 1 << 24  # bytes


class UnfinishedBins:
    """Bins that are being written under temporary names, and a journal beside them from which a stopped run goes on.

    key: what decides the bins' content; a journal with another one is of no use, and writing starts anew.
    """

    def __init__(self, folder: Path, key: dict, itemsize: int):
        self.folder, self.itemsize = folder, itemsize
        self.paths = {split: folder / f'.{split}.bin.unfinished' for split in SPLITS}
        self.journal = folder / '.journal.json'
        nothing = {
            'key': key,
            'pieces': 0,
            'tokens': dict.fromkeys(SPLITS, 0),
            'bytes': dict.fromkeys(SPLITS, 0),
        }
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self.done = self._read_journal(key) or nothing
            if self.done is nothing:
                self.journal.unlink(
                    missing_ok=True
                )  # first: it would be wrong about what is written from now on
            self.files = {
                split: open(path, 'r+b' if path.exists() else 'w+b')
                for split, path in self.paths.items()
            }
            self.digests = {
                split: self._rewind(file, self.done['tokens'][split])
                for split, file in self.files.items()
            }
        self.saved = time.monotonic()

    def _read_journal(self, key: dict) -> dict | None:
        try:
            done = json.loads(self.journal.read_bytes())
            whole = all(
                path.stat().st_size >= done['tokens'][split] * self.itemsize
                for split, path in self.paths.items()
            )
            counts = [
                done['pieces'],
                *(done[what][split] for what in ('tokens', 'bytes') for split in SPLITS),
            ]
            whole = whole and all(type(count) is int and count >= 0 for count in counts)
            return done if done['key'] == json.loads(json.dumps(key)) and whole else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _rewind(self, file, tokens: int):
        """Puts a file back to what the journal says; returns the hash of that."""
        file.truncate(tokens * self.itemsize)
        digest = hashlib.sha256()
        while content := file.read(_CHUNK):
            digest.update(content)
        return digest

    def add(self, encoded: Encoded):
        """Appends what a batch became, and every few seconds notes in the journal that it is there."""
        tokens, n_bytes = dict(self.done['tokens']), dict(self.done['bytes'])
        with self._writing():
            for split, ids in encoded.ids.items():
                self.files[split].write(ids)
                self.digests[split].update(ids)
                tokens[split] += len(ids) // self.itemsize
                n_bytes[split] += encoded.n_bytes[split]
            # All at once, so that Ctrl-C finds the numbers before this batch or those after it.
            self.done = {
                **self.done,
                'pieces': self.done['pieces'] + encoded.pieces,
                'tokens': tokens,
                'bytes': n_bytes,
            }
            if time.monotonic() - self.saved > JOURNAL_SECONDS:
                self.save()

    def save(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())  # before the journal that tells of it
        with atomic_write(self.journal) as file:
            file.write(json.dumps(self.done).encode())
        self.saved = time.monotonic()

    def finish(self, meta: dict):
        """Puts the files in place. A crash in between leaves no two bins, so nothing that could pass for a dataset."""
        with self._writing():
            self.save()
            for file in self.files.values():
                file.close()
            for name in (
                'train.bin',
                'val.bin',
                'meta.pkl',
            ):  # the last is nanoGPT's, and wrong about the new bins
                (self.folder / name).unlink(missing_ok=True)
            with atomic_write(self.folder / 'meta.json') as file:
                file.write(json.dumps(meta, indent=1).encode())
            for split, path in self.paths.items():
                os.replace(path, self.folder / f'{split}.bin')
            sync_folder(self.folder)
            self.journal.unlink()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """What is there is kept for the next run, also on Ctrl-C; files without content are not."""
        if all(
            file.closed for file in self.files.values()
        ):  # by finish(), to which the next run comes at once
            return
        with suppress(OSError):  # the error that is on its way says more
            if self.done['pieces']:
                self.save()
        for split, file in self.files.items():
            with suppress(OSError):
                file.close()
            if not self.done['pieces']:
                self.paths[split].unlink()

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f'{self.folder} cannot be written ({error.strerror}): mend that and type the same command, which '
                f'goes on from there, or name another folder as --out_dir=PATH'
            ) from error
