"""nib/machine/threads.py: the cores of this process, and how its threads wait."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, run_script
from processes import PATIENCE

from nib import errors, startup
from nib.machine import device, threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def thread_ids() -> set[str]:
    return set(os.listdir('/proc/self/task'))


def wait_until(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux measures the wait for a core')
def test_while_cores_are_taken_there_are_more_threads_than_cores(two_threads):
    """They do no work: the results stay the same."""
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = (x @ x).sum()
    waited, before = [0.0], thread_ids()

    def wait_for_core():
        waited[0] = None if waited[0] is None else waited[0] + step[0]
        return waited[0]

    step = [0.0]
    yielding = threads.Yielding(wait_for_core, interval=0.02)
    looking = threading.Thread(target=yielding.run)
    looking.start()
    try:
        assert not yielding.additional and len(thread_ids() - before) == 1
        step[0] = 0.01
        # Besides the thread that looks: the one that keeps the additional thread, and that thread.
        wait_until(lambda: yielding.additional and len(thread_ids() - before) == 3)
        assert (x @ x).sum() == expected
        step[0] = 0.0
        wait_until(lambda: not yielding.additional and len(thread_ids() - before) == 1)
    finally:
        waited[0] = None
        looking.join()


# Ends while another thread is inside an operation of torch, here one that takes long.
ENDS_AT_ONCE = """
import itertools, threading, time, torch
from nib.machine import threads
zeros = torch.zeros
torch.zeros = lambda n: zeros(64 * n)
seconds = itertools.count()
yielding = threads.Yielding(lambda: float(next(seconds)), interval=0.01)
threading.Thread(target=yielding.run, daemon=True).start()
while not yielding.additional:
    time.sleep(0.001)
time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_process_may_end_while_a_thread_is_being_added():
    """Otherwise torch aborts the process, whose exit code is then wrong."""
    done = run_script('-c', ENDS_AT_ONCE, python=sys.executable)
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('chosen', [{}, {'GOMP_SPINCOUNT': '7'}, {'OMP_WAIT_POLICY': 'ACTIVE'}])
def test_the_users_settings_of_waiting_have_priority(chosen, two_threads, monkeypatch):
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(threads.Yielding, 'run', lambda self: started.append(self._waited))
    threads.watch_cores.cache_clear()
    threads.watch_cores()
    threads.watch_cores()
    wait_until(lambda: len(started) == (not chosen))
    threads.watch_cores.cache_clear()


def test_torch_has_no_more_threads_than_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        for chosen, wanted in (({}, 2), ({'OMP_NUM_THREADS': '3'}, 3)):
            monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
            monkeypatch.delenv('MKL_NUM_THREADS', raising=False)
            for name, value in chosen.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setattr(device, 'available_cores', lambda: 2)
            torch.set_num_threads(3)
            assert device.pick_device('cpu') == 'cpu'
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(threads.seconds_without_core() is None, reason='only Linux measures it')
def test_the_wait_for_a_core_is_that_which_another_process_causes():
    """Sleep, as in waiting for a disk, does not count. A busy machine may disturb some looks."""

    def wait_while(work) -> float:
        waited, started = threads.seconds_without_core(), time.perf_counter()
        while time.perf_counter() - started < 0.3:
            work()
        return (threads.seconds_without_core() - waited) / (time.perf_counter() - started)

    core = min(os.sched_getaffinity(0))
    program = f'import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass'
    before = os.sched_getaffinity(0)
    with subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE) as busy:
        busy.stdout.readline()
        os.sched_setaffinity(0, {core})
        try:
            assert any(wait_while(lambda: sum(range(1000))) > 0.2 for _ in range(5))
            assert any(wait_while(lambda: time.sleep(0.1)) < 0.15 for _ in range(5))
        finally:
            os.sched_setaffinity(0, before)
            busy.kill()


def test_scripts_import_startup_before_everything_else():
    scripts = {path.stem for path in ROOT.glob('*.py')} - {'model', 'configurator'}
    assert scripts == set(startup._SCRIPTS)
    prepares = [ROOT / 'data' / name / 'prepare.py' for name in startup._DATASETS]
    for path in [*(ROOT / f'{script}.py' for script in scripts), *prepares]:
        lines = path.read_text(encoding='utf-8').splitlines()
        imports = [line for line in lines if line.startswith(('import ', 'from '))]
        if path.name == 'prepare.py':  # which has to find the repository first
            assert imports[:2] == ['import sys', 'from pathlib import Path'], path
            del imports[:2]
        assert imports[0].startswith('import nib.startup'), path


def test_ctrl_c_reaches_your_own_prepare_script(tmp_path):
    """It imports parts of nib, but need not call run_script()."""
    for file in ('startup.py', 'errors.py', '__init__.py'):
        (tmp_path / 'nib').mkdir(exist_ok=True)
        shutil.copy(ROOT / 'nib' / file, tmp_path / 'nib')
    for name in (startup._DATASETS[0], 'own'):
        script = tmp_path / 'data' / name / 'prepare.py'
        script.parent.mkdir(parents=True)
        script.write_text(
            f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
            'import signal, nib.errors; print(signal.getsignal(signal.SIGINT) != signal.SIG_DFL)'
        )
        done = subprocess.run([sys.executable, script], capture_output=True, text=True)
        assert done.stdout == f'{name == "own"}\n', done.stderr


def test_garbage_is_collected_again_when_main_runs(capsys):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    gc.disable()
    try:
        with pytest.raises(SystemExit):
            errors.run_script(lambda argv: print(gc.isenabled()))
    finally:
        gc.enable()
        for number, handler in handlers.items():  # run_script() ignores signals at the end
            signal.signal(number, handler)
    assert capsys.readouterr().out == 'True\n'


@pytest.mark.skipif(os.name == 'nt', reason='Windows does not delete a working directory')
def test_startup_works_in_a_deleted_working_directory(tmp_path):
    program = f'import os, sys; os.rmdir({str(tmp_path)!r}); sys.path.insert(0, {str(ROOT)!r})'
    program += '; import nib.startup, signal; print(signal.getsignal(signal.SIGINT))'
    command = [sys.executable, '-c', program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'default_int_handler' in done.stdout, done.stderr
