"""Measures generation beside nanoGPT's, in turns, and against the memory, out of which every weight comes for every token.

    git clone https://github.com/karpathy/nanoGPT && python benchmarks/sampling.py --nanogpt=nanoGPT

Both have random weights of the same shapes and choose tokens with temperature 0.8 and top_k 200; nanoGPT's weights are
float32. nibGPT's time holds what it does but once, reading the prompt and packing the weights. nanoGPT reads everything
again for each token, so that a few tokens show its speed.
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
from benchmarks.nanogpt import NanoGPT
from model import GPT, GPTConfig
from nib.errors import UserError, run_script
from nib.machine.device import pick_device, synchronize

nanogpt: str = ''  # path of a clone of karpathy/nanoGPT
rounds: int = 4  # times that everything is measured
device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
compile: bool = False  # compile nibGPT's step from token to token
result: str = ''  # file to write the table to, too


@dataclass(frozen=True)
class Job:
    """Tokens to write after a prompt."""

    shape: dict  # of the model: fields of GPTConfig, nanoGPT's too
    prompt_tokens: int
    new_tokens: int
    nanogpt_tokens: int  # that nanoGPT writes instead
    n_prompts: int = 1  # that nanoGPT continues together
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
    if rounds < 1:
        raise UserError(f'rounds is {rounds}: it must be at least 1')
    peer = NanoGPT(
        'nanogpt',
        nanogpt,
        NANOGPT_SCRIPT,
        {
            'device': device,
            'sampling': SAMPLING,
            'jobs': {name: asdict(job) for name, job in JOBS.items()},
        },
    )
    models = {
        (name, dtype): GPT(GPTConfig(**job.shape)).to(device, getattr(torch, dtype))
        for name, job in JOBS.items()
        for dtype in DTYPES
    }
    for (name, _), model in models.items():
        generate(model, JOBS[name])  # to warm up, and to compile
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
                shares[f'{name}, {dtype}: %'] = (
                    100 * sum(map(n_bytes, matrices(models[name, dtype]))) / step / memory_rate
                )
        batches = {}
        for dtype in DTYPES:
            alone, together = (generate(models[name, dtype], job, n) for n in (1, N_PROMPTS))
            for n in (job.new_tokens // 5, job.new_tokens):
                batches[f'{n} tokens, {dtype}: {N_PROMPTS} / 1'] = together[n - 1] / alone[n - 1]
        turns['nanoGPT'].append(theirs)
        turns['nibGPT'].append(ours | batches | {'plain read, GB/s': memory_rate / 1e9} | shares)
        print(
            f'round {turn + 1}: '
            + '; '.join(f'{key} {ours[key] / rate:.1f} x' for key, rate in theirs.items()),
            file=sys.stderr,
            flush=True,
        )
    table = (
        f'{rounds} rounds in turns; {measure.describe_machine(device)}{", compiled" if compile else ""}\n'
        f"tokens/s of one prompt; time of {N_PROMPTS} prompts and of 1, {name}; % of a plain read's rate at which a step reads "
        f'the weights\n\n'
        f'{measure.make_table(turns)}'
    )
    print(table, end='')
    if result:
        Path(result).write_text(table)


def generate(model: GPT, job: Job, n_prompts: int = 1) -> list[float]:
    """Seconds from the start to each new token."""
    prompts = [[0] * job.prompt_tokens] * n_prompts
    synchronize(device)
    started, seconds = time.perf_counter(), []
    for tokens in model.generate(prompts, job.new_tokens, seed=1, compile=compile, **SAMPLING):
        tokens.tolist()  # waits for the device, as whoever shows them must
        seconds.append(time.perf_counter() - started)
    return seconds


def matrices(model: GPT) -> list[torch.Tensor]:
    """The weights that each token is multiplied with."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and 'wpe' not in name]


def n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def read_rate(model: GPT) -> float:
    """Bytes a second that adding up the weights reaches, the best of five."""
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
    prompt = torch.zeros(wanted['n_prompts'], wanted['prompt_tokens'], dtype=torch.long, device=device)
    wait = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    is_float32 = wanted['dtype'] == 'float32'
    context = contextlib.nullcontext() if is_float32 else torch.autocast(device.split(':')[0], getattr(torch, wanted['dtype']))
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
    print(json.dumps({'tokens/s': wanted['nanogpt_tokens'] / seconds(wanted, wanted['nanogpt_tokens'])}), flush=True)
"""


if __name__ == '__main__':
    run_script(main)
