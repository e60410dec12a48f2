"""Measures nibGPT and nanoGPT on a GPU, in stages: all figures of docs/speed.md about GPUs.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/gpu.py --nanogpt=nanoGPT --out=gpu-figures --text=input.txt
    python benchmarks/gpu.py --out=rehearsal --rehearse     the same on a CPU, at toy sizes

Needs a CUDA GPU, torch, numpy and pytest, and no network. It measures transformers too, if
installed. The text is Python's own library, or --text=FILE. With tiny Shakespeare, the character
stage trains to nanoGPT's published loss. Each stage is a process with a time limit. It writes
OUT/STAGE.txt and OUT/results.json as it goes, and its output to OUT/STAGE.log. A finished stage is
not run again.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import gpu_kernels, gpu_runs, gpu_stages, measure
from benchmarks.gpu_stages import Setting
from nib.errors import UserError, run_script
from nib.files import atomic_write

nanogpt: str = ''  # path of a clone of karpathy/nanoGPT; empty: nibGPT alone
out: str = 'gpu-figures'  # folder of the results
text: str = ''  # file to train on; empty: the source of Python's library
stages: str = 'tests,gpt2,char,sampling,determinism,profile,compilers,recipes'  # in this order
again: bool = False  # also run stages that are finished
rehearse: bool = False  # on the CPU, at toy sizes
seconds: int = 0  # time limit of all stages together; 0: only the limits of each stage
batches: str = '16,32'  # sequences per micro step in the gpt2 stage
recipe_seconds: int = 60  # training time of each recipe

STAGES = {  # name -> the function, and its time limit in seconds
    'tests': (gpu_stages.run_tests, 330),
    'gpt2': (gpu_stages.measure_gpt2, 240),
    'char': (gpu_runs.measure_char, 240),
    'sampling': (gpu_stages.measure_sampling, 150),
    'determinism': (gpu_stages.check_determinism, 180),
    'profile': (gpu_stages.profile, 100),
    'compilers': (gpu_stages.compare_compilers, 450),
    'recipes': (gpu_runs.compare_recipes, 470),
}


def main(argv):
    configure(argv)
    names = stages.split(',')
    for name in names:
        if name not in STAGES:
            raise UserError(
                f'--stages={stages}: there is no stage {name!r}; use {", ".join(STAGES)}'
            )
    if not rehearse and not torch.cuda.is_available():
        raise UserError(
            'torch finds no CUDA GPU here; --rehearse runs the stages on the CPU, at toy sizes'
        )
    if nanogpt and not (Path(nanogpt) / 'train.py').exists():
        raise UserError(f'--nanogpt={nanogpt}: expected the path of a clone of karpathy/nanoGPT')
    if text and not Path(text).is_file():
        raise UserError(f'--text={text}: there is no such file')
    Path(out).mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (seconds or 1e9)
    for name in names:
        if read_results().get(name, {}).get('outcome') == 'done' and not again:
            print(f'{name}: done before', flush=True)
            continue
        limit = min(600 if rehearse else STAGES[name][1], end - time.monotonic())
        figures = run_in_process(name, argv, limit) if limit > 10 else f'{name}: no time left'
        print(figures, flush=True)


def configure(argv):
    values, _ = configurator.configure(__file__, argv)
    values |= {
        key: str(Path(values[key]).resolve()) for key in ('out', 'nanogpt', 'text') if values[key]
    }
    globals().update(values)


def run_in_process(name: str, argv, limit: float) -> str:
    """Runs a stage for at most `limit` seconds; returns its figures and how it ended."""
    (Path(out) / f'{name}.txt').unlink(missing_ok=True)
    save(name, {})
    program = (
        f'import sys; from benchmarks import gpu; gpu.run_stage({name!r}, {limit}, sys.argv[1:])'
    )
    started = time.perf_counter()
    with open(Path(out) / f'{name}.log', 'w') as log:
        process = subprocess.Popen(
            [sys.executable, '-u', '-c', program, *argv],
            env=measure.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            outcome = 'failed' if process.wait(limit) else 'done'
        except subprocess.TimeoutExpired:
            outcome = f'stopped after {limit:.0f} s'
        except KeyboardInterrupt:
            end_group(process)
            raise
    end_group(process)
    figures = Figures(name, read_results().get(name, {}))
    if outcome == 'failed':
        said = (Path(out) / f'{name}.log').read_text(errors='replace').strip().splitlines()
        outcome = f'failed: {said[-1][:300] if said else "nothing was printed"}'
    figures.note('seconds', time.perf_counter() - started)
    figures.note('outcome', outcome)
    return (Path(out) / f'{name}.txt').read_text()


def end_group(process):
    """Ends a stage's process and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(name: str, limit: float, argv):
    """Runs in the stage's own process, from any folder."""
    configure(argv)
    figures = Figures(name)
    setting = Setting(nanogpt, Path(out), text, batches, recipe_seconds, rehearse)
    figures.note('measured on', measure.describe_machine(setting.device))
    measure_stage, _ = STAGES[name]
    measure_stage(setting, figures, time.perf_counter() + limit)


class Figures:
    """A stage's figures, written to OUT/STAGE.txt and OUT/results.json as soon as they exist."""

    def __init__(self, stage: str, values=()):
        self.stage, self.values = stage, dict(values)

    def note(self, name: str, value: float | str | bool):
        self.values[name] = value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        shown = measure.show(value) if is_number else str(value)
        with open(Path(out) / f'{self.stage}.txt', 'a') as file:
            file.write(f'{self.stage}: {name:60} {shown}\n')
        self.save()

    def save(self, more: Mapping = MappingProxyType({})):
        """Writes the figures, and more that are not final."""
        save(self.stage, {**self.values, **more})

    def attempt(self, name: str, work):
        """Notes the rate or text that work() returns, or why it failed."""
        try:
            self.note(name, work())
        except Exception as error:  # still measure the other figures of the stage
            self.note(name, f'failed: {gpu_kernels.describe(error)}')


def read_results() -> dict:
    path = Path(out) / 'results.json'
    return json.loads(path.read_text()) if path.exists() else {}


def save(stage: str, values: dict):
    with atomic_write(Path(out) / 'results.json') as file:
        file.write(json.dumps(read_results() | {stage: values}, indent=1).encode())


if __name__ == '__main__':
    run_script(main)
