"""Measures how much slower training and sampling become when other processes use the cores.

    python benchmarks/busy_machine.py

Each job runs alone, twice at once, and next to a process that never waits. It does so with
libgomp's defaults (a thread per core and a spin count of 300,000) and with nibGPT's settings. The
jobs are ready before the measurement, and take turns of equal time. Nothing else may use the
machine meanwhile.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np

import configurator
import train
from benchmarks import measure
from nib.errors import run_script
from nib.machine.device import SMALL_MODEL, limit_threads, pick_device, pick_dtype
from nib.machine.threads import CALM, INTERVAL, available_cores
from nib.run.checks import settle_schedule
from nib.schema import check_range
from nib.tokens.dataset import TokenDataset

config: str = 'config/train_shakespeare_char.py'  # the model
rounds: int = 5  # rounds of measurements
seconds: float = 3.0  # of each measurement
result: str = ''  # also write the table to this file

JOBS = {'training': 'steps/s', 'sampling': 'tokens/s'}
SITUATIONS = {'alone': (1, 0), 'two at once': (2, 0), 'next to a busy process': (1, 1)}
LIBGOMP = {'GOMP_SPINCOUNT': '300000', 'OMP_NUM_THREADS': str(available_cores())}
CONTESTANTS = {'libgomp': LIBGOMP, 'nibGPT': {}}  # environment variables
VOCAB_SIZE = 65


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'rounds', least=1)
    check_range(values, 'seconds', least=0.1)
    turns: dict[str, list] = {name: [{} for _ in range(rounds)] for name in CONTESTANTS}
    for job, unit in JOBS.items():
        workers = {
            name: [start(job, variables) for _ in range(2)]
            for name, variables in CONTESTANTS.items()
        }
        for turn in range(rounds):
            for name, pair in workers.items():
                figures = measure_situations(job, unit, pair)
                turns[name][turn] |= figures
                measure.say_round(turn, name, figures)
        for pair in workers.values():
            for worker in pair:
                worker.close()
    table = (
        f'{rounds} alternating rounds of {seconds:g} s; {measure.describe_machine()}\n'
        f'{config}; x: times slower than alone in the same round\n\n'
        f'{measure.make_table(turns)}'
    )
    measure.publish(table, result)


def measure_situations(job: str, unit: str, workers) -> dict[str, float]:
    """Returns the rate of a job alone, and how many times slower it is in the other situations."""
    rates = {}
    for situation, (n_workers, n_busy) in SITUATIONS.items():
        busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(n_busy)]
        time.sleep((CALM + 1) * INTERVAL)  # nibGPT's threads stop yielding
        for worker in workers[:n_workers]:
            worker.send(f'{seconds}')
        counts = [worker.answer()['rate'] for worker in workers[:n_workers]]
        rates[situation] = sum(counts) / len(counts)
        for process in busy:
            process.kill()
            process.wait()
    alone = rates.pop('alone')
    slower = {f'{job} {situation}, x': alone / rate for situation, rate in rates.items()}
    return {f'{job} alone, {unit}': alone} | slower


def start(job: str, variables: dict[str, str]) -> measure.Worker:
    """Starts a process that is ready to do a job for some seconds."""
    chosen = ('OMP_', 'GOMP_', 'KMP_', 'MKL_')
    environ = {name: text for name, text in os.environ.items() if not name.startswith(chosen)}
    program = 'import sys; from benchmarks import busy_machine; busy_machine.work(*sys.argv[1:])'
    return measure.Worker('a worker', program, job, config, variables=environ | variables)


def work(job: str, config: str):
    """Runs in a worker: for each line with seconds, does the job that long and prints its rate."""
    values, _ = configurator.configure(
        train.__file__, [config, '--device=cpu'], settle={'device': pick_device}
    )
    values = settle_schedule(values) | {'dtype': pick_dtype(values['dtype'], 'cpu')[0]}
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=100_000, dtype=np.uint16)
    data = TokenDataset('random tokens', Path(), tokens, tokens, VOCAB_SIZE, None, {}, '')
    training = train.Training.set_up(values, data)
    training.optimizer.lr = values['learning_rate']
    do = {'training': do_steps, 'sampling': do_tokens}[job](training)
    for _ in range(20):
        next(do)
    print('{}', flush=True)
    for line in sys.stdin:
        count, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < float(line):
            next(do)
            count += 1
        print(json.dumps({'rate': count / spent}), flush=True)


def do_steps(training):
    step = 0
    while True:
        loss, _ = train.train_step(training, training.batches.micro_batches(step), step)
        float(loss)
        step += 1
        yield


def do_tokens(training):
    model = training.raw_model
    if model.num_params() < SMALL_MODEL:  # as in sample.py
        limit_threads(1)
    while True:
        yield from model.generate([[0]] * 3, 500, temperature=0.8, top_k=200, seed=1)


if __name__ == '__main__':
    run_script(main)
