"""Trains with every combination of values, then compares the runs in a table and a page.

python sweep.py config/x.py --learning_rate=1e-4,3e-4,1e-3 --seed=1,2    six runs, one by one
python sweep.py config/x.py --seed=1,2,3,4 --jobs=2                      two at a time
python sweep.py config/x.py --seed=1,2 --sweep_dir=seeds                 to another folder

All arguments but --jobs and --sweep_dir are those of train.py. The same command continues a sweep:
it leaves out the runs that have ended and resumes the others. A run that fails does not stop it.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import configurator
from nib.checkpoint import store
from nib.checkpoint.wrong_folder import is_run
from nib.errors import UserError, run_script
from nib.report.compare import compare
from nib.report.history import read_run, read_runs
from nib.report.page import write_report

TRAIN = str(Path(__file__).resolve().with_name('train.py'))
EXIT_FAILED = 1  # at least one run has failed


def main(argv):
    if not argv or '--help' in argv:
        print(__doc__.strip())
        return 0
    argv, jobs = take_flag(argv, 'jobs', '1')
    argv, sweep_dir = take_flag(argv, 'sweep_dir', 'sweep')
    runs = dict(combinations(argv))
    for flags in runs.values():
        configurator.configure(TRAIN, flags)  # a wrong value ends the sweep before its first run
    slots = find_slots(jobs)
    print(f'{len(runs)} runs in {sweep_dir}, {len(slots.environments)} at a time')
    Path(sweep_dir).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(slots.environments)) as pool:
        folders = [Path(sweep_dir, name) for name in runs]
        try:
            codes = list(pool.map(slots.train, folders, runs.values()))
        except KeyboardInterrupt:  # the active runs have received it too, and save
            slots.stopped = True
            print('stopped; the same command continues', flush=True)
            raise
    folders = [folder for folder in folders if is_run(folder)]
    if folders:
        page = Path(sweep_dir, 'comparison.html')
        write_report(folders, configurator.read_block(TRAIN).defaults, page)
        print_table(*compare(read_runs(folders)))
        print(f'report: {page}')
    return EXIT_FAILED if any(codes) else 0


def take_flag(argv: list[str], name: str, default: str) -> tuple[list[str], str]:
    """Returns the arguments without --name=value, and the value."""
    start = f'--{name}='
    values = [argument.removeprefix(start) for argument in argv if argument.startswith(start)]
    others = [argument for argument in argv if not argument.startswith(start)]
    return others, values[-1] if values else default


def combinations(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Returns a name and train.py's arguments for each combination of the values with commas."""
    fixed = [argument for argument in argv if not is_swept(argument)]
    swept = [argument.partition('=') for argument in argv if is_swept(argument)]
    if not swept:
        raise UserError('nothing to sweep: give a key several values, as in --seed=1,2')
    if any(argument.startswith(('--out_dir', '--init_from=resume')) for argument in argv):
        raise UserError('--out_dir and --init_from=resume are set for each run; use --sweep_dir')
    found = []
    for values in itertools.product(*(text.split(',') for _, _, text in swept)):
        flags = [f'{key}={value}' for (key, _, _), value in zip(swept, values)]
        name = ' '.join(flag.removeprefix('--') for flag in flags)
        found.append((re.sub(r'[^\w.=+-]+', '_', name), [*fixed, *flags]))
    if len(dict(found)) < len(found):
        raise UserError('a value is given twice')
    return found


def is_swept(argument: str) -> bool:
    return argument.startswith('--') and ',' in argument.partition('=')[2]


def find_slots(jobs: str) -> 'Slots':
    """Returns the places for `jobs` runs at once, at most one on each GPU or CPU core."""
    import torch  # late, because the check of the arguments does not need it

    gpus = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    most, unit = (gpus, 'GPUs') if gpus else (cores, 'CPU cores')
    if not jobs.isdigit() or not 1 <= int(jobs) <= most:
        raise UserError(f'--jobs={jobs}: expected 1 to {most}, the number of {unit}')
    n = int(jobs)
    if n == 1:
        return Slots([{}])
    if gpus:
        visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
        names = visible if len(visible) >= gpus and visible[0] else list(map(str, range(gpus)))
        return Slots([{'CUDA_VISIBLE_DEVICES': names[slot]} for slot in range(n)])
    return Slots([{'OMP_NUM_THREADS': str(max(1, cores // n))}] * n)


class Slots:
    """Trains runs, each with the environment variables of a free slot."""

    def __init__(self, environments: list[dict]):
        self.environments = environments
        self.free = SimpleQueue()
        self.stopped = False
        for environment in environments:
            self.free.put(environment)

    def train(self, folder: Path, flags: list[str]) -> int:
        """Starts or resumes a run, unless it has ended. Returns its exit code."""
        if self.stopped:
            return 1
        if is_finished(folder):
            print(f'{folder.name}: already finished', flush=True)
            return 0
        start = ['--init_from=resume'] if store.exists(folder) else []
        command = [sys.executable, TRAIN, *flags, f'--out_dir={folder}', *start]
        log, began, environment = Path(f'{folder}.log'), time.perf_counter(), self.free.get()
        with open(log, 'a', encoding='utf-8') as output:
            output.write(f'{shlex.join(command)}\n')
            output.flush()
            code = subprocess.call(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
            )
        self.free.put(environment)
        self.stopped = self.stopped or code in (130, 143)  # by Ctrl-C or a signal
        seconds = time.perf_counter() - began
        lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
        said = f'exit code {code}, {lines[-1]} (see {log})' if code else f'done in {seconds:.0f} s'
        print(f'{folder.name}: {said}', flush=True)
        return code


def is_finished(folder: Path) -> bool:
    """Returns whether a run has evaluated the whole validation split at its end."""
    if not is_run(folder):
        return False
    run = read_run(folder)
    return max(run.numbers.get('loss/val_whole', {}), default=-1) >= run.config.get('max_iters', 0)


def print_table(names, rows):
    lines = [names, *([cell.shown for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print('  '.join(f'{cell:{width}}' for cell, width in zip(line, widths)).rstrip())


if __name__ == '__main__':
    run_script(main)
