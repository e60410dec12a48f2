"""The prepare scripts, run as a user runs them and as train.py does."""

import hashlib
import json
import os
import pickle
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from conftest import ROOT, run_script
from processes import PATIENCE
from small_tokenizers import byte_level

from nib.errors import UserError
from nib.files import command
from nib.text import train_bpe
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.tokenizer import CharTokenizer, encode_prompt, tokenizer_from_json
from nib.tokens import borrow, encode, shakespeare, unfinished, write
from nib.tokens.dataset import is_prepared, open_dataset

SHAKESPEARE = ROOT / 'data/shakespeare_char/prepare.py'
SHAKESPEARE_GPT2 = ROOT / 'data/shakespeare/prepare.py'
STDLIB = ROOT / 'data/stdlib_char/prepare.py'
OPENWEBTEXT = ROOT / 'data/openwebtext/prepare.py'
WRITTEN = ROOT / 'data/text/prepare.py'
AT_HAND = any((script.parent / 'input.txt').exists() for script in (SHAKESPEARE, SHAKESPEARE_GPT2))
NO_NETWORK = dict.fromkeys(('https_proxy', 'HTTPS_PROXY'), 'http://127.0.0.1:1')
TEXT = 'Wherefore art thou Romeo? Ὦ Ῥωμαῖε!\n' * 30


@pytest.fixture
def given(tmp_path):
    path = tmp_path / 'romeo.txt'
    path.write_text(TEXT, encoding='utf-8', newline='')
    return path


def text_of(folder):
    data = open_dataset(folder, 16)
    return data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val)


def test_a_text_of_one_s_own_becomes_a_dataset_and_is_told_from_shakespeare(
    given, tmp_path, run_main, monkeypatch
):
    """From another folder, with relative paths."""
    monkeypatch.chdir(tmp_path)
    done = run_main(SHAKESPEARE, '--input=romeo.txt', '--out_dir=romeo')
    assert done.returncode == 0, done.stderr
    assert text_of(tmp_path / 'romeo') == TEXT
    cut = int(len(TEXT) * 0.9)
    for number in (len(TEXT), len(set(TEXT)), cut, len(TEXT) - cut):
        assert f'{number:,} ' in done.stdout or f'{number:,},' in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert 'not the published tiny Shakespeare' in done.stderr
    meta = json.loads((tmp_path / 'romeo/meta.json').read_text())
    assert meta['source'] == {
        'file': 'romeo.txt',
        'sha256': hashlib.sha256(given.read_bytes()).hexdigest(),
    }


def test_train_py_can_prepare_a_dataset_in_its_own_process(given, tmp_path, capsys):
    runpy.run_path(str(SHAKESPEARE))['main'](
        [f'--input={given}', f'--out_dir={tmp_path / "romeo"}']
    )
    assert text_of(tmp_path / 'romeo') == TEXT


@pytest.fixture
def lonely_script(tmp_path, monkeypatch):
    """A copy of the script with no text beside it, and no network."""
    for name in NO_NETWORK:
        monkeypatch.setenv(name, NO_NETWORK[name])
    script = tmp_path / 'checkout/data/shakespeare_char/prepare.py'
    script.parent.mkdir(parents=True)
    return shutil.copy(SHAKESPEARE, script)


def test_a_text_put_into_out_dir_is_taken_without_a_network(
    lonely_script, run_main, given, tmp_path
):
    (tmp_path / 'new').mkdir()
    given.rename(tmp_path / 'new/input.txt')
    ended = run_main(lonely_script, f'--out_dir={tmp_path / "new"}')
    assert ended.returncode == 0, ended.stderr
    assert text_of(tmp_path / 'new') == TEXT


def test_without_a_network_the_error_says_what_to_download_and_where_to_save_it(
    lonely_script, run_main, tmp_path
):
    ended = run_main(lonely_script, f'--out_dir={tmp_path / "new"}')
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    for word in (
        f'{tmp_path / "new/input.txt"} could not be downloaded (no connection)',
        'download https://raw.githubusercontent.com/',
        'on another machine and save it under this name',
    ):
        assert word in ended.stderr
    assert list((tmp_path / 'new').iterdir()) == []


def test_shakespeare_by_gpt2_s_tokens(small_gpt2, given, tmp_path, capsys):
    runpy.run_path(str(SHAKESPEARE_GPT2))['main'](
        [f'--input={given}', f'--out_dir={tmp_path / "romeo"}']
    )
    assert text_of(tmp_path / 'romeo') == TEXT
    assert open_dataset(tmp_path / 'romeo', 16).tokenizer == Gpt2Tokenizer()
    assert 'vocabulary 50,257' in capsys.readouterr().out


@pytest.mark.skipif(
    not AT_HAND, reason='tiny Shakespeare is not beside its script: data/shakespeare_char/input.txt'
)
def test_tiny_shakespeare_has_the_counts_that_nanogpt_gives(real_gpt2, tmp_path, capsys):
    runpy.run_path(str(SHAKESPEARE_GPT2))['main']([f'--out_dir={tmp_path}'])
    assert '301,966 training and 36,059 validation' in capsys.readouterr().out


def test_shakespeare_by_gpt2_s_tokens_without_its_vocabulary_is_one_line(given, tmp_path):
    done = run_script(
        SHAKESPEARE_GPT2,
        f'--input={given}',
        f'--out_dir={tmp_path / "new"}',
        env={**NO_NETWORK, 'TIKTOKEN_CACHE_DIR': str(tmp_path / 'cache')},
        python=sys.executable,  # which has not read the vocabulary
    )
    assert (
        done.returncode == 2
        and 'TIKTOKEN_CACHE_DIR' in done.stderr.splitlines()[-1]
        and 'Traceback' not in done.stderr
    )


@pytest.mark.parametrize(
    'name, other', [('shakespeare', 'shakespeare_char'), ('shakespeare_char', 'shakespeare')]
)
def test_each_shakespeare_takes_the_text_of_the_other(given, tmp_path, capsys, name, other):
    (tmp_path / other).mkdir()
    given.rename(tmp_path / other / 'input.txt')
    shakespeare.prepare(str(tmp_path / name / 'prepare.py'), '', '', CharTokenizer.train)
    assert text_of(tmp_path / name) == TEXT


@pytest.fixture(scope='module')
def stdlib(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stdlib')
    done = run_script(STDLIB, f'--out_dir={folder}')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_standard_library_is_text_enough_and_says_where_it_is_from(stdlib):
    text = text_of(stdlib)
    assert len(text) > 5_000_000 and text.isascii() and '\r' not in text and text.endswith('\n')
    library = Path(sysconfig.get_paths()['stdlib'])
    assert (library / 'argparse.py').read_text(encoding='utf-8') in text
    meta = json.loads((stdlib / 'meta.json').read_text())
    assert meta['source']['python'] == platform.python_version()
    assert meta['source']['sha256'] == hashlib.sha256(text.encode()).hexdigest()
    assert 100 < meta['source']['files'] < 2000


@pytest.mark.slow
def test_the_standard_library_gives_the_same_bins_twice(stdlib, tmp_path, capsys):
    runpy.run_path(str(STDLIB))['main']([f'--out_dir={tmp_path}'])
    assert open_dataset(tmp_path, 16).fingerprint == open_dataset(stdlib, 16).fingerprint


def test_tests_installed_packages_and_what_is_not_ascii_are_left_out(tmp_path):
    files = {
        'b.py': b'b = 1',
        'a/z.py': b'z = 1\r\nz = 2\rz = 3\n',
        'a.py': b'a = 1\n',
        'empty.py': b'',
        'notes.txt': b'no',
        'accent.py': 'é = 1\n'.encode(),
        'test/x.py': b'no',
        'a/tests/x.py': b'no',
        'idlelib/idle_test/x.py': b'no',
        'site-packages/x.py': b'no',
        'dist-packages/x.py': b'no',
        '__pycache__/x.py': b'no',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'dangling.py').symlink_to(tmp_path / 'nowhere.py')
    # In the order of the paths, in which a.py is before a/z.py.
    expected = ['a = 1\n', 'z = 1\nz = 2\nz = 3\n', 'b = 1\n']
    assert runpy.run_path(str(STDLIB))['read_sources'](tmp_path) == expected


def test_a_python_without_its_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
    with pytest.raises(UserError, match='no Python source'):
        runpy.run_path(str(STDLIB))['main']([f'--out_dir={tmp_path / "out"}'])


# -- a person's own text ---------------------------------------------------------------------------


@pytest.fixture
def notes(tmp_path):
    """Twenty notes in a folder, with what else is there."""
    folder = tmp_path / 'My notes'
    (folder / 'old').mkdir(parents=True)
    for number in range(20):
        name = f'{number}.md' if number % 2 else f'old/{number}.txt'
        (folder / name).write_text(f'Note {number}: ' + 'é one thing and another. ' * 40)
    (folder / 'picture.png').write_bytes(b'')
    (folder / '.hidden.md').write_text('hidden')
    return folder


@pytest.mark.parametrize('tokenizer, vocabulary', [('char', 26), ('byte', 257), ('gpt2', 50257)])
def test_a_folder_of_notes_becomes_a_dataset(
    small_gpt2, notes, tmp_path, capsys, tokenizer, vocabulary
):
    runpy.run_path(str(WRITTEN))['main'](
        [f'--input={notes}', f'--tokenizer={tokenizer}', f'--out_dir={tmp_path / "mine"}']
    )

    data = open_dataset(tmp_path / 'mine', 16)
    texts = {
        split: data.tokenizer.decode(data.split(split)).split('<|endoftext|>')
        for split in ('train', 'val')
    }
    assert data.vocab_size == vocabulary and texts['train'].pop() == texts['val'].pop() == ''
    assert len(texts['val']) in (1, 2) and len(texts['train']) + len(texts['val']) == 20
    assert sorted(texts['train'] + texts['val']) == sorted(
        path.read_text() for path in notes.rglob('[0-9]*')
    )
    said = capsys.readouterr()
    for words in (
        f'vocabulary {vocabulary:,}',
        '20 documents',
        f'{len(data.train):,} training',
        f'{len(data.val):,} validation',
    ):
        assert words in said.out
    assert said.err.splitlines() == [
        'note: skipped 1 hidden file',
        'note: skipped 1 file of types other than .txt, .md, .jsonl, .parquet',
        'note: this is very little text to learn from; use at least 100,000 characters',
    ]
    assert said.out.splitlines()[-1] == (
        f'to train on it: {command("train.py")} config/train_text.py --dataset=mine '
        f'--data_dir={tmp_path}'
    )


def test_one_text_is_split_by_position_and_has_no_end_of_text(
    given, tmp_path, run_main, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = run_main(WRITTEN, '--input=romeo.txt', '--out_dir=romeo')
    assert done.returncode == 0 and done.stderr.splitlines() == [
        'note: this is very little text to learn from; use at least 100,000 characters'
    ]
    data = open_dataset(tmp_path / 'romeo', 16)
    assert text_of(tmp_path / 'romeo') == TEXT and data.vocab_size == len(set(TEXT))
    assert len(data.train) == int(len(TEXT) * 0.9)


@pytest.mark.parametrize('number, told', [(9, True), (10, False)])
def test_a_note_says_if_there_are_only_a_few_documents(run_main, tmp_path, number, told):
    text = '<|endoftext|>'.join(f'Chapter {digit}. It rained.' for digit in range(number))
    (tmp_path / 'book.txt').write_text(text)
    flags = [f'--input={tmp_path / "book.txt"}', f'--out_dir={tmp_path / "book"}']
    said = run_main('data/text/prepare.py', *flags).stderr
    assert (f'with only {number} documents' in said) == told
    said = run_main(
        'data/text/prepare.py', *flags, '--end_of_text=characters', '--overwrite'
    ).stderr
    assert 'with only' not in said


def test_a_text_that_is_refused_leaves_no_folder(run_main, tmp_path):
    (tmp_path / 'short.txt').write_text('a')
    ended = run_main(WRITTEN, f'--input={tmp_path / "short.txt"}', f'--out_dir={tmp_path / "new"}')
    assert ended.returncode == 2 and 'the text has 1 character, too few' in ended.stderr
    assert not (tmp_path / 'new').exists()


def test_several_inputs_and_another_field(given, tmp_path, capsys):
    (tmp_path / 'rows.jsonl').write_text('{"body": "one thing"}\n{"body": "another, thing"}')
    runpy.run_path(str(WRITTEN))['main'](
        [f'--input={tmp_path}/rows.jsonl,{given}', '--field=body', f'--out_dir={tmp_path / "mine"}']
    )
    data = open_dataset(tmp_path / 'mine', 2)
    assert sorted(text_of(tmp_path / 'mine').split('<|endoftext|>')) == [
        '',
        TEXT,
        'another, thing',
        'one thing',
    ]
    assert data.meta['source']['documents'] == 3 and data.meta['source']['input'] == [
        'rows.jsonl',
        'romeo.txt',
    ]


STORIES = 'Once there was a cat.\n<|endoftext|>\n' * 30


@pytest.mark.parametrize('tokenizer', ['char', 'byte', 'gpt2'])
def test_a_written_end_of_text_becomes_the_token_or_stays_as_told_and_prompts_agree(
    small_gpt2, tmp_path, capsys, tokenizer
):
    (tmp_path / 'stories.txt').write_text(STORIES)
    prepare = runpy.run_path(str(WRITTEN))['main']
    flags = [f'--input={tmp_path / "stories.txt"}', f'--tokenizer={tokenizer}']

    prepare([*flags, f'--out_dir={tmp_path / "ends"}'])
    said = capsys.readouterr()
    assert '<|endoftext|> occurs 30 times in the text: each ends a document' in said.err
    assert '30 documents,' in said.out
    data = open_dataset(tmp_path / 'ends', 16)
    end = data.tokenizer.end_of_text
    assert (data.train == end).sum() + (data.val == end).sum() == 30
    assert text_of(tmp_path / 'ends') == 'Once there was a cat.\n<|endoftext|>' * 30
    assert encode_prompt(data.tokenizer, '<|endoftext|>', '--start') == [end]

    prepare([*flags, f'--out_dir={tmp_path / "stays"}', '--end_of_text=characters'])
    assert 'occurs 30 times in the text: each stays ordinary characters' in capsys.readouterr().err
    data = open_dataset(tmp_path / 'stays', 16)
    end = data.tokenizer.end_of_text
    assert text_of(tmp_path / 'stays') == STORIES
    assert end is None or end not in data.train
    prompt = encode_prompt(data.tokenizer, '<|endoftext|>', '--start')
    assert prompt == data.tokenizer.encode('<|endoftext|>').tolist() and len(prompt) > 1
    assert tokenizer_from_json(data.meta['tokenizer']) == data.tokenizer


def test_a_text_is_prepared_with_the_tokenizer_of_a_dataset(tmp_path, capsys):
    """Also one without an end-of-text token; the characters that it lacks are counted."""
    prepare = runpy.run_path(str(WRITTEN))['main']
    (tmp_path / 'a.txt').write_text('the cat sees the dog? ' * 30)
    (tmp_path / 'new').mkdir()
    for name in 'bc':
        (tmp_path / f'new/{name}.txt').write_text('the \u20acat, the dog ' * 30)
    prepare([f'--input={tmp_path / "a.txt"}', f'--out_dir={tmp_path / "first"}'])
    capsys.readouterr()
    prepare(
        [
            f'--input={tmp_path / "new"}',
            f'--tokenizer={tmp_path / "first"}',
            f'--out_dir={tmp_path / "second"}',
            '--replace_missing=?',
        ]
    )
    said = capsys.readouterr().err
    assert "lacks 2 of the characters of this text, which occur 120 times: '" in said
    assert "'\u20ac' (60)" in said and "is replaced by '?'" in said
    assert 'has no <|endoftext|>: nothing separates the documents' in said
    first, second = (open_dataset(tmp_path / name, 16) for name in ('first', 'second'))
    assert second.tokenizer == first.tokenizer
    assert text_of(tmp_path / 'second') == 'the ?at? the dog ' * 60
    assert second.meta['source']['replaced'] == {'characters': 120, 'by': '?'}
    shutil.copytree(tmp_path / 'second', tmp_path / 'old')  # as nanoGPT describes it
    (tmp_path / 'old/meta.json').unlink()
    characters = first.tokenizer.characters
    meta = {'vocab_size': len(characters), 'itos': dict(enumerate(characters))}
    meta['stoi'] = {character: number for number, character in meta['itos'].items()}
    (tmp_path / 'old/meta.pkl').write_bytes(pickle.dumps(meta))
    assert borrow.read_tokenizer(str(tmp_path / 'old')) == first.tokenizer


@pytest.mark.slow
def test_a_model_of_characters_is_finetuned_on_another_text(
    data_dir, train_here, run_main, tmp_path
):
    assert train_here(tmp_path / 'run').returncode == 0
    (tmp_path / 'more.txt').write_text('A caf\u00e9 is small. The dog sleeps.\r\n' * 60)
    step = next((tmp_path / 'run').glob('step-*'))
    for number, folder in enumerate((tmp_path / 'run', step, data_dir / 'tiny')):
        done = run_main(
            'data/text/prepare.py',
            f'--input={tmp_path / "more.txt"}',
            f'--tokenizer={folder}',
            '--replace_missing= ',
            f'--out_dir={tmp_path / "data" / str(number)}',
        )
        assert done.returncode == 0 and 'lacks 2 of the characters' in done.stderr, done.stderr
    tuned = train_here(
        tmp_path / 'tuned',
        f'--data_dir={tmp_path / "data"}',
        '--dataset=0',
        f'--init_from={tmp_path / "run"}',
    )
    assert tuned.returncode == 0, tuned.stderr


def test_a_split_far_from_a_tenth_is_told(tmp_path, capsys):
    for name, length in (('a', 3000), ('b', 2000)):
        (tmp_path / f'{name}.txt').write_text('word ' * length)
    runpy.run_path(str(WRITTEN))['main']([f'--input={tmp_path}', f'--out_dir={tmp_path / "mine"}'])
    assert 'has 40% of the text' in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path):
    """What the script needs of the project, where its datasets can be written beside it."""
    folder = tmp_path / 'checkout'
    shutil.copytree(ROOT / 'nib', folder / 'nib', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'configurator.py', folder)
    for script in (WRITTEN, SHAKESPEARE):
        (folder / 'data' / script.parent.name).mkdir(parents=True)
        shutil.copy(script, folder / 'data' / script.parent.name)
    shutil.copy(ROOT / 'data/.gitignore', folder / 'data')
    return folder


def test_a_dataset_is_named_after_its_input_and_stays_out_of_git(checkout, notes):
    done = run_script(
        'data/text/prepare.py', f'--input={notes}', folder=checkout, python=sys.executable
    )
    assert done.returncode == 0, done.stderr
    assert is_prepared(checkout / 'data/My_notes')
    last = done.stdout.splitlines()[-1]
    assert last.startswith('to train on it: ') and last.endswith('train_text.py --dataset=My_notes')
    subprocess.run(['git', 'init', '--quiet'], cwd=checkout, check=True)
    (checkout / 'data/mine').mkdir()
    shutil.copy(WRITTEN, checkout / 'data/mine')
    kept = subprocess.run(
        ['git', 'ls-files', '--others', '--exclude-standard', 'data'],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert sorted(kept.stdout.split()) == [
        'data/.gitignore',
        'data/mine/prepare.py',
        'data/shakespeare_char/prepare.py',
        'data/text/prepare.py',
    ]


def test_a_second_text_of_the_same_name_does_not_replace_the_first(tmp_path, run_main):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'notes.txt').write_text(f'The notes of {folder}. ' * 20)

    def prepare(folder, *flags):
        path = tmp_path / folder / 'notes.txt'
        return run_main(WRITTEN, f'--input={path}', f'--out_dir={tmp_path / "notes"}', *flags)

    assert prepare('a').returncode == 0
    before = open_dataset(tmp_path / 'notes', 16).fingerprint
    refused = prepare('b')
    assert refused.returncode == 2 and '--overwrite' in refused.stderr
    assert '--name=NAME' in refused.stderr
    assert prepare('a').returncode == 0  # the same text again
    assert open_dataset(tmp_path / 'notes', 16).fingerprint == before
    assert prepare('b', '--overwrite').returncode == 0
    assert text_of(tmp_path / 'notes') == 'The notes of b. ' * 20


def test_two_inputs_are_two_flags_only_by_mistake(given, run_main, tmp_path):
    done = run_main(WRITTEN, f'--input={given}', f'--input={given}', f'--out_dir={tmp_path / "x"}')
    assert done.returncode == 2 and 'separate several paths with commas' in done.stderr
    done = run_main(WRITTEN, '--input', given, given)  # as a shell writes *.txt
    assert done.returncode == 2 and 'Separate several paths with commas' in done.stderr


def test_a_text_that_another_process_has_just_prepared_is_not_replaced(
    given, tmp_path, run_main, monkeypatch
):
    """While this process read its own text, or waited for the other one."""
    own, other, folder = write.locked, tmp_path / 'other.txt', tmp_path / 'notes'
    other.write_text('The other text. ' * 20)

    def locked(path):
        monkeypatch.setattr(write, 'locked', own)
        assert run_main(WRITTEN, f'--input={other}', f'--out_dir={folder}').returncode == 0
        return own(path)

    monkeypatch.setattr(write, 'locked', locked)
    done = run_main(WRITTEN, f'--input={given}', f'--out_dir={folder}')
    assert done.returncode == 2 and 'contains a dataset made from another text' in done.stderr
    assert text_of(folder) == 'The other text. ' * 20


@pytest.mark.parametrize(
    'flags, said',
    [
        ([], '--input=PATH'),
        (['--input=nothing'], 'nothing'),
        (['--input={notes}/picture.png'], 'picture.png'),
        (['--input={notes}', '--name=shakespeare_char'], 'data/shakespeare_char/prepare.py'),
        (['--input={notes}', '--name=text'], 'data/text'),
        (['--input={notes}', '--name=a/b'], '--name=a_b'),
        (['--input={notes}', '--name=..'], '--name=notes'),
        (['--input={notes}', '--tokenizer=words'], 'words'),
        (['--input={notes}/empty.txt'], 'the files contain no text'),
        (['--input={notes}/ab.txt'], '2 characters'),
        (['--input={notes}/bad.jsonl'], 'bad.jsonl:1'),
    ],
)
def test_a_mistake_is_named_on_one_line_and_writes_nothing(
    checkout, notes, run_main, monkeypatch, flags, said
):
    for name, content in (('empty.txt', ''), ('ab.txt', 'ab'), ('bad.jsonl', '{')):
        (notes / name).write_text(content)
    monkeypatch.chdir(checkout)
    script = checkout / 'data/text/prepare.py'
    done = run_main(script, *[flag.format(notes=notes) for flag in flags])
    errors = [line for line in done.stderr.splitlines() if not line.startswith('note: skipped')]
    assert (
        done.returncode == 2
        and len(errors) == 1
        and errors[0].startswith('error: ')
        and said in errors[0]
    )
    assert not list(checkout.glob('data/**/*.bin'))


# -- OpenWebText, on documents that are here -------------------------------------------------------


@pytest.fixture
def pages(tmp_path):
    """Fifty documents in two files of two types."""
    texts = [f'Page {number} ' + 'of the web. ' * (number % 7) for number in range(50)]
    folder = tmp_path / 'pages'
    folder.mkdir()
    (folder / 'a.jsonl').write_text(
        ''.join(json.dumps({'url': 'x', 'text': text}) + '\n' for text in texts[:30])
    )
    pyarrow.parquet.write_table(pyarrow.table({'text': texts[30:]}), folder / 'b.parquet')
    return folder, texts


def openwebtext(*flags):
    runpy.run_path(str(OPENWEBTEXT))['main'](list(flags))


def test_openwebtext_is_split_and_ordered_as_nanogpt_does(small_gpt2, pages, tmp_path, capsys):
    folder, texts = pages
    (folder / 'c.jsonl').write_text(
        '{"text": ""}\n{"text": null}\n'
    )  # documents too; .parquet files come last
    texts[30:30] = ['', '']
    openwebtext(f'--input={folder}', f'--out_dir={tmp_path / "owt"}')
    data = open_dataset(tmp_path / 'owt', 2)
    parts = datasets.Dataset.from_dict({'text': texts}).train_test_split(
        test_size=0.0005, seed=2357, shuffle=True
    )
    for ids, part in ((data.val, parts['test']), (data.train, parts['train'])):
        assert data.tokenizer.decode(ids).split('<|endoftext|>') == [*part['text'], '']
    assert data.meta['source']['documents'] == {'train': 51, 'val': 1}
    assert '52 documents' in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / 'owt').iterdir()) == [
        'meta.json',
        'train.bin',
        'val.bin',
    ]


def test_openwebtext_from_hugging_face_gives_the_bins_of_the_same_texts_in_files(
    small_gpt2, pages, tmp_path, monkeypatch, capsys
):
    folder, texts = pages
    texts[7] = ''
    (folder / 'a.jsonl').write_text(
        ''.join(json.dumps({'text': text}) + '\n' for text in texts[:30])
    )
    monkeypatch.setattr(
        datasets,
        'load_dataset',
        lambda name, split, num_proc: datasets.Dataset.from_dict(
            {'text': [text or None for text in texts], 'url': ['x'] * 50}
        ),
    )
    openwebtext(f'--input={folder}', f'--out_dir={tmp_path / "files"}')
    openwebtext(f'--out_dir={tmp_path / "hub"}')
    for name in ('train.bin', 'val.bin'):
        assert (tmp_path / 'hub' / name).read_bytes() == (tmp_path / 'files' / name).read_bytes()
    assert 'has changed since' in capsys.readouterr().err


@pytest.mark.parametrize('at', [1, 30, 49])
def test_openwebtext_goes_on_where_it_was_stopped(
    small_gpt2, pages, tmp_path, monkeypatch, capsys, at
):
    openwebtext(f'--input={pages[0]}', f'--out_dir={tmp_path / "whole"}')
    monkeypatch.setattr(unfinished, 'JOURNAL_SECONDS', 0)
    monkeypatch.setattr(encode, 'BATCH', 1)
    monkeypatch.setattr(encode, 'SERIAL_BATCHES', 1000)
    add, added = unfinished.UnfinishedBins.add, []

    def stopping(unfinished, encoded):
        if len(added) == at:
            raise KeyboardInterrupt
        added.append(encoded)
        add(unfinished, encoded)

    monkeypatch.setattr(unfinished.UnfinishedBins, 'add', stopping)
    with pytest.raises(KeyboardInterrupt):
        openwebtext(f'--input={pages[0]}', f'--out_dir={tmp_path / "stopped"}')
    added.clear()
    at = 50 - at  # no more than is left may be encoded now
    openwebtext(f'--input={pages[0]}', f'--out_dir={tmp_path / "stopped"}')
    assert len(added) == at
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'stopped' / name).read_bytes() == (
            tmp_path / 'whole' / name
        ).read_bytes()


def test_openwebtext_without_its_package_says_what_to_install(
    small_gpt2, pages, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='pip install datasets'):
        openwebtext(f'--out_dir={tmp_path / "owt"}')


@pytest.mark.parametrize(
    'name, content, said',
    [
        ('broken.jsonl', '{"text": "one"}\n{"text": \n', 'broken.jsonl:2: not valid JSON'),
        ('other.jsonl', '{"body": "one"}\n', "other.jsonl:1: no field 'text'"),
        ('one.jsonl', '{"text": "one"}\n', 'two'),
        ('number.jsonl', '{"text": 1}\n{"text": 2}\n', 'number.jsonl:1: .*not text'),
        ('notes.txt', 'one', r'supported: .jsonl, .parquet\); use data/text/prepare.py'),
    ],
)
def test_pages_that_will_not_do_are_named(small_gpt2, pages, tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        openwebtext(f'--input={tmp_path / name}', f'--out_dir={tmp_path / "owt"}')
    assert not (tmp_path / 'owt').exists()


@pytest.mark.slow
def test_openwebtext_without_a_network_is_one_line(tmp_path):
    """The vocabulary is not what is missing here."""
    program = (
        'import runpy, sys; from nib import errors; from nib.text import gpt2\n'
        'gpt2.Gpt2Tokenizer.encode = lambda self, text: None\n'
        f'errors.run_script(lambda argv: runpy.run_path({str(OPENWEBTEXT)!r})["main"]'
        f'(["--out_dir={tmp_path / "owt"}"]))'
    )
    done = run_script('-c', program, env={'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'})
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and 'Traceback' not in done.stderr
    )
    for word in ('Skylion007/openwebtext', '--input=FOLDER'):
        assert word in done.stderr


# -- a tokenizer trained on the text ---------------------------------------------------------------


def prepare_bpe(run_main, path, folder, *flags):
    return run_main(
        'data/text/prepare.py', f'--input={path}', f'--out_dir={folder}', '--tokenizer=bpe', *flags
    )


@pytest.mark.parametrize(
    'normalizer, said',
    [
        (None, ''),
        (tokenizers.normalizers.Lowercase(), "changes the text: 'The old captain sail' bec"),
    ],
)
def test_a_note_says_that_a_tokenizer_changes_the_text(normalizer, said, tmp_path, run_main):
    library = byte_level()
    if normalizer:
        library.normalizer = normalizer
    library.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'one.txt').write_text('The old captain sails home. ' * 400)
    done = run_main(
        'data/text/prepare.py',
        f'--input={tmp_path / "one.txt"}',
        f'--tokenizer={tmp_path / "tokenizer.json"}',
        f'--out_dir={tmp_path / "set"}',
    )
    assert done.returncode == 0 and said in done.stderr
    assert ('changes the text' in done.stderr) == bool(said)


def test_a_tokenizer_is_trained_on_the_training_split(tmp_path, run_main):
    text = 'the old captain sails home. ' * 400 + 'zyxwvut ' * 100  # in the last tenth
    (tmp_path / 'one.txt').write_text(text)
    done = prepare_bpe(run_main, tmp_path / 'one.txt', tmp_path / 'a', '--vocab_size=270')
    assert done.returncode == 0, done.stderr
    prepare_bpe(run_main, tmp_path / 'one.txt', tmp_path / 'b', '--vocab_size=270')
    for name in ('meta.json', 'train.bin', 'val.bin'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    data = open_dataset(tmp_path / 'a', 16)
    assert text_of(tmp_path / 'a') == text and data.vocab_size == 270
    assert data.meta['tokenizer']['kind'] == 'hf'
    assert not any(b'zy' in data.tokenizer.decode_bytes([token]) for token in range(270))


def test_a_tokenizer_is_trained_once(tmp_path, run_main, monkeypatch):
    (tmp_path / 'one.txt').write_text('the old captain sails home. ' * 400)
    path, flags = tmp_path / 'one.txt', ['--vocab_size=270']
    prepare_bpe(run_main, path, tmp_path / 'whole', *flags)
    with (
        monkeypatch.context() as stopped
    ):  # a full disk: after the training, before the first token
        stopped.setattr(unfinished.UnfinishedBins, 'add', lambda self, encoded: 1 / 0)
        stopped.setattr(unfinished.UnfinishedBins, '__exit__', lambda *nothing: None)  # a kill
        with pytest.raises(ZeroDivisionError):
            prepare_bpe(run_main, path, tmp_path / 'a', *flags)
    monkeypatch.setattr(train_bpe, 'train_bpe', None)
    for _ in range(2):  # the second time, the dataset is complete
        done = prepare_bpe(run_main, path, tmp_path / 'a', *flags)
        assert done.returncode == 0, done.stderr
        for name in ('meta.json', 'train.bin', 'val.bin'):
            whole = (tmp_path / 'whole' / name).read_bytes()
            assert (tmp_path / 'a' / name).read_bytes() == whole
        assert 'cannot be resumed' not in done.stderr
    monkeypatch.undo()
    done = prepare_bpe(run_main, path, tmp_path / 'a', '--vocab_size=265')
    assert f'the tokens in {tmp_path / "a"} were replaced: runs on the old ones' in done.stderr
    assert open_dataset(tmp_path / 'a', 16).vocab_size == 265


def test_a_short_text_lowers_the_default_vocabulary_but_not_one_that_is_set(tmp_path, run_main):
    path = tmp_path / 'one.txt'
    path.write_text('the old captain sails home. ' * 400)
    for name in ('a', 'b', 'a'):  # a is repeated: it is complete
        done = prepare_bpe(run_main, path, tmp_path / name)
        assert done.returncode == 0, done.stderr
        found = open_dataset(tmp_path / name, 16).vocab_size
        assert 257 < found < 4096
        lines = [line for line in done.stderr.splitlines() if 'default' in line]
        assert len(lines) == 1 and f'only {found} tokens, so' in lines[0]
    for name in ('meta.json', 'train.bin', 'val.bin'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    for flag in ('--vocab_size=4096', f'--vocab_size={found + 1}'):
        done = prepare_bpe(run_main, path, tmp_path / 'a', flag, '--overwrite')
        assert done.returncode == 2 and f'use --vocab_size={found} or less' in done.stderr
    assert open_dataset(tmp_path / 'a', 16).vocab_size == found
    done = prepare_bpe(run_main, path, tmp_path / 'a', f'--vocab_size={found}')
    assert done.returncode == 0 and 'default' not in done.stderr


def test_what_a_trained_tokenizer_gains_is_told(notes, tmp_path, run_main, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))  # without GPT-2's files
    done = prepare_bpe(run_main, notes, tmp_path / 'a', '--vocab_size=270')
    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stdout.splitlines() if 'bytes per token' in line)
    data = open_dataset(tmp_path / 'a', 16)
    counts = data.meta['splits']['val']
    ends = int((data.val == data.tokenizer.end_of_text).sum())
    assert f': {counts["bytes"] / (counts["tokens"] - ends):.2f}; characters have 1.0' in told
    assert "GPT-2's vocabulary is not on this machine" in told


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--vocab_size=256'], 'expected 257'),
        (['--vocab_size=100000000000'], 'to 1048576'),
        (['--vocab_size=many'], "found 'many'"),
        (['--vocab_size=5000'], 'or a longer text'),
        (['--vocab_size=300', '--tokenizer=char'], 'leave --vocab_size out'),
    ],
)
def test_a_vocabulary_that_cannot_be_trained_is_refused(notes, tmp_path, run_main, flags, said):
    done = prepare_bpe(run_main, notes, tmp_path / 'none', *flags)
    errors = [line for line in done.stderr.splitlines() if not line.startswith('note: ')]
    assert done.returncode == 2 and len(errors) == 1 and said in errors[0]
    assert not (tmp_path / 'none').exists()


# While the tokenizers' library trains, the process is in code that does not look for signals.
TRAINS_ON = """
import hashlib, runpy, sys
from nib.text import train_bpe
spread = train_bpe.spread
def all_and_more(*arguments):
    yield from spread(*arguments)
    print('training', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'for hours', b'', (1 << 31) - 1)
train_bpe.spread = all_and_more
runpy.run_path(sys.argv.pop(1), run_name='__main__')
"""


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no signals between processes')
def test_ctrl_c_ends_the_training_of_a_tokenizer_at_once(notes, tmp_path):
    flags = [f'--input={notes}', f'--out_dir={tmp_path / "a"}', '--tokenizer=bpe']
    program = [sys.executable, '-c', TRAINS_ON, WRITTEN, *flags]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(program, cwd=ROOT, **pipes) as run:
        try:
            assert any('training' in line for line in run.stdout)
            run.send_signal(signal.SIGINT)
            _, said = run.communicate(timeout=PATIENCE)
        finally:
            run.kill()
    assert run.returncode == -signal.SIGINT and 'Traceback' not in said
    assert not (tmp_path / 'a').exists()
