"""One run per out_dir; signals to one process of a run; torchrun's restarts."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_RUN, full_disk, records, run_script, train
from processes import PATIENCE, TRAIN, Started, free_port, start_on_ranks

from nib.checkpoint import store
from nib.checkpoint.writer import CheckpointWriter
from nib.errors import UserError, call
from nib.files import atomic_write
from nib.machine.ranks import Ranks
from nib.machine.signals import StopSignal, name_signal
from nib.run.folder import RunLock, write_config
from nib.run.logbook import Logbook
from nib.run.metrics import Metrics

TIMED = (
    'time',
    'mfu',
    'tokens_per_second',
    'peak_memory',
    'seconds/evaluation',
)  # what the same run measures differently
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
ENDLESS = ['--max_iters=1000000', '--lr_decay_iters=1000000', '--eval_interval=1000000']
# A program that takes the lock, prints a line, and holds the lock until it is killed.
HOLDER = """
import sys, time
from nib.run.folder import RunLock
lock = RunLock(sys.argv[1])
lock.take(new_run=sys.argv[2] == 'new')
print(1, flush=True)
time.sleep(3600)
"""

linux = pytest.mark.skipif(
    not sys.platform.startswith('linux'), reason='looks at processes in /proc'
)


@linux
def test_a_deleted_working_directory_is_one_line_or_no_problem(data_dir, run_main, tmp_path):
    """A relative out_dir has no place then; with an absolute one, the run goes on to its end."""
    train = ['train.py', *SMALL_RUN, '--max_iters=2', '--eval_iters=1', f'--data_dir={data_dir}']
    here, gone = Path.cwd(), tmp_path / 'gone'
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        relative = run_main(*train, '--out_dir=run')
        absolute = run_main(*train, f'--out_dir={tmp_path / "run"}')
    finally:
        os.chdir(here)
    assert relative.returncode == 2 and 'directory has been deleted' in relative.stderr
    assert len(relative.stderr.splitlines()) == 1
    assert absolute.returncode == 0 and 'samples: ' in absolute.stdout, absolute.stderr


@contextmanager
def started(*command, env=None):
    """Starts a process, and kills it and its children at the end."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(process, line):
    assert any(line in said for said in process.stdout), process.stderr.read()


def ranks_of(process) -> list[int]:
    """The pids of torchrun's children, by rank."""
    children = subprocess.run(
        ['pgrep', '-P', str(process.pid)], capture_output=True, text=True
    ).stdout.split()

    def rank(pid):
        environment = Path(f'/proc/{pid}/environ').read_text().split('\0')
        return next((int(item[5:]) for item in environment if item.startswith('RANK=')), -1)

    return sorted((int(pid) for pid in children if rank(pid) >= 0), key=rank)


@pytest.mark.slow
def test_a_second_process_is_refused_with_the_first_ones_host_and_pid(tmp_path):
    with started('-c', HOLDER, tmp_path, 'new') as holder:
        wait_for(holder, '1')
        with pytest.raises(UserError, match=f'host {socket.gethostname()}, pid {holder.pid}'):
            RunLock(tmp_path).take(new_run=True)
    lock = RunLock(tmp_path)
    lock.take(new_run=True)  # the first was killed: its lock is stale
    assert json.loads((tmp_path / '.lock').read_text())['pid'] == os.getpid()
    lock.release()


@pytest.mark.parametrize('content', ['', '{', '[]', '{"changes": 1}', '[' * 100_000])
def test_a_damaged_config_json_stops_no_run(tmp_path, content):
    (tmp_path / 'config.json').write_text(content)
    write_config(tmp_path, {'seed': 2}, {}, 10, {'seed': [1, 2]}, {})
    assert json.loads((tmp_path / 'config.json').read_text())['changes'] == [
        {'step': 10, 'changes': {'seed': [1, 2]}}
    ]


def test_a_run_that_fails_in_a_notebook_gives_its_folder_back(train_here, tmp_path, monkeypatch):
    """Although its frames are still alive: a notebook keeps the last exception, for %debug."""
    import train as training

    def fail(t, micro_batches, step):
        if step == 15:
            raise ZeroDivisionError('a bug')
        return train_step(t, micro_batches, step)

    train_step, kept = training.train_step, []
    run = training.run
    monkeypatch.setattr(training, 'run', lambda *parts: kept.append(parts) or run(*parts))
    monkeypatch.setattr(training, 'train_step', fail)
    with pytest.raises(ZeroDivisionError) as failed:
        train_here(tmp_path)
    train_here(tmp_path, '--init_from=resume', '--n_layer=7', status=2)
    with pytest.raises(ZeroDivisionError) as again:
        train_here(tmp_path, '--init_from=resume')
    monkeypatch.setattr(training, 'train_step', train_step)
    done = train_here(tmp_path, '--init_from=resume', status=0)
    assert 'resuming from' in done.stdout and 'step-00000010' in done.stdout
    assert failed.value is not again.value and len(kept) == 4
    assert all(book.metrics.file.closed for _, _, book, _ in kept if book.metrics)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='file cannot be written'):
        RunLock(tmp_path / 'file').take(new_run=True)
    for name in ('file', 'file/run', 'file/runs/run'):  # before a dataset is prepared
        with pytest.raises(UserError, match=r'cannot be written, because .*file is not a folder'):
            RunLock(tmp_path / name).check_new()
    RunLock(tmp_path / 'runs/run').check_new()
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_a_full_disk_is_named_before_the_first_step(tmp_path):
    lock = RunLock(tmp_path)
    with full_disk(10):
        with pytest.raises(UserError, match=f'out_dir {tmp_path} cannot be written: '):
            lock.take(new_run=True)
        lock.release()  # raises nothing that would hide that


def test_a_run_that_appears_after_the_first_check_is_left_alone(tmp_path, train_here, monkeypatch):
    train_here(tmp_path / 'run', '--max_iters=1', status=0)
    before = (tmp_path / 'run/metrics.jsonl').read_bytes()
    monkeypatch.setattr(Logbook, 'check_new', lambda book: None)  # it was not there yet
    done = train_here(tmp_path / 'run', '--max_iters=1', status=2)
    assert 'already contains a run' in done.stderr
    assert (tmp_path / 'run/metrics.jsonl').read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_open(tmp_path, capsys):
    ranks = Ranks()
    with Logbook(str(tmp_path), {}, ranks, StopSignal(ranks)) as book:
        book.metrics = Metrics(tmp_path, 0, {'tensorboard': False, 'wandb_log': False})
        book.metrics.rewind(0)
        file = book.metrics.file
        book.writer = CheckpointWriter(tmp_path / 'absent', keep_last=1)
        book.writer.record_evaluation(1, {}, best=True)
    assert 'absent' in capsys.readouterr().err
    assert file.closed


def test_a_run_is_kept_if_the_one_that_replaces_it_saves_nothing(tmp_path, train_here):
    """Neither does the next start delete it, which puts it back, nor one that can't begin."""
    out_dir = tmp_path / 'run'

    def content():
        return {
            str(path.relative_to(out_dir)): path.read_bytes()
            for path in out_dir.rglob('*')
            if path.is_file() and path.name != '.lock'
        }

    train_here(out_dir, '--max_iters=2', status=0)
    before = content()
    broken = ['--overwrite', '--learning_rate=1e30', '--grad_clip=0', '--max_bad_steps=1']
    done = train_here(out_dir, *broken, '--warmup_iters=0', status=3)
    assert f'the previous run is kept in {out_dir / ".replaced"}' in done.stdout
    assert not store.exists(out_dir) and store.exists(out_dir / '.replaced')
    done = train_here(out_dir, status=2)
    assert 'already contains a run' in done.stderr and content() == before
    train_here(out_dir, *broken, '--warmup_iters=0', status=3)
    (out_dir / '.replaced').rename(
        out_dir / '.replaced-moving'
    )  # as if a crash had interrupted the next start
    done = train_here(out_dir, '--init_from=resume', status=0)
    assert 'resuming from' in done.stdout
    assert store.newest(out_dir).step > 2
    assert not [
        path for path in out_dir.iterdir() if path.name in ('.replaced', '.replaced-moving')
    ]
    before = content()
    (out_dir / '.replaced-moving').write_text('in the way')
    done = train_here(out_dir, '--overwrite', status=2)
    assert content() == before | {'.replaced-moving': b'in the way'}


@linux
@pytest.mark.slow
@pytest.mark.parametrize('how', ['removed', 'renamed'])
def test_a_run_whose_folder_is_gone_continues_in_a_new_one(data_dir, tmp_path, how):
    out_dir = tmp_path / 'run'
    flags = [*SMALL_RUN, f'--data_dir={data_dir}', *ENDLESS, '--eval_interval=100']
    run = Started(tmp_path, TRAIN, *flags, f'--out_dir={out_dir}')
    state = out_dir / 'step-00000100/state.json'
    while '"evaluated": 100' not in (state.read_text() if state.exists() else ''):
        time.sleep(0.01)
    shutil.rmtree(out_dir) if how == 'removed' else out_dir.rename(tmp_path / 'moved')
    run.wait_for('step 300: train')
    with pytest.raises(UserError, match='belongs to a run that is still active'):
        RunLock(out_dir).take(new_run=False)
    run.send(signal.SIGINT)
    assert run.end() == 130
    assert run.stderr.count(f'{out_dir} has been removed or renamed; the run continues') == 1
    assert min(record['step'] for record in records(out_dir)) > 100
    assert {'config.json', 'latest', 'report.html'} <= {path.name for path in out_dir.iterdir()}


@linux
@pytest.mark.slow
def test_a_run_does_not_go_on_in_the_folder_of_another_one(data_dir, tmp_path, train_here):
    out_dir = tmp_path / 'run'
    flags = [*SMALL_RUN, f'--data_dir={data_dir}', *ENDLESS, '--eval_interval=200']
    run = Started(tmp_path, TRAIN, *flags, f'--out_dir={out_dir}')
    run.wait_for('step 0: train')
    out_dir.rename(tmp_path / 'moved')
    train_here(tmp_path / 'other', '--max_iters=2', status=0)
    (tmp_path / 'other').rename(out_dir)
    files = [path for path in out_dir.rglob('*') if path.is_file() and path.name != '.lock']
    before = {path: path.read_bytes() for path in files}
    assert run.end() == 2
    assert f'{out_dir} already contains a run' in run.stderr.splitlines()[-1]
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.slow
@pytest.mark.parametrize('flags', [[], ['--init_from=resume'], ['--overwrite']])
def test_a_run_that_is_going_on_is_left_alone(tmp_path, flags, train_here):
    train_here(tmp_path / 'run', '--max_iters=2', status=0)
    with started('-c', HOLDER, tmp_path / 'run', 'resumed') as holder:
        wait_for(holder, '1')
        before = {
            path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()
        }
        done = train_here(tmp_path / 'run', *flags)
        assert (
            done.returncode == 2
            and f'pid {holder.pid}' in done.stderr
            and len(done.stderr.splitlines()) == 1
        )
        assert {
            path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()
        } == before


@linux
@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_a_signal_to_any_one_rank_ends_all_after_this_step_or_the_next_with_it_saved(
    data_dir, tmp_path, rank, name
):
    number, out_dir = getattr(signal, name), tmp_path / 'run'
    flags = [*SMALL_RUN, *ENDLESS, f'--data_dir={data_dir}', f'--out_dir={out_dir}']
    ranks = start_on_ranks(2, tmp_path, TELLS_ITS_STEP, *flags)
    ranks[0].wait_for('step 3: loss')
    since = time.monotonic()
    ranks[rank].send(number)
    assert [each.end() for each in ranks] == [128 + number] * 2, ranks[0].stderr
    assert time.monotonic() - since < 60  # much less than any timeout of the communication
    stopped_at = assert_stopped(out_dir, number, ranks[0].stdout)
    heard_in = int(re.search(r'signal in step (\d+)', ranks[rank].stdout)[1])
    assert heard_in <= stopped_at <= heard_in + 1


TELLS_ITS_STEP = """
import os, sys, train
from nib.machine.signals import StopSignal
original, receive, begun = train.train_step, StopSignal._receive, [0]
def train_step(t, micro_batches, step):
    begun[0] = step + 1
    return original(t, micro_batches, step)
def tell(stop, number, frame):
    receive(stop, number, frame)
    os.write(1, f'signal in step {begun[0]}\\n'.encode())
train.train_step, StopSignal._receive = train_step, tell
sys.exit(train.main(sys.argv[1:]))
"""


def assert_stopped(out_dir, number, said) -> int:
    """Returns the step after which the run has stopped, if it is saved, and nothing else is."""
    stopped_at = int(
        re.search(
            rf'stopped by {re.escape(name_signal(number))} after step (\d+), which is saved', said
        )[1]
    )
    assert store.load(out_dir)[0].step == stopped_at
    assert [path.name for path in out_dir.glob('step-*')] == [f'step-{stopped_at:08d}']
    return stopped_at


@linux
@pytest.mark.slow
def test_torchrun_sees_all_ranks_end_after_a_signal_to_one(data_dir, tmp_path):
    """It sends a signal to the others as soon as the first has ended."""
    out_dir = tmp_path / 'run'
    flags = [*SMALL_RUN, *ENDLESS, f'--data_dir={data_dir}', f'--out_dir={out_dir}']
    with started(*TORCHRUN, 'train.py', *flags) as run:
        wait_for(run, 'step 3: loss')
        os.kill(ranks_of(run)[1], signal.SIGINT)
        said, errors = run.communicate(timeout=PATIENCE)
    assert re.findall(r'exitcode  : (-?\d+)', errors) == ['130'] * 2, errors  # of both ranks
    assert_stopped(out_dir, signal.SIGINT, said)


SLOW_DISK = """
import os, sys, time, train
sync = os.fsync
def slow(descriptor):
    if 'step-' in os.readlink(f'/proc/self/fd/{descriptor}'):
        print('syncing', flush=True)
        time.sleep(3600)
    sync(descriptor)
train.main([*sys.argv[1:], '--max_iters=2', '--eval_interval=2'])
os.fsync = slow
sys.exit(train.main([*sys.argv[1:], '--init_from=resume']))
"""


@linux
@pytest.mark.slow
def test_a_second_signal_ends_at_once_without_harm(data_dir, tmp_path):
    """The second signal comes while the checkpoint of the first one is being written."""
    flags = [*SMALL_RUN, *ENDLESS, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}']
    run = Started(tmp_path, SLOW_DISK, *flags)
    run.wait_for('step 4: loss')
    run.send(signal.SIGTERM)
    run.wait_for('syncing')
    time.sleep(1.2)  # within a second, the same signal counts as a repetition by the system
    run.send(signal.SIGTERM)
    assert run.end() == 143
    assert store.load(tmp_path / 'run')[0].step == 2


DIES_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
original = train.train_step
def dies(*arguments):
    is_first_start = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
    if is_first_start and (arguments[2], arguments[0].ranks.rank) == (13, {rank}):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
train.train_step = dies
sys.exit(train.main(sys.argv[1:]))
"""


RESTARTED = ['--dropout=0.1', '--eval_interval=5', '--keep_last=9']


@pytest.fixture(scope='module')
def undisturbed(data_dir, tmp_path_factory):
    """What the restarted runs must equal."""
    out_dir = tmp_path_factory.mktemp('undisturbed') / 'whole'
    flags = [*SMALL_RUN, *RESTARTED, f'--data_dir={data_dir}', f'--out_dir={out_dir}']
    ranks = start_on_ranks(2, out_dir.parent, TRAIN, *flags)
    assert [rank.end() for rank in ranks] == [0, 0] and 'resuming' not in ranks[0].stdout
    return out_dir


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_after_a_killed_rank_torchrun_restarts_the_run_and_it_goes_on_by_itself(
    data_dir, tmp_path, undisturbed, rank, train_here
):
    """Curves and weights are as if nothing had happened; an old run in the folder stays deleted."""
    (tmp_path / 'dies.py').write_text(DIES_ONCE.format(root=str(ROOT), rank=rank))
    train_here(tmp_path / 'run', '--seed=3', '--max_iters=2', '--eval_interval=2', status=0)
    launcher = [*TORCHRUN, '--max-restarts=1', tmp_path / 'dies.py']
    if rank == 0:  # either way
        launcher[launcher.index('--standalone')] = f'--master-port={free_port()}'
    done = run_script(
        *launcher,
        *SMALL_RUN,
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
        *RESTARTED,
        '--overwrite',
        python=sys.executable,  # torchrun is the parent of its processes
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'resuming from' in done.stdout and 'step-00000010' in done.stdout
    untimed = [
        [
            {name: value for name, value in record.items() if name not in TIMED}
            for record in records(out_dir)
        ]
        for out_dir in (tmp_path / 'run', undisturbed)
    ]
    assert untimed[0] == untimed[1]
    for file in ('model.safetensors', 'optimizer.safetensors'):
        assert (tmp_path / 'run/step-00000020' / file).read_bytes() == (
            undisturbed / 'step-00000020' / file
        ).read_bytes()


@pytest.mark.slow
def test_a_restart_does_not_take_another_launchs_run_for_its_own(data_dir, tmp_path):
    """Without --standalone, all launches have the same name."""
    launcher = [item for item in TORCHRUN if item != '--standalone']
    launcher.append(f'--master-port={free_port()}')  # the usual one may be taken
    train(data_dir, tmp_path / 'run', '--max_iters=2', launcher=launcher)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    done = train(
        data_dir,
        tmp_path / 'run',
        '--seed=9',
        launcher=[*launcher, '--max-restarts=1'],
        check=False,
    )
    assert (
        done.returncode != 0
        and 'already contains a run' in done.stderr
        and 'resuming' not in done.stdout
    )
    assert {
        path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()
    } == before


@pytest.mark.slow
def test_ranks_that_read_different_checkpoints_do_not_train_together(
    data_dir, tmp_path, train_here
):
    """One process that cannot read the newest would take an older one."""
    train_here(tmp_path / 'run', '--eval_interval=5', '--max_iters=10', '--keep_last=2', status=0)
    flags = [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}', '--init_from=resume']
    ranks = start_on_ranks(2, tmp_path, BLIND, *SMALL_RUN, *flags)
    assert [rank.end() for rank in ranks] == [2, 2]
    assert 'the step of the checkpoint differs between' in ranks[0].stderr
    assert '[10, 5] by rank' in ranks[0].stderr
    assert store.load(tmp_path / 'run')[0].step == 10


BLIND = """
import os, sys, train
from nib.checkpoint import tensorfile
read = tensorfile.read
def blind(path, expected):
    if os.environ['RANK'] == '1' and 'step-00000010' in str(path):
        raise OSError(5, 'Input/output error')
    return read(path, expected)
tensorfile.read = blind
from nib.errors import run_script
run_script(train.main)
"""


def test_a_system_that_allows_no_more_threads_is_one_line(capsys):
    def start_thread(argv):
        raise RuntimeError("can't start new thread")  # as Python says under ulimit -u

    assert call(start_thread, []) == 2
    said = capsys.readouterr().err
    assert 'allows no more threads' in said and len(said.splitlines()) == 1


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path):
    path = tmp_path / 'missing' / 'report.html'
    with pytest.raises(OSError) as caught, atomic_write(path):
        pass
    assert caught.value.filename == str(path)
