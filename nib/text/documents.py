"""Texts to make a dataset of: found in a person's files, read piece by piece, shared out over training and validation.

A piece is (text, ends): a part of a document, and whether the document ends with it. Documents are read as streams of
pieces, so that neither a large file nor many documents need much memory.
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

PIECE = 1 << 16  # characters, and bytes of a file that are read at once
VAL_FRACTION = 0.1
_ROWS = 1000  # of a .parquet file that are read at once
# GPT-2's pre-tokenizer puts a boundary between anything and white space that follows it, and no piece before such a place
# depends on what comes after it: text cut there gives the same tokens as the whole.
_BOUNDARY = re.compile(r'(?<=\S)[ \n]')


@dataclass(frozen=True)
class Survey:
    """What reading all documents once tells."""

    lengths: array  # characters of each document
    n_bytes: int  # of UTF-8
    sha256: str  # of the documents, and of where one ends and the next begins
    characters: str  # the distinct ones, in order; '' where nobody asked for them


def find_files(inputs: Sequence[str | os.PathLike]) -> tuple[list[Path], int]:
    """The files to read of these files and folders, in order, and how many others the folders hold.

    Folders are searched to the bottom, hidden files and folders left out. UserError where there is nothing to read.
    """
    files, ignored = [], 0
    for path in map(Path, inputs):
        if path.is_dir():
            for folder, names, here in os.walk(path):
                names[:] = sorted(name for name in names if not name.startswith('.'))
                shown = [Path(folder, name) for name in sorted(here) if not name.startswith('.')]
                shown = [file for file in shown if file.is_file()]  # no link that leads nowhere
                files += [file for file in shown if file.suffix.lower() in READERS]
                ignored += sum(file.suffix.lower() not in READERS for file in shown)
        elif not path.exists():
            raise UserError(
                f'{path}: there is no such file or folder; --input=PATH takes files and folders, separated by commas'
            )
        elif path.suffix.lower() not in READERS:
            raise UserError(
                f'{path} is of a type that cannot be read, only {", ".join(READERS)}; give text the ending .txt'
            )
        else:
            files.append(path)
    if not files:
        raise UserError(
            f'{", ".join(map(str, inputs))}: found no {", ".join(READERS)} file there ({ignored} of other types)'
        )
    return list(dict.fromkeys(files)), ignored


def read_documents(
    files: Iterable[Path], field: str = 'text', with_empty: bool = False
) -> Iterator[tuple[str, bool]]:
    """Pieces of the documents in these files: a .txt or .md file is one, and so is every row of the others, whose text
    is in `field`. Empty documents are left out, but for rows where with_empty asks for them. UserError names the file, and
    the row, that cannot be read."""
    for file in files:
        try:
            yield from (
                piece
                for piece in READERS[file.suffix.lower()](file, field)
                if piece[0] or with_empty
            )
        except OSError as error:
            raise UserError(f'{file} cannot be read: {error.strerror or error}') from error


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """The text that the chunks make up, in pieces of PIECE characters and on to the next place where it may be cut."""
    rest, searched = '', PIECE
    for chunk in chunks:
        rest += chunk
        while boundary := _BOUNDARY.search(rest, searched):
            yield rest[: boundary.start()]
            rest, searched = rest[boundary.start() :], PIECE
        searched = max(
            searched, len(rest)
        )  # of a text without white space nothing is searched twice
    if rest:
        yield rest


def survey(pieces: Iterable[tuple[str, bool]], with_characters: bool) -> Survey:
    """Counts documents in one pass. UserError where there are none."""
    lengths, length, n_bytes, digest, characters, begins = (
        array('q'),
        0,
        0,
        hashlib.sha256(),
        set(),
        False,
    )
    for text, ends in pieces:
        content = text.encode()
        digest.update(b'\xff' * begins + content)  # a byte that UTF-8 never has
        n_bytes += len(content)
        if with_characters:
            characters.update(text)
        length, begins = length + len(text), ends
        if ends:
            lengths.append(length)
            length = 0
    if not lengths:
        raise UserError('the files hold no text: each is empty; name others as --input=PATH')
    return Survey(lengths, n_bytes, digest.hexdigest(), ''.join(sorted(characters)))


def choose_val(lengths: Sequence[int]) -> set[int]:
    """Which of several documents to validate on: in a shuffled order those that fit into VAL_FRACTION of the characters,
    at least one. Always the same for the same lengths."""
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
    """(split, text, ends) of every piece, by its document's number."""
    document = 0
    for text, ends in pieces:
        yield ('val' if document in val else 'train'), text, ends
        document += ends


def split_text(texts: Iterable[str], length: int) -> Iterator[tuple[str, str, bool]]:
    """(split, text, False) of the pieces of one text of `length` characters: the first part to train on, the rest to
    validate on, cut where nanoGPT cuts it. No end of text follows it. UserError where it is too short."""
    cut_at = int(length * (1 - VAL_FRACTION))
    if cut_at < 2 or length - cut_at < 2:
        raise UserError(
            f'the text has {length} characters: too few to split into training and '
            f'validation; take a longer one'
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
    """Texts that were read once, in a temporary file, from where they are read in any order. Only where each of them ends is
    in memory, 8 bytes a text. The file has no name, so that nothing is left of it however the process ends."""

    def __init__(self, folder: Path, texts: Iterable[str]):
        """folder: on whose disk the texts find room; it need not be there yet. UserError where they do not."""
        there = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()
        )
        self._ends, digest = array('q', [0]), hashlib.sha256()
        try:
            self._file = tempfile.TemporaryFile(dir=there)
            for text in texts:
                content = text.encode()
                self._file.write(content)
                digest.update(len(content).to_bytes(8, 'little') + content)
                self._ends.append(self._ends[-1] + len(content))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f'{there} cannot be written ({error.strerror}): it takes room for the whole text; name '
                f'another folder as --out_dir=PATH'
            ) from error
        self.n_bytes, self.fingerprint = self._ends[-1], digest.hexdigest()

    def __len__(self):
        return len(self._ends) - 1

    def read(self, rows: Iterable[int]) -> list[str]:
        """The texts of these numbers."""
        texts = []
        for row in rows:
            self._file.seek(self._ends[row])
            texts.append(self._file.read(self._ends[row + 1] - self._ends[row]).decode())
        return texts


# -- one reader for each type of file ----------------------------------------------------------------------------------


def _read_text(file: Path, field: str) -> Iterator[tuple[str, bool]]:
    pieces = cut(_decoded(file))
    piece = next(pieces, None)
    while piece is not None:
        following = next(pieces, None)
        yield piece, following is None
        piece = following


def _decoded(file: Path) -> Iterator[str]:
    """A UTF-8 file in chunks, without the mark that some editors put at its beginning."""
    decoder, offset = codecs.getincrementaldecoder('utf-8-sig')(), 0
    with open(file, 'rb') as stream:
        while True:
            content = stream.read(PIECE)
            kept = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
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
                    f'{file}:{number}: found no JSON ({error}); every line is an object with a text'
                ) from error
            row = row if isinstance(row, dict) else {}
            if field not in row:
                raise _missing(f'{file}:{number}', field, row)
            yield _document(row[field], field, f'{file}:{number}'), True


def _read_parquet(file: Path, field: str) -> Iterator[tuple[str, bool]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{file}: to read .parquet files, pip install pyarrow') from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                raise _missing(file, field, table.schema_arrow.names)
            for batch in table.iter_batches(_ROWS, columns=[field]):
                for value in batch.column(field).to_pylist():
                    yield _document(value, field, file), True
    except UserError:
        raise
    except (
        pyarrow.ArrowException,
        ValueError,
    ) as error:  # a text that is not UTF-8 is a ValueError
        raise UserError(
            f'{file} is not a .parquet file that can be read ({error}); write it anew'
        ) from error


READERS = {'.txt': _read_text, '.md': _read_text, '.jsonl': _read_jsonl, '.parquet': _read_parquet}


def _document(value, field: str, where) -> str:
    if not isinstance(value, str | None):
        raise UserError(
            f'{where}: {field!r} is no text but of type {type(value).__name__}; name another as --field=NAME'
        )
    return without_surrogates(value or '')


def _missing(where, field: str, names: Iterable[str]) -> UserError:
    return UserError(
        f'{where}: found no field {field!r} ({", ".join(map(repr, names)) or "nothing"} instead); name the one '
        f'that holds the text: --field=NAME'
    )


def not_utf8(file: Path, offset: int) -> UserError:
    return UserError(f'{file} is not UTF-8 text (byte {offset}); convert it: iconv -t UTF-8')
