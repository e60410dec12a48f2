"""The stages of benchmarks/gpu.py, each in a process of its own.

A stage takes a Setting, its Figures, to which it adds what it measures, and the time at which it
should have ended.
"""

import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import configurator
import train
from benchmarks import gpu_kernels, measure, nanogpt, sampling
from benchmarks.contestant import time_steps
from model import GPT, GPTConfig
from nib.errors import UserError
from nib.machine.device import synchronize
from nib.machine.rates import measure_flops, peak_flops

ROOT = measure.ROOT
TOY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)
OUR_LOOP = """
import json, sys
from benchmarks.gpu_kernels import serve
for figures in serve(json.loads(sys.argv[1]), sys.stdin):
    print(json.dumps(figures), flush=True)
"""
IN_PROCESS = """
import json, sys
from benchmarks import gpu_kernels
print(json.dumps(getattr(gpu_kernels, sys.argv[1])(json.loads(sys.argv[2]))))
"""


# Variables of torch's compiler that make it look for faster kernels, for longer.
DESCENT = {'TORCHINDUCTOR_COORDINATE_DESCENT_TUNING': '1'}
TUNED = {'TORCHINDUCTOR_MAX_AUTOTUNE_GEMM': '1'}
COMPILER_SETTINGS = {
    'as it is': {},
    'coordinate descent': DESCENT,
    'tuned products': TUNED,
    'both': DESCENT | TUNED,
}


@dataclass(frozen=True)
class Setting:
    """What the stages measure, and where: keys of benchmarks/gpu.py."""

    nanogpt: str
    out: Path
    text: str
    batches: str
    recipe_seconds: int
    rehearse: bool

    @property
    def device(self) -> str:
        return 'cpu' if self.rehearse else 'cuda'


# -- what the stages share -------------------------------------------------------------------------


def gpt2_config(s: Setting, **changes) -> dict:
    """train.py's defaults, which are GPT-2 124M, on this device."""
    own = {
        'device': s.device,
        'dtype': 'float32' if s.rehearse else 'bfloat16',
        'compile': not s.rehearse,
        'gradient_accumulation_steps': 2 if s.rehearse else 4,
        'learning_rate': 1e-4,
        'vocab_size': 50257,
        'folder': str(random_tokens(s)),
    }
    toy = TOY | {'batch_size': 2} if s.rehearse else {}
    return configurator.read_block(train.__file__).defaults | own | changes | toy


def random_tokens(s: Setting) -> Path:
    """A random dataset of GPT-2 tokens, some of them frequent, as in a real text."""
    folder = s.out / 'data' / 'random'
    if not (folder / 'val.bin').exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ('train.bin', 'val.bin'):
            draws = np.random.default_rng(0).random(2_000_000) ** 4
            (draws * 50257).astype(np.uint16).tofile(folder / name)
    return folder


# -- stages ----------------------------------------------------------------------------------------


def run_tests(s, figures, end):
    """The tests marked gpu, several at a time if pytest-xdist is installed."""
    parallel = ['-n', '8'] if importlib.util.find_spec('xdist') and not s.rehearse else []
    command = 'pytest tests/test_gpu.py -m gpu -vv --tb=short -p no:cacheprovider'.split()
    process = subprocess.Popen(
        [sys.executable, '-u', '-m', *command, *parallel],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    counts, last = {}, ''
    for line in process.stdout:
        print(line, end='')
        last = line.strip() or last
        names = re.search(r'test_gpu\.py::(\S+)', line)
        result = re.search(r'\b(PASSED|FAILED|ERROR|SKIPPED)\b', line)
        if names and result and ' - ' not in line:
            counts[result[1]] = counts.get(result[1], 0) + 1
            if result[1] in ('FAILED', 'ERROR'):
                figures.note(f'{result[1].lower()} {names[1]}', 'see tests.log')
        figures.save({'so far': counts})
    for result, count in counts.items():
        figures.note(result.lower(), count)
    figures.note('pytest', last.strip('= '))
    if process.wait() not in (0, 1, 5):
        raise UserError(f'pytest ended with exit code {process.returncode}')


def measure_gpt2(s, figures, end):
    """Training of GPT-2 124M at context 1024, alternating with nanoGPT."""
    rate = measure_flops(s.device, 'float32' if s.rehearse else 'bfloat16')
    figures.note('rate of a large matrix product, TFLOP/s', rate / 1e12)
    peak = peak_flops(s.device, 'bfloat16')
    for batch in s.batches.split(',')[: 1 if s.rehearse else None]:
        if time.perf_counter() < end - 15:
            measure_batch(s, figures, int(batch), rate, peak)


def measure_batch(s, figures, batch: int, rate: float, peak: float | None):
    job = gpt2_config(s, batch_size=batch) | {'steps': 1 if s.rehearse else 10, 'new_tokens': 0}
    # nanoGPT takes 50,304 for speed; both start, and compile, at the same time.
    starting = {'nibGPT': (ROOT, OUR_LOOP, job)}
    if s.nanogpt:
        starting['nanoGPT'] = (
            s.nanogpt,
            nanogpt.NANOGPT_LOOP,
            job | {'vocab_size': 50304, 'train_bin': f'{job["folder"]}/train.bin'},
        )

    def start(name, folder, script, job):
        started = time.perf_counter()
        contestant = measure.Worker(name, script, json.dumps(job), folder=folder)
        return contestant, time.perf_counter() - started

    contestants, turns = {}, {name: [] for name in starting}
    with ThreadPoolExecutor() as pool:
        for name, future in {
            name: pool.submit(start, name, *what) for name, what in starting.items()
        }.items():
            try:
                contestants[name], ready = future.result()
                figures.note(f'batch {batch}, {name}: seconds until 3 steps are done', ready)
            except UserError as error:
                figures.note(f'batch {batch}, {name}', f'failed: {error}')
    for _ in range(2):
        for name, contestant in contestants.items():
            turns[name].append(contestant.round())
    for name, contestant in contestants.items():
        contestant.close()
        speed = statistics.median(turn['tokens/s'] for turn in turns[name])
        figures.note(f'batch {batch}, {name}: tokens/s', speed)
        figures.note(
            f'batch {batch}, {name}: each turn',
            ', '.join(measure.show(turn['tokens/s']) for turn in turns[name]),
        )
        figures.note(
            f'batch {batch}, {name}: peak memory, GB', turns[name][0]['peak memory, MB'] / 1e3
        )
    if 'nibGPT' in contestants:
        flops = statistics.median(turn['TFLOP/s'] for turn in turns['nibGPT']) * 1e12
        if peak:
            figures.note(f'batch {batch}, nibGPT: MFU, %', 100 * flops / peak)
        figures.note(f'batch {batch}, nibGPT: % of the rate of a large product', 100 * flops / rate)
    if len(contestants) == 2:
        ratios = [
            ours['tokens/s'] / theirs['tokens/s']
            for ours, theirs in zip(turns['nibGPT'], turns['nanoGPT'])
        ]
        figures.note(f'batch {batch}: nibGPT / nanoGPT, tokens/s', statistics.median(ratios))


def compare_compilers(s, figures, end):
    """The same training, alternating settings of torch's compiler, as far as the time allows."""
    batch = int(s.batches.split(',')[0])
    job = gpt2_config(s, batch_size=batch) | {'steps': 1 if s.rehearse else 10}
    workers: dict[str, measure.Worker] = {}
    longest = 0.0
    for name, variables in list(COMPILER_SETTINGS.items())[:: 3 if s.rehearse else 1]:
        started = time.perf_counter()
        if started + longest > end - 30:
            figures.note(name, 'no time left')
            continue
        try:  # one at a time, because the compiler times its kernels
            workers[name] = measure.Worker(
                name, OUR_LOOP, json.dumps(job), variables=measure.environment(**variables)
            )
        except UserError as error:
            figures.note(name, f'failed: {error}')
            continue
        longest = max(longest, time.perf_counter() - started)
        figures.note(f'{name}: seconds until 3 steps are done', time.perf_counter() - started)
    turns = [{name: worker.round() for name, worker in workers.items()} for _ in range(3)]
    for name, worker in workers.items():
        worker.close()
        speeds = [turn[name]['tokens/s'] for turn in turns]
        figures.note(f'{name}: tokens/s, batch {batch}', measure.spread(speeds))


def measure_sampling(s, figures, end):
    """GPT-2 124M with random weights writes 100 tokens after 256."""
    sampling.device, new, prompt = s.device, (4 if s.rehearse else 100), (8 if s.rehearse else 256)
    shape = sampling.GPT2 | (TOY if s.rehearse else {})
    job = sampling.Job(shape, prompt, new, new)
    model = {
        dtype: GPT(GPTConfig(**shape)).to(s.device, getattr(torch, dtype))
        for dtype in sampling.DTYPES
    }
    cases = [(dtype, n) for dtype in ('bfloat16', 'float32') for n in (1, 2 if s.rehearse else 32)]

    def ours(dtype, n):
        sampling.generate(model[dtype], job, n)
        return n * new / min(sampling.generate(model[dtype], job, n)[-1] for _ in range(3))

    for dtype, n in cases:
        figures.attempt(f'nibGPT, {dtype}, {n} prompts: tokens/s', lambda: ours(dtype, n))
    if s.nanogpt:
        jobs = {
            f'{dtype}, {n}': vars(sampling.Job(shape, prompt, new, new, n, dtype))
            for dtype, n in cases
        }
        peer = nanogpt.start(
            'nanogpt',
            s.nanogpt,
            sampling.NANOGPT_SCRIPT,
            {'device': s.device, 'sampling': sampling.SAMPLING, 'jobs': jobs},
        )
        for dtype, n in cases:
            figures.attempt(
                f'nanoGPT, {dtype}, {n} prompts: tokens/s',
                lambda: n * peer.round(f'{dtype}, {n}')['tokens/s'],
            )
        peer.close()
    for dtype, n in cases if importlib.util.find_spec('transformers') else ():
        figures.attempt(
            f'transformers, {dtype}, {n} prompts: tokens/s',
            lambda: sample_transformers(s.device, job, dtype, n),
        )
    sampling.compile = not s.rehearse
    for dtype, n in cases:
        figures.attempt(f'nibGPT compiled, {dtype}, {n} prompts: tokens/s', lambda: ours(dtype, n))


def sample_transformers(device: str, job, dtype: str, n: int) -> float:
    """Tokens/s of transformers' GPT-2 with its cache."""
    import transformers

    shape = job.shape
    config = transformers.GPT2Config(
        vocab_size=shape['vocab_size'],
        n_positions=shape['block_size'],
        n_layer=shape['n_layer'],
        n_head=shape['n_head'],
        n_embd=shape['n_embd'],
    )
    model = transformers.GPT2LMHeadModel(config).to(device, getattr(torch, dtype)).eval()
    prompts = torch.zeros(n, job.prompt_tokens, dtype=torch.long, device=device)
    times = []
    for _ in range(3):
        synchronize(device)
        started = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=job.new_tokens,
            do_sample=True,
            min_new_tokens=job.new_tokens,
            pad_token_id=0,
            **sampling.SAMPLING,
        )
        synchronize(device)
        times.append(time.perf_counter() - started)
    return n * job.new_tokens / min(times)


def check_determinism(s, figures, end):
    """Whether steps repeat bit for bit, by attention kernel; several processes start at a time."""
    base = gpt2_config(s, n_layer=2, batch_size=8) | {
        'gradient_accumulation_steps': 1,
        'lock': f'{s.out}/lock',
    }
    jobs = {'operations': ('repeat_operations', base, {})}
    for compiled in (False,) if s.rehearse else (True, False):
        for attention in ('default',) if s.rehearse else ('default', 'flash', 'cuDNN'):
            for deterministic in (False, True)[: 1 + (attention != 'cuDNN')]:
                kernel = f'{attention} attention{", deterministic" * deterministic}'
                job = {'compile': compiled, 'attention': attention, 'deterministic': deterministic}
                extra = {'CUBLAS_WORKSPACE_CONFIG': ':4096:8'} if deterministic else {}
                name = f'{"compiled" if compiled else "eager"}, {kernel}'
                jobs[name] = ('repeat_steps', base | job, extra)

    def run(name):
        function, job, extra = jobs[name]
        cache = s.out / 'inductor' / re.sub(r'\W+', '-', name)
        command = [sys.executable, '-c', IN_PROCESS, function, json.dumps(job)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=measure.environment(TORCHINDUCTOR_CACHE_DIR=str(cache), **extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = done.stdout.strip().splitlines() or ['it said nothing']
        print(f'--- {name}\n{done.stdout}')
        return json.loads(said[-1]) if done.returncode == 0 else {'failed': said[-1][:300]}

    figures.note(
        'note',
        f'4 steps twice from one state; then the first gradients {gpu_kernels.REPEATS} times',
    )
    with ThreadPoolExecutor(2 if s.rehearse else 6) as pool:
        futures = {name: pool.submit(run, name) for name in jobs}
        for name, future in futures.items():
            for key, value in future.result().items():
                figures.note(f'{name}: {key}', value)
    shutil.rmtree(s.out / 'inductor', ignore_errors=True)


def profile(s, figures, end):
    """The time of a step by kind of kernel, and lower bounds for it."""
    config = gpt2_config(s, batch_size=16)
    training = gpu_kernels.start(config)
    time_steps(training, 0, 3)
    step = 1000 * time_steps(training, 3, 5) / 5
    groups, longest = gpu_kernels.profile_steps(training, 8, 2)
    figures.note('ms per step', step)
    for kind, milliseconds in sorted(groups.items(), key=lambda item: -item[1]):
        figures.note(f'{kind}: ms', milliseconds)
        figures.note(f'{kind}: % of the kernels', 100 * milliseconds / sum(groups.values()))
    figures.note('the longest kernels', '\n' + '\n'.join(longest))
    tokens = config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps']
    attention = (
        3 * 4 * config['block_size'] * config['n_embd'] * config['n_layer'] * tokens / 2
    )  # causal
    products = (training.flops_per_token * tokens) - 2 * attention
    rate = measure_flops(s.device, config['dtype'])
    copies = measure.copy_rate(s.device, 1 << (20 if s.rehearse else 30))
    n_params = training.raw_model.num_params()
    figures.note('copy, TB/s', copies / 1e12)
    figures.note('limit of matrix products: ms', 1000 * products / rate)
    figures.note('limit of attention, at the rate of products: ms', 1000 * attention / rate)
    figures.note(
        'limit of the loss, logits read twice and written once: ms',
        1000 * 3 * 2 * tokens * 50304 / copies,
    )
    figures.note('limit of the optimizer with clipping: ms', 1000 * n_params * 4 * (7 + 3) / copies)
