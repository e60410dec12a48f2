"""Measures how the size of a dataset affects opening it, its batches, memory and start-up time.

    python benchmarks/loading.py

One dataset has 2 MB, the other 20 GB. The files are sparse and take no space on the disk. All
tokens are the same character.
"""

import pickle
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from nib.errors import run_script
from nib.machine.device import peak_memory
from nib.schema import check_range
from nib.tokens.batches import BatchLoader
from nib.tokens.dataset import SPLITS, open_dataset

rounds: int = 5  # alternating measurements of each, each in a new process
folder: str = ''  # where to write; empty: the system's folder for temporary files
result: str = ''  # also write the table to this file

SIZES = {'2 MB': 2_000_000, '20 GB': 20_000_000_000}  # of train.bin, and of val.bin
BLOCK_SIZE, BATCH_SIZE, N_BATCHES = 64, 12, 1000
TIME_LOADING = 'benchmarks.loading.time_loading'  # in a process that has not seen the file yet


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'rounds', least=1)
    turns = {name: [] for name in SIZES}
    with tempfile.TemporaryDirectory(dir=folder or None) as scratch:
        for name, n_bytes in SIZES.items():
            make_dataset(Path(scratch) / name, n_bytes)
        for turn in range(rounds):
            for name in SIZES:
                flags = [
                    'config/train_shakespeare_char.py',
                    '--device=cpu',
                    '--no-compile',
                    f'--data_dir={scratch}',
                    f'--dataset={name}',
                    f'--out_dir={Path(scratch) / "run"}',
                    '--overwrite',
                ]
                turns[name].append(
                    measure.in_fresh_process(TIME_LOADING, str(Path(scratch) / name))
                    | {'command to first step, s': measure.time_startup(flags)}
                )
                measure.say_round(turn, name, turns[name][-1])
    table = (
        f'{rounds} alternating rounds; {measure.describe_machine()}\n'
        f'batches of {BATCH_SIZE} x {BLOCK_SIZE} tokens, the first {N_BATCHES} of the training '
        f'split\n\n' + measure.make_table(turns)
    )
    measure.publish(table, result)


def make_dataset(path: Path, n_bytes: int):
    """Writes a dataset in nanoGPT's format: n_bytes / 2 characters '!' in both splits."""
    path.mkdir()
    for split in SPLITS:
        with open(path / f'{split}.bin', 'wb') as file:
            file.truncate(n_bytes)
    characters = dict(enumerate(map(chr, range(33, 98))))
    (path / 'meta.pkl').write_bytes(
        pickle.dumps(
            {
                'vocab_size': len(characters),
                'itos': characters,
                'stoi': {character: number for number, character in characters.items()},
            }
        )
    )


def time_loading(path: str) -> dict[str, float]:
    """Opens a dataset and makes batches of it; returns the times and the memory."""
    before, started = peak_memory('cpu'), time.perf_counter()
    data = open_dataset(Path(path), BLOCK_SIZE)
    opened = time.perf_counter()
    batches = BatchLoader(data.train, BLOCK_SIZE, BATCH_SIZE, 1, 1, vocab_size=data.vocab_size)
    next(batches.eval_batches(data.val))
    evaluated = time.perf_counter()
    for step in range(N_BATCHES):
        batches.batch(step, 0)
    return {
        'ms to open it': 1000 * (opened - started),
        'ms first evaluation batch': 1000 * (evaluated - opened),
        'ms training batch': 1000 * (time.perf_counter() - evaluated) / N_BATCHES,
        'memory of all that, MB': (peak_memory('cpu') - before) / 1e6,
    }


if __name__ == '__main__':
    run_script(main)
