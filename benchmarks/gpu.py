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
import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
import train
from benchmarks import gpu_kernels, measure, sampling
from benchmarks.contestant import time_steps
from benchmarks.nanogpt import NANOGPT_LOOP, NanoGPT
from model import GPT, GPTConfig
from nib.errors import UserError, run_script
from nib.files import atomic_write
from nib.machine.device import measure_flops, peak_flops, synchronize
from nib.report.history import read_run
from nib.tokens import shakespeare

nanogpt: str = ''  # path of a clone of karpathy/nanoGPT; empty: nibGPT alone
out: str = 'gpu-figures'  # folder of the results
text: str = ''  # file to train on; empty: the source of Python's library
stages: str = 'tests,gpt2,char,sampling,determinism,profile,recipes'  # the stages to run, in order
again: bool = False  # also run stages that are finished
rehearse: bool = False  # on the CPU, at toy sizes
seconds: int = 0  # time limit of all stages together; 0: only the limits of each stage
batches: str = '16,32'  # sequences per micro step in the gpt2 stage
recipe_seconds: int = 60  # training time of each recipe

LIMITS = dict(  # seconds
    tests=240, gpt2=240, char=150, sampling=150, determinism=180, profile=100, recipes=470
)
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


def main(argv):
    configure(argv)
    names = stages.split(',')
    for name in names:
        if name not in STAGES:
            raise UserError(
                f'--stages={stages}: there is no stage {name!r}; there are {", ".join(STAGES)}'
            )
    if not rehearse and not torch.cuda.is_available():
        raise UserError(
            'torch finds no CUDA GPU here; --rehearse runs the stages on the CPU, at toy sizes'
        )
    if nanogpt and not (Path(nanogpt) / 'train.py').exists():
        raise UserError(f'--nanogpt={nanogpt}: it is the path of a clone of karpathy/nanoGPT')
    if text and not Path(text).is_file():
        raise UserError(f'--text={text}: there is no such file')
    Path(out).mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (seconds or 1e9)
    for name in names:
        if read_results().get(name, {}).get('outcome') == 'done' and not again:
            print(f'{name}: done before', flush=True)
            continue
        limit = min(600 if rehearse else LIMITS[name], end - time.monotonic())
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
    figures.note('measured on', measure.describe_machine(device()))
    STAGES[name](figures, time.perf_counter() + limit)


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
        save(self.stage, self.values)

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


# -- what the stages share -------------------------------------------------------------------------


def device() -> str:
    return 'cpu' if rehearse else 'cuda'


def gpt2_config(**changes) -> dict:
    """train.py's defaults, which are GPT-2 124M, on this device."""
    own = {
        'device': device(),
        'dtype': 'float32' if rehearse else 'bfloat16',
        'compile': not rehearse,
        'gradient_accumulation_steps': 2 if rehearse else 4,
        'learning_rate': 1e-4,
        'vocab_size': 50257,
        'folder': str(random_tokens()),
    }
    toy = TOY | {'batch_size': 2} if rehearse else {}
    return configurator.read_block(train.__file__).defaults | own | changes | toy


def random_tokens() -> Path:
    """A random dataset of GPT-2 tokens, some of them frequent, as in a real text."""
    folder = Path(out) / 'data' / 'random'
    if not (folder / 'val.bin').exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ('train.bin', 'val.bin'):
            draws = np.random.default_rng(0).random(2_000_000) ** 4
            (draws * 50257).astype(np.uint16).tofile(folder / name)
    return folder


def find_text() -> Path:
    """Returns the path of --text, or of a file made from Python's library."""
    path = Path(text or Path(out) / 'text.txt')
    if not path.exists():
        sources = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
        whole = ''.join(s.read_text(encoding='ascii', errors='ignore') for s in sources)
        path.write_text(whole[: 100_000 if rehearse else 5_000_000])
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


def run_tests(figures, end):
    """The tests marked gpu, several at a time if pytest-xdist is installed."""
    parallel = ['-n', '8'] if importlib.util.find_spec('xdist') and not rehearse else []
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
        save(figures.stage, figures.values | {'so far': counts})
    for result, count in counts.items():
        figures.note(result.lower(), count)
    figures.note('pytest', last.strip('= '))
    if process.wait() not in (0, 1, 5):
        raise UserError(f'pytest ended with exit code {process.returncode}')


def measure_gpt2(figures, end):
    """Training of GPT-2 124M at context 1024, in turns with nanoGPT."""
    rate = measure_flops(device(), 'float32' if rehearse else 'bfloat16')
    figures.note('rate of a large matrix product, TFLOP/s', rate / 1e12)
    peak = peak_flops(device(), 'bfloat16')
    for batch in batches.split(',')[: 1 if rehearse else None]:
        if time.perf_counter() < end - 15:
            measure_batch(figures, int(batch), rate, peak)


def measure_batch(figures, batch: int, rate: float, peak: float | None):
    job = gpt2_config(batch_size=batch) | {'steps': 1 if rehearse else 10, 'new_tokens': 0}
    # nanoGPT takes 50,304 for speed; both start, and compile, at the same time.
    starting = {'nibGPT': (ROOT, OUR_LOOP, job)}
    if nanogpt:
        starting['nanoGPT'] = (
            nanogpt,
            NANOGPT_LOOP,
            job | {'vocab_size': 50304, 'train_bin': f'{job["folder"]}/train.bin'},
        )

    def start(clone, script, job):
        started = time.perf_counter()
        contestant = NanoGPT('nanogpt', clone, script, job)
        return contestant, time.perf_counter() - started

    contestants, turns = {}, {name: [] for name in starting}
    with ThreadPoolExecutor() as pool:
        for name, future in {
            name: pool.submit(start, *what) for name, what in starting.items()
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


def measure_char(figures, end):
    """The character model to nanoGPT's published loss; with another text, the time of its steps."""
    path, data = find_text(), Path(out) / 'data' / 'shakespeare_char'
    is_shakespeare = (
        hashlib.sha256(path.read_bytes()).hexdigest() == shakespeare.SHA256 and not rehearse
    )
    write_characters(path, data)
    toy = TOY_FLAGS if rehearse else []
    ours = [f'--data_dir={data.parent}', '--fallback_dataset=', '--overwrite', '--no-report', *toy]
    fast = ['--max_iters=1000', '--eval_interval=100']
    train_py = [*PYTHON, 'train.py']
    char, fast_char = 'config/train_shakespeare_char.py', 'config/fast_shakespeare_char.py'
    runs = {
        'nibGPT': ([*train_py, char, f'--out_dir={out}/char', *ours], ROOT),
        'fast': ([*train_py, fast_char, f'--out_dir={out}/char-fast', *fast, *ours], ROOT),
    }
    if nanogpt:  # which prints only every log_interval-th step's time
        theirs = [*toy, f'--log_interval={1 if rehearse else 10}']
        command = [*train_py, char, f'--out_dir={out}/char-nanogpt', *theirs]
        runs['nanoGPT'] = command, copy_nanogpt(data)
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
            speeds = read_run(f'{out}/char{"-fast" * (name == "fast")}').values('tokens_per_second')
            tokens = 4 * 32 if rehearse else 64 * 256
            figures.note(f'{name}: ms per step', 1000 * tokens / statistics.median(speeds))
        else:
            said = lines[-1].strip() if lines else 'nothing'
            figures.note(name, f'no steps; it ended with: {said}')


def copy_nanogpt(data: Path) -> Path:
    """Copies the clone, with the dataset's tokens as its data."""
    folder = Path(out) / 'nanogpt'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(nanogpt) / 'config', folder / 'config')
    for path in Path(nanogpt).glob('*.py'):
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


def measure_sampling(figures, end):
    """GPT-2 124M with random weights writes 100 tokens after 256."""
    sampling.device, new, prompt = device(), (4 if rehearse else 100), (8 if rehearse else 256)
    shape = sampling.GPT2 | (TOY if rehearse else {})
    job = sampling.Job(shape, prompt, new, new)
    model = {
        dtype: GPT(GPTConfig(**shape)).to(device(), getattr(torch, dtype))
        for dtype in sampling.DTYPES
    }
    cases = [(dtype, n) for dtype in ('bfloat16', 'float32') for n in (1, 2 if rehearse else 32)]

    def ours(dtype, n):
        sampling.generate(model[dtype], job, n)
        return n * new / min(sampling.generate(model[dtype], job, n)[-1] for _ in range(3))

    for dtype, n in cases:
        figures.attempt(f'nibGPT, {dtype}, {n} prompts: tokens/s', lambda: ours(dtype, n))
    if nanogpt:
        jobs = {
            f'{dtype}, {n}': vars(sampling.Job(shape, prompt, new, new, n, dtype))
            for dtype, n in cases
        }
        peer = NanoGPT(
            'nanogpt',
            nanogpt,
            sampling.NANOGPT_SCRIPT,
            {'device': device(), 'sampling': sampling.SAMPLING, 'jobs': jobs},
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
            lambda: sample_transformers(job, dtype, n),
        )
    sampling.compile = not rehearse
    for dtype, n in cases:
        figures.attempt(f'nibGPT compiled, {dtype}, {n} prompts: tokens/s', lambda: ours(dtype, n))


def sample_transformers(job, dtype: str, n: int) -> float:
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
    model = transformers.GPT2LMHeadModel(config).to(device(), getattr(torch, dtype)).eval()
    prompts = torch.zeros(n, job.prompt_tokens, dtype=torch.long, device=device())
    times = []
    for _ in range(3):
        synchronize(device())
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
        synchronize(device())
        times.append(time.perf_counter() - started)
    return n * job.new_tokens / min(times)


def check_determinism(figures, end):
    """Whether steps repeat bit for bit, by attention kernel; several processes start at a time."""
    base = gpt2_config(n_layer=2, batch_size=8) | {
        'gradient_accumulation_steps': 1,
        'lock': f'{out}/lock',
    }
    jobs = {'operations': ('repeat_operations', base, {})}
    for compiled in (False,) if rehearse else (True, False):
        for attention in ('default',) if rehearse else ('default', 'flash', 'cuDNN'):
            for deterministic in (False, True)[: 1 + (attention != 'cuDNN')]:
                kernel = f'{attention} attention{", deterministic" * deterministic}'
                job = {'compile': compiled, 'attention': attention, 'deterministic': deterministic}
                extra = {'CUBLAS_WORKSPACE_CONFIG': ':4096:8'} if deterministic else {}
                name = f'{"compiled" if compiled else "eager"}, {kernel}'
                jobs[name] = ('repeat_steps', base | job, extra)

    def run(name):
        function, job, extra = jobs[name]
        cache = Path(out) / 'inductor' / re.sub(r'\W+', '-', name)
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
    with ThreadPoolExecutor(2 if rehearse else 6) as pool:
        futures = {name: pool.submit(run, name) for name in jobs}
        for name, future in futures.items():
            for key, value in future.result().items():
                figures.note(f'{name}: {key}', value)
    shutil.rmtree(Path(out) / 'inductor', ignore_errors=True)


def profile(figures, end):
    """The time of a step by kind of kernel, and lower bounds for it."""
    config = gpt2_config(batch_size=16)
    training = gpu_kernels.make_training(config, config['folder'])
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
    rate = measure_flops(device(), config['dtype'])
    copies = measure.copy_rate(device(), 1 << (20 if rehearse else 30))
    n_params = training.raw_model.num_params()
    figures.note('copy, TB/s', copies / 1e12)
    figures.note('limit of matrix products: ms', 1000 * products / rate)
    figures.note('limit of attention, at the rate of products: ms', 1000 * attention / rate)
    figures.note(
        'limit of the loss, logits read twice and written once: ms',
        1000 * 3 * 2 * tokens * 50304 / copies,
    )
    figures.note('limit of the optimizer with clipping: ms', 1000 * n_params * 4 * (7 + 3) / copies)


def compare_recipes(figures, end):
    """fast_gpt2's recipe against train_gpt2's: the loss after the same training time."""
    path, data = find_text(), Path(out) / 'data' / 'recipes'
    prepare = [*PYTHON, ROOT / 'data/text/prepare.py', f'--input={path}', f'--out_dir={data}']
    # GPT-2's tokenizer needs tiktoken, and files that it may have to download.
    if rehearse or subprocess.run([*prepare, '--tokenizer=gpt2']).returncode:
        shutil.rmtree(data, ignore_errors=True)
        write_characters(path, data)
    figures.note('tokens', 'characters' if (data / 'meta.pkl').exists() else 'gpt2')
    micro_steps = 2 if rehearse else 4
    size = TOY_FLAGS if rehearse else ['--batch_size=16']
    size = [*size, f'--gradient_accumulation_steps={micro_steps}']
    tokens_per_step = micro_steps * (4 * 32 if rehearse else 16 * 1024)

    def run(name, steps):
        folder = Path(out) / name
        where = ['--dataset=recipes', f'--data_dir={data.parent}', f'--out_dir={folder}']
        schedule = [f'--max_iters={steps}', f'--warmup_iters={max(1, steps // 20)}']
        watching = [f'--eval_interval={steps}', '--eval_iters=5', '--log_interval=5', '--no-report']
        flags = [*where, '--overwrite', *size, *schedule, *watching]
        subprocess.run([*PYTHON, 'train.py', f'config/{name}.py', *flags], cwd=ROOT, check=True)
        return read_run(folder)

    for name in ('train_gpt2', 'fast_gpt2'):
        speed = max(run(name, 30 if rehearse else 20).values('tokens_per_second'))
        steps = 30 if rehearse else max(20, int(recipe_seconds * speed / tokens_per_step))
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


if __name__ == '__main__':
    run_script(main)
