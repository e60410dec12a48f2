"""Measures a config: training speed and where the time goes, memory, time to the first step, generation.

    python bench.py config/train_shakespeare_char.py
    python bench.py config/train_gpt2.py --batch_size=4 --gradient_accumulation_steps=1
    git clone https://github.com/karpathy/nanoGPT && python bench.py config/train_shakespeare_char.py --vs_nanogpt=nanoGPT

Takes every key of train.py. With --vs_nanogpt the same model and batch are measured in nanoGPT's code too, in turns.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import configurator
from model import GPT, GPTConfig
from nib import corpus, datasets, guard, loader, measure, optim, runtime
from nib.checks import check_config
from nib.errors import UserError, run_script
from train import train_step

# benchmark
rounds: int = 5  # times that everything is measured
steps: int = 10  # training steps in a round
prompt_tokens: int = 32  # length of the prompt to generate from
new_tokens: int = 100  # tokens to generate in a round; 0 leaves generation out
startup: bool = True  # also measure the time from the command to the first step
vs_nanogpt: str = ''  # path of a clone of karpathy/nanoGPT to measure beside
result: str = ''  # file to write the table to, too

VOCAB_SIZE = 50257  # of the random tokens that stand in for a dataset that is not there


def main(argv):
    values, _ = configurator.configure(__file__, argv, settle={'device': runtime.pick_device}, base='train.py')
    globals().update(values)
    values['dtype'], _ = runtime.pick_dtype(values['dtype'], values['device'])
    values['compile'], _ = runtime.pick_compile(values['compile'], values['device'])
    check_config(values, world_size=1)
    for key, least in (('rounds', 1), ('steps', 1), ('prompt_tokens', 1), ('new_tokens', 0)):
        if values[key] < least:
            raise UserError(f'{key} is {values[key]}: it must be at least {least}')
    with tempfile.TemporaryDirectory() as scratch:
        data = find_data(values, Path(scratch))
        contestants = {'nibGPT': Contestant(values, data)}
        if vs_nanogpt:
            contestants = {'nanoGPT': NanoGPT(values, data, vs_nanogpt)} | contestants
        measured = {name: [] for name in contestants}
        for turn in range(rounds):
            for name, contestant in contestants.items():
                measured[name].append(contestant.round())
                print(f'round {turn + 1}, {name}: {measured[name][-1]["tokens/s"]:,.0f} tokens/s', file=sys.stderr, flush=True)
        if startup:
            measured['nibGPT'][0]['command to first step, s'] = time_startup(argv, Path(scratch))
    ours = contestants['nibGPT']
    tokens = values['gradient_accumulation_steps'] * values['batch_size'] * values['block_size']
    table = (f'{rounds} rounds of {steps} steps{" in turns" if vs_nanogpt else ""}; {measure.describe_machine(values["device"])}\n'
             f'{ours.model.num_params() / 1e6:.2f}M parameters, {tokens:,} tokens a step ({values["gradient_accumulation_steps"]} x '
             f'{values["batch_size"]} x {values["block_size"]}), {values["dtype"]}, compile {"on" if values["compile"] else "off"}, '
             f'{data.name}\n\n' + measure.make_table(measured))
    print(table, end='')
    if result:
        Path(result).write_text(table)


def find_data(values, scratch: Path) -> corpus.TokenDataset:
    """The config's dataset where it is prepared, else random tokens."""
    folder = Path(values['data_dir'] or datasets.SCRIPTS) / values['dataset']
    if corpus.is_prepared(folder):
        return corpus.open_dataset(folder, values['block_size'])
    folder = scratch / 'random tokens'
    folder.mkdir()
    for name in ('train.bin', 'val.bin'):  # without a meta.json: tokens of GPT-2
        np.random.default_rng(0).integers(VOCAB_SIZE, size=64 * values['block_size'] + 1, dtype=np.uint16).tofile(folder / name)
    return corpus.open_dataset(folder, values['block_size'])


class Contestant:
    """nibGPT's own train_step and generation, ready to be timed."""

    def __init__(self, values, data):
        self.values, self.device = values, values['device']
        self.micro_steps = values['gradient_accumulation_steps']
        self.precision = runtime.precision(values['dtype'], self.device)
        try:
            self.raw_model = GPT(GPTConfig.pick(values, data.vocab_size)).to(self.device).train()
        except ValueError as error:
            raise UserError(str(error)) from error
        self.optimizer = optim.Optimizer.pick(values, self.raw_model, runtime.has_bfloat16(self.device))
        self.optimizer.lr = values['learning_rate']
        self.scaler = torch.amp.GradScaler(torch.device(self.device).type, enabled=values['dtype'] == 'float16')
        self.batches = loader.BatchLoader(data.train, values['block_size'], values['batch_size'], values['seed'], 'train',
                                          self.micro_steps, device=self.device, vocab_size=data.vocab_size)
        self.bad_steps = guard.BadSteps(None, self.device)
        self.model = self.raw_model
        if values['compile']:
            self.model = runtime.compile_model(self.raw_model, self.batches.batch(0, 0), self.precision, print)
        self.prompt = data.val[:values['prompt_tokens']].tolist()
        self.step = 0
        self.peak = runtime.peak_flops(self.device, values['dtype'])
        for _ in range(3):  # to warm up
            self.train_step(self.model, self.batches.micro_batches(self.step))

    def train_step(self, model, micro_batches):
        train_step(model, self.optimizer, self.scaler, micro_batches, self.micro_steps, self.precision,
                   self.values['grad_clip'], (self.values['seed'], self.step, 0), runtime.Ranks(), self.bad_steps)
        self.step += 1

    def round(self) -> dict[str, float]:
        """Figures of `steps` steps, of a few more with every part timed, and of one generation."""
        runtime.synchronize(self.device)
        started = time.perf_counter()
        for _ in range(steps):
            self.train_step(self.model, self.batches.micro_batches(self.step))
        runtime.synchronize(self.device)
        seconds = (time.perf_counter() - started) / steps
        tokens_per_second = self.micro_steps * self.values['batch_size'] * self.values['block_size'] / seconds
        flops_per_second = 3 * sum(self.raw_model.flops_per_token().values()) * tokens_per_second
        figures = {'tokens/s': tokens_per_second, 'ms/step': 1000 * seconds, **self.time_parts()}
        figures['TFLOP/s'] = flops_per_second / 1e12
        if self.peak:
            figures['MFU %'] = 100 * flops_per_second / self.peak
        else:
            figures["% of matrix products' rate"] = 100 * flops_per_second / matrix_rate(self.device, self.values['dtype'])
        if (memory := runtime.peak_memory(self.device)) is not None:
            figures['peak memory, MB'] = memory / 1e6
        if new_tokens:
            figures['generated tokens/s'] = new_tokens / self.time_generation()
        return figures

    def time_parts(self) -> dict[str, float]:
        """Milliseconds of a step by part. train_step itself runs, on objects that look at the clock as it passes them;
        waiting for the device at each look makes the sum a little more than a step."""
        clock = LapClock(self.device)
        n = max(1, steps // 3)
        for _ in range(n):
            clock.lap('')
            self.train_step(TimedModel(self.model, clock), clock.time_batches(self.batches.micro_batches(self.step)))
            clock.lap('optimizer')
        return {f'ms {part}': 1000 * clock.seconds[part] / n for part in ('data', 'forward', 'backward', 'optimizer')}

    def time_generation(self) -> float:
        runtime.synchronize(self.device)
        started = time.perf_counter()
        for _ in self.raw_model.generate([self.prompt], new_tokens, temperature=0.8, top_k=200, seed=1):
            pass
        runtime.synchronize(self.device)
        return time.perf_counter() - started


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
    """A model that notes the end of its forward pass."""

    def __init__(self, model, clock):
        self.model, self.clock, self.parameters = model, clock, model.parameters

    def __call__(self, x, y):
        loss = self.model(x, y)
        self.clock.lap('forward')
        return loss


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


def time_startup(argv, scratch: Path) -> float:
    """Seconds from the command train.py to the end of its first step, with an evaluation of one batch before it."""
    own = configurator.read_block(__file__).defaults
    flags = [item for item in argv if item.removeprefix('--').partition('=')[0] not in own]
    started = time.perf_counter()
    run = subprocess.Popen([sys.executable, 'train.py', *flags, '--max_iters=1', '--eval_iters=1', f'--out_dir={scratch / "run"}'],
                           cwd=Path(__file__).resolve().parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = ''
    for line in run.stdout:
        output += line
        if line.startswith('step 1: loss'):
            seconds = time.perf_counter() - started
            run.communicate()
            return seconds
    raise UserError(f'train.py did not reach its first step: {output[-300:]}')


class NanoGPT:
    """nanoGPT's model.py in a process of its own, with the loop of its train.py, told when to run."""

    def __init__(self, values, data, clone: str):
        gpt2 = configurator.read_block(str(Path(__file__).with_name('train.py'))).defaults
        for key in ('n_kv_head', 'position', 'norm', 'qk_norm', 'mlp', 'tied_head', 'logit_cap', 'zero_init', 'optimizer'):
            if values[key] != gpt2[key]:
                raise UserError(f'--vs_nanogpt: nanoGPT has no {key} {values[key]}; compare a config with GPT-2\'s architecture')
        keys = ('device', 'dtype', 'compile', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'n_layer', 'n_head',
                'n_embd', 'dropout', 'bias', 'learning_rate', 'beta1', 'beta2', 'weight_decay', 'grad_clip', 'steps', 'new_tokens')
        job = {key: values[key] for key in keys} | {'vocab_size': data.vocab_size, 'prompt': data.val[:prompt_tokens].tolist(),
                                                    'train_bin': str((data.folder / 'train.bin').resolve())}
        self.peer = measure.NanoGPT('vs_nanogpt', clone, NANOGPT_LOOP, job)

    def round(self) -> dict[str, float]:
        return self.peer.round()


NANOGPT_LOOP = '''
import contextlib, json, sys, time
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
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e6

train(3)
print('{}', flush=True)
for line in sys.stdin:
    spent = seconds(lambda: train(job['steps'])) / job['steps']
    figures = {'tokens/s': micro_steps * B * T / spent, 'ms/step': 1000 * spent, 'peak memory, MB': memory()}
    if job['new_tokens']:
        figures['generated tokens/s'] = job['new_tokens'] / seconds(generate)
    print(json.dumps(figures), flush=True)
'''


if __name__ == '__main__':
    run_script(main)
