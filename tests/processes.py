"""Processes of their own, for tests of signals, kills and several ranks.

They are forked from a process that has imported torch already, which saves two seconds each.
"""

import multiprocessing
import os
import socket
import sys
import time
from multiprocessing import forkserver
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
