"""Runs of train.py in forks, and stops by signals at random moments: a part of stress/crash.py."""

import fcntl
import os
import random
import re
import shutil
import signal
import struct
import sys
import termios
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import train
from nib.checkpoint import store
from nib.errors import UserError, run_script
from nib.machine.signals import SIGNALS
from nib.run.metrics import read_records
from nib.tokens.write import write_char_dataset

SAVE_INTERVAL = 2  # steps between saves in the killed runs of train.py
RUN = (
    '--dataset=tiny --device=cpu --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2 '
    '--gradient_accumulation_steps=1 --dropout=0.1 --max_iters=60 --lr_decay_iters=60 '
    f'--warmup_iters=4 --eval_interval={SAVE_INTERVAL} --eval_iters=1 --log_interval=1 '
    '--learning_rate=1e-2 --keep_every=20'
).split()
LONG = 40  # micro steps of a long step
MICRO_STEP = 0.02  # seconds that each of them takes at least
CONSOLES = ('tee', 'unread pipe', 'full disk', 'closed', 'terminal')
STEPS = f'--eval_interval=1000 --gradient_accumulation_steps={LONG} --max_iters=6'
STOPPED = {  # what is stopped -> flags of the runs
    'broken consoles': ['--eval_interval=1000'],
    'long steps': STEPS.split(),
}


def fork(function: Callable[[], None], output: Path | None = None) -> int:
    """Runs function in a fork, which exits with 0, or 1 after an exception; returns its id."""
    if process := os.fork():
        return process
    try:
        if output:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        function()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def train_whole(scratch: Path, *more: str) -> tuple[list[str], dict, float]:
    """Trains without interruption; returns the flags of the run, its tensors and its seconds."""
    scratch.mkdir()
    text = ' '.join(
        random.Random(0).choices(
            'the a cat dog bird sees hears chases small big red'.split(), k=4000
        )
    )
    write_char_dataset(scratch / 'data' / 'tiny', text, {'text': 'made up'})
    flags = [*RUN, f'--data_dir={scratch / "data"}', *more]
    started = time.perf_counter()
    if exit_code(
        fork(lambda: train.main([*flags, f'--out_dir={scratch / "whole"}']), scratch / 'whole.txt')
    ):
        raise UserError(f'train.py failed: {(scratch / "whole.txt").read_text()[-500:]}')
    duration = time.perf_counter() - started
    return flags, store.load(scratch / 'whole')[1], duration


def is_same(tensors: dict, others: dict) -> bool:
    """Whether the tensors are the same, bit for bit."""
    return tensors.keys() == others.keys() and all(
        tensors[kind].keys() == others[kind].keys()
        and all(torch.equal(value, others[kind][name]) for name, value in tensors[kind].items())
        for kind in tensors
    )


# -- stops by a signal at random moments -----------------------------------------------------------


def stop_training(
    stops: int, limit: float, draw: random.Random, scratch: Path, problems: list[str], kind: str
) -> dict[str, float]:
    """Stops and resumes train.py until it ends, then compares it with an uninterrupted run."""
    flags, expected, duration = train_whole(scratch, *STOPPED[kind])
    is_long, out_dir = kind == 'long steps', scratch / 'run'
    began = scratch / 'micro-steps.txt'  # when each one did
    counts: dict[str, float] = dict.fromkeys(
        ('stops', 'steps lost', 'slowest stop, seconds', 'runs that ended', 'of these, different'),
        0,
    )
    while counts['stops'] < stops or store.exists(out_dir):
        console = 'file' if is_long else draw.choice(CONSOLES)
        resume = ['--init_from=resume'] if store.exists(out_dir) else []
        argv = [*flags, f'--out_dir={out_dir}', *resume]
        keyboard, screen = os.openpty()
        process = fork(
            lambda: train_on(console, argv, keyboard, screen, began if is_long else None),
            scratch / 'run.txt',
        )
        os.close(screen)
        number = 0
        if counts['stops'] < stops and wait_until_it_listens(process):
            time.sleep(draw.uniform(0, 2 * LONG * MICRO_STEP if is_long else duration))
            number = stop(process, console, keyboard, draw)
        since = time.perf_counter()
        code = exit_code(process)
        if console != 'terminal' or not number:
            os.close(keyboard)
        where = f'{kind}, {console}, signal {number}'
        if code == 0:
            counts['runs that ended'] += 1
            if not is_same(store.load(out_dir)[1], expected):
                counts['of these, different'] += 1
                problems.append(f'{where}: other weights than the uninterrupted run')
            shutil.rmtree(out_dir)
            continue
        if code != 128 + number:
            problems.append(
                f'{where}: exit code {code}; {(scratch / "run.txt").read_text()[-500:]}'
            )
            break
        seconds = time.perf_counter() - since
        counts['stops'] += 1
        counts['slowest stop, seconds'] = max(counts['slowest stop, seconds'], seconds)
        records = read_records(out_dir / 'metrics.jsonl')[0]
        saved = max(store.steps_after(out_dir, 0), default=0)
        lost = max(record['step'] for record in records) - saved
        counts['steps lost'] += lost
        if lost or 'end' not in records[-1] or seconds > limit:
            problems.append(f'{where}: {lost} steps lost, {seconds:.1f} s, {records[-1]}')
        if is_long:
            late = sum(float(line) > since for line in began.read_text().split())
            if late > 2:  # one may begin before the signal arrives
                problems.append(f'{where}: {late} micro steps after it')
    return counts


def train_on(console: str, argv: list[str], keyboard: int, screen: int, began: Path | None):
    """Runs train.py as a script on this console and ends the process like Python.

    began: makes micro steps long, and writes to this file when each one begins.
    """
    os.close(keyboard)
    os.setsid()
    if console == 'closed':
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None
    elif console != 'file':
        for number in (1, 2):
            os.dup2(open_console(console, screen), number)
    if began:
        seed_everything = train.seed_everything  # every micro step calls it once

        def seed_slowly(*numbers):
            with began.open('a') as file:
                file.write(f'{time.perf_counter()}\n')
            time.sleep(MICRO_STEP)
            seed_everything(*numbers)

        began.write_text('')
        train.seed_everything = seed_slowly
    sys.argv = ['train.py', *argv]
    try:
        run_script(train.main)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)


def open_console(console: str, screen: int) -> int:
    """Returns a descriptor for the output of this process."""
    if console == 'full disk':
        return os.open('/dev/full', os.O_WRONLY)
    if console == 'terminal':
        fcntl.ioctl(screen, termios.TIOCSCTTY, 0)
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
        return screen
    reader, writer = os.pipe()
    if console == 'unread pipe':  # it is full after the first line
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    elif not os.fork():  # tee, in the same process group
        os.dup2(reader, 0)
        os.close(writer)
        os.execlp('tee', 'tee', os.devnull)
    return writer


def wait_until_it_listens(process: int) -> bool:
    """Waits until the process handles signals; returns False if it has ended."""
    while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        status = Path(f'/proc/{process}/status').read_text()
        if int(re.search(r'SigCgt:\s*(\w+)', status)[1], 16) >> signal.SIGUSR1 - 1 & 1:
            return True
        time.sleep(0.005)
    return False


def stop(process: int, console: str, keyboard: int, draw: random.Random) -> int:
    """Stops the process in a way that goes with its console; returns the signal."""
    if console == 'terminal':
        os.close(keyboard)  # the window is closed
        return signal.SIGHUP
    if console == 'tee':
        os.killpg(process, signal.SIGINT)  # Ctrl-C
        return signal.SIGINT
    number = draw.choice(SIGNALS)
    os.kill(process, number)
    return number
