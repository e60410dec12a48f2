"""Compares the planned memory of configs with what training on this CPU takes.

    python benchmarks/planned_memory.py --result=benchmarks/results/planned_memory.txt

Each config trains for five steps on random tokens in a process of its own. The measured memory is
its peak (Linux only) minus the memory after a step of a tiny model, which has loaded the libraries.
"""

import contextlib
import gc
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench
import configurator
import train
from benchmarks import measure
from model import GPTConfig
from nib.errors import UserError, run_script, warn
from nib.machine.device import peak_memory
from nib.machine.memory_plan import plan_memory

result: str = ''  # also write the table to this file

MODERN = '--position=rotary --norm=rms --qk_norm --mlp=swiglu --no-tied_head'
MUON = '--optimizer=muon'
SWIGLU = '--mlp=swiglu --no-tied_head'
GROUPED = '--n_kv_head=2 --position=rotary --norm=rms'
SMALL = '--n_layer=4 --n_embd=256 --n_head=4'
MEDIUM = '--n_layer=6 --n_embd=384 --n_head=6'
DEEP = '--n_layer=8 --n_embd=384 --n_head=6'
TWELVE = '--n_layer=12 --n_embd=384 --n_head=6'
WIDE = '--n_layer=4 --n_embd=512 --n_head=8'
LARGE = '--n_embd=768 --n_head=12'
ACCUMULATED = '--gradient_accumulation_steps=2'
CONFIGS = (  # the results file says which were seen while the estimate was made
    f'{MEDIUM} --block_size=256 --batch_size=16 --dtype=bfloat16',
    f'{MEDIUM} --block_size=256 --batch_size=16 --dtype=float32',
    f'{MEDIUM} --block_size=512 --batch_size=8 --dtype=bfloat16 {ACCUMULATED}',
    f'{MEDIUM} --block_size=256 --batch_size=32 --dtype=bfloat16 --recompute',
    f'{MEDIUM} --block_size=256 --batch_size=16 --dtype=float32 --dropout=0.1',
    f'{MEDIUM} --block_size=256 --batch_size=16 --dtype=bfloat16 {MODERN} {MUON}',
    f'{MEDIUM} --block_size=256 --batch_size=16 --dtype=float32 {MODERN} {MUON} {ACCUMULATED}',
    f'{LARGE} --n_layer=8 --block_size=128 --batch_size=2 --dtype=bfloat16 {MODERN} {MUON}',
    f'{LARGE} --n_layer=6 --block_size=256 --batch_size=8 --dtype=bfloat16 --mlp=relu2 --bias',
    f'{LARGE} --n_layer=12 --block_size=1024 --batch_size=2 --dtype=bfloat16',
    f'{WIDE} --block_size=128 --batch_size=8 --dtype=bfloat16',
    f'{WIDE} --block_size=128 --batch_size=8 --dtype=float32',
    f'{WIDE} --block_size=128 --batch_size=8 --dtype=bfloat16 --no-tied_head',
    f'{WIDE} --block_size=128 --batch_size=4 --dtype=bfloat16 --gradient_accumulation_steps=4',
    f'{WIDE} --block_size=128 --batch_size=8 --dtype=float32 {MODERN} {ACCUMULATED}',
    '--n_layer=2 --n_embd=256 --n_head=4 --block_size=256 --batch_size=8 --dtype=bfloat16',
    f'{SMALL} --block_size=2048 --batch_size=2 --dtype=bfloat16',
    f'{SMALL} --block_size=2048 --batch_size=2 --dtype=float32',
    f'{DEEP} --block_size=512 --batch_size=8 --dtype=bfloat16 --recompute {MODERN}',
    f'{DEEP} --block_size=256 --batch_size=16 --dtype=bfloat16 {MODERN} {MUON} --vocab_size=256',
    f'{MEDIUM} --block_size=256 --batch_size=8 --dtype=float32 --optimizer=sgd',
    f'{WIDE} --block_size=512 --batch_size=4 --dtype=bfloat16 {GROUPED}',
    f'{MEDIUM} --block_size=256 --batch_size=16 --dtype=float32 {SWIGLU} --vocab_size=5000',
    f'{MEDIUM} --block_size=256 --batch_size=16 --dtype=bfloat16 --dropout=0.2 --vocab_size=65',
    f'{MEDIUM} --block_size=256 --batch_size=32 --dtype=float32 --vocab_size=65',
    f'{LARGE} --n_layer=4 --block_size=256 --batch_size=4 --dtype=bfloat16 {MUON} {ACCUMULATED}',
    f'{MEDIUM} --block_size=256 --batch_size=8 --dtype=bfloat16 --mlp=relu2 --logit_cap=15',
    f'{TWELVE} --block_size=256 --batch_size=16 --dtype=float32 --recompute --vocab_size=1000',
    f'{MEDIUM} --block_size=512 --batch_size=4 --dtype=float32 --dropout=0.1 --vocab_size=65',
    f'{MEDIUM} --block_size=512 --batch_size=4 --dtype=bfloat16 --dropout=0.1 --vocab_size=65',
    f'{MEDIUM} --block_size=128 --batch_size=16 --dtype=float32 --dropout=0.1 --vocab_size=65',
)
TINY = {'n_layer': 1, 'n_head': 1, 'n_kv_head': 0, 'n_embd': 32, 'block_size': 16, 'batch_size': 1}
MEASURE_CONFIG = 'benchmarks.planned_memory.measure_config'


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    rows = [f'{measure.describe_machine()}\n\n{"planned, MB":>12}{"measured, MB":>14}{"ratio":>8}']
    for flags in CONFIGS:
        planned, measured = measure.in_fresh_process(MEASURE_CONFIG, flags.split())
        rows.append(f'{planned:12,.0f}{measured:14,.0f}{planned / measured:8.2f}  {flags}')
        warn(rows[-1])
    measure.publish('\n'.join([*rows, '']), values['result'])


def measure_config(flags: list[str]) -> tuple[float, float]:
    """Trains for five steps, and returns the planned and the measured memory in MB."""
    values = bench.read_config(['--device=cpu', '--gradient_accumulation_steps=1', *flags])
    with tempfile.TemporaryDirectory() as scratch:
        take_steps(values | TINY, Path(scratch) / 'tiny', 1)
        gc.collect()
        before = resident_memory()
        vocab_size = take_steps(values, Path(scratch) / 'run', 5)
    peak = peak_memory('cpu')
    assert peak is not None
    plan = plan_memory(GPTConfig.pick(values, vocab_size), values)
    return plan.peak / 1e6, (peak - before) / 1e6


def take_steps(values, scratch: Path, n: int) -> int:
    """Takes n training steps on random tokens, and returns the size of the vocabulary."""
    scratch.mkdir()
    with contextlib.redirect_stderr(None):  # that the tokens are random
        data = bench.find_data(values | {'data_dir': str(scratch)}, scratch)
    training = train.Training.set_up(values | {'on_nonfinite': 'skip'}, data)
    training.optimizer.lr = 1e-4
    for step in range(n):
        train.train_step(training, training.batches.micro_batches(step), step)
    return data.vocab_size


def resident_memory() -> int:
    """Returns the bytes of main memory that this process has now. Raises UserError if unknown."""
    try:
        with open('/proc/self/status') as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith('VmRSS'))
    except OSError as error:
        raise UserError(
            'this benchmark needs Linux, which reports the memory of a process'
        ) from error


if __name__ == '__main__':
    run_script(main)
