"""Reading: one rule for all text. Other content is rejected, with advice that works."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nib.errors import UserError
from nib.text import reading

TEXT = 'Grüße, “world”!\nЖизнь 生活。\n🙂\n' * 20
CHINESE = '生活。很好，真的。' * 9
RUSSIAN = 'Это просто текст, слова.'
ENCODINGS = ['utf-8', 'utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be']
MARK = '\ufeff'
needs_iconv = pytest.mark.skipif(not shutil.which('iconv'), reason='needs iconv')


def read(content: bytes, path=None) -> tuple[str, list[str]]:
    said = []
    return ''.join(reading.decode(io.BytesIO(content), path, said.append)), said


@pytest.mark.parametrize('encoding', ENCODINGS)
@pytest.mark.parametrize('line_end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('chunk', [1, 3, 1 << 16])
def test_a_mark_decides_the_encoding_and_lines_end_in_one_way(
    monkeypatch, encoding, line_end, chunk
):
    monkeypatch.setattr(reading, 'CHUNK', chunk)
    monkeypatch.setattr(reading, '_HEAD', max(chunk, 4))
    content = (MARK + TEXT.replace('\n', line_end)).encode(encoding)
    text, said = read(content)
    assert text == TEXT
    decoded = f'decoded from {encoding[:6].upper()}{encoding[-2:].upper()}'
    assert said[0] == (reading.MARK if encoding == 'utf-8' else decoded)
    assert (reading.CARRIAGE_RETURNS in said) == (line_end != '\n')


@given(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0\r\ufeff\ufffd')))
def test_plain_utf8_is_read_as_it_is(text):
    if not any(text.encode().startswith(signature) for signature in reading._SIGNATURES):
        assert read(text.encode()) == (text, [])
    assert reading.plain(text, pytest.fail) == text


@given(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0')))
def test_text_in_memory_is_read_as_in_a_file(text):
    said = []
    if not any(text.encode().startswith(signature) for signature in reading._SIGNATURES):
        from_file, said_of_file = read(text.encode())
        assert reading.plain(text, said.append) == from_file
        assert sorted(said) == sorted(said_of_file)


def test_what_an_earlier_conversion_has_lost_is_said():
    assert 'U+FFFD' in read('caf\ufffd'.encode())[1][0]
    assert 'NUL' in read((MARK + 'a\0b').encode('utf-16-le'))[1][1]


def advised(content: bytes, tmp_path, name='my text.txt') -> tuple[str, bytes]:
    """Returns the message about a file, and what the command in it makes of the file."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(reading.read_file(path, pytest.fail))
    command = re.search(r": ((?:iconv|tr) .*-utf8\.txt'?)", str(error.value))[1]
    subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True)  # iconv -c returns 1
    return str(error.value), (tmp_path / 'my text-utf8.txt').read_bytes()


@needs_iconv
@pytest.mark.parametrize(
    'content, said, becomes',
    [
        ('Grüße\n'.encode('latin-1') * 9, 'not UTF-8 text (byte 2)', 'Grüße\n' * 9),
        (b'x' * 70_000 + b'caf\xe9', '(byte 70003)', 'x' * 70_000 + 'café'),
        ('“Grüße”\n'.encode('cp1252'), 'CP1252', '“Grüße”\n'),
        (TEXT.encode('utf-16-le'), 'not UTF-8 text (byte 4) but UTF-16LE without', TEXT),
        (TEXT.encode('utf-16-be'), 'UTF-16BE', TEXT),
        (TEXT.encode('utf-32-le'), 'UTF-32LE', TEXT),
        (CHINESE.encode('utf-16-le'), 'UTF-16LE', CHINESE),
        (RUSSIAN.encode('utf-16-be'), 'UTF-16BE', RUSSIAN),
        (TEXT.encode() + b'\xff' + TEXT.encode(), 'most of it is', TEXT + TEXT),
        (TEXT.encode() + '生'.encode()[:2], f'(byte {len(TEXT.encode())})', TEXT),
        (b'one\0two\n' * 9, 'NUL bytes', 'onetwo\n' * 9),
        (
            (MARK + 'ab').encode('utf-16-le') + b'\0\xd8' + 'c'.encode('utf-16-le'),
            'UTF-16LE',
            'abc',
        ),
    ],
)
def test_the_advised_command_makes_text_of_what_can_be_converted(tmp_path, content, said, becomes):
    message, converted = advised(content, tmp_path)
    assert said in message
    assert read(converted)[0] == becomes


def follow_advice(path) -> Path:
    """Returns the file that the advised command writes, which is the only new one."""
    before = set(path.parent.iterdir())
    command = reading.advice(path).removeprefix('convert it: ')
    subprocess.run(command, shell=True, check=True)
    [new] = set(path.parent.iterdir()) - before
    return new


@pytest.mark.skipif(not shutil.which('jq'), reason='no jq')
@pytest.mark.parametrize(
    'content', ['[\n {"text": "a"},\n {"text": "b"}\n]', '{\n "text": "a"\n}\n{"text": "b"}']
)
def test_the_advised_command_makes_rows_of_json(tmp_path, content):
    (tmp_path / 'my rows.json').write_text(content)
    new = follow_advice(tmp_path / 'my rows.json')
    assert new.name == 'my rows-rows.jsonl' and new.read_text() == '{"text":"a"}\n{"text":"b"}\n'


@pytest.mark.skipif(not shutil.which('gunzip'), reason='no gunzip')
@pytest.mark.parametrize(
    'name, becomes',
    [
        ('rows.jsonl.gz', 'rows-text.jsonl'),
        ('a.b.txt.gz', 'a.b-text.txt'),
        ('rows.json.gz', 'rows-text.json'),
        ('vol.1.gz', 'vol.1-text.txt'),
        ('book.gz', 'book-text.txt'),
    ],
)
def test_a_file_is_unpacked_under_a_name_of_its_type(tmp_path, name, becomes):
    (tmp_path / name).write_bytes(gzip.compress(b'text'))
    new = follow_advice(tmp_path / name)
    assert new.name == becomes and new.read_bytes() == b'text'


@pytest.mark.parametrize(
    'content, said',
    [
        (b'%PDF-1.7\n1 0 obj\n', r'is a .pdf file.*pdftotext \S*a.txt \S*a-text.txt'),
        (b'{\\rtf1\\ansi text}', 'is a .rtf file.*pandoc'),
        (b'PK\x03\x04\x14\x00', 'is a .zip file.*unzip'),
        (b'\x1f\x8b\x08\x00', 'is a .gz file.*gunzip'),
        (bz2.compress(b'text'), 'is a .bz2 file.*bunzip2'),
        (lzma.compress(b'text'), 'is a .xz file.*xz --decompress'),
        (b'\x28\xb5\x2f\xfd\x24\x04', 'is a .zst file.*zstd --decompress'),
        (b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x01\0', 'binary data'),
        (b'\x7fELF\x02\x01\x01\0\0\0\0\0\0\0', 'binary data'),
        (b'\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01', 'binary data'),
        (bytes(range(256)) * 9, 'binary data'),
    ],
)
def test_what_is_not_text_is_not_converted_but_named(tmp_path, content, said):
    (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        list(reading.read_file(tmp_path / 'a.txt', pytest.fail))
    assert 'iconv' not in str(error.value)
    with pytest.raises(UserError, match='standard input is'):
        read(content)


def test_the_marks_are_those_of_the_encodings():
    for mark, name in reading._MARKS.items():
        assert MARK.encode(name) == mark and codecs.lookup(name)


@pytest.mark.skipif(os.name == 'nt', reason='needs /dev')
@pytest.mark.parametrize('path', ['/dev/zero', '/dev/null', '/'])
def test_what_could_be_read_forever_is_not_opened(path):
    with pytest.raises(UserError, match='is a (device|folder), not a file'):
        list(reading.read_file(path, pytest.fail))
