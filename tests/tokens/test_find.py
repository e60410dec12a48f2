"""A run finds its dataset, prepares it, or says on one line why not; only a download falls back."""

import errno
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from conftest import ROOT, SMALL_RUN, full_disk
from processes import PATIENCE

import configurator
from nib import files
from nib.checkpoint import store
from nib.errors import UserError
from nib.files import FolderLock
from nib.machine.ranks import Ranks
from nib.text.download import DownloadError
from nib.tokens import find, shakespeare, unfinished
from nib.tokens.dataset import open_dataset
from nib.tokens.find import Unavailable, open_or_prepare
from nib.tokens.unfinished import locked

TEXT = 'To be, or not to be: that is the question.\n' * 50


@pytest.fixture
def values(tmp_path):
    """A run on tiny Shakespeare that may prepare it, and falls back to the standard library."""
    return {
        'init_from': 'scratch',
        'dataset': 'shakespeare_char',
        'data_dir': str(tmp_path / 'data'),
        'fallback_dataset': 'stdlib_char',
        'prepare_dataset': True,
        'block_size': 16,
        'vocab_size': 0,
    }


@pytest.fixture
def no_text_here(tmp_path, monkeypatch):
    """Copies of the scripts, with no text beside them, prepare the datasets."""
    folder = tmp_path / 'checkout/data'
    shutil.copytree(ROOT / 'data', folder, ignore=shutil.ignore_patterns('input.txt', '*.bin'))
    monkeypatch.setattr(find, 'SCRIPTS', folder)


@pytest.fixture
def no_network(monkeypatch):
    def fail(urls, path, sha256, max_bytes):
        raise DownloadError('no connection')

    monkeypatch.setattr(shakespeare, 'download', fail)


def refusal(values) -> str:
    with pytest.raises(UserError) as error:
        open_or_prepare(values, Ranks(), say=lambda line: None)
    return str(error.value)


@pytest.mark.usefixtures('no_text_here')
def test_a_failed_download_falls_back(values, no_network, monkeypatch):
    ran = []
    monkeypatch.setattr(find, '_prepare', pretend_to_prepare(find._prepare, ran))
    said = []
    with pytest.raises(UserError, match='stdlib_char'):  # pretend_to_prepare writes nothing
        open_or_prepare(values, Ranks(), said.append)
    assert ran == ['stdlib_char']
    headline, remedy = said[1].splitlines()
    assert 'TRAINING ON stdlib_char INSTEAD OF shakespeare_char' in headline
    assert 'input.txt' in remedy and remedy.endswith('repeat the command with --overwrite')
    assert len(said[1]) < 400
    with pytest.raises(Unavailable, match=r'no connection.*--fallback_dataset=NAME'):
        open_or_prepare(values | {'fallback_dataset': ''}, Ranks(), said.append)


@pytest.mark.usefixtures('no_text_here')
@pytest.mark.parametrize('name', ['mine', 'openwebtext'])  # without a script here, and with one
@pytest.mark.parametrize(
    'start, data_dir',
    [
        ('scratch', 'data'),
        ('nanoGPT/out/ckpt.pt', 'nanoGPT/data'),
        ('nanoGPT/out', 'nanoGPT/data'),
        ('nanoGPT/ckpt.pt', 'nanoGPT/data'),
    ],
)
def test_a_dataset_in_nanogpt_s_folder_is_named(
    values, name, start, data_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    values |= {'dataset': name, 'data_dir': 'other', 'init_from': start, 'prepare_dataset': False}
    assert 'did you mean --data_dir' not in refusal(values)
    (tmp_path / data_dir / name).mkdir(parents=True)
    for split in ('train', 'val'):
        (tmp_path / data_dir / name / f'{split}.bin').touch()
    assert refusal(values).endswith(f'train.bin is missing; did you mean --data_dir={data_dir}?')


@pytest.mark.parametrize('data_dir', ['data', 'my runs/data', 'checkout/data'])
def test_a_resumed_run_without_its_dataset_says_where_one_of_this_name_is(
    data_dir, values, tmp_path, monkeypatch
):
    monkeypatch.setattr(find, 'SCRIPTS', tmp_path / 'checkout/data')
    monkeypatch.chdir(tmp_path)
    values |= {'dataset': 'mine', 'init_from': 'resume', 'out_dir': 'my runs/out'}
    values |= {'data_dir': str(tmp_path / 'gone')}
    assert 'with --data_dir=FOLDER' in refusal(values)
    (tmp_path / data_dir / 'mine').mkdir(parents=True)
    for split in ('train', 'val'):
        (tmp_path / data_dir / 'mine' / f'{split}.bin').touch()
    typed = f'did you mean --data_dir={shlex.quote(data_dir)}?'
    assert refusal(values).endswith(f'that it was trained on; {typed}')


WRITE = """
from pathlib import Path
for split in ('train', 'val'):
    (Path(__file__).parent / f'{split}.bin').write_bytes(bytes(range(2, 130)) * 9)
"""


@pytest.mark.parametrize(
    'script, works',
    [
        (WRITE, True),  # as in nanoGPT
        (f'def main():\n    pass\n{WRITE}', True),
        ("if __name__ == '__main__':\n    print('prepares')", False),
        ("def main():\n    print('prepares')", False),
        ('def main(argv):\n    pass', False),
    ],
)
def test_a_prepare_script_of_another_form_works_or_is_named(
    values, script, works, tmp_path, monkeypatch
):
    monkeypatch.setattr(find, 'SCRIPTS', tmp_path / 'data')
    (tmp_path / 'data/mine').mkdir(parents=True)
    (tmp_path / 'data/mine/prepare.py').write_text(script)
    values |= {'dataset': 'mine', 'vocab_size': 1 << 16}
    if works:
        assert open_or_prepare(values, Ranks(), say=lambda line: None).name == 'mine'
    else:
        assert 'prepare.py has not written ' in (message := refusal(values))
        assert message.endswith(
            ': run it yourself first, or give it a main(argv) that takes --out_dir'
        )


def pretend_to_prepare(prepare, ran):
    def pretend(name, data_dir, values, say):
        if name == 'stdlib_char':  # takes seconds
            ran.append(name)
            return data_dir / name
        return prepare(name, data_dir, values, say)

    return pretend


@pytest.mark.usefixtures('no_text_here')
@pytest.mark.parametrize(
    'content, words', [(b'caf\xe9 ' * 99, 'input.txt is not'), (b'', 'is empty'), (b'ab', 'longer')]
)
def test_a_text_that_will_not_do_does_not_fall_back(values, tmp_path, content, words):
    folder = tmp_path / 'data/shakespeare_char'
    folder.mkdir(parents=True)
    (folder / 'input.txt').write_bytes(content)
    assert words in refusal(values)
    assert not (tmp_path / 'data/stdlib_char').exists()


@pytest.mark.usefixtures('no_text_here')
def test_a_folder_that_cannot_be_written_does_not_fall_back(values, tmp_path):
    (tmp_path / 'data').write_text('not a folder')
    said = refusal(values)
    assert 'cannot be written (Not a directory)' in said
    assert 'in train.py, --data_dir=PATH' in said  # whose --out_dir is the folder of the run


@pytest.mark.usefixtures('no_text_here')
def test_a_full_disk_does_not_fall_back(values, tmp_path):
    folder = tmp_path / 'data/shakespeare_char'
    folder.mkdir(parents=True)
    (folder / 'input.txt').write_text(TEXT)
    with full_disk(1000):
        assert 'cannot be written (File too large)' in refusal(values)
    assert not (tmp_path / 'data/stdlib_char').exists()


@pytest.mark.parametrize(
    'name, words',
    [
        ('shakespear_char', ['did you mean --dataset=shakespeare_char?']),
        ('tinny', ['did you mean --dataset=tiny?']),
        ('nowhere', ['nowhere/train.bin is missing', '--input=PATH', 'stdlib_char, tiny']),
        ('zen', ['config/zen.py say how to prepare it']),
        ('{folder}/data/tinny', ['tinny/train.bin is missing']),
    ],
)
def test_a_misspelt_name_is_one_line_with_the_nearest_one(values, tmp_path, name, words):
    """Also with the keys of config/train_shakespeare_char.py, whose dataset has a fallback."""
    (tmp_path / 'data/tiny').mkdir(parents=True)
    (tmp_path / 'data/tiny/train.bin').write_bytes(b'')
    said = refusal(values | {'dataset': name.format(folder=tmp_path)})
    assert all(word in said for word in words), said
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['tiny']


def test_the_path_of_a_dataset_elsewhere_is_recognized(values, data_dir, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    said = refusal(values | {'dataset': f'{data_dir.name}/tiny'})
    assert f'did you mean --data_dir={data_dir} --dataset=tiny?' in said
    said = refusal(values | {'dataset': f'{data_dir}/tiny/train.bin'})
    assert f'did you mean --data_dir={data_dir} --dataset=tiny?' in said
    data = open_or_prepare(values | {'dataset': str(data_dir / 'tiny')}, Ranks(), say=print)
    assert data.name == 'tiny'


def test_out_dir_is_named_after_the_last_part_of_a_path():
    for dataset in ('notes', '/data/of mine/notes', '/data/of mine/notes/'):
        argv = ['config/train_text.py', f'--dataset={dataset}', '--device=cpu']
        values, _ = configurator.configure(str(ROOT / 'train.py'), argv)
        assert values['out_dir'] == 'out-notes'


def test_a_run_in_out_dir_is_noticed_before_data_is_prepared(train_here, tmp_path):
    assert train_here(tmp_path / 'run', '--max_iters=2').returncode == 0
    done = train_here(tmp_path / 'run', '--dataset=nowhere')
    assert done.returncode == 2 and 'already contains a run' in done.stderr


# -- several processes -----------------------------------------------------------------------------


def test_a_second_process_waits_says_so_and_uses_what_the_first_has_made(
    values, tmp_path, monkeypatch, capsys
):
    """The first one goes on as soon as the second one waits."""
    folder = tmp_path / 'data/shakespeare_char'
    program = f"""
import sys, time
from pathlib import Path
from nib.tokens.unfinished import locked
from nib.tokens.write import write_char_dataset
with locked(Path({str(folder)!r})):
    print('locked', flush=True)
    sys.stdin.readline()
write_char_dataset({str(folder)!r}, {TEXT!r}, {{}})
time.sleep(3600)
"""
    pauses = []
    with started('-c', program) as first:
        assert first.stdout.readline() == 'locked\n'

        def pause(seconds):
            if not pauses:
                first.stdin.write('go on\n')
                first.stdin.flush()
            pauses.append(seconds)
            time.sleep(seconds)

        monkeypatch.setattr(unfinished, 'time', SimpleNamespace(sleep=pause))
        data = wait_and_open(values)
    assert pauses
    assert data.tokenizer.decode(data.train) == TEXT[: int(0.9 * len(TEXT))]
    assert f'pid {first.pid}, which is preparing {folder}' in capsys.readouterr().err


def wait_and_open(values):
    """Opens the dataset, which another process prepares; it may not be prepared here."""
    while True:
        try:
            return open_or_prepare(values | {'prepare_dataset': False}, Ranks(), say=print)
        except Unavailable:  # the first process has given the lock back between its two steps
            time.sleep(0.05)


def start(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )


@contextmanager
def started(*command):
    process = start(*command)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path, capsys):
    program = f"""
import time
from pathlib import Path
from nib.tokens.unfinished import locked
with locked(Path({str(tmp_path)!r})):
    print('locked', flush=True)
    time.sleep(3600)
"""
    with started('-c', program) as holder:
        assert holder.stdout.readline() == 'locked\n'
        assert not FolderLock(tmp_path).take()
    assert (tmp_path / '.lock').exists()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ''


def test_a_lock_whose_file_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Two processes have opened the file; the first removes it with its lock."""
    first, second, lock = FolderLock(tmp_path), FolderLock(tmp_path), files._lock
    assert first.take() and not second.take()

    def lock_later(file):
        first.release(remove=True)
        return lock(file)

    monkeypatch.setattr(files, '_lock', lock_later)
    assert second.take()
    assert not FolderLock(tmp_path).take()
    second.release(remove=True)


def test_an_interrupt_while_the_file_is_removed_still_releases_the_lock(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path)
    assert lock.take()

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr('pathlib.Path.unlink', interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:  # its traceback keeps an open file open
            lock.release(remove=True)
    other = FolderLock(tmp_path)
    assert other.take() and caught.tb
    other.release()


def test_a_lock_names_its_last_holder(tmp_path):
    (tmp_path / '.lock').write_text('{"host": "another", "pid": 1}\n')
    lock = FolderLock(tmp_path)
    assert lock.take() and lock.holder() == 'host another, pid 1'
    lock.sign()
    assert lock.holder() == f'host {socket.gethostname()}, pid {os.getpid()}'
    lock.release()


@pytest.mark.skipif(os.name == 'nt', reason='Windows locks files in another way')
def test_on_a_file_system_without_locks_every_process_gets_the_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, 'flock', refuse)
    locks = FolderLock(tmp_path), FolderLock(tmp_path)
    assert all(lock.take() for lock in locks)
    for lock in locks:
        lock.release()


@pytest.mark.slow
def test_three_runs_started_together_prepare_the_dataset_once(tmp_path):
    """One of them has two ranks. They all wait for the lock first, so that they really compete."""
    folder = tmp_path / 'data/shakespeare_char'
    folder.mkdir(parents=True)
    (folder / 'input.txt').write_text(TEXT)
    lock = FolderLock(folder)
    assert lock.take()
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    runs = []
    for number, launcher in enumerate(([], [], torchrun)):
        command = [
            *launcher,
            'train.py',
            *SMALL_RUN,
            '--dataset=shakespeare_char',
            '--prepare_dataset',
            f'--data_dir={tmp_path / "data"}',
            f'--out_dir={tmp_path / f"run{number}"}',
            '--max_iters=2',
            '--no-report',
        ]
        runs.append(start(*command))
    try:
        for run in runs:
            while 'waiting for' not in (line := run.stderr.readline()):
                assert line, run.stdout.read()
        lock.release(remove=True)
        for run in runs:
            _, errors = run.communicate(timeout=PATIENCE)
            assert run.returncode == 0, errors
    finally:
        for run in runs:
            run.kill()
    fingerprint = open_dataset(folder, 16).fingerprint
    for number in range(3):
        state = store.load(tmp_path / f'run{number}')[0].state
        assert state['dataset_fingerprint'] == fingerprint
    names = sorted(path.name for path in folder.iterdir())
    assert names == ['input.txt', 'meta.json', 'train.bin', 'val.bin']


def test_the_path_of_a_text_gets_the_command_that_prepares_it(values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my notes').mkdir()
    (tmp_path / 'novel.txt').write_text('Once upon a time')
    for name, typed in (('my notes', "'my notes'"), ('novel.txt', 'novel.txt')):
        said = refusal(values | {'dataset': name})
        assert f'if {name} is your text, prepare it with ' in said
        assert f'data/text/prepare.py --input={typed}, which' in said
