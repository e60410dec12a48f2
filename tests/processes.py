"""Processes of their own, for tests of signals, kills and several ranks, and of whole programs.

They are forked from a process that has imported torch already, which saves two seconds each.
"""

import functools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAIN = 'import train; from nib.errors import run_script; run_script(train.main)'
PATIENCE = 600.0  # seconds until a test fails that waits for a line or an end: a hang
IS_WINDOWS = os.name == 'nt'
running: list = []  # processes of the current test
held: list = []  # sockets that keep its ports
context = multiprocessing.get_context('spawn' if IS_WINDOWS else 'forkserver')


class Started:
    """A Python program in a process group of its own; folder/out and folder/err get its output.

    env: environment variables to set.
    """

    def __init__(self, folder: Path, program: str, *argv, env: dict | None = None):
        if not IS_WINDOWS:
            start_server()
        folder.mkdir(parents=True, exist_ok=True)
        self.files = folder / 'out', folder / 'err'
        for file in self.files:
            file.write_text('')
        arguments = program, list(map(str, argv)), self.files, env or {}
        self.process = context.Process(target=run, args=arguments, daemon=True)
        self.process.start()
        self.pid = self.process.pid
        running.append(self.process)

    @property
    def stdout(self) -> str:
        return self.files[0].read_text()

    @property
    def stderr(self) -> str:
        return self.files[1].read_text()

    def wait_for(self, text: str):
        """Waits until the program has printed the text."""
        until = time.monotonic() + PATIENCE
        while text not in self.stdout:
            if not self.process.is_alive() or time.monotonic() > until:
                pytest.fail(f'no {text!r} in:\n{self.stdout}{self.stderr}')
            time.sleep(0.01)

    def send(self, number: int):
        os.kill(self.pid, number)

    def end(self, patience: float = PATIENCE) -> int:
        """Waits for the end of the process; returns its exit code."""
        self.process.join(patience)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f'no end after:\n{self.stdout}{self.stderr}')
        return self.process.exitcode


def start_on_ranks(n: int, folder: Path, program: str, *argv) -> list[Started]:
    """Starts the program on n ranks, as torchrun does, but does not watch them."""
    shared = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(), 'WORLD_SIZE': n}
    return [
        Started(
            folder / f'rank-{rank}', program, *argv, env=shared | {'RANK': rank, 'LOCAL_RANK': rank}
        )
        for rank in range(n)
    ]


def free_port() -> int:
    """Returns a port on which only this test's programs will listen."""
    free = socket.socket()
    free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that they can
    free.bind(('127.0.0.1', 0))
    held.append(free)
    return free.getsockname()[1]


def kill_running():
    """Kills the processes that a test has left behind, as if it failed, and frees its ports."""
    while running:
        running.pop().kill()
    while held:
        held.pop().close()


def start_server():
    """Starts the process from which the others are forked, with one thread, unless it runs."""
    context.set_forkserver_preload(['train', 'torch._dynamo'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')
        patch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), str(ROOT / 'tests')]))
        forkserver.ensure_running()


# -- a fast python ---------------------------------------------------------------------------------

# In the place of Python's executable. It passes its streams and arguments on to the tests' process,
# and the signals that it gets.
FAST_PYTHON = """#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
order = json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(order).to_bytes(4, 'big')], [0, 1, 2])
server.sendall(order)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
code = int.from_bytes(server.recv(4), 'big', signed=True)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def fast_python() -> str:
    """Returns the path of a python whose programs are forked, as are those that they start.

    Their process is not the one that was started: it has another pid and another parent.
    """
    if IS_WINDOWS:
        return sys.executable
    start_server()
    folder = tempfile.TemporaryDirectory()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f'{folder.name}/socket')
    listener.listen()
    path = Path(folder.name, 'python')
    path.write_text(FAST_PYTHON.format(python=sys.executable, address=f'{folder.name}/socket'))
    path.chmod(0o755)

    def serve(folder):
        while True:
            threading.Thread(target=fork, args=[listener.accept()[0]], daemon=True).start()

    threading.Thread(target=serve, args=[folder], daemon=True).start()
    return str(path)


def fork(caller: socket.socket):
    """Runs a program of fast_python(), and tells its exit code."""
    with caller, caller.makefile('rb') as orders:
        size, streams, *_ = socket.recv_fds(caller, 4, 3)
        order = json.loads(orders.read(int.from_bytes(size, 'big')))
        process = context.Process(target=be_python, args=(*order, tuple(map(DupFd, streams))))
        process.start()
        running.append(process)
        for stream in streams:
            os.close(stream)
        while process.sentinel not in wait([process.sentinel, caller]):
            signal_number = caller.recv(1)
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, signal_number[0] if signal_number else signal.SIGKILL)
        process.join()
        with suppress(OSError):  # it was killed
            caller.sendall(process.exitcode.to_bytes(4, 'big', signed=True))


def be_python(argv: list[str], environment: dict, folder: str, streams):
    """Runs `python arguments...` in the new process: -c CODE, -m MODULE or FILE."""
    for number, stream in enumerate(streams):
        os.dup2(stream.detach(), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - until the process ends
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    own = {'nib', 'benchmarks', 'stress', 'processes', *(path.stem for path in ROOT.glob('*.py'))}
    for name in list(sys.modules):
        if name.partition('.')[0] in own:
            del sys.modules[name]
    paths = environment.get('PYTHONPATH', '').split(os.pathsep)
    installed = [path for path in sys.path if path not in ('', str(ROOT))]
    installed = [path for path in installed if not path.startswith(str(ROOT / 'tests'))]
    sys.path[:] = [folder, *filter(None, paths), *installed]
    sys.executable, *arguments = argv
    while arguments[0] in ('-u', '-B'):
        arguments.pop(0)
    kind, *sys.argv = arguments
    if kind == '-c':
        program = sys.argv[0]
        sys.argv[0] = '-c'
        exec(compile(program, '<string>', 'exec'), {'__name__': '__main__'})
    elif kind == '-m':
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv.insert(0, kind)
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name='__main__')


def run(program: str, argv: list[str], files: tuple[Path, Path], env: dict):
    """Runs in the new process."""
    if not IS_WINDOWS:
        os.setsid()
    os.chdir(ROOT)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ |= {name: str(value) for name, value in env.items()}
    sys.argv = ['train.py', *argv]
    exec(compile(program, 'program', 'exec'), {'__name__': '__main__'})
