"""Trains with every combination of values, then compares the runs in a table and a page.

python sweep.py config/x.py --learning_rate=1e-4,3e-4,1e-3 --seed=1,2    six runs, one by one
python sweep.py config/x.py --seed=1,2,3,4 --jobs=2                      two at a time
python sweep.py config/x.py --seed=1,2 --sweep_dir=seeds                 to another folder

Besides --jobs and --sweep_dir, it takes the arguments of train.py. The same command continues a
sweep: it leaves out the runs that have ended and resumes the others. --overwrite trains all of them
again, for example after a change to the code. If a run fails, the sweep continues with the next.
"""

import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import configurator
from nib.budget import check_plan
from nib.checkpoint import store
from nib.checkpoint.paths import is_run
from nib.errors import EXIT_FINDING, EXIT_INTERRUPTED, EXIT_NONFINITE, UserError, run_script
from nib.files import FolderLock, atomic_write, naming, read_json
from nib.machine.device import pick_device
from nib.machine.signals import SIGNALS, name_signal
from nib.machine.threads import available_cores
from nib.report.compare import NOT_COMPARED, compare
from nib.report.history import read_run, read_runs
from nib.report.page import write_report
from nib.run.checks import check_config

# sweep.py's own keys; all others are train.py's, with commas between several values: --seed=1,2
sweep_dir: str = 'sweep'  # folder of the runs, their logs and comparison.html
jobs: int = 1  # runs at a time, each on its own GPU or with its share of the CPU cores

TRAIN = str(Path(__file__).resolve().with_name('train.py'))
MAY_CHANGE = {'max_iters', 'device', *NOT_COMPARED} - {'init_from'}  # when a sweep continues
EXIT_FAILED = 1  # at least one run has failed
LONGEST_NAME = 200  # bytes of a folder's name; those of logs and temporary files are longer


@dataclass(frozen=True)
class Planned:
    """A run of the sweep."""

    folder: Path
    flags: list[str]  # of train.py
    values: dict  # of all keys

    @property
    def log(self) -> Path:
        return Path(f'{self.folder}.log')

    @property
    def record(self) -> Path:
        """The values that the run began with, to tell whether the command has changed."""
        return Path(f'{self.folder}.json')

    def write_record(self, exit_code: int | None = None):
        """exit_code: of a run that does not continue, such as one that the doctor has stopped."""
        ended = {} if exit_code is None else {'exit_code': exit_code}
        with atomic_write(self.record) as file:
            file.write(json.dumps(self.values | ended, indent=1).encode())


def main(argv):
    if not argv or {'--help', '-h'} & set(argv):
        argv = ['--help']
    own, others = split_arguments(argv)
    values, _ = configurator.configure(__file__, own)
    globals().update(values)
    if not sweep_dir:
        raise UserError('sweep_dir is empty: set it with --sweep_dir=NAME')
    runs = plan(others)
    for run in runs:
        check_unchanged(run)
    environments = find_environments(runs[0].values['device'])
    Path(sweep_dir).mkdir(parents=True, exist_ok=True)
    lock = FolderLock(sweep_dir)
    if not lock.take():
        raise UserError(
            f'{sweep_dir} belongs to a sweep that is still active ({lock.holder()}): choose '
            f'another --sweep_dir'
        )
    lock.sign()
    print(f'{len(runs)} runs, {jobs} at a time; their logs are {Path(sweep_dir, "*.log")}')
    try:
        sweep = Sweep(environments)
        sweep.train_all(runs)
        return end(runs, sweep.signal, sweep.failed)
    except KeyboardInterrupt:
        name = name_signal(signal.SIGINT)
        print(f'stopped by {name}: the runs have ended; repeat the command to compare them')
        return EXIT_INTERRUPTED
    finally:
        lock.release(remove=True)


def end(runs: list[Planned], number: int, failed: list[Planned]) -> int:
    """Compares the runs, unless signal `number` has stopped the sweep; returns the exit code.

    failed: runs whose folders may still hold an earlier run.
    """
    finished = [run.folder for run in runs if is_finished(run) and run not in failed]
    if number:
        then = f'{len(finished)} of {len(runs)} runs are finished; repeat the command to continue'
        if runs[0].values['overwrite']:
            then = 'because of --overwrite, the same command would begin again'
        print(f'stopped by {name_signal(number)}: {then}')
        return 128 + number
    folders = [run.folder for run in runs if is_run(run.folder)]
    if folders:
        page = Path(sweep_dir, 'comparison.html')
        write_report(folders, configurator.read_block(TRAIN).defaults, page)
        print_table(*compare(read_runs(folders)))
        print(f'report: {page}')
    if missing := [run.folder.name for run in runs if run in failed or not is_run(run.folder)]:
        print(f'failed: {", ".join(missing)}')
    return 0 if len(finished) == len(runs) else EXIT_FAILED


# -- the plan --------------------------------------------------------------------------------------


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments with this script's own keys, and the others."""
    own, others = [], []
    for before, argument in zip(['', *argv], argv):
        names = [name.partition('=')[0].replace('-', '_') for name in (before, argument)]
        is_value = names[0] in ('__sweep_dir', '__jobs') and '=' not in before
        is_own = is_value or names[1] in ('__sweep_dir', '__jobs', '__help')
        (own if is_own else others).append(argument)
    return own, others


def plan(argv: list[str]) -> list[Planned]:
    """Returns a run for each combination of values. Raises UserError if any is impossible."""
    runs: dict[str, Planned] = {}
    for name, flags in combinations(argv):
        values, origins = configurator.configure(TRAIN, flags, settle={'device': pick_device})
        if origins['out_dir'] == 'command line' or values['init_from'] == 'resume':
            raise UserError(
                '--out_dir and --init_from=resume are set for each run; use --sweep_dir'
            )
        if values['eval_only']:
            raise UserError('--eval_only trains nothing: leave it out')
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise UserError(
                f'{name[:40]}... is too long for the name of a folder: sweep fewer keys at a time, '
                f'or use shorter values'
            )
        planned = bool(values['budget'] or values['params'])
        check_config(values, world_size=1, planned=planned)
        if planned:
            check_plan(values, origins)
        for other, run in runs.items():
            if name == other or values == run.values:
                raise UserError(
                    f'{" and ".join({other, name})}: two runs would be the same; remove one'
                )
        runs[name] = Planned(Path(sweep_dir, name), flags, values)
    return list(runs.values())


def check_unchanged(run: Planned):
    """Raises UserError if the run exists and began with other values of keys that matter."""
    if run.values['overwrite'] or not store.exists(run.folder):
        return
    for key, before in read_json(run.record).items():
        now = run.values.get(key, before)
        if now != before and key not in MAY_CHANGE:
            raise UserError(
                f'{run.folder} was trained with {key} {before!r}, but this command says {now!r}: '
                f'choose another --sweep_dir, or train all runs again (--overwrite)'
            )


def combinations(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Returns a name and train.py's arguments for each combination of the values with commas."""
    fixed = [argument for argument in argv if not is_swept(argument)]
    swept = [argument.partition('=') for argument in argv if is_swept(argument)]
    if not swept:
        raise UserError(
            'nothing to sweep: give a key several values, with = and commas, as in --seed=1,2'
        )
    found = []
    for values in itertools.product(*(text.split(',') for _, _, text in swept)):
        flags = [f'{key}={value.strip()}' for (key, _, _), value in zip(swept, values)]
        name = ' '.join(flag.removeprefix('--') for flag in flags)
        found.append((re.sub(r'[^\w.=+-]+', '_', name), [*fixed, *flags]))
    return found


def is_swept(argument: str) -> bool:
    """Returns whether a flag has several values. A comma may also belong to a path that exists."""
    value = argument.partition('=')[2]
    return argument.startswith('--') and ',' in value and not os.path.exists(value)


def find_environments(device: str) -> list[dict]:
    """Returns the environment variables of each job, at most one on each GPU or CPU core."""
    gpus = 0 if device == 'cpu' else torch.cuda.device_count()
    cores = available_cores()
    most, unit = (gpus, 'GPUs') if gpus else (cores, 'CPU cores')
    if not 1 <= jobs <= most:
        raise UserError(f'--jobs={jobs}: expected 1 to {most}, the number of {unit}')
    if jobs == 1:
        return [{}]
    if gpus:
        visible = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(gpus)))
        return [{'CUDA_VISIBLE_DEVICES': name.strip()} for name in visible.split(',')[:jobs]]
    threads = os.environ.get('OMP_NUM_THREADS') or max(1, cores // jobs)
    return [{'OMP_NUM_THREADS': str(threads)}] * jobs


# -- training --------------------------------------------------------------------------------------


class Sweep:
    """Trains runs, as many at a time as there are environments, until a signal stops it."""

    def __init__(self, environments: list[dict]):
        self.free = environments
        self.active: list[tuple[subprocess.Popen, Planned, dict, float]] = []
        self.failed: list[Planned] = []  # perhaps before they replaced an earlier run
        self.signal = 0  # the signal received; 0: none

    def train_all(self, runs: list[Planned]):
        waiting, told = list(runs), False
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in previous.items():
            if handler != signal.SIG_IGN:  # by nohup, for example
                signal.signal(number, self.receive)
        try:
            while self.active or waiting and not self.signal:
                while waiting and self.free and not self.signal:
                    self.start(waiting.pop(0))
                if self.signal and not told:
                    line = 'stopping and saving the active runs (a second signal ends them at once)'
                    print(line, flush=True)
                    told = True
                for job in [job for job in self.active if job[0].poll() is not None]:
                    self.active.remove(job)
                    self.end(*job)
                time.sleep(0.1)
        finally:  # no run outlives an error of the sweep
            for process, *_ in self.active:
                process.terminate()
            for process, *_ in self.active:
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def receive(self, number, frame):
        """Passes a signal on to the active runs.

        Ctrl-C in a terminal reaches a run twice. It ignores a repeat within a second.
        """
        self.signal = number
        for process, *_ in self.active:
            with suppress(ValueError):  # Windows sends Ctrl-C to all processes itself
                process.send_signal(number)

    def start(self, run: Planned):
        """Starts or resumes a run, unless it has finished."""
        overwrite = run.values['overwrite']
        if is_finished(run) and not overwrite:
            print(f'{run.folder.name}: already finished', flush=True)
            return
        before = read_json(run.record)
        ended = before.pop('exit_code', None)
        is_same = before == run.values | {'device': before.get('device')} and is_run(run.folder)
        if ended is not None and is_same and not overwrite:
            again = 'to train it again, add --overwrite'
            print(f'{run.folder.name}: has already ended, exit code {ended}; {again}', flush=True)
            return
        if ended is not None:
            replace(run, values=before).write_record()
        resume = ['--init_from=resume'] if store.exists(run.folder) and not overwrite else []
        command = [sys.executable, TRAIN, *run.flags, f'--out_dir={run.folder}', *resume]
        environment = self.free.pop()
        with naming(run.log), open(run.log, 'a', encoding='utf-8') as output:
            output.write(f'{shlex.join(command)}\n')
            output.flush()
            if not store.exists(run.folder):
                run.write_record()
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
            )
        self.active.append((process, run, environment, time.perf_counter()))
        if self.signal:  # it arrived after the check in the loop
            self.receive(self.signal, None)

    def end(self, process, run: Planned, environment: dict, began: float):
        """Frees the environment of a run that has ended, and prints a line about it."""
        self.free.append(environment)
        if self.signal:
            return
        if process.returncode not in (0, EXIT_NONFINITE, EXIT_FINDING):
            self.failed.append(run)
        elif process.returncode:
            run.write_record(process.returncode)
        elif run.values['overwrite']:  # now the folder holds this run
            run.write_record()
        if process.returncode:
            lines = run.log.read_text(encoding='utf-8', errors='replace').splitlines()
            said = f'exit code {process.returncode}, {lines[-1]} (see {run.log})'
        else:
            best = read_run(run.folder).best()
            loss = f'best validation loss {best[1]:.4f}, ' if best else ''
            said = f'{loss}{time.perf_counter() - began:.0f} s'
        print(f'{run.folder.name}: {said}', flush=True)


def is_finished(run: Planned) -> bool:
    """Returns whether a run has evaluated the whole validation split at its end."""
    if not is_run(run.folder):
        return False
    read, last = read_run(run.folder), run.values['max_iters']
    if run.values['budget'] or run.values['params']:  # these have chosen it
        last = read.config.get('max_iters', last)
    return max(read.numbers.get('loss/val_whole', {}), default=-1) >= last


def print_table(names, rows):
    lines = [names, *([cell.shown for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print('  '.join(f'{cell:{width}}' for cell, width in zip(line, widths)).rstrip())


if __name__ == '__main__':
    run_script(main)
