"""The prepare scripts, run as a user runs them and as train.py does."""
import hashlib
import json
import platform
import runpy
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from nib import corpus
from nib.errors import UserError

SHAKESPEARE = ROOT / 'data/shakespeare_char/prepare.py'
STDLIB = ROOT / 'data/stdlib_char/prepare.py'
NO_NETWORK = {name: 'http://127.0.0.1:1' for name in ('https_proxy', 'HTTPS_PROXY')}
TEXT = 'Wherefore art thou Romeo? Ὦ Ῥωμαῖε!\n' * 30


@pytest.fixture
def given(tmp_path):
    path = tmp_path / 'romeo.txt'
    path.write_text(TEXT, encoding='utf-8', newline='')
    return path


def text_of(folder):
    data = corpus.open_dataset(folder, 16)
    return data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val)


def test_a_text_of_one_s_own_becomes_a_dataset_and_is_told_from_shakespeare(given, tmp_path):
    """From another folder, with relative paths."""
    done = run_script(SHAKESPEARE, '--input=romeo.txt', '--out_dir=romeo', folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert text_of(tmp_path / 'romeo') == TEXT
    cut = int(len(TEXT) * 0.9)
    for number in (len(TEXT), len(set(TEXT)), cut, len(TEXT) - cut):
        assert f'{number:,} ' in done.stdout or f'{number:,},' in done.stdout
    assert len(done.stderr.splitlines()) == 1 and 'not tiny Shakespeare' in done.stderr
    meta = json.loads((tmp_path / 'romeo/meta.json').read_text())
    assert meta['source'] == {'file': 'romeo.txt', 'sha256': hashlib.sha256(given.read_bytes()).hexdigest()}


def test_train_py_can_prepare_a_dataset_in_its_own_process(given, tmp_path, capsys):
    runpy.run_path(str(SHAKESPEARE))['main']([f'--input={given}', f'--out_dir={tmp_path / "romeo"}'])
    assert text_of(tmp_path / 'romeo') == TEXT


@pytest.mark.skipif((SHAKESPEARE.parent / 'input.txt').exists(), reason='tiny Shakespeare is beside its script')
def test_a_text_put_into_out_dir_is_taken_without_a_network(given, tmp_path):
    given.rename(tmp_path / 'input.txt')
    done = run_script(SHAKESPEARE, f'--out_dir={tmp_path}', env=NO_NETWORK)
    assert done.returncode == 0, done.stderr
    assert text_of(tmp_path) == TEXT


@pytest.mark.skipif((SHAKESPEARE.parent / 'input.txt').exists(), reason='tiny Shakespeare is beside its script')
def test_without_a_network_the_error_names_every_address_and_how_to_mend_it(tmp_path):
    done = run_script(SHAKESPEARE, f'--out_dir={tmp_path / "new"}', env=NO_NETWORK)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for word in ('raw.githubusercontent.com', 'cdn.jsdelivr.net', 'storage.googleapis.com', '--input=PATH',
                 'data/shakespeare_char/input.txt'):
        assert word in done.stderr
    assert list((tmp_path / 'new').iterdir()) == []


@pytest.mark.parametrize('content, said', [(None, 'No such file'), (b'caf\xe9 ' * 50, 'not UTF-8 text (byte 3)'),
                                           (b'', '0 characters'), (b'abc', '3 characters')])
def test_a_text_that_will_not_do_is_named_on_one_line(tmp_path, content, said):
    path = tmp_path / 'text.txt'
    if content is not None:
        path.write_bytes(content)
    done = run_script(SHAKESPEARE, f'--input={path}', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr
    assert not corpus.is_prepared(tmp_path / 'out')


@pytest.fixture(scope='module')
def stdlib(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stdlib')
    done = run_script(STDLIB, f'--out_dir={folder}')
    assert done.returncode == 0, done.stderr
    return folder


def test_the_standard_library_is_text_enough_and_says_where_it_is_from(stdlib):
    text = text_of(stdlib)
    assert len(text) > 5_000_000 and text.isascii() and '\r' not in text and text.endswith('\n')
    library = Path(sysconfig.get_paths()['stdlib'])
    assert (library / 'argparse.py').read_text(encoding='utf-8') in text
    meta = json.loads((stdlib / 'meta.json').read_text())
    assert meta['source']['python'] == platform.python_version()
    assert meta['source']['sha256'] == hashlib.sha256(text.encode()).hexdigest()
    assert 100 < meta['source']['files'] < 2000


def test_the_standard_library_gives_the_same_bins_twice(stdlib, tmp_path, capsys):
    runpy.run_path(str(STDLIB))['main']([f'--out_dir={tmp_path}'])
    assert corpus.open_dataset(tmp_path, 16).fingerprint == corpus.open_dataset(stdlib, 16).fingerprint


def test_tests_installed_packages_and_what_is_not_ascii_are_left_out(tmp_path):
    files = {'b.py': b'b = 1', 'a/z.py': b'z = 1\r\nz = 2\rz = 3\n', 'a.py': b'a = 1\n', 'empty.py': b'', 'notes.txt': b'no',
             'accent.py': 'é = 1\n'.encode(), 'test/x.py': b'no', 'a/tests/x.py': b'no', 'idlelib/idle_test/x.py': b'no',
             'site-packages/x.py': b'no', 'dist-packages/x.py': b'no', '__pycache__/x.py': b'no'}
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
