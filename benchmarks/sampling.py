"""Measures generation against nanoGPT's, alternating, and against the memory bandwidth.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/sampling.py --nanogpt=nanoGPT

Both use random weights of the same shapes, temperature 0.8 and top_k 200. nanoGPT's weights are
float32. The time of nibGPT includes what it does only once: reading the prompt and packing the
weights. nanoGPT processes the whole text again for each token, so a few tokens show its speed.

Every token needs all weights from memory, which limits the speed.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from benchmarks.nanogpt import start
from model import GPT, GPTConfig
from nib.errors import run_script, warn
from nib.machine.device import pick_device, synchronize
from nib.schema import check_range

nanogpt: str = ''  # path of a clone of karpathy/nanoGPT
rounds: int = 4  # rounds of measurements
device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
compile: bool = False  # compile nibGPT's decoding step
result: str = ''  # also write the table to this file


@dataclass(frozen=True)
class Job:
    """A prompt length and the number of tokens to generate."""

    shape: dict  # fields of GPTConfig, which nanoGPT's has too
    prompt_tokens: int
    new_tokens: int
    nanogpt_tokens: int  # number of tokens for nanoGPT
    n_prompts: int = 1  # prompts that nanoGPT continues together
    dtype: str = 'float32'  # of nanoGPT's matrix products; its weights stay float32


GPT2 = dict(
    vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True, dropout=0.0
)
BABY = dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False, dropout=0.0)
JOBS = {
    'GPT-2 after 256': Job(GPT2, 256, 100, 6),
    'GPT-2 after 900': Job(GPT2, 900, 100, 4),
    '10.65M': Job(BABY, 1, 500, 500),
}
DTYPES = ('float32', 'bfloat16')
N_PROMPTS = 32
SAMPLING = dict(temperature=0.8, top_k=200)


def main(argv):
    values, _ = configurator.configure(__file__, argv, settle={'device': pick_device})
    globals().update(values)
    check_range(values, 'rounds', least=1)
    jobs = {name: asdict(job) for name, job in JOBS.items()}
    peer_job = {'device': device, 'sampling': SAMPLING, 'jobs': jobs}
    peer = start('nanogpt', nanogpt, NANOGPT_SCRIPT, peer_job)
    models = {
        (name, dtype): GPT(GPTConfig(**job.shape)).to(device, getattr(torch, dtype))
        for name, job in JOBS.items()
        for dtype in DTYPES
    }
    for (name, _), model in models.items():
        generate(model, JOBS[name])  # warms up, and compiles
    turns = {'nanoGPT': [], 'nibGPT': []}
    for turn in range(rounds):
        theirs, ours, shares = {}, {}, {}
        for name, job in JOBS.items():
            rate = peer.round(name)['tokens/s']
            memory_rate = read_rate(models[next(iter(models))])
            for dtype in DTYPES:
                seconds = generate(models[name, dtype], job)
                theirs[f'{name}, {dtype}'] = rate
                ours[f'{name}, {dtype}'] = job.new_tokens / seconds[-1]
                step = (seconds[-1] - seconds[0]) / (job.new_tokens - 1)
                read = sum(map(n_bytes, matrices(models[name, dtype])))
                shares[f'{name}, {dtype}: %'] = 100 * read / step / memory_rate
        batches = {}
        for dtype in DTYPES:
            alone, together = (generate(models[name, dtype], job, n) for n in (1, N_PROMPTS))
            for n in (job.new_tokens // 5, job.new_tokens):
                batches[f'{n} tokens, {dtype}: {N_PROMPTS} / 1'] = together[n - 1] / alone[n - 1]
        turns['nanoGPT'].append(theirs)
        turns['nibGPT'].append(ours | batches | {'plain read, GB/s': memory_rate / 1e9} | shares)
        warn(
            f'round {turn + 1}: '
            + '; '.join(f'{key} {ours[key] / rate:.1f} x' for key, rate in theirs.items())
        )
    compiled = ', compiled' if compile else ''
    table = (
        f'{rounds} alternating rounds; {measure.describe_machine(device)}{compiled}\n'
        f'tokens/s of one prompt; time of {N_PROMPTS} prompts / time of 1, {name}; rate at which a '
        f'step reads the weights, in % of a plain read\n\n'
        f'{measure.make_table(turns)}'
    )
    measure.publish(table, result)


def generate(model: GPT, job: Job, n_prompts: int = 1) -> list[float]:
    """Returns the seconds from the start to each new token."""
    prompts = [[0] * job.prompt_tokens] * n_prompts
    synchronize(device)
    started, seconds = time.perf_counter(), []
    for tokens in model.generate(prompts, job.new_tokens, seed=1, compile=compile, **SAMPLING):
        tokens.tolist()  # waits for the device, like a program that prints them
        seconds.append(time.perf_counter() - started)
    return seconds


def matrices(model: GPT) -> list[torch.Tensor]:
    """Returns the weights that every token needs."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and 'wpe' not in name]


def n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def read_rate(model: GPT) -> float:
    """Returns the rate in bytes/s at which the weights can be summed, the best of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for matrix in matrices(model):
            matrix.detach().sum()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return sum(map(n_bytes, matrices(model))) / min(times)


NANOGPT_SCRIPT = """
import contextlib, json, sys, time, torch
from model import GPT, GPTConfig
job = json.loads(sys.argv[1])
torch.backends.cuda.matmul.allow_tf32 = True
device, jobs, models = job['device'], job['jobs'], {}
for wanted in jobs.values():
    shape = str(wanted['shape'])
    if shape not in models:
        models[shape] = GPT(GPTConfig(**wanted['shape'])).to(device).eval()

def seconds(wanted, new_tokens):
    shape = wanted['n_prompts'], wanted['prompt_tokens']
    prompt = torch.zeros(shape, dtype=torch.long, device=device)
    wait = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    context = contextlib.nullcontext()
    if wanted['dtype'] != 'float32':
        context = torch.autocast(device.split(':')[0], getattr(torch, wanted['dtype']))
    wait()
    started = time.perf_counter()
    with torch.no_grad(), context:
        models[str(wanted['shape'])].generate(prompt, new_tokens, **job['sampling'])
    wait()
    return time.perf_counter() - started

for wanted in jobs.values():
    seconds(wanted, 2)
print('{}', flush=True)
for line in sys.stdin:
    wanted = jobs[line.strip()]
    n = wanted['nanogpt_tokens']
    print(json.dumps({'tokens/s': n / seconds(wanted, n)}), flush=True)
"""


if __name__ == '__main__':
    run_script(main)
