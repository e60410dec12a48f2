"""The stages of benchmarks/gpu.py, each in a process of its own.

A stage takes a Setting, its Figures, to which it adds what it measures, and the time at which it
should have ended.
"""

import hashlib
import importlib.util
import json
import math
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import threading
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
from nib.machine.device import measure_flops, peak_flops, synchronize
from nib.report.history import read_run
from nib.tokens import shakespeare

ROOT = measure.ROOT
TARGET = 1.4697  # validation loss that nanoGPT publishes for config/train_shakespeare_char.py
TOY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)
TOY_FLAGS = (
    '--device=cpu --n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --max_iters=30 '
    '--eval_interval=15 --eval_iters=2 --log_interval=5 --compile=False'
).split()
OUR_LOOP = """
import json, sys
from benchmarks.gpu_kernels import serve
for figures in serve(json.loads(sys.argv[1]), sys.stdin):
    print(json.dumps(figures), flush=True)
"""
PYTHON = [sys.executable, '-u']
IN_PROCESS = """
import json, sys
from benchmarks import gpu_kernels
print(json.dumps(getattr(gpu_kernels, sys.argv[1])(json.loads(sys.argv[2]))))
"""


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


def find_text(s: Setting) -> Path:
    """Returns the path of --text, or of a file made from Python's library."""
    path = Path(s.text or s.out / 'text.txt')
    if not path.exists():
        sources = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
        whole = ''.join(source.read_text(encoding='ascii', errors='ignore') for source in sources)
        path.write_text(whole[: 100_000 if s.rehearse else 5_000_000])
    return path


def write_characters(path: Path, folder: Path):
    """Writes the bins of a text's characters as nanoGPT does. Both projects read them."""
    whole = path.read_text(encoding='utf-8', errors='ignore')
    characters = sorted(set(whole))
    numbers = {character: number for number, character in enumerate(characters)}
    ids = np.array([numbers[character] for character in whole], dtype=np.uint16)
    n_train = int(0.9 * len(ids))
    folder.mkdir(parents=True, exist_ok=True)
    ids[:n_train].tofile(folder / 'train.bin')
    ids[n_train:].tofile(folder / 'val.bin')
    meta = {'vocab_size': len(characters), 'stoi': numbers, 'itos': dict(enumerate(characters))}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


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
    """Training of GPT-2 124M at context 1024, in turns with nanoGPT."""
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


def measure_char(s, figures, end):
    """The character model to nanoGPT's published loss; with another text, the time of its steps."""
    path, data = find_text(s), s.out / 'data' / 'shakespeare_char'
    is_shakespeare = (
        hashlib.sha256(path.read_bytes()).hexdigest() == shakespeare.SHA256 and not s.rehearse
    )
    write_characters(path, data)
    toy = TOY_FLAGS if s.rehearse else []
    ours = [f'--data_dir={data.parent}', '--fallback_dataset=', '--overwrite', '--no-report', *toy]
    fast = ['--max_iters=1000', '--eval_interval=100']
    train_py = [*PYTHON, 'train.py']
    char, fast_char = 'config/train_shakespeare_char.py', 'config/fast_shakespeare_char.py'
    runs = {
        'nibGPT': ([*train_py, char, f'--out_dir={s.out}/char', *ours], ROOT),
        'fast': ([*train_py, fast_char, f'--out_dir={s.out}/char-fast', *fast, *ours], ROOT),
    }
    if s.nanogpt:  # which prints only every log_interval-th step's time
        theirs = [*toy, f'--log_interval={1 if s.rehearse else 10}']
        command = [*train_py, char, f'--out_dir={s.out}/char-nanogpt', *theirs]
        runs['nanoGPT'] = command, copy_nanogpt(s, data)
    for i, (name, (command, folder)) in enumerate(runs.items()):
        left = (end - 5 - time.perf_counter()) / (len(runs) - i)
        if i < len(runs) - 1:
            left *= 1.2
        target = TARGET if is_shakespeare else math.inf
        evaluations, lines, reached = watch_run(command, folder, left, target)
        if is_shakespeare:
            seconds = evaluations[-1][0] if reached else 'not reached in its time'
            losses = ', '.join(f'{step}: {loss}' for _, step, loss in evaluations)
            figures.note(f'{name}: seconds to {TARGET}', seconds)
            figures.note(f'{name}: step, loss of each evaluation', losses)
        times = re.findall(r'^iter \d+: .*time ([\d.]+)ms', ''.join(lines), re.MULTILINE)
        if times:
            figures.note(f'{name}: ms per step', statistics.median(map(float, times)))
        elif name != 'nanoGPT' and len(evaluations) > 1:
            speeds = read_run(f'{s.out}/char{"-fast" * (name == "fast")}').values(
                'tokens_per_second'
            )
            tokens = 4 * 32 if s.rehearse else 64 * 256
            figures.note(f'{name}: ms per step', 1000 * tokens / statistics.median(speeds))
        else:
            said = lines[-1].strip() if lines else 'nothing'
            figures.note(name, f'no steps; it ended with: {said}')


def copy_nanogpt(s: Setting, data: Path) -> Path:
    """Copies the clone, with the dataset's tokens as its data."""
    folder = s.out / 'nanogpt'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(s.nanogpt) / 'config', folder / 'config')
    for path in Path(s.nanogpt).glob('*.py'):
        shutil.copy(path, folder)
    shutil.copytree(data, folder / 'data' / 'shakespeare_char')
    return folder


def watch_run(command, folder, limit: float, target: float):
    """Runs a training until an evaluation after step 0 is at most `target`, or for `limit` seconds.

    Returns its evaluations (seconds since the start, step, validation loss), its lines, and whether
    the target was reached.
    """
    started, evaluations, lines, reached = time.perf_counter(), [], [], False
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(max(1.0, limit), process.kill)
    timer.start()
    for line in process.stdout:
        print(line, end='')
        lines.append(line)
        if found := re.match(r'step (\d+): train loss [\d.]+, val loss ([\d.]+)', line):
            evaluations.append((time.perf_counter() - started, int(found[1]), float(found[2])))
            reached = int(found[1]) > 0 and float(found[2]) <= target
            if reached:
                break
    process.kill()
    process.wait()
    timer.cancel()
    return evaluations, lines, reached


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


def compare_recipes(s, figures, end):
    """fast_gpt2's recipe against train_gpt2's: the loss after the same training time."""
    path, data = find_text(s), s.out / 'data' / 'recipes'
    prepare = [*PYTHON, ROOT / 'data/text/prepare.py', f'--input={path}', f'--out_dir={data}']
    # GPT-2's tokenizer needs tiktoken, and files that it may have to download.
    if s.rehearse or subprocess.run([*prepare, '--tokenizer=gpt2']).returncode:
        shutil.rmtree(data, ignore_errors=True)
        write_characters(path, data)
    figures.note('tokens', 'characters' if (data / 'meta.pkl').exists() else 'gpt2')
    micro_steps = 2 if s.rehearse else 4
    size = TOY_FLAGS if s.rehearse else ['--batch_size=16']
    size = [*size, f'--gradient_accumulation_steps={micro_steps}']
    tokens_per_step = micro_steps * (4 * 32 if s.rehearse else 16 * 1024)

    def run(name, steps):
        folder = s.out / name
        where = ['--dataset=recipes', f'--data_dir={data.parent}', f'--out_dir={folder}']
        schedule = [f'--max_iters={steps}', f'--warmup_iters={max(1, steps // 20)}']
        watching = [f'--eval_interval={steps}', '--eval_iters=5', '--log_interval=5', '--no-report']
        flags = [*where, '--overwrite', *size, *schedule, *watching]
        subprocess.run([*PYTHON, 'train.py', f'config/{name}.py', *flags], cwd=ROOT, check=True)
        return read_run(folder)

    for name in ('train_gpt2', 'fast_gpt2'):
        speed = max(run(name, 30 if s.rehearse else 20).values('tokens_per_second'))
        steps = 30 if s.rehearse else max(20, int(s.recipe_seconds * speed / tokens_per_step))
        done = run(name, steps)
        figures.note(f'{name}: tokens/s', speed)
        figures.note(f'{name}: steps', steps)
        figures.note(f'{name}: validation loss', done.values('loss/val_whole')[-1])


STAGES = {
    'tests': run_tests,
    'gpt2': measure_gpt2,
    'char': measure_char,
    'sampling': measure_sampling,
    'determinism': check_determinism,
    'profile': profile,
    'recipes': compare_recipes,
}
