"""What the benchmarks share: a machine's description, a table of medians with their spread, a clock for the parts of a step,
nanoGPT to measure beside."""
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nib import runtime
from nib.errors import UserError


def describe_machine(device: str = 'cpu') -> str:
    """Processor or GPU, cores, Python and torch, on one line."""
    name = platform.processor() or 'CPU'
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            name = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), name)
    if device.startswith('cuda'):
        name = f'{torch.cuda.get_device_name(device)}, {name}'
    return f'{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}'


def matrix_rate(device: str, dtype: str) -> float:
    """FLOP/s that a large matrix product reaches on this machine, the best of five."""
    n = 2048
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(6):
        runtime.synchronize(device)
        started = time.perf_counter()
        a @ b
        runtime.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * n ** 3 / min(times[1:])


def make_table(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Rows of 'median (lowest to highest)' for each of one or two contestants, whose rounds stand at the same index.

    measured: contestant -> its rounds, each quantity -> figure. The ratio is that of the second to the first, round by
    round, as a machine's speed drifts; its median and spread.
    """
    names = list(measured)
    lines = [f'{"median (lowest to highest)":30}' + ''.join(f'{name:>34}' for name in names)
             + (f'{names[1] + " / " + names[0]:>28}' if len(names) == 2 else '')]
    for key in measured[names[-1]][0]:
        columns = [[turn[key] for turn in measured[name] if key in turn] for name in names]
        cells = ''.join(f'{_spread(column) if column else "":>34}' for column in columns)
        if len(names) == 2 and all(columns):
            cells += f'{_spread([second / first for first, second in zip(*columns)]):>28}'
        lines.append(f'{key:30}{cells}')
    return '\n'.join(lines) + '\n'


def show(figure: float) -> str:
    """Four digits, or a whole number where it has more."""
    return f'{figure:,.0f}' if figure >= 1000 else f'{figure:.4g}'


def _spread(figures: Sequence[float]) -> str:
    low, middle, high = map(show, (min(figures), statistics.median(figures), max(figures)))
    return middle if low == high else f'{middle} ({low} to {high})'


class LapClock:
    """Gives the time since it was last looked at to a part of the step."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, part: str):
        runtime.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def time_batches(self, batches):
        for batch in batches:
            self.lap('data')
            yield batch
            self.lap('backward')  # what passed until the loop comes back, but for the forward pass
        self.lap('data')  # of the batch that is prepared ahead


class TimedModel:
    """A model that notes how long its forward pass takes."""

    def __init__(self, model, clock):
        self.model, self.clock, self.parameters = model, clock, model.parameters

    def __call__(self, x, y):
        self.clock.lap('data')  # dropout's seed
        loss = self.model(x, y)
        self.clock.lap('forward')
        return loss


class TimedBadSteps:
    """A guard.BadSteps that notes how long it takes."""

    def __init__(self, bad_steps, clock):
        self.bad_steps, self.clock = bad_steps, clock

    def usable(self, loss, grad_norm):
        self.clock.lap('optimizer')
        usable = self.bad_steps.usable(loss, grad_norm)
        self.clock.lap('checks')
        return usable


class NanoGPT:
    """nanoGPT's model.py in a process of its own, which measures when it is told to.

    script: Python that runs in the clone with the job as JSON in sys.argv[1]. It prints {} when it is ready, then for each
    line of standard input a JSON object of figures.
    """

    def __init__(self, flag: str, clone: str, script: str, job: Mapping):
        if not clone or not (Path(clone) / 'model.py').exists():
            raise UserError(f'--{flag}={clone}: it is the path of a clone of karpathy/nanoGPT')
        self._process = subprocess.Popen([sys.executable, '-c', script, json.dumps(job)], cwd=clone, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer()

    def round(self, what: str = 'go') -> dict[str, float]:
        """The figures of one round of what was asked for."""
        self._process.stdin.write(what + '\n')
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        for line in self._process.stdout:
            if line.startswith('{'):  # its code prints other lines too
                return json.loads(line)
        raise UserError(f'nanoGPT ended with exit code {self._process.wait()}; what it said stands above')


NANOGPT_LOOP = '''
import contextlib, json, os, sys, time
import numpy as np, torch
from model import GPT, GPTConfig
job = json.loads(sys.argv[1])
device, kind = job['device'], job['device'].split(':')[0]
B, T, micro_steps = job['batch_size'], job['block_size'], job['gradient_accumulation_steps']
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
context = contextlib.nullcontext() if kind == 'cpu' else torch.amp.autocast(
    device_type=kind, dtype=getattr(torch, job['dtype']))
raw_model = GPT(GPTConfig(**{k: job[k] for k in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')}))
raw_model.to(device)
scaler = torch.amp.GradScaler(kind, enabled=job['dtype'] == 'float16')
optimizer = raw_model.configure_optimizers(job['weight_decay'], job['learning_rate'], (job['beta1'], job['beta2']), kind)
model = torch.compile(raw_model) if job['compile'] else raw_model

def batch():
    data = np.memmap(job['train_bin'], dtype=np.uint16, mode='r')
    starts = torch.randint(len(data) - T, (B,))
    x, y = (torch.stack([torch.from_numpy(data[i + shift:i + shift + T].astype(np.int64)) for i in starts]) for shift in (0, 1))
    if kind == 'cuda':
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)

def train(steps):
    x, y = batch()
    for _ in range(steps):
        for _ in range(micro_steps):
            with context:
                loss = model(x, y)[1] / micro_steps
            x, y = batch()
            scaler.scale(loss).backward()
        if job['grad_clip']:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), job['grad_clip'])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

def seconds(work):
    wait = torch.cuda.synchronize if kind == 'cuda' else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started

def generate():
    raw_model.eval()
    with torch.no_grad(), context:
        raw_model.generate(torch.tensor([job['prompt']], device=device), job['new_tokens'], temperature=0.8, top_k=200)
    raw_model.train()

def memory():
    if kind == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e6
    if os.path.exists('/proc/self/status'):
        return next(int(line.split()[1]) / 1e3 * 1.024 for line in open('/proc/self/status') if line.startswith('VmHWM'))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e6

train(3)
used = memory()
print('{}', flush=True)
for line in sys.stdin:
    spent = seconds(lambda: train(job['steps'])) / job['steps']
    figures = {'tokens/s': micro_steps * B * T / spent, 'ms/step': 1000 * spent, 'peak memory, MB': used}
    if job['new_tokens']:
        figures['generated tokens/s'] = job['new_tokens'] / seconds(generate)
    print(json.dumps(figures), flush=True)
'''
