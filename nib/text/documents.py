"""The documents of a dataset: finds files, reads them and splits them into training and validation.

A piece is (text, ends): part of a document, and whether the document ends with it. Documents are
streamed as pieces, so that neither a large file nor many documents need much memory.
"""

import hashlib
import random
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nib.errors import UserError
from nib.files import ELSEWHERE
from nib.text import reading, rows
from nib.text.tokenizer import END_OF_TEXT

PIECE = 1 << 16  # characters in a piece
LONGEST = 1 << 18  # characters in a piece of a text that can hardly be cut
CUTTING = 3  # version of how texts are cut into pieces
VAL_FRACTION = 0.1
# A byte pair tokenizer always begins a new word at a space that follows other text, and at the end
# of a line that follows a letter or a digit. No word before that place depends on what comes after
# it. Text cut there gives the same tokens.
# Only characters that every version of Unicode classifies alike: Latin, kana, Chinese.
_ALPHANUMERIC = '[0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5]'
_BOUNDARY = re.compile(rf'(?<=\S) |(?<={_ALPHANUMERIC})\n')
# So it does at punctuation that follows a letter or a digit.
_PUNCTUATION = re.compile(rf'(?<={_ALPHANUMERIC})[!-&(-/:-@\[-`{{-~\u3001\u3002\uff01\uff0c\uff1f]')
_LAST_SPACE = re.compile(r'\s\S*\Z')


@dataclass(frozen=True)
class Survey:
    """The result of reading all documents once."""

    lengths: array  # characters in each document
    n_bytes: int  # of UTF-8
    sha256: str  # of the documents and the boundaries between them
    characters: str  # the distinct characters, sorted; '' if not requested
    missing: Counter[str]  # the characters that are not among the known ones, and how often


def read_documents(
    files: Iterable[Path],
    field: str = 'text',
    split: bool = True,
    noted: Counter[str] | None = None,
) -> Iterator[tuple[str, bool]]:
    """Yields the pieces of all documents in these files. Empty documents are skipped.

    A .txt or .md file is one document; in other files every row is one, whose text is in `field`.
    split: whether a document also ends at each END_OF_TEXT in its text, and the line with it.
    noted: counts what has been changed (see inputs.told), and END_OF_TEXT under its own name.
    Raises UserError, which names the file and the row, if something cannot be read.
    """
    noted = Counter() if noted is None else noted
    for file in files:
        for chunks in _chunked_documents(file, field, noted):
            yield from cut(_at_end_of_text(chunks, split, noted))


def _chunked_documents(file: Path, field: str, noted: Counter[str]) -> Iterator[Iterable[str]]:
    """Yields every document of a file as an iterable of its chunks."""

    def note_file(what: str):
        noted[f'file{{s}}: {what}'] += 1

    def note_row(what: str):
        noted[f'row{{s}}: {what}'] += 1

    if file.suffix.lower() in rows.READERS:
        for row in rows.read_rows(file, field, note_file):
            yield [reading.plain(row, note_row)]
    else:
        yield reading.read_file(file, note_file)


def _at_end_of_text(
    chunks: Iterable[str], split: bool, noted: Counter[str]
) -> Iterator[tuple[str, bool]]:
    """Yields (text, ends) and counts END_OF_TEXT. If split, a document ends at each of them."""
    rest, begins = '', False
    for chunk in chunks:
        *parts, rest = (rest + chunk).split(END_OF_TEXT)
        for part in parts:
            noted[END_OF_TEXT] += 1
            yield (_without_line_end(part, begins), True) if split else (part + END_OF_TEXT, False)
            begins = split
        # The last characters may begin an END_OF_TEXT that the next chunk completes.
        kept = len(rest) - len(END_OF_TEXT)
        if kept > 0:
            yield _without_line_end(rest[:kept], begins), False
            rest, begins = rest[kept:], False
    yield _without_line_end(rest, begins), True


def _without_line_end(text: str, begins: bool) -> str:
    """Removes the line ending of an END_OF_TEXT on a line of its own from the text after it."""
    return text.removeprefix('\n') if begins else text


def cut(chunks: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Cuts documents into pieces that can be tokenized independently.

    A piece ends at the first white space after PIECE characters. If there is none within LONGEST
    characters, it ends at punctuation, otherwise after LONGEST characters. Only a word of that
    length gets other tokens than it would as a whole. Empty documents are left out.

    chunks: (text, ends) as for pieces, but cut anywhere.
    """
    rest, searched = '', 0
    for chunk, ends in chunks:
        rest, start = rest + chunk, 0
        while True:
            # Text without white space is not searched again.
            first, last = max(start + PIECE, searched), start + LONGEST
            boundary = _BOUNDARY.search(rest, first, last)
            if boundary is None:
                searched = max(searched, min(last, len(rest)))
                if len(rest) <= last:
                    break
                boundary = _PUNCTUATION.search(rest, start + PIECE, last)
            end = boundary.start() if boundary else last
            yield rest[start:end], False
            start = end
        rest, searched = rest[start:], searched - start
        if ends:
            if rest:
                yield rest, True
            rest, searched = '', 0


def survey(pieces: Iterable[tuple[str, bool]], with_characters: bool, known: str = '') -> Survey:
    """Counts documents, characters and bytes in one pass. Raises UserError if there are none.

    known: the characters that the text should consist of; empty: any.
    """
    lengths, length, n_bytes = array('q'), 0, 0
    digest, characters, begins = hashlib.sha256(), set(), False
    missing = Counter[str]()
    for text, ends in pieces:
        content = text.encode()
        digest.update(b'\xff' * begins + content)  # a byte that never occurs in UTF-8
        n_bytes += len(content)
        if with_characters:
            here = set(text)
            characters |= here
            for character in here.difference(known or here):
                missing[character] += text.count(character)
        length, begins = length + len(text), ends
        if ends:
            lengths.append(length)
            length = 0
    if not lengths:
        raise UserError('the files contain no text; use --input=PATH to name other files')
    return Survey(lengths, n_bytes, digest.hexdigest(), ''.join(sorted(characters)), missing)


def choose_val(lengths: Sequence[int]) -> set[int]:
    """Chooses the documents of the validation split.

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
    """Yields (split, text, ends) for every piece. val: indices of the validation documents."""
    document = 0
    for text, ends in pieces:
        yield ('val' if document in val else 'train'), text, ends
        document += ends


def split_position(length: int) -> int:
    """Returns the first validation character of a text, where nanoGPT splits it.

    Raises UserError if the text is too short.
    """
    position = int(length * (1 - VAL_FRACTION))
    if position < 2 or length - position < 2:
        raise UserError(
            f'the text has {length} character{"s" * (length != 1)}, too few for training and '
            f'validation; use a longer text'
        )
    return position


def split_text(
    texts: Iterable[str], length: int, between_words: bool = False
) -> Iterator[tuple[str, str, bool]]:
    """Splits one text into a training part and a validation part; see split_position.

    texts: the pieces of the text. length: its characters. between_words: whether to split at the
    last white space before that position, if the piece has any.
    Yields (split, text, False): no end-of-text token follows.
    """
    cut_at = split_position(length)
    for text in texts:
        if between_words and 0 < cut_at < len(text):
            space = _LAST_SPACE.search(text, 0, cut_at + 1)
            cut_at = space.start() if space else cut_at
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
        """Stores the texts on the disk of `folder`, which need not exist yet.

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
                f'{ELSEWHERE}'
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
