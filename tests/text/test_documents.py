"""Documents: all text is read, in order and in little memory; errors name what cannot be read."""

import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nib.errors import UserError
from nib.text import documents
from nib.text.tokenizer import Gpt2Tokenizer

SAME_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
SPACES = ' \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000'
# Texts that are hard to cut: all kinds of white space, contractions, numbers, several alphabets.
TANGLED = st.lists(
    st.sampled_from(
        [*SPACES, '  ', '\n\n', 'the', 'bee', "'s", "'ll", '12', '€', '🙂', '!', 'ж', '\u0301']
    )
).map(''.join)


def write_parquet(path, values, field='text'):
    pyarrow.parquet.write_table(pyarrow.table({field: values}), path)


def read(*files, field='text') -> list[str]:
    """Whole documents."""
    texts, begins = [], True
    for text, ends in documents.read_documents(files, field):
        texts = [*texts, text] if begins else [*texts[:-1], texts[-1] + text]
        begins = ends
    assert begins, 'the last document has no end'
    return texts


# -- finding ---------------------------------------------------------------------------------------


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
    files, ignored = documents.find_files([tmp_path])
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        'b.txt',
        'e.parquet',
        'a/B.TXT',
        'a/z.md',
        'a/c/d.jsonl',
    ]
    assert ignored == 2  # the picture and the one without an ending
    assert documents.find_files([tmp_path / 'b.txt', tmp_path])[0] == files  # nothing is read twice
    assert documents.find_files([tmp_path / 'a' / 'z.md']) == ([tmp_path / 'a' / 'z.md'], 0)


@pytest.mark.parametrize(
    'name, said',
    [
        ('nothing', 'no such file'),
        ('picture.png', 'type'),
        ('empty', 'found no .txt'),
        ('pictures', '1 of other types'),
    ],
)
def test_nothing_to_read_is_named(tmp_path, name, said):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures/x.png').write_bytes(b'')
    (tmp_path / 'picture.png').write_bytes(b'')
    with pytest.raises(UserError, match=said) as error:
        documents.find_files([tmp_path / name])
    assert name in str(error.value)


# -- reading ---------------------------------------------------------------------------------------


def test_files_are_documents_and_so_are_rows(tmp_path):
    (tmp_path / 'a.txt').write_bytes('\ufeffcafé\r\n'.encode())
    (tmp_path / 'b.md').write_text('# b')
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'c.jsonl').write_text(
        '{"text": "one"}\n\n{"n": 1, "text": "tw\\u006f\\n"}\n{"text": ""}\n{"text": null}\n'
        '{"text": "lone \\ud800"}'
    )
    write_parquet(tmp_path / 'd.parquet', ['three', None, '', 'four'])
    assert read(*documents.find_files([tmp_path])[0]) == [
        'café\r\n',
        '# b',
        'one',
        'two\n',
        'lone \ufffd',
        'three',
        'four',
    ]


def test_another_field_can_hold_the_text(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"body": "one"}')
    write_parquet(tmp_path / 'b.parquet', ['two'], 'body')
    assert read(tmp_path / 'a.jsonl', tmp_path / 'b.parquet', field='body') == ['one', 'two']


@pytest.mark.parametrize(
    'name, content, said',
    [
        ('a.txt', b'caf\xe9 ' * 50, r'a.txt is not UTF-8 text \(byte 3\).*iconv'),
        ('a.md', b'x' * 10 + b'\xe2\x82', r'a.md is not UTF-8 text \(byte 10\)'),
        ('a.jsonl', b'{"text": "one"}\n{"text": \n', 'a.jsonl:2: not valid JSON'),
        ('a.jsonl', b'{"text": "\xff"}', 'a.jsonl:1: not valid JSON'),
        ('a.jsonl', b'[' * 100_000, 'a.jsonl:1: not valid JSON'),
        (
            'a.jsonl',
            b'{"body": "one", "n": 1}',
            "a.jsonl:1: no field 'text' \\(fields: 'body', 'n'\\).*--field",
        ),
        ('a.jsonl', b'"text"', "a.jsonl:1: no field 'text'"),
        ('a.jsonl', b'{"text": 3}', "a.jsonl:1: field 'text' has type int, not text"),
        ('a.parquet', b'PAR1', 'a.parquet is not a valid .parquet file'),
        ('a.parquet', {'body': ['one']}, "a.parquet: no field 'text' \\(fields: 'body'\\)"),
        ('a.parquet', {'text': [3]}, "a.parquet: field 'text' has type int, not text"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, said):
    path = tmp_path / name
    if isinstance(content, dict):
        pyarrow.parquet.write_table(pyarrow.table(content), path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read(path)


def test_a_file_that_goes_away_is_named(tmp_path):
    with pytest.raises(UserError, match='a.txt cannot be read: No such file'):
        read(tmp_path / 'a.txt')


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    write_parquet(tmp_path / 'a.parquet', ['one'])
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    with pytest.raises(UserError, match='pip install pyarrow'):
        read(tmp_path / 'a.parquet')


@pytest.mark.parametrize('size', [1, 2, 3, 5, 7])
def test_a_character_that_two_chunks_share_is_read(tmp_path, monkeypatch, size):
    monkeypatch.setattr(documents, 'PIECE', size)
    (tmp_path / 'a.txt').write_text('é€🙂 aé€🙂\n' * 3, encoding='utf-8')
    assert read(tmp_path / 'a.txt') == ['é€🙂 aé€🙂\n' * 3]
    (tmp_path / 'b.txt').write_bytes('é€🙂'.encode() + b'\xff')
    with pytest.raises(UserError, match='byte 9'):
        read(tmp_path / 'b.txt')


@pytest.mark.slow
@pytest.mark.parametrize('ending', ['.txt', '.jsonl'])
def test_a_large_file_is_read_in_little_memory(tmp_path, ending):
    """40 MB, of which no more than a few pieces are there at once."""
    path = tmp_path / f'a{ending}'
    line = 'To be, or not to be: that is the question.\n' * 20
    with open(path, 'w') as file:
        file.writelines(
            line if ending == '.txt' else json.dumps({'text': line}) + '\n'
            for _ in range(40_000_000 // len(line))
        )
    tracemalloc.start()
    length = sum(len(text) for text, _ in documents.read_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length > 35_000_000 and peak < 12 * documents.PIECE


# -- cutting ---------------------------------------------------------------------------------------


def pieces_of(text, monkeypatch, piece, chunk) -> list[str]:
    with monkeypatch.context() as patch:
        patch.setattr(documents, 'PIECE', piece)
        return list(
            documents.cut(text[first : first + chunk] for first in range(0, len(text), chunk))
        )


@SAME_FIXTURE
@given(TANGLED, st.integers(1, 9), st.integers(1, 20))
def test_a_text_cut_in_pieces_has_the_tokens_of_the_whole(
    small_gpt2, monkeypatch, text, piece, chunk
):
    tokenizer = Gpt2Tokenizer()
    pieces = pieces_of(text, monkeypatch, piece, chunk)
    assert ''.join(pieces) == text and all(pieces)
    assert [token for part in pieces for token in tokenizer.encode(part)] == tokenizer.encode(
        text
    ).tolist()


@SAME_FIXTURE
@given(TANGLED, st.integers(1, 9))
def test_so_it_has_with_the_real_gpt2(real_gpt2, monkeypatch, text, piece):
    tokenizer = Gpt2Tokenizer()
    pieces = pieces_of(text, monkeypatch, piece, 20)
    assert [token for part in pieces for token in tokenizer.encode(part)] == tokenizer.encode(
        text
    ).tolist()


@SAME_FIXTURE
@given(TANGLED, st.integers(1, 9))
def test_where_a_text_is_cut_does_not_depend_on_how_it_was_read(monkeypatch, text, piece):
    assert pieces_of(text, monkeypatch, piece, 3) == pieces_of(text, monkeypatch, piece, 1000)


def test_pieces_are_as_long_as_they_should_be(monkeypatch):
    pieces = pieces_of('word ' * 1000, monkeypatch, 100, 64)
    assert all(100 <= len(piece) <= 105 for piece in pieces[:-1])
    assert pieces_of('w' * 1000, monkeypatch, 100, 64) == [
        'w' * 1000
    ]  # where it may not be cut, it is not


# -- counting and splitting ------------------------------------------------------------------------


def test_a_survey_counts_documents_not_pieces():
    found = documents.survey([('ab', False), ('é', True), ('cab', True)], with_characters=True)
    assert list(found.lengths) == [3, 3] and found.n_bytes == 7 and found.characters == 'abcé'
    assert documents.survey([('ab', True)], with_characters=False).characters == ''
    with pytest.raises(UserError, match='all files are empty'):
        documents.survey([], with_characters=True)


def test_a_survey_tells_texts_apart_and_where_they_end():
    def sha256(*pieces):
        return documents.survey(pieces, with_characters=False).sha256

    assert sha256(('ab', False), ('c', True)) == sha256(('a', False), ('bc', True))
    assert (
        len(
            {
                sha256(('abc', True)),
                sha256(('ab', True), ('c', True)),
                sha256(('a', True), ('bc', True)),
                sha256(('abd', True)),
            }
        )
        == 4
    )


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=200))
def test_documents_to_validate_on_fill_a_tenth_at_most_or_are_the_shortest(lengths):
    val = documents.choose_val(lengths)
    chosen = sum(lengths[document] for document in val)
    assert 1 <= len(val) < len(lengths) and val == documents.choose_val(lengths)
    assert chosen <= sum(lengths) / 10 or (len(val) == 1 and chosen == min(lengths))


def test_of_many_documents_the_share_is_a_tenth_and_from_everywhere():
    val = documents.choose_val([100] * 1000)
    assert len(val) == 100 and len([document for document in val if document < 500]) in range(
        30, 70
    )


def test_pieces_follow_their_document_into_its_split():
    pieces = [('a', False), ('b', True), ('c', True), ('d', False), ('e', True)]
    assert list(documents.split_documents(pieces, {1})) == [
        ('train', 'a', False),
        ('train', 'b', True),
        ('val', 'c', True),
        ('train', 'd', False),
        ('train', 'e', True),
    ]


@given(st.integers(min_value=20, max_value=3000), st.integers(min_value=1, max_value=500))
def test_a_single_text_is_cut_where_nanogpt_cuts_it(length, piece):
    text = ('0123456789' * 300)[:length]
    parts = {'train': '', 'val': ''}
    for split, part, ends in documents.split_text(
        (text[first : first + piece] for first in range(0, length, piece)), length
    ):
        assert part and not ends
        parts[split] += part
    assert parts['train'] + parts['val'] == text and len(parts['train']) == int(length * 0.9)


@pytest.mark.parametrize('text', ['', 'a', 'abc'])
def test_a_text_too_short_to_split_is_refused(text):
    with pytest.raises(UserError, match=f'{len(text)} characters'):
        documents.split_text([text], len(text))


def test_stored_texts_are_read_in_any_order_and_known_by_their_fingerprint(tmp_path):
    texts = ['one', '', 'zwei \N{SNOWMAN}', 'x' * 100_000]
    stored = documents.StoredTexts(tmp_path / 'not there yet', texts)
    assert [len(stored), stored.n_bytes] == [4, sum(len(text.encode()) for text in texts)]
    assert stored.read([3, 0, 2, 1, 0]) == [texts[3], texts[0], texts[2], texts[1], texts[0]]
    assert list(tmp_path.iterdir()) == []  # nobody sees the file
    others = [
        documents.StoredTexts(tmp_path, other).fingerprint
        for other in (texts[::-1], ['o', 'ne', *texts[1:]])
    ]
    assert documents.StoredTexts(tmp_path, texts).fingerprint == stored.fingerprint not in others


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a disk that is full')
def test_texts_that_find_no_room_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.TemporaryFile', lambda dir: open('/dev/full', 'w+b'))  # noqa: SIM115, the code under test closes it
    with pytest.raises(UserError, match='No space left.*--out_dir'):
        documents.StoredTexts(tmp_path, ['x' * 100_000])
