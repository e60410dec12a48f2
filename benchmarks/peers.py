"""Trains nanoGPT's and transformers' GPT-2 alternating with nibGPT, at equal precision.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/peers.py --nanogpt=nanoGPT
    python benchmarks/peers.py --nanogpt=nanoGPT --sizes=124m --peers=nanogpt,transformers

Every contestant has the same shape, activation (exact GELU, like nanoGPT's), batch, optimizer
(AdamW in torch's fused kernel) and clipping. In bfloat16, the peers run inside torch.autocast,
which is one line in anybody's loop. 'compiled' is torch.compile with its defaults. nibGPT is
compiled if a long run with --compile=auto is. The time until a contestant is ready, with three
steps, is a line of its own. A turn is a few whole steps, short because the speed of a machine
drifts. Each peer is a process of its own, next to nibGPT's.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
import train
from bench import settle_compile
from benchmarks import measure
from benchmarks.contestant import Contestant
from benchmarks.nanogpt import NANOGPT_KEYS, NANOGPT_LOOP, start
from nib.errors import UserError, run_script
from nib.machine.device import pick_device
from nib.run.checks import settle_schedule
from nib.schema import check_range
from nib.tokens.dataset import open_dataset

nanogpt: str = ''  # path of a clone of karpathy/nanoGPT
sizes: str = 'small,10m,124m'  # of SIZES below, separated by commas
dtype: Literal['bfloat16', 'float32'] = 'bfloat16'  # of all contestants
peers: str = 'nanogpt,nanogpt-compiled,transformers'  # each also with -compiled
rounds: int = 12  # turns
result: str = ''  # also add the table to this file

SIZES = {
    'small': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12),
    '10m': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16),
    '124m': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=4),
}
VOCAB_SIZES = {'small': 65, '10m': 65, '124m': 50257}
STEPS = {'small': 10, '10m': 1, '124m': 1}  # in a turn


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    for size in sizes.split(','):
        if size not in SIZES:
            raise UserError(f'--sizes: no size is named {size!r}; known: {", ".join(SIZES)}')
    for peer in peers.split(','):
        if peer.removesuffix('-compiled') not in ('nanogpt', 'transformers'):
            raise UserError(
                f'--peers: no peer is named {peer!r}; known: nanogpt, transformers, and both with '
                '-compiled at the end'
            )
    check_range(values, 'rounds', least=1)
    heading = [
        f'training, {dtype}; {rounds} alternating rounds; {measure.describe_machine()}',
        f'{"size":8}{"peer":24}{"peer, tokens/s":>26}{"nibGPT, tokens/s":>26}{"ratio":>26}',
    ]
    write('\n'.join(heading))
    for size in sizes.split(','):
        with tempfile.TemporaryDirectory() as scratch:
            for line in measure_size(size, Path(scratch)):
                write(line)


def write(line: str):
    print(line, flush=True)
    if result:
        with open(result, 'a') as file:
            file.write(line + '\n')


def measure_size(size: str, scratch: Path):
    """Yields a line about nibGPT and one for each peer."""
    values = train_config(size)
    rng = np.random.default_rng(0)
    for name in ('train.bin', 'val.bin'):  # as unevenly distributed as text
        tokens = rng.zipf(1.2, 200_000).clip(max=VOCAB_SIZES[size]) - 1
        tokens.astype(np.uint16).tofile(scratch / name)
    data = open_dataset(scratch, values['block_size'], VOCAB_SIZES[size])
    started = time.perf_counter()
    ours = Contestant(values, data)
    how = 'compiled' if values['compile'] else 'not compiled'
    yield f'{size:8}nibGPT {how}, ready after {time.perf_counter() - started:.1f} s'
    for peer in peers.split(','):
        job = {key: values[key] for key in NANOGPT_KEYS if key in values} | {
            'model': peer.removesuffix('-compiled'),
            'compile': peer.endswith('-compiled'),
            'autocast': dtype == 'bfloat16',
            'fused': True,
            'vocab_size': VOCAB_SIZES[size],
            'train_bin': str(scratch / 'train.bin'),
            'steps': STEPS[size],
            'new_tokens': 0,
        }
        started = time.perf_counter()
        theirs = start('nanogpt', nanogpt, NANOGPT_LOOP, job)
        yield f'{size:8}{peer}, ready after {time.perf_counter() - started:.1f} s'
        pairs = []
        for _ in range(rounds):
            seconds = ours.time_steps(STEPS[size]) / STEPS[size]
            pairs.append((theirs.round()['tokens/s'], ours.tokens / seconds))
        theirs.close()
        columns = [*zip(*pairs), [mine / other for other, mine in pairs]]
        yield f'{size:8}{peer:24}' + ''.join(f'{measure.spread(column):>26}' for column in columns)


def train_config(size: str) -> dict:
    """Returns the values of train.py's keys."""
    defaults = configurator.read_block(train.__file__).defaults
    device = pick_device('cpu')
    shape = SIZES[size]
    changes = {'device': device, 'dtype': dtype, 'prompt_tokens': 1}
    changes |= {'gradient_accumulation_steps': 1, 'mlp': 'gelu_erf'}  # nanoGPT's GELU is exact
    values = settle_schedule(defaults | shape | changes)
    return settle_compile(values, VOCAB_SIZES[size])  # of a run with GPT-2's 600,000 steps


if __name__ == '__main__':
    run_script(main)
