"""nanoGPT in a process of its own, for comparison."""

import json
from collections.abc import Mapping
from pathlib import Path

import configurator
import train
from benchmarks import measure
from nib.errors import UserError

# Keys that nanoGPT's code does not have; the config must leave them as GPT-2 has them.
NOT_IN_NANOGPT = (
    'n_kv_head head_dim position norm qk_norm smear mlp mlp_width tied_head logit_cap zero_init '
    'optimizer'.split()
)
NANOGPT_KEYS = (
    'device dtype compile block_size batch_size gradient_accumulation_steps n_layer n_head n_embd '
    'dropout bias learning_rate beta1 beta2 weight_decay grad_clip steps new_tokens'.split()
)


def start(flag: str, clone: str, script: str, job: Mapping) -> measure.Worker:
    """Starts a script in a clone of nanoGPT, with the job as JSON in sys.argv[1].

    Raises UserError if --flag does not name a clone.
    """
    if not clone or not (Path(clone) / 'model.py').exists():
        raise UserError(f'--{flag}={clone}: expected the path of a clone of karpathy/nanoGPT')
    return measure.Worker('nanoGPT', script, json.dumps(job), folder=clone)


def start_training(values, data, clone: str) -> measure.Worker:
    """Returns nanoGPT with the loop of its train.py, with the same model and batch.

    Raises UserError if nanoGPT does not have the config's architecture.
    """
    gpt2 = configurator.read_block(train.__file__).defaults
    for key in NOT_IN_NANOGPT:
        if values[key] != gpt2[key]:
            raise UserError(
                f'--vs_nanogpt: nanoGPT has no {key} {values[key]}; '
                f"use a config with GPT-2's architecture"
            )
    job = {key: values[key] for key in NANOGPT_KEYS} | {
        'vocab_size': data.vocab_size,
        'prompt': data.val[: values['prompt_tokens']].tolist(),
        'train_bin': str((data.folder / 'train.bin').resolve()),
    }
    return start('vs_nanogpt', clone, NANOGPT_LOOP, job)


NANOGPT_LOOP = """
import contextlib, json, os, sys, time
import numpy as np, torch
job = json.loads(sys.argv[1])
device, kind = job['device'], job['device'].split(':')[0]
B, T, micro_steps = job['batch_size'], job['block_size'], job['gradient_accumulation_steps']
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
as_it_is = contextlib.nullcontext()  # nanoGPT does not use autocast on a CPU
context = as_it_is if kind == 'cpu' and not job.get('autocast') else torch.amp.autocast(
    device_type=kind, dtype=getattr(torch, job['dtype']))
keys = 'block_size vocab_size n_layer n_head n_embd dropout bias'.split()
shape = {key: job[key] for key in keys}
if job.get('model') == 'transformers':
    from transformers import GPT2Config, GPT2LMHeadModel
    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = GPT2LMHeadModel(GPT2Config(
                vocab_size=shape['vocab_size'], n_positions=shape['block_size'],
                n_layer=shape['n_layer'], n_head=shape['n_head'], n_embd=shape['n_embd'],
                activation_function='gelu',  # exact, like nanoGPT's
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                bos_token_id=None, eos_token_id=None))
        def forward(self, x, y):
            return None, self.model(input_ids=x, labels=x).loss
    raw_model = Theirs()
else:
    from model import GPT, GPTConfig
    raw_model = GPT(GPTConfig(**shape))
raw_model.to(device)
scaler = torch.amp.GradScaler(kind, enabled=job['dtype'] == 'float16')
if job.get('fused'):
    groups = [
        {'params': [p for p in raw_model.parameters() if (p.dim() >= 2) == is_matrix],
         'weight_decay': decay} for is_matrix, decay in ((True, job['weight_decay']), (False, 0.0))]
    optimizer = torch.optim.AdamW(
        groups, job['learning_rate'], (job['beta1'], job['beta2']), fused=True)
else:
    optimizer = raw_model.configure_optimizers(
        job['weight_decay'], job['learning_rate'], (job['beta1'], job['beta2']), kind)
model = torch.compile(raw_model) if job['compile'] else raw_model

def batch():
    data = np.memmap(job['train_bin'], dtype=np.uint16, mode='r')
    starts = torch.randint(len(data) - T, (B,))
    def windows(shift):
        windows = (data[i + shift:i + shift + T].astype(np.int64) for i in starts)
        return torch.stack([torch.from_numpy(window) for window in windows])
    x, y = windows(0), windows(1)
    if kind == 'cuda':
        return tuple(ids.pin_memory().to(device, non_blocking=True) for ids in (x, y))
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
        prompt = torch.tensor([job['prompt']], device=device)
        raw_model.generate(prompt, job['new_tokens'], temperature=0.8, top_k=200)
    raw_model.train()

def memory():
    if kind == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e6
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status') as file:
            peak = next(line for line in file if line.startswith('VmHWM'))
        return int(peak.split()[1]) / 1e3 * 1.024
    import resource
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

train(3)
used = memory()
print('{}', flush=True)
for line in sys.stdin:
    spent = seconds(lambda: train(job['steps'])) / job['steps']
    figures = {'tokens/s': micro_steps * B * T / spent, 'ms/step': 1000 * spent}
    figures['peak memory, MB'] = used
    if job['new_tokens']:
        figures['generated tokens/s'] = job['new_tokens'] / seconds(generate)
    print(json.dumps(figures), flush=True)
"""
