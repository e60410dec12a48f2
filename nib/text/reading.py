r"""Reads text from bytes by one rule, for prepare scripts and prompts alike, and says what it did.

A byte-order mark decides the encoding and is removed. Without one, the text must be UTF-8. The
line endings \r\n and \r become \n. Other content is rejected, and the error has a command that
converts it.
"""

import codecs
import io
import os
import shlex
import stat
import unicodedata
from collections.abc import Callable, Iterator
from typing import BinaryIO

from nib.errors import UserError

CHUNK = 1 << 16  # bytes read at once
_HEAD = 1 << 12  # bytes read first, which show what kind of file it is
# The marks of UTF-32 come first: that of UTF-32LE begins with that of UTF-16LE.
_MARKS = {
    codecs.BOM_UTF32_LE: 'UTF-32LE',
    codecs.BOM_UTF32_BE: 'UTF-32BE',
    codecs.BOM_UTF16_LE: 'UTF-16LE',
    codecs.BOM_UTF16_BE: 'UTF-16BE',
    codecs.BOM_UTF8: 'UTF-8',
}
# Files that may consist of valid characters, but whose text is not what they begin with.
_SIGNATURES = {
    b'%PDF-': '.pdf',
    b'{\\rtf': '.rtf',
    b'%!PS': '.ps',
    b'PK\x03\x04': '.zip',
    b'\x1f\x8b': '.gz',
    b'BZh91AY&SY': '.bz2',
    b'\xfd7zXZ\0': '.xz',
    b'\x28\xb5\x2f\xfd': '.zst',
    b'PAR1': '.parquet',
}
_PANDOC = 'pandoc --to=plain {file} --output={stem}-text.txt'
_DELETE_NULS = r"tr -d '\000' < {file} > {new}"
_CONVERTERS = {
    '.pdf': 'pdftotext {file} {stem}-text.txt',
    '.ps': 'ps2ascii {file} {stem}-text.txt',
    **dict.fromkeys(('.rtf', '.doc', '.docx', '.odt', '.epub', '.html', '.htm'), _PANDOC),
    '.zip': 'unzip {file}',
    **dict.fromkeys(('.tar', '.tgz'), 'tar --extract --file={file}'),
    '.gz': 'gunzip --stdout {file} > {unpacked}',
    '.bz2': 'bunzip2 --stdout {file} > {unpacked}',
    '.xz': 'xz --decompress --stdout {file} > {unpacked}',
    '.zst': 'zstd --decompress --stdout {file} > {unpacked}',
    '.ndjson': 'cp {file} {stem}.jsonl',
    '.csv': (
        "python -c 'import csv, json, sys; "
        "[print(json.dumps(row)) for row in csv.DictReader(sys.stdin)]' < {file} > {stem}.jsonl"
    ),
    '.parquet': 'mv {file} {stem}.parquet',
    # An array of rows, a row on several lines, or rows as in .jsonl.
    '.json': (
        'jq --compact-output \'if type == "array" then .[] else . end\' {file} > {stem}-rows.jsonl'
    ),
}
# Control characters other than NUL that occur in no text, whatever its encoding.
_CONTROLS = bytes(byte for byte in (*range(1, 32), 127) if byte not in b'\b\t\n\f\r\x1b')

CARRIAGE_RETURNS = r'line endings \r\n or \r changed to \n'
MARK = 'byte-order mark removed'
_NAMED = {
    '\0': 'contains NUL characters',
    '\ufffd': 'contains U+FFFD, so an earlier conversion has lost characters',
}


def read_file(path: str | os.PathLike, say: Callable[[str], None]) -> Iterator[str]:
    """Yields the text of a regular file in chunks; see decode.

    Raises UserError if the file cannot be read, or is a pipe or device, which could block forever.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise not_a_file(path, mode)
        with open(path, 'rb') as stream:
            yield from decode(stream, path, say)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}') from error


def not_a_file(path: str | os.PathLike, mode: int) -> UserError:
    kind = 'folder' if stat.S_ISDIR(mode) else 'pipe' if stat.S_ISFIFO(mode) else 'device'
    return UserError(f'{path} is a {kind}, not a file: save the text in a file and name that file')


def decode(
    stream: BinaryIO, path: str | os.PathLike | None, say: Callable[[str], None]
) -> Iterator[str]:
    """Yields the text of a stream in chunks, with `\n` as the only line ending.

    path: of the file, for messages; None: standard input.
    say: called after the last chunk, once for each way in which the text differs from the file.
    Raises UserError if the stream is not text: what it seems to be, and how to convert it.
    """
    content = stream.read(_HEAD)
    mark, encoding = next(
        ((mark, name) for mark, name in _MARKS.items() if content.startswith(mark)), (b'', 'UTF-8')
    )
    for signature, ending in _SIGNATURES.items():
        if content.startswith(signature):
            raise UserError(f'{_name(path)} is a {ending} file, not text: {advice(path, ending)}')
    offset = 0
    decoder = codecs.getincrementaldecoder(encoding)()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    found, last = set(), b''
    while True:
        kept = decoder.getstate()[0]  # bytes of a character that two chunks share
        last = kept + content if content else last
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            at = offset - len(kept) + error.start
            raise _not_text(path, encoding, last, at, bool(mark)) from error
        if '\0' in text and not mark:
            at = offset - len(kept) + len(text[: text.index('\0')].encode())
            raise _not_text(path, encoding, last, at)
        if offset == 0:
            text = text.removeprefix('\ufeff')
        found |= {what for character, what in _NAMED.items() if character in text}
        yield lines.decode(text, final=not content)
        if not content:
            break
        offset += len(content)
        content = stream.read(CHUNK)
    if mark:
        say(MARK if encoding == 'UTF-8' else f'decoded from {encoding}')
    if lines.newlines not in (None, '\n'):
        say(CARRIAGE_RETURNS)
    for what in sorted(found):
        say(what)


def plain(text: str, say: Callable[[str], None]) -> str:
    """Returns a text that is in memory, by the rule for files."""
    if '\r' in text:
        text = text.replace('\r\n', '\n').replace('\r', '\n')
        say(CARRIAGE_RETURNS)
    if text.startswith('\ufeff'):
        text = text[1:]
        say(MARK)
    for character, what in _NAMED.items():
        if character in text:
            say(what)
    return text


def advice(path: str | os.PathLike | None, ending: str = '') -> str:
    """Returns how to convert a file to text. ending: of its real type; empty: that of its name."""
    ending = ending or os.path.splitext(path or '')[1].lower()
    if ending not in _CONVERTERS:
        return f'if it is plain text, copy it: {_command("cp {file} {stem}.txt", path)}'
    return f'convert it: {_command(_CONVERTERS[ending], path)}'


def _name(path: str | os.PathLike | None) -> str:
    return 'standard input' if path is None else os.fspath(path)


def _iconv(path: str | os.PathLike | None, source: str) -> str:
    return _command(f'iconv -f {source} -t UTF-8 {{file}} > {{new}}', path)


def _command(form: str, path: str | os.PathLike | None) -> str:
    """Returns a shell command that reads the file and writes another."""
    file = os.fspath(path or 'FILE')
    stem, suffix = os.path.splitext(file)
    name, inner = os.path.splitext(stem)  # of name.jsonl.gz
    is_known = inner.lower() in (*_CONVERTERS, '.txt', '.md', '.jsonl')
    unpacked = f'{name}-text{inner}' if is_known else f'{stem}-text.txt'
    names = {'file': file, 'new': f'{stem}-utf8{suffix}', 'stem': stem, 'unpacked': unpacked}
    return form.format(**{key: shlex.quote(name) for key, name in names.items()})


def _not_text(path, encoding: str, content: bytes, at: int, marked: bool = False) -> UserError:
    """Returns an error that says what a file seems to be, and how to convert it.

    encoding: what the file was read as. marked: whether its byte-order mark says so.
    content: the last bytes that were read. at: offset of the first byte that is not text.
    """
    text = content.decode('utf-8', 'replace')
    n_bad = text.count('\ufffd')
    n_foreign = sum(not character.isascii() for character in text) - n_bad
    is_binary = len(content.translate(None, _CONTROLS)) < len(content)
    why = f'is not {encoding} text (byte {at})'
    if marked:
        how = f'it is damaged there; drop the damaged bytes: {_iconv(path, f"{encoding} -c")}'
    elif 0 < text.count('\0') < len(text) / 4 and not n_bad and not is_binary:
        why += ', because it contains NUL bytes'
        how = f'remove them: {_command(_DELETE_NULS, path)}'
    elif source := _unmarked_encoding(content):
        why += f' but {source} without a byte-order mark'
        how = f'convert it: {_iconv(path, source)}'
    elif '\0' in text or is_binary:
        why += ' but binary data'
        how = 'leave it out, or convert it to text with the program that wrote it'
    elif n_foreign > n_bad:
        how = f'most of it is; drop the rest: {_iconv(path, "UTF-8 -c")}'
    else:
        # Windows-1252 has letters and quotes where Latin-1 has control characters.
        source = 'CP1252' if any(0x80 <= byte < 0xA0 for byte in content) else 'LATIN1'
        how = (
            f'convert it: {_iconv(path, source)} if it is Western European; '
            f'other encodings are CP1251, GB18030, SHIFT_JIS (iconv -l lists all)'
        )
    return UserError(f'{_name(path)} {why}: {how}')


def _unmarked_encoding(content: bytes) -> str | None:
    """Returns the encoding of UTF-16 or UTF-32 without a byte-order mark, as iconv names it.

    The bytes can be decoded with it, and the result has ASCII characters. Other bytes, read two at
    a time, have hardly any.
    """
    if b'\0' not in content and len(content.translate(None, _CONTROLS)) == len(content):
        return None
    for encoding in ('UTF-32LE', 'UTF-32BE', 'UTF-16LE', 'UTF-16BE'):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(content)
        except UnicodeDecodeError:
            continue
        n_common = sum(
            character.isascii() or character in '\u3001\u3002\uff0c' for character in text
        )
        n_odd = sum(
            unicodedata.category(character)[0] == 'C' and character not in '\t\n\f\r'
            for character in text
        )
        if text and 100 * n_common >= len(text) >= 100 * n_odd:
            return encoding
    return None
