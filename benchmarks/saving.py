"""Measures saving and loading a checkpoint, with and without digests, alternating.

    python benchmarks/saving.py                          124M parameters: 0.5 GB, optimizer 1 GB
    python benchmarks/saving.py --n_layer=2 --rounds=1   a quick look

It also measures how long training waits for a save. Files are removed from the page cache before
they are loaded, as after a crash, except in the row 'warm'.
"""

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from model import GPT, GPTConfig
from nib.checkpoint import store, tensorfile
from nib.checkpoint.writer import CheckpointWriter
from nib.errors import run_script
from nib.optim import Optimizer
from nib.schema import check_range

rounds: int = 5  # rounds of measurements
n_layer: int = 12  # blocks of the model
n_head: int = 12  # attention heads in a block
n_embd: int = 768  # width
device: str = 'cpu'  # where the model is: 'cpu', 'cuda', 'mps'
folder: str = ''  # where to write; empty: the system's folder for temporary files
result: str = ''  # also write the table to this file

NO_DIGEST = SimpleNamespace(
    sha256=lambda: SimpleNamespace(update=lambda block: None, hexdigest=lambda: 'none')
)


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'rounds', least=1)
    model = GPT(
        GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False)
    ).to(device)
    optimizer = Optimizer(model)
    optimizer.lr = 1e-3
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(torch.tensor(True, device=device))
    turns = {'no digests': [], 'digests': []}
    with tempfile.TemporaryDirectory(dir=folder or None) as scratch:
        out_dir = Path(scratch)
        take_turn(model, optimizer, out_dir)  # not measured: the first write is different
        for turn in range(rounds):
            # Each one goes first in every other round.
            for name in list(turns)[:: 1 if turn % 2 else -1]:
                tensorfile.hashlib = hashlib if name == 'digests' else NO_DIGEST
                turns[name].append(take_turn(model, optimizer, out_dir))
                measure.say_round(turn, name, turns[name][-1])
    table = (
        f'{rounds} alternating rounds; {measure.describe_machine(device)}\n'
        f'{model.num_params() / 1e6:.2f}M parameters, seconds; SHA-256 alone takes '
        f'{hash_alone(model, optimizer):.2f} on one core\n\n' + measure.make_table(turns)
    )
    measure.publish(table, result)


def take_turn(model, optimizer, out_dir: Path) -> dict[str, float]:
    writer = CheckpointWriter(out_dir, keep_last=1)
    tensors = model.state_dict(), optimizer.named_state(model)
    measured = {'training waits': seconds(lambda: writer.save(1, *tensors, {}))}
    measured['saving'] = measured['training waits'] + seconds(writer.wait)
    writer.close()
    for path in (out_dir / 'step-00000001').iterdir():
        with open(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    measured['loading'] = seconds(lambda: store.load(out_dir))
    measured['loading, warm'] = seconds(lambda: store.load(out_dir))
    return measured


def hash_alone(model, optimizer) -> float:
    """Returns the seconds for a checkpoint's digests if nothing else runs."""
    tensors = [*model.state_dict().values(), *optimizer.named_state(model).values()]
    contents = [tensor.detach().cpu().numpy() for tensor in tensors]
    return seconds(lambda: [hashlib.sha256(content).digest() for content in contents])


def seconds(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == '__main__':
    run_script(main)
