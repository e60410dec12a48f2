"""Inputs: every file is found once, and what is skipped is reported."""

import os
from pathlib import Path

import pytest

from nib.errors import UserError
from nib.text import inputs

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='needs links and pipes')


def names_of(files, folder) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in files]


def test_folders_are_searched_to_the_bottom_and_hidden_files_left_out(tmp_path):
    for name in (
        'b.txt',
        'a/z.md',
        'a/B.TXT',
        'a/c/d.jsonl',
        'e.parquet',
        'a/picture.png',
        'noending',
        '.hidden.txt',
        '.git/x.txt',
        'a/.obsidian/y.md',
        '.DS_Store',
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('x')
    (tmp_path / 'dangling.txt').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'circle.txt').symlink_to(tmp_path / 'circle.txt')
    os.mkfifo(tmp_path / 'pipe.txt')
    files, skipped = inputs.find_files([tmp_path])
    assert names_of(files, tmp_path) == ['b.txt', 'e.parquet', 'a/B.TXT', 'a/z.md', 'a/c/d.jsonl']
    assert inputs.told(skipped) == [
        '2 hidden folders',
        '2 hidden files',
        '2 broken links',
        '2 files of types other than .txt, .md, .jsonl, .parquet',
        '1 pipe or device',
    ]
    one, skipped = inputs.find_files([tmp_path / 'a' / 'z.md'])
    assert one == [tmp_path / 'a' / 'z.md'] and not skipped
    rows, skipped = inputs.find_files([tmp_path], ('.jsonl',))
    assert names_of(rows, tmp_path) == ['a/c/d.jsonl']
    assert skipped['file{s} of types other than .jsonl'] == 6


def test_names_are_separated_by_commas_and_no_name_is_not_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inputs.split_names('a.txt, b,') == ['a.txt', 'b']
    assert inputs.split_names('') == inputs.split_names(', ') == []
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')
    assert inputs.split_names('a, ~/b') == ['a', '/home/me/b']
    Path('a,b').mkdir()
    assert inputs.split_names('a,b') == ['a,b']


def test_linked_folders_are_searched_and_each_file_counts_once(tmp_path):
    (tmp_path / 'notes/old').mkdir(parents=True)
    (tmp_path / 'elsewhere').mkdir()
    for name in ('notes/a.txt', 'notes/old/b.txt', 'elsewhere/c.txt'):
        (tmp_path / name).write_text(name)
    (tmp_path / 'notes/linked').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'notes/old/up').symlink_to(tmp_path / 'notes')  # a circle
    (tmp_path / 'notes/soft.txt').symlink_to(tmp_path / 'notes/a.txt')
    os.link(tmp_path / 'elsewhere/c.txt', tmp_path / 'notes/old/hard.txt')
    files, skipped = inputs.find_files([tmp_path / 'notes'])
    assert names_of(files, tmp_path) == ['notes/a.txt', 'notes/linked/c.txt', 'notes/old/b.txt']
    assert inputs.told(skipped) == ['2 other paths to the same file']
    again = [tmp_path / 'elsewhere/../notes', tmp_path / 'notes/a.txt', tmp_path / 'notes']
    assert len(inputs.find_files(again)[0]) == 3


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """The superuser, who runs some test machines, may read every folder."""
    (tmp_path / 'locked').mkdir()
    (tmp_path / 'a.txt').write_text('x')
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == 'locked':
            raise PermissionError(13, 'Permission denied', os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(UserError, match='locked cannot be read: Permission denied; make it'):
        inputs.find_files([tmp_path])


@pytest.mark.parametrize(
    'name, said',
    [
        ('nothing', 'no such file'),
        ('picture.png', r'type.*cp \S*picture.png \S*picture.txt'),
        ('book.pdf', r'type.*pdftotext \S*book.pdf \S*book-text.txt'),
        ('my letter.docx', r"type.*pandoc --to=plain '\S*my letter.docx' --output='\S*my "),
        ('rows.json', r'type.*jq .* > \S*rows-rows.jsonl'),
        ('rows.ndjson', r'type.*cp \S*rows.ndjson \S*rows.jsonl'),
        ('rows.csv', r'csv.DictReader\(sys.stdin\)\]. < \S*rows.csv > \S*rows.jsonl'),
        ('book.txt.zst', r'type.*zstd .* > \S*book-text.txt'),
        ('books.tgz', r'type.*tar --extract --file=\S*books.tgz'),
        ('empty', 'found no .txt'),
        ('pictures', '1 file of types other'),
        ('pipe.txt', 'is a pipe, not a file'),
    ],
)
def test_nothing_to_read_is_named(tmp_path, name, said):
    for folder in ('empty', 'pictures'):
        (tmp_path / folder).mkdir()
    files = 'pictures/x.png', 'picture.png', 'book.pdf', 'my letter.docx', 'rows.json'
    for file in (*files, 'rows.csv', 'rows.ndjson', 'book.txt.zst', 'books.tgz'):
        (tmp_path / file).write_bytes(b'')
    os.mkfifo(tmp_path / 'pipe.txt')
    with pytest.raises(UserError, match=said) as error:
        inputs.find_files([tmp_path / name])
    assert name in str(error.value)
