"""The documents of a dataset: finds files, reads them and splits them into training and validation.

A piece is (text, ends): part of a document, and whether the document ends with it. Documents are
streamed as pieces, so that neither a large file nor many documents need much memory.
"""

import codecs
import hashlib
import json
import os
import random
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nib.errors import UserError
from nib.text.tokenizer import without_surrogates

PIECE = 1 << 16  # characters in a piece, and bytes of a file read at once
VAL_FRACTION = 0.1
_ROWS = 1000  # rows of a .parquet file read at once
# GPT-2's pre-tokenizer always begins a new word at white space that follows other text, and no word
# before that place depends on what comes after it. Text cut there gives the same tokens.
_BOUNDARY = re.compile(r'(?<=\S)[ \n]')


@dataclass(frozen=True)
class Survey:
    """The result of reading all documents once."""

    lengths: array  # characters in each document
    n_bytes: int  # of UTF-8
    sha256: str  # of the documents and the boundaries between them
    characters: str  # the distinct characters, sorted; '' if not requested


def find_files(inputs: Sequence[str | os.PathLike]) -> tuple[list[Path], int]:
    """Find the files to read.

    inputs: files and folders. Folders are searched recursively, without hidden files and folders.
    Returns the files in order, and the number of other files in the folders.
    Raises UserError if an input is missing or cannot be read, or if there is nothing to read.
    """
    files, ignored = [], 0
    for path in map(Path, inputs):
        if path.is_dir():
            for folder, names, here in os.walk(path):
                names[:] = sorted(name for name in names if not name.startswith('.'))
                shown = [Path(folder, name) for name in sorted(here) if not name.startswith('.')]
                shown = [file for file in shown if file.is_file()]  # excludes broken links
                files += [file for file in shown if file.suffix.lower() in READERS]
                ignored += sum(file.suffix.lower() not in READERS for file in shown)
        elif not path.exists():
            raise UserError(
                f'{path}: no such file or folder; --input=PATH takes files and folders, '
                f'separated by commas'
            )
        elif path.suffix.lower() not in READERS:
            raise UserError(
                f'{path}: unsupported file type (supported: {", ".join(READERS)}); '
                f'rename a text file to .txt'
            )
        else:
            files.append(path)
    if not files:
        raise UserError(
            f'{", ".join(map(str, inputs))}: found no {", ".join(READERS)} file there '
            f'({ignored} of other types)'
        )
    return list(dict.fromkeys(files)), ignored


def read_documents(
    files: Iterable[Path], field: str = 'text', with_empty: bool = False
) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of all documents in these files.

    A .txt or .md file is one document; in other files every row is one, whose text is in `field`.
    Empty documents are skipped; with_empty keeps empty rows.
    Raises UserError, which names the file and the row, if something cannot be read.
    """
    for file in files:
        try:
            for piece in READERS[file.suffix.lower()](file, field):
                if piece[0] or with_empty:
                    yield piece
        except OSError as error:
            raise UserError(f'{file} cannot be read: {error.strerror or error}') from error


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """Recut chunks of a text into pieces that tokenize independently.

    A piece has PIECE characters, and more up to the next place where the text may be cut.
    """
    rest, searched = '', PIECE
    for chunk in chunks:
        rest += chunk
        while boundary := _BOUNDARY.search(rest, searched):
            yield rest[: boundary.start()]
            rest, searched = rest[boundary.start() :], PIECE
        searched = max(searched, len(rest))  # text without white space is not searched again
    if rest:
        yield rest


def survey(pieces: Iterable[tuple[str, bool]], with_characters: bool) -> Survey:
    """Count documents, characters and bytes in one pass. Raises UserError if there are none."""
    lengths, length, n_bytes = array('q'), 0, 0
    digest, characters, begins = hashlib.sha256(), set(), False
    for text, ends in pieces:
        content = text.encode()
        digest.update(b'\xff' * begins + content)  # a byte that never occurs in UTF-8
        n_bytes += len(content)
        if with_characters:
            characters.update(text)
        length, begins = length + len(text), ends
        if ends:
            lengths.append(length)
            length = 0
    if not lengths:
        raise UserError('all files are empty; use --input=PATH to name other files')
    return Survey(lengths, n_bytes, digest.hexdigest(), ''.join(sorted(characters)))


def choose_val(lengths: Sequence[int]) -> set[int]:
    """Choose the documents of the validation split.

    Takes documents in a shuffled order while they fit into VAL_FRACTION of all characters, and at
    least one. The choice depends only on the lengths. Returns the documents' indices.
    """
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    room, val = VAL_FRACTION * sum(lengths), set()
    for document in order:
        if lengths[document] <= room:
            room -= lengths[document]
            val.add(document)
    return val or {min(order, key=lengths.__getitem__)}


def split_documents(
    pieces: Iterable[tuple[str, bool]], val: set[int]
) -> Iterator[tuple[str, str, bool]]:
    """Yield (split, text, ends) for every piece. val: indices of the validation documents."""
    document = 0
    for text, ends in pieces:
        yield ('val' if document in val else 'train'), text, ends
        document += ends


def split_text(texts: Iterable[str], length: int) -> Iterator[tuple[str, str, bool]]:
    """Split one text into a training part and a validation part, where nanoGPT splits it.

    texts: the pieces of the text. length: its characters.
    Yields (split, text, False): no end-of-text token follows.
    Raises UserError if the text is too short.
    """
    cut_at = int(length * (1 - VAL_FRACTION))
    if cut_at < 2 or length - cut_at < 2:
        raise UserError(
            f'the text has {length} characters, too few for training and validation; '
            f'use a longer text'
        )
    return _split_at(texts, cut_at)


def _split_at(texts: Iterable[str], cut_at: int) -> Iterator[tuple[str, str, bool]]:
    for text in texts:
        train, val = text[:cut_at], text[cut_at:]
        cut_at -= len(train)
        if train:
            yield 'train', train, False
        if val:
            yield 'val', val, False


class StoredTexts:
    """Random access to texts that are stored in a temporary file.

    Memory holds only the offset of each text (8 bytes). The file has no name on disk, so nothing
    is left behind however the process ends.
    """

    def __init__(self, folder: Path, texts: Iterable[str]):
        """Store the texts on the disk of `folder`, which need not exist yet.

        Raises UserError if they cannot be written.
        """
        parents = (folder.absolute(), *folder.absolute().parents)
        existing = next(path for path in parents if path.is_dir())
        self._ends, digest = array('q', [0]), hashlib.sha256()
        try:
            self._file = tempfile.TemporaryFile(dir=existing)  # noqa: SIM115 (read() needs it)
            for text in texts:
                content = text.encode()
                self._file.write(content)
                digest.update(len(content).to_bytes(8, 'little') + content)
                self._ends.append(self._ends[-1] + len(content))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f'{existing} cannot be written ({error.strerror}): the whole text has to fit; '
                f'use --out_dir=PATH to name another folder'
            ) from error
        self.n_bytes, self.fingerprint = self._ends[-1], digest.hexdigest()

    def __len__(self):
        return len(self._ends) - 1

    def read(self, rows: Iterable[int]) -> list[str]:
        """Returns the texts with these indices."""
        texts = []
        for row in rows:
            self._file.seek(self._ends[row])
            texts.append(self._file.read(self._ends[row + 1] - self._ends[row]).decode())
        return texts


# -- one reader for each type of file --------------------------------------------------------------


def _read_text(file: Path, field: str) -> Iterator[tuple[str, bool]]:
    pieces = cut(_decoded(file))
    piece = next(pieces, None)
    while piece is not None:
        following = next(pieces, None)
        yield piece, following is None
        piece = following


def _decoded(file: Path) -> Iterator[str]:
    """Yields a UTF-8 file in chunks, without a byte order mark."""
    decoder, offset = codecs.getincrementaldecoder('utf-8-sig')(), 0
    with open(file, 'rb') as stream:
        while True:
            content = stream.read(PIECE)
            kept = len(decoder.getstate()[0])  # bytes of a character split between two chunks
            try:
                yield decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                raise not_utf8(file, offset - kept + error.start) from error
            offset += len(content)
            if not content:
                return


def _read_jsonl(file: Path, field: str) -> Iterator[tuple[str, bool]]:
    with open(file, 'rb') as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
                raise UserError(
                    f'{file}:{number}: not valid JSON ({error}); every line must be a JSON object'
                ) from error
            row = row if isinstance(row, dict) else {}
            if field not in row:
                raise _missing(f'{file}:{number}', field, row)
            yield _document(row[field], field, f'{file}:{number}'), True


def _read_parquet(file: Path, field: str) -> Iterator[tuple[str, bool]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f'{file}: reading .parquet files requires pyarrow: pip install pyarrow'
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                raise _missing(file, field, table.schema_arrow.names)
            for batch in table.iter_batches(_ROWS, columns=[field]):
                for value in batch.column(field).to_pylist():
                    yield _document(value, field, file), True
    except UserError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:  # invalid UTF-8 is a ValueError
        raise UserError(f'{file} is not a valid .parquet file ({error}); recreate it') from error


READERS = {'.txt': _read_text, '.md': _read_text, '.jsonl': _read_jsonl, '.parquet': _read_parquet}


def _document(value, field: str, where) -> str:
    if not isinstance(value, str | None):
        raise UserError(
            f'{where}: field {field!r} has type {type(value).__name__}, not text; '
            f'use --field=NAME to name another field'
        )
    return without_surrogates(value or '')


def _missing(where, field: str, names: Iterable[str]) -> UserError:
    found = ', '.join(map(repr, names)) or 'none'
    return UserError(
        f'{where}: no field {field!r} (fields: {found}); use --field=NAME to name the text field'
    )


def not_utf8(file: Path, offset: int) -> UserError:
    return UserError(f'{file} is not UTF-8 text (byte {offset}); convert it: iconv -t UTF-8')
