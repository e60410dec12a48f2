"""Trains the small character GPT with nanoGPT and nibGPT, alternating; prints time, speed and loss.

    git clone https://github.com/karpathy/nanoGPT && python nanoGPT/data/shakespeare_char/prepare.py
    python benchmarks/vs_nanogpt.py --nanogpt=nanoGPT

All train on the text of nanoGPT's bins. nanoGPT and nibGPT use the settings that nanoGPT's README
gives for a CPU: the same model, batch, steps and number of evaluations. 'fast' is nibGPT with
config/fast_shakespeare_char.py, with a different seed in each turn. A turn is a whole process:
start-up, training, evaluations and saving.
"""

import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from nib.errors import UserError, run_script
from nib.report.history import read_run
from nib.schema import check_range

nanogpt: str = ''  # path of a clone of karpathy/nanoGPT with data/shakespeare_char prepared
rounds: int = 3  # turns of each contestant
max_iters: int = 2000  # steps in a turn; at least 250, for a quick look
result: str = ''  # also write the table to this file

TOKENS_PER_STEP = 12 * 64
# nanoGPT's own code evaluates nanoGPT's checkpoint on the whole validation split.
WHOLE_SPLIT = """
import sys, numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load(sys.argv[1] + '/ckpt.pt', map_location='cpu', weights_only=False)
model = GPT(GPTConfig(**saved['model_args']))
model.load_state_dict(saved['model'])
model.eval()
val = np.fromfile('data/shakespeare_char/val.bin', dtype=np.uint16)
val = torch.from_numpy(val.astype(np.int64))
T = model.config.block_size
n = (len(val) - 1) // T
x, y = val[:n * T].view(n, T), val[1:n * T + 1].view(n, T)
with torch.no_grad():
    print(sum(model(a, b)[1].item() * len(a) for a, b in zip(x.split(12), y.split(12))) / n)
"""


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    clone = Path(nanogpt)
    if not nanogpt or not all(
        (clone / name).exists() for name in ('train.py', 'data/shakespeare_char/meta.pkl')
    ):
        raise UserError(
            f'--nanogpt={nanogpt}: expected the path of a clone of karpathy/nanoGPT, in which '
            f'data/shakespeare_char/prepare.py has been run'
        )
    check_range(values, 'rounds', least=1)
    if max_iters < 250:
        raise UserError(
            f'max_iters is {max_iters}: it must be at least 250, when nanoGPT first saves'
        )
    text = clone / 'data/shakespeare_char/input.txt'
    contestants = {'nanoGPT': train_nanogpt, 'nibGPT': train_nibgpt, 'fast': train_fast}
    turns = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = Path(scratch) / 'data'
        measure.run(
            'data/shakespeare_char/prepare.py',
            f'--input={text.resolve()}',
            f'--out_dir={data_dir / "shakespeare_char"}',
        )
        for turn in range(rounds):
            for name, train in contestants.items():
                turns[name].append(train(clone, data_dir, Path(scratch) / f'{name}-{turn}', turn))
                measure.say_round(turn, name, turns[name][-1])
    table = (
        f'{rounds} alternating rounds; {measure.describe_machine()}; '
        f'{max_iters} steps of {TOKENS_PER_STEP} tokens\n\n'
        + measure.make_table({name: turns[name] for name in ('nanoGPT', 'nibGPT')})
        + '\n'
        + measure.make_table({name: turns[name] for name in ('nanoGPT', 'fast')})
    )
    measure.publish(table, result)


def train_nanogpt(clone, data_dir, out_dir, seed):
    command = [
        'train.py',
        'config/train_shakespeare_char.py',
        '--device=cpu',
        '--compile=False',
        '--eval_iters=20',
        '--log_interval=1',
        '--block_size=64',
        '--batch_size=12',
        '--n_layer=4',
        '--n_head=4',
        '--n_embd=128',
        f'--max_iters={max_iters}',
        f'--lr_decay_iters={max_iters}',
        '--dropout=0.0',
        f'--out_dir={out_dir}',
    ]
    started = time.perf_counter()
    output = measure.run(*command, folder=clone)
    seconds = time.perf_counter() - started
    times = {
        int(step): float(ms)
        for step, ms in re.findall(r'^iter (\d+): .*time ([\d.]+)ms', output, re.MULTILINE)
    }
    # Windows of 50 steps, as nibGPT logs them. The first of every 250 steps includes an evaluation.
    milliseconds = [
        statistics.mean(times[step] for step in range(first, first + 50) if step % 250)
        for first in range(0, max_iters - 49, 50)
    ]
    whole = measure.run('-c', WHOLE_SPLIT, out_dir, folder=clone)
    return {
        'process s': seconds,
        'tokens/s': TOKENS_PER_STEP / statistics.median(milliseconds) * 1000,
        'val loss, whole split': float(whole.split()[-1]),
    }


def train_nibgpt(clone, data_dir, out_dir, seed):
    return train_config(
        data_dir, out_dir, 'config/train_shakespeare_char.py', f'--max_iters={max_iters}'
    )


def train_fast(clone, data_dir, out_dir, seed):
    return train_config(data_dir, out_dir, 'config/fast_shakespeare_char.py', f'--seed={seed}')


def train_config(data_dir, out_dir, *flags):
    command = [
        'train.py',
        *flags,
        '--device=cpu',
        '--compile=False',
        f'--data_dir={data_dir}',
        f'--out_dir={out_dir}',
        '--fallback_dataset=',
    ]
    started = time.perf_counter()
    measure.run(*command)
    seconds = time.perf_counter() - started
    done = read_run(out_dir)
    return {
        'process s': seconds,
        'tokens/s': statistics.median(done.values('tokens_per_second')),
        'val loss, whole split': done.values('loss/val_whole')[-1],
    }


if __name__ == '__main__':
    run_script(main)
