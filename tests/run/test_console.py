"""A console that breaks: closed pipes, full disks, vanished terminals, readers that do not read."""

import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL_RUN, records
from processes import PATIENCE

from nib import errors
from nib.checkpoint import store
from nib.run.console import Console, Output
from nib.run.metrics import Metrics

unix = pytest.mark.skipif(sys.platform == 'win32', reason='uses Unix pipes and devices')
LINE = 'x' * 99 + '\n'
ALONE = {'tensorboard': False, 'wandb_log': False}  # metrics.jsonl, and nothing else


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def vanished_terminal():
    keyboard, terminal = os.openpty()
    os.close(keyboard)
    return terminal


def full_disk():
    return os.open('/dev/full', os.O_WRONLY)


@unix
@pytest.mark.parametrize('open_broken', [broken_pipe, vanished_terminal, full_disk])
def test_a_stream_that_cannot_be_written_is_dropped(open_broken):
    with os.fdopen(open_broken(), 'w') as stream:
        output = Output(stream)
        for _ in range(3):
            output.write(LINE)
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))
        print('also by others', file=stream, flush=True)  # no error


def test_without_streams_a_console_is_silent(monkeypatch):
    for stream in (None, io.StringIO()):
        if stream:
            stream.close()
        monkeypatch.setattr(sys, 'stdout', stream)
        monkeypatch.setattr(sys, 'stderr', stream)
        console = Console(shown=True)
        console.say('a')
        console.warn('b')
        console.advance(1, 2)
        console.close()


@unix
def test_a_reader_that_does_not_read_costs_a_second_and_not_the_run():
    reader, writer = os.pipe()
    with os.fdopen(reader) as lines, os.fdopen(writer, 'w') as stream:
        output = Output(stream)
        started = time.monotonic()
        for _ in range(2000):  # three times what the pipe takes
            output.write(LINE)
        assert time.monotonic() - started < 60  # and not a second for each of 1,300 lines
        for _ in range(600):
            assert lines.readline() == LINE
        output.write('read again\n')
        while (line := lines.readline()) == LINE:
            pass
        rest = [line, *(lines.readline() for _ in range(2))]
        assert [item.strip() for item in rest if item.strip()] == [
            '[some output was dropped, because nobody was reading it]',
            'read again',
        ]


@unix
def test_a_signal_handler_is_not_kept_waiting_by_the_console(monkeypatch):
    from nib.machine.ranks import Ranks
    from nib.machine.signals import StopSignal

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while os.write(writer, LINE.encode()):
            pass
    except BlockingIOError:
        os.set_blocking(writer, True)
    streams = [None, os.fdopen(writer, 'w'), os.fdopen(broken_pipe(), 'w')]
    for stream in streams:
        monkeypatch.setattr(sys, 'stderr', stream)
        with StopSignal(Ranks()) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
    os.close(reader)
    for stream in streams[1:]:
        stream.close()


@unix
def test_a_run_whose_disk_is_full_keeps_its_records_until_there_is_room(tmp_path):
    import resource

    said = []
    metrics = Metrics(tmp_path, 0, ALONE, said.append)
    metrics.rewind(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        for step in range(1, 100):
            metrics.log(step, {'loss/step': 1.0 / step})
        assert metrics.path.stat().st_size == 2000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.log(100, {'end': 'done'})
    metrics.close()
    assert [record['step'] for record in records(tmp_path)] == list(range(1, 101))
    assert said == [f'{metrics.path} cannot be written: {os.strerror(errno.EFBIG)}; trying again']


def test_a_service_that_fails_is_dropped_with_one_warning(tmp_path):
    class Broken:
        def log(self, *arguments, **named):
            raise BrokenPipeError('its process has ended')

        add_scalar = close = log
        step = 0

    said = []
    metrics = Metrics(tmp_path, 0, ALONE, said.append)
    metrics.rewind(0)
    metrics.wandb = metrics.writer = Broken()
    for step in (1, 2):
        metrics.log(step, {'loss/step': 1.0})
    metrics.close()
    assert len(records(tmp_path)) == 2
    assert [line.split()[0] for line in said] == ['TensorBoard', 'wandb']
    metrics.writer, metrics.writer_class = Broken(), Broken
    metrics.rewind(2)
    metrics.close()
    assert metrics.writer is None and said[2].startswith('TensorBoard')
    assert all('no longer works: BrokenPipeError: its process' in line for line in said)


# -- whole runs ------------------------------------------------------------------------------------


@unix
@pytest.mark.parametrize('name', ['stdout', 'stderr'])
def test_a_run_without_a_console_trains_to_its_end(train_here, tmp_path, monkeypatch, name):
    with os.fdopen(broken_pipe(), 'w') as stream:
        monkeypatch.setattr(sys, name, stream)
        done = train_here(tmp_path / 'run', '--max_iters=4')
        monkeypatch.undo()
    assert done.returncode == 0
    assert store.load(tmp_path / 'run')[0].step == 4


@unix
@pytest.mark.slow
def test_ctrl_c_ends_a_pipeline_with_everything_saved(data_dir, tmp_path):
    """The signal goes to the whole process group, and tee ends first."""
    (tmp_path / 'my folder').symlink_to(ROOT)
    flags = ' '.join([*SMALL_RUN, '--max_iters=1000000', '--eval_interval=1000000'])
    command = (
        f"trap 'true' INT; '{sys.executable}' 'my folder/train.py' {flags} --data_dir={data_dir} "
        f'--out_dir=run 2>&1 | tee log; echo ${{PIPESTATUS[0]}} > status'
    )
    with subprocess.Popen(
        ['bash', '-c', command],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    ) as run:
        next(line for line in run.stdout if line.startswith('step 3: loss'))
        os.killpg(run.pid, signal.SIGINT)
        run.stdout.close()
        run.wait(PATIENCE)
    assert (tmp_path / 'status').read_text() == '130\n'
    step, end = store.load(tmp_path / 'run')[0].step, records(tmp_path / 'run')[-1]['end']
    assert f'stopped by Ctrl-C (SIGINT) after step {step}, which is saved; to resume: ' in end
    command = end.split('to resume: ')[1] + f' --max_iters={step + 1} --lr_decay_iters={step + 1}'
    assert "'my folder/train.py'" in command
    done = subprocess.run(['bash', '-c', command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f'step {step + 1}: loss' in done.stdout, done.stderr


CLOSED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from nib.errors import UserError, run_script
def main(argv):
    with open('file', 'w') as file:
        assert file.fileno() > 2
        print('to standard output')
        print('to standard error', file=sys.stderr)
    raise UserError('as it should')
run_script(main)
"""


@unix
@pytest.mark.parametrize('closing', ['>&-', '2>&-', '<&-', '<&- >&- 2>&-', '>/dev/full'])
def test_closed_or_full_streams_do_not_change_the_exit_code_or_a_file(tmp_path, closing):
    command = f'exec {sys.executable} -c "$1" {closing}'
    done = subprocess.run(
        ['sh', '-c', command, 'sh', CLOSED], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == errors.EXIT_USER_ERROR, done.stderr
    assert (tmp_path / 'file').read_text() == ''
    assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr


@unix
@pytest.mark.parametrize(
    ('script', 'module'),
    [('train.py', 'torch'), ('report.py', 'glob'), ('data/text/prepare.py', 'shlex')],
)
def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path, script, module):
    program = 'import os, signal; os.kill(os.getpid(), signal.SIGINT)'
    (tmp_path / f'{module}.py').write_text(program)  # instead of the one that the script imports
    environment = os.environ | {'PYTHONPATH': str(tmp_path)}
    command = [sys.executable, script, '--help']
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, b'', b'')
