"""Interrupts saves at every disk operation, kills runs, and checks that only unsaved work is lost.

    python stress/crash.py              every operation, then 1,000 kills, half of them of train.py,
                                        and 600 stops by signals, half of them without a console
    python stress/crash.py --kills=50 --stops=20    a quick check

A stop ends the process before a disk operation, or in the middle of a write. A power cut is a stop
that also discards the content of every file that was not synced. An error makes the operation fail
with an I/O error. After a stop by a signal, the run must have saved every step that it recorded.
"""

import builtins
import errno
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it; once here, not in every killed process

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
import train
from benchmarks import measure
from nib.checkpoint import store
from nib.checkpoint.replacing import put_back, set_aside
from nib.checkpoint.writer import CheckpointWriter
from nib.errors import UserError, run_script
from nib.schema import check_range
from stress.stops import (
    SAVE_INTERVAL,
    STOPPED,
    exit_code,
    fork,
    is_same,
    stop_training,
    train_whole,
)

kills: int = 1000  # SIGKILLs at random moments: half hit train.py, half a process that only saves
stops: int = 600  # signals at random moments: half without a console, half inside long steps
seed: int = 0  # determines the moments
limit: float = 10.0  # seconds from a signal to the end of the process, on a machine that is idle
folder: str = ''  # where to write the runs; empty: the system's folder for temporary files
result: str = ''  # also write the table to this file


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'kills', 'stops', least=2)
    torch.set_num_threads(1)
    rows, problems = [], []
    with tempfile.TemporaryDirectory(dir=folder or None) as scratch:
        for name in SCENARIOS:
            counts = {
                way: stop_at_every_operation(name, way, Path(scratch) / 'stops', problems)
                for way in WAYS
            }
            rows.append(f'{name:46}' + ''.join(f'{count:>12,}' for count in counts.values()))
        saving = kill_saving(kills // 2, random.Random(seed), Path(scratch) / 'saving', problems)
        training = kill_training(
            kills - kills // 2, random.Random(seed + 1), Path(scratch) / 'training', problems
        )
        stopped = [
            stop_training(
                stops // 2, limit, random.Random(seed + 2), Path(scratch) / name, problems, name
            )
            for name in STOPPED
        ]
    lines = [
        measure.describe_machine(),
        '',
        f'{"cut at every operation of":46}' + ''.join(f'{way:>12}' for way in WAYS),
        *rows,
        '',
        f'{"killed at random":46}{"saving":>12}{"train.py":>12}',
        *(f'{key:46}{saving[key]:>12,}{training[key]:>12,}' for key in COUNTED),
        f'{"runs that ended, after kills and resumes":46}{"":>12}{training["ended"]:>12,}',
        f'{"of these, with other weights than uninterrupted":46}{"":>11}{training["differ"]:>12,}',
        '',
        f'{"stopped by a signal at random":46}' + ''.join(f'{name:>16}' for name in STOPPED),
    ]
    for key in stopped[0]:
        lines.append(f'{key:46}' + ''.join(f'{counts[key]:>16,.3g}' for counts in stopped))
    lines += ['', f'violations: {len(problems)}', *problems[:20], '']
    table = '\n'.join(lines)
    measure.publish(table, result)
    return int(bool(problems))


# -- a stop at every operation ---------------------------------------------------------------------


def tensors_of(value: float) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of a small checkpoint, all filled with the value."""
    return {
        'model': {'a': torch.full((40, 30), value), 'b': torch.full((7,), value)},
        'optimizer': {'a/exp_avg': torch.full((40, 30), value), 'a/step': torch.tensor(value)},
    }


def save(
    out_dir: Path,
    step: int,
    value: float,
    best: bool | None = None,
    start: int | None = None,
    keep_last: int = 1,
):
    """Saves a step of a run that starts at `start`, with an evaluation if best is given."""
    writer = CheckpointWriter(out_dir, keep_last, start=step - 1 if start is None else start)
    writer.save(step, **tensors_of(value), state={'train': {}})
    if best is not None:
        writer.record_evaluation(step, {'evaluated': step}, best)
    writer.close()


def prepare_two(out_dir: Path):
    save(out_dir, 10, 1.0, best=True)
    save(out_dir, 20, 2.0, keep_last=2)


def record_best(out_dir: Path):
    writer = CheckpointWriter(out_dir, 1, start=20)
    writer.record_evaluation(20, {'evaluated': 20}, True)
    writer.close()


def replace(out_dir: Path):
    set_aside(out_dir)
    save(out_dir, 30, 7.0, start=0)


# Preparation, interrupted action, and which (step, value) may be the newest afterwards.
SCENARIOS = {
    'a first save': (
        lambda out_dir: None,
        lambda out_dir: save(out_dir, 10, 1.0),
        {None, (10, 1.0)},
    ),
    'a save that makes an older one superfluous': (
        lambda out_dir: save(out_dir, 10, 1.0),
        lambda out_dir: save(out_dir, 20, 2.0),
        {(10, 1.0), (20, 2.0)},
    ),
    'a save and its evaluation, best so far': (
        prepare_two,
        lambda out_dir: save(out_dir, 30, 3.0, best=True),
        {(20, 2.0), (30, 3.0)},
    ),
    'an evaluation after a resume': (prepare_two, record_best, {(20, 2.0)}),
    'a step saved again': (
        prepare_two,
        lambda out_dir: save(out_dir, 20, 7.0, start=10, keep_last=2),
        {(20, 2.0), (20, 7.0)},
    ),
    'a new run that replaces an old one': (prepare_two, replace, {(20, 2.0), (30, 7.0)}),
}
WAYS = ('stop', 'power cut', 'error')


def stop_at_every_operation(scenario: str, way: str, scratch: Path, problems: list[str]) -> int:
    """Runs the scenario once per operation and interrupts it there; returns their number."""
    prepare, act, allowed = SCENARIOS[scenario]
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / 'before').mkdir(parents=True)
    prepare(scratch / 'before')
    operation, done = 0, False
    while not done:
        out_dir = scratch / 'run'
        shutil.rmtree(out_dir, ignore_errors=True)
        shutil.copytree(scratch / 'before', out_dir)
        code = exit_code(fork(lambda: play(act, out_dir, operation, way)))
        where = f'{scenario}, {way} at operation {operation}'
        if code not in (0, 50, 51, 52):
            problems.append(f'{where}: exit code {code}')
            break
        problems += [f'{where}: {problem}' for problem in check_folder(out_dir, allowed)]
        done = code == 0
        operation += not done
    return operation


def play(act, out_dir: Path, operation: int, way: str):
    """Calls act; exits with 50 if stopped, 51 or 52 if an error was reported or ignored."""
    reached = intercept(operation, way)
    try:
        act(out_dir)
    except UserError:
        if not reached():
            raise
        os._exit(51)
    if reached():
        os._exit(52)


def intercept(operation: int, way: str) -> Callable[[], bool]:
    """Interrupts the disk operation with this number. Returns a function: was it reached?"""
    count, unsynced, really_open = [0], {}, builtins.open

    def before(in_part: Callable[[], None] = lambda: None):
        count[0] += 1
        if count[0] - 1 != operation:
            return
        in_part()
        if way == 'error':
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if way == 'power cut':
            for descriptor in unsynced.values():
                os.ftruncate(descriptor, 0)
        os._exit(50)

    def wrap(function, after=lambda *arguments: None):
        def wrapped(*arguments, **options):
            before()
            value = function(*arguments, **options)
            after(*arguments)
            return value

        return wrapped

    def open(file, mode='r', *arguments, **options):
        if 'w' not in mode:
            return really_open(file, mode, *arguments, **options)
        before()
        opened = really_open(file, mode, *arguments, **options)
        unsynced[os.fstat(opened.fileno()).st_ino] = os.dup(opened.fileno())
        write = opened.write

        def write_half(block):
            write(block[: len(block) // 2])
            opened.flush()

        def wrapped(block):
            before(lambda: write_half(block))
            return write(block)

        opened.write = wrapped
        return opened

    def synced(descriptor):
        unsynced.pop(os.fstat(descriptor).st_ino, None)

    for name in ('mkdir', 'rename', 'replace', 'unlink', 'rmdir'):
        setattr(os, name, wrap(getattr(os, name)))
    os.fsync = wrap(os.fsync, synced)
    builtins.open = open
    return lambda: count[0] > operation


def check_folder(out_dir: Path, allowed: set) -> list[str]:
    """Returns what is wrong with a folder after an interruption: can the run be resumed from it?"""
    put_back(out_dir)  # as the next start does
    problems, warnings = [], []
    newest = None
    for step in sorted(store.steps_after(out_dir, 0)):
        value = read_value(out_dir, str(step), problems, warnings)
        newest = (step, value)
    if newest and read_value(out_dir, 'latest', problems, warnings) != newest[1]:
        problems.append('latest is not the newest')
    if newest and read_value(out_dir, 'best', problems, warnings) is None:
        problems.append('there is no best')
    problems += [warning for warning in warnings if 'no best checkpoint yet' not in warning]
    if newest not in allowed:
        problems.append(f'the newest is {newest}')
    save(out_dir, 40, 4.0, best=True, start=newest[0] if newest else 0)
    left = sorted(path.name for path in out_dir.iterdir())
    if (
        left != ['best', 'latest', 'step-00000040']
        or read_value(out_dir, 'latest', problems, warnings) != 4.0
    ):
        problems.append(f'after another save there are {left}')
    return problems


def read_value(out_dir: Path, which: str, problems: list[str], warnings: list[str]) -> float | None:
    try:
        found, tensors = store.load(out_dir, which, warn=warnings.append)
    except UserError as error:
        problems.append(str(error))
        return None
    values = {
        float(value)
        for kind in tensors.values()
        for tensor in kind.values()
        for value in tensor.unique()
    }
    if len(values) != 1:
        problems.append(f'{found.path} mixes {values}')
    return values.pop()


# -- kills at random moments -----------------------------------------------------------------------

COUNTED = (
    'kills',
    'within a save or deletion',
    'folders that cannot be loaded',
    'most saves lost of those begun',
)


def kill_saving(
    kills: int, draw: random.Random, out_dir: Path, problems: list[str]
) -> dict[str, int]:
    """Repeatedly kills a process that only saves; each one continues from the previous state."""
    out_dir.mkdir()
    counts = dict.fromkeys(COUNTED, 0)
    while counts['kills'] < kills:
        newest = max(store.steps_after(out_dir, 0), default=0)
        begun, told = os.pipe()
        process = fork(lambda: save_for_ever(out_dir, newest, told))
        os.close(told)
        time.sleep(draw.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        if exit_code(process) != -signal.SIGKILL:
            problems.append('the saving process failed')
            break
        counts['kills'] += 1
        counts['within a save or deletion'] += has_leftovers(out_dir)
        with os.fdopen(begun) as lines:
            last = int((lines.read().split() or [newest])[-1])
        found = check_steps(out_dir, problems, counts)
        counts['most saves lost of those begun'] = max(
            counts['most saves lost of those begun'], last - found
        )
        if found < last - 1 or any(
            read_value(out_dir, str(step), problems, []) != step
            for step in store.steps_after(out_dir, 0)
        ):
            problems.append(f'killed while saving step {last}: the newest is {found}')
    return counts


def save_for_ever(out_dir: Path, step: int, told: int):
    writer = CheckpointWriter(out_dir, keep_last=1, keep_every=50, start=step)
    store.clear_leftovers(out_dir)
    while True:
        step += 1
        writer.wait()
        os.write(told, f'{step}\n'.encode())
        writer.save(step, **tensors_of(float(step)), state={'train': {}})
        writer.record_evaluation(step, {'evaluated': step}, best=step % 3 == 0)


def kill_training(
    kills: int, draw: random.Random, scratch: Path, problems: list[str]
) -> dict[str, int]:
    """Kills and resumes train.py until it ends, then compares it with an uninterrupted run."""
    flags, expected, duration = train_whole(scratch)
    out_dir, output = scratch / 'run', scratch / 'run.txt'
    counts = dict.fromkeys((*COUNTED, 'ended', 'differ'), 0)
    while counts['kills'] < kills or store.exists(out_dir):
        resume = ['--init_from=resume'] if store.exists(out_dir) else []
        output.write_text('')  # a process killed at once has no output
        process = fork(lambda: train.main([*flags, f'--out_dir={out_dir}', *resume]), output)
        time.sleep(draw.uniform(0, duration) if counts['kills'] < kills else 0)
        if counts['kills'] < kills:
            os.kill(process, signal.SIGKILL)
        code = exit_code(process)
        if code == 0:
            counts['ended'] += 1
            if not is_same(store.load(out_dir)[1], expected):
                counts['differ'] += 1
                problems.append(
                    f'run {counts["ended"]} ends with other weights than the uninterrupted one'
                )
            shutil.rmtree(out_dir)
            continue
        if code != -signal.SIGKILL:
            problems.append(f'train.py does not go on: {output.read_text()[-500:]}')
            break
        counts['kills'] += 1
        counts['within a save or deletion'] += has_leftovers(out_dir)
        found = check_steps(out_dir, problems, counts)
        reached = max(
            map(int, re.findall(r'^step (\d+): loss', output.read_text(), re.MULTILINE)), default=0
        )
        lost = (
            max(reached - 1, 0) // SAVE_INTERVAL - found // SAVE_INTERVAL
        )  # the last save may not have begun
        counts['most saves lost of those begun'] = max(
            counts['most saves lost of those begun'], lost
        )
        if lost > 1:
            problems.append(f'killed at step {reached}: the newest checkpoint is {found}')
    return counts


def has_leftovers(out_dir: Path) -> bool:
    return any(path.name != '.lock' for path in out_dir.glob('.*')) or any(
        out_dir.glob('step-*/.*')
    )


def check_steps(out_dir: Path, problems: list[str], counts: dict[str, int]) -> int:
    """Returns the newest step, or 0. Checks that every step, `latest` and `best` can be loaded."""
    if not store.exists(out_dir):
        return 0
    warnings = []
    try:
        for which in ('best', 'latest', *map(str, store.steps_after(out_dir, 0))):
            store.load(out_dir, which, warn=warnings.append)
    except UserError as error:
        warnings.append(str(error))
    if found := [warning for warning in warnings if 'no best checkpoint yet' not in warning]:
        counts['folders that cannot be loaded'] += 1
        problems += found
    return store.load(out_dir, warn=lambda line: None)[0].step


if __name__ == '__main__':
    run_script(main)
