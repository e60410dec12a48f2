"""Documents: all text is read, in order and in little memory; errors name what cannot be read."""

import json
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nib.errors import UserError
from nib.text import documents, inputs, reading
from nib.text.gpt2 import Gpt2Tokenizer

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
    assert read(*inputs.find_files([tmp_path])[0]) == [
        'café\n',
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
        ('a.jsonl', b'{"text": "one"}\n{"text": \n', r'a.jsonl:2: not valid JSON.*column 10\)'),
        ('a.jsonl', b'{"text": "one', r'string starting at column 10\)'),
        ('a.jsonl', b'{"text": "\xff"}', r'a.jsonl is not UTF-8 text \(byte 10\)'),
        ('a.jsonl', b'[' * 100_000, 'a.jsonl:1: not valid JSON'),
        (
            'a.jsonl',
            b'{"body": "one", "n": 1}',
            "a.jsonl:1: no field 'text' \\(fields: 'body', 'n'\\).*--field",
        ),
        ('a.jsonl', b'"text"', 'a.jsonl:1: a JSON str, not an object'),
        ('a.jsonl', b'[{"text": "one"}]', r'a.jsonl:1: a JSON array.*jq .* > .*/a-rows.jsonl'),
        ('a.jsonl', b'[\n{"text": "one"}\n]', r'a.jsonl:1: not valid JSON.*jq'),
        ('a.jsonl', b'{"text": 3}', "a.jsonl:1: field 'text' has type int, not text"),
        ('a.parquet', b'PAR1', 'a.parquet is not a valid .parquet file'),
        ('a.parquet', {'body': ['one']}, "a.parquet: no field 'text' \\(fields: 'body'\\)"),
        ('a.parquet', {'text': [3]}, "a.parquet: field 'text' has type int, not text"),
        ('a.parquet', ['text', 'n', 'text'], "a.parquet: 2 columns are named 'text'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, said):
    path = tmp_path / name
    if isinstance(content, list):
        columns = [pyarrow.array(['x'])] * len(content)
        pyarrow.parquet.write_table(pyarrow.table(columns, content), path)
    elif isinstance(content, dict):
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
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(UserError, match='pip install pyarrow'):
        read(tmp_path / 'a.parquet')


STORIES = 'Once.\n<|endoftext|>\nTwice, <|endoftext|> thrice.<|endoftext|><|endoftext|>\n'


@pytest.mark.parametrize('size', [1, 2, 3, 5, 7, 13, 1000])
def test_a_written_end_of_text_ends_a_document_wherever_chunks_end(tmp_path, monkeypatch, size):
    """The line ending after it belongs to it; empty documents are skipped."""
    monkeypatch.setattr(reading, 'CHUNK', size)
    monkeypatch.setattr(reading, '_HEAD', size)
    (tmp_path / 'a.txt').write_text(STORIES)
    (tmp_path / 'b.jsonl').write_text('{"text": "a<|endoftext|>b"}\n{"text": "c"}')
    noted = Counter()
    pieces = documents.read_documents([tmp_path / 'a.txt', tmp_path / 'b.jsonl'], noted=noted)
    texts = ['Once.\n', 'Twice, ', ' thrice.', 'a', 'b', 'c']
    assert list(pieces) == [(text, True) for text in texts]
    assert noted == {'<|endoftext|>': 5}

    kept, noted = [], Counter()
    for text, _ in documents.read_documents([tmp_path / 'a.txt'], split=False, noted=noted):
        kept.append(text)
    assert ''.join(kept) == STORIES and noted == {'<|endoftext|>': 4}


def test_rows_follow_the_rule_for_files_and_what_changed_is_counted(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'one\r\n')
    (tmp_path / 'b.txt').write_bytes('\ufeffzw\xf6lf\r'.encode('utf-16-be'))
    rows = ['one\r\ntwo\rthree', '\ufefffour', 'five\0', 'six']
    (tmp_path / 'c.jsonl').write_bytes(
        '\ufeff'.encode() + '\r\n'.join(json.dumps({'text': row}) for row in rows).encode()
    )
    write_parquet(tmp_path / 'd.parquet', ['seven\r'])
    noted = Counter()
    files = [tmp_path / name for name in ('a.txt', 'b.txt', 'c.jsonl', 'd.parquet')]
    texts = [text for text, _ in documents.read_documents(files, noted=noted)]
    assert texts == ['one\n', 'zw\xf6lf\n', 'one\ntwo\nthree', 'four', 'five\0', 'six', 'seven\n']
    assert inputs.told(noted) == [
        r'3 files: line endings \r\n or \r changed to \n',
        '1 file: decoded from UTF-16BE',
        r'2 rows: line endings \r\n or \r changed to \n',
        '1 row: byte-order mark removed',
        '1 row: contains NUL characters',
        '1 file: byte-order mark removed',
    ]


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


@pytest.mark.parametrize('word', ['x', 'x,', '\u6587\u3002'])
def test_a_text_on_one_line_is_read_in_little_memory(tmp_path, word):
    path = tmp_path / 'a.txt'
    path.write_text(word * (4_000_000 // len(word)), encoding='utf-8')
    tracemalloc.start()
    pieces = [len(text) for text, _ in documents.read_documents([path])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(pieces) == 4_000_000 and max(pieces) <= documents.LONGEST
    assert max(pieces[:-3]) <= documents.PIECE + 2 or word == 'x'
    assert peak < 8 * documents.LONGEST


# -- cutting ---------------------------------------------------------------------------------------


def pieces_of(text, monkeypatch, piece, chunk, longest=1 << 18) -> list[str]:
    with monkeypatch.context() as patch:
        patch.setattr(documents, 'PIECE', piece)
        patch.setattr(documents, 'LONGEST', longest)
        chunks = [(text[at : at + chunk], False) for at in range(0, len(text), chunk)]
        pieces = list(documents.cut([*chunks, ('', True)]))
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    return [text for text, _ in pieces]


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


@given(TANGLED, st.integers(1, 9))
def test_so_it_has_with_the_real_gpt2(real_gpt2, monkeypatch, text, piece):
    tokenizer = Gpt2Tokenizer()
    pieces = pieces_of(text, monkeypatch, piece, 20)
    assert [token for part in pieces for token in tokenizer.encode(part)] == tokenizer.encode(
        text
    ).tolist()


@given(TANGLED, st.integers(1, 9))
def test_where_a_text_is_cut_does_not_depend_on_how_it_was_read(monkeypatch, text, piece):
    assert pieces_of(text, monkeypatch, piece, 3) == pieces_of(text, monkeypatch, piece, 1000)


# Without the white space where texts are usually cut, and no word longer than a few characters.
DENSE = st.lists(
    st.sampled_from(
        ['the', 'bee', "'s", "'ll", "'", '12', '7', '\u20ac', '!', '_', '``', ',', '\u0436', '\t']
        + ['\u6587', '\u3042', '\u30a2', '\u30fb', '\u30fc', '\u3002', '\uff0c', '\u0301', '\xb2']
    ),
    min_size=10,
    max_size=60,
).map(''.join)


@given(DENSE, st.integers(1, 9))
def test_text_cut_at_punctuation_has_the_tokens_of_the_whole(real_gpt2, monkeypatch, text, piece):
    tokenizer, longest = Gpt2Tokenizer(), len(text) - 1
    assume(documents._PUNCTUATION.search(text, piece, longest))
    pieces = pieces_of(text, monkeypatch, piece, 5, longest)
    assert len(pieces) > 1
    assert [token for part in pieces for token in tokenizer.encode(part)] == tokenizer.encode(
        text
    ).tolist()


@given(DENSE | TANGLED, st.integers(1, 9), st.integers(10, 20))
def test_where_a_dense_text_is_cut_does_not_depend_on_how_it_was_read(
    monkeypatch, text, piece, longest
):
    pieces = pieces_of(text, monkeypatch, piece, 3, longest)
    assert pieces == pieces_of(text, monkeypatch, piece, 1000, longest)
    assert ''.join(pieces) == text and max(map(len, pieces), default=0) <= longest


def test_pieces_are_as_long_as_they_should_be(monkeypatch):
    pieces = pieces_of('word ' * 1000, monkeypatch, 100, 64)
    assert all(100 <= len(piece) <= 105 for piece in pieces[:-1])
    assert pieces_of('w' * 1000, monkeypatch, 100, 64) == [
        'w' * 1000
    ]  # where it may not be cut, it is not
    pieces = pieces_of('word,' * 1000, monkeypatch, 100, 64, longest=400)
    assert all(100 <= len(piece) <= 105 for piece in pieces[:-2])
    assert pieces_of('w' * 1000, monkeypatch, 100, 64, longest=400) == ['w' * 400] * 2 + ['w' * 200]


# -- counting and splitting ------------------------------------------------------------------------


def test_a_survey_counts_documents_not_pieces():
    found = documents.survey([('ab', False), ('é', True), ('cab', True)], with_characters=True)
    assert list(found.lengths) == [3, 3] and found.n_bytes == 7 and found.characters == 'abcé'
    assert documents.survey([('ab', True)], with_characters=False).characters == ''
    lacking = documents.survey([('abba', False), ('cb', True)], True, known='ac')
    assert lacking.missing == {'b': 3} and not found.missing
    with pytest.raises(UserError, match='the files contain no text'):
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
    with pytest.raises(UserError, match=f'{len(text)} characters?, too few'):
        documents.split_position(len(text))


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
    # The code under test closes it.
    full = open('/dev/full', 'w+b')  # noqa: SIM115
    monkeypatch.setattr('tempfile.TemporaryFile', lambda dir: full)
    with pytest.raises(UserError, match='No space left.*--out_dir'):
        documents.StoredTexts(tmp_path, ['x' * 100_000])
