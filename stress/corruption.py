"""Damages checkpoints at random and checks that the newest good one is loaded, with a warning.

python stress/corruption.py                 10,000 damages
python stress/corruption.py --damages=200   a quick look
"""

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from nib.checkpoint import store, tensorfile
from nib.errors import UserError, run_script
from nib.schema import check_range

damages: int = 10_000  # number of damages, alternating between all kinds
seed: int = 0  # determines what is damaged and where
result: str = ''  # also write the table to this file

FILES = ('model.safetensors', 'optimizer.safetensors', 'state.json')
STEPS = (30, 20, 10)  # of the existing checkpoints, newest first


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'damages', least=1)
    counts, problems = {kind: Counter() for kind in KINDS}, []
    with tempfile.TemporaryDirectory() as scratch:
        out_dir = Path(scratch)
        whole = make_run(out_dir)
        content = {path: path.read_bytes() for path in out_dir.rglob('*') if path.is_file()}
        draw = random.Random(seed)
        for number in range(damages):
            kind = list(KINDS)[number % len(KINDS)]
            outcome, said = damage_and_load(out_dir, kind, whole, content, draw)
            counts[kind][outcome] += 1
            if outcome in ('silent', 'wrong'):
                problems.append(f'damage {number}, {kind}: {said}')
            restore(out_dir, content)
    columns = {
        'older': 'older taken',
        'none': 'none left',
        'harmless': 'no harm',
        'silent': 'silent',
        'wrong': 'wrong',
    }
    rows = [*counts.items(), ('all', sum(counts.values(), Counter()))]
    table = (
        '\n'.join(
            [
                measure.describe_machine(),
                '',
                f'{"damage":46}' + ''.join(f'{heading:>12}' for heading in columns.values()),
                *(
                    f'{kind:46}' + ''.join(f'{count[outcome]:>12,}' for outcome in columns)
                    for kind, count in rows
                ),
                '',
                f'loaded without a word: {rows[-1][1]["silent"]} of {damages:,}',
                *problems[:20],
            ]
        )
        + '\n'
    )
    measure.publish(table, result)
    return int(bool(problems))


def make_run(out_dir: Path) -> dict[int, dict]:
    """Saves three checkpoints of random tensors, the second as best; returns step -> tensors."""
    torch.manual_seed(0)
    whole = {}
    for step in reversed(STEPS):
        model = {
            f'h.{layer}.{name}': torch.randn(shape)
            for layer in range(2)
            for name, shape in (('weight', (16, 12)), ('proj', (16, 12)), ('bias', (16,)))
        }
        optimizer = {
            f'{name}/{key}': torch.rand_like(value)
            for name, value in model.items()
            for key in ('exp_avg', 'exp_avg_sq')
        }
        whole[step] = {'model': model, 'optimizer': optimizer}
        store.save(
            out_dir,
            step,
            model,
            optimizer,
            {'train': {}, 'config': {'learning_rate': 1e-05, 'dataset': 'é'}},
        )
        store.record_evaluation(out_dir, step, {'best_val_loss': 1 + 1 / step}, best=step == 20)
    return whole


def restore(out_dir: Path, content: dict[Path, bytes]):
    for path, was in content.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(was)


# -- kinds of damage, each to one file -------------------------------------------------------------


def flip_bit(path: Path, draw: random.Random):
    content = bytearray(path.read_bytes())
    at = draw.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def extend(path: Path, draw: random.Random):
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def zero(path: Path, draw: random.Random):
    """Zeroes up to 512 bytes, like a disk that has lost a sector."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)


def remove(path: Path, draw: random.Random):
    path.unlink()


def take_from_another_step(path: Path, draw: random.Random):
    other = draw.choice([step for step in STEPS if path.parent.name != f'step-{step:08d}'])
    path.write_bytes((path.parent.parent / f'step-{other:08d}' / path.name).read_bytes())


def exchange_files(path: Path, draw: random.Random):
    """Swaps the contents of two files of a checkpoint."""
    other = path.with_name(draw.choice([name for name in FILES if name != path.name]))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def swap_tensors(path: Path, draw: random.Random):
    """Swaps two tensors of the same shape in an otherwise intact file."""
    path = path if path.suffix == '.safetensors' else path.with_name(FILES[0])
    tensors = safetensors.torch.load(path.read_bytes())
    first = draw.choice(sorted(tensors))
    second = draw.choice(
        sorted(
            name
            for name in tensors
            if name != first and tensors[name].shape == tensors[first].shape
        )
    )
    tensorfile.write(path, {**tensors, first: tensors[second], second: tensors[first]})


def garble_names(path: Path, draw: random.Random):
    """Garbles the contents of `latest` and `best`; the checkpoints stay intact."""
    for name in ('latest', 'best'):
        (path.parent.parent / name).write_bytes(
            draw.choice([b'', b'step-00000099\n', draw.randbytes(16), b'../..\n'])
        )


KINDS = {
    'one bit flipped': flip_bit,
    'cut off at any length': truncate,
    'bytes added': extend,
    'up to 512 bytes zeroed': zero,
    'a file missing': remove,
    'a file of another step': take_from_another_step,
    'two files exchanged': exchange_files,
    'two tensors swapped': swap_tensors,
    '`latest` and `best` garbled': garble_names,
}


def damage_and_load(
    out_dir: Path,
    kind: str,
    whole: dict[int, dict],
    content: dict[Path, bytes],
    draw: random.Random,
) -> tuple[str, str]:
    """Damages the newest one to three checkpoints, loads 'latest'; returns (outcome, message).

    whole, content: the tensors and files before the damage.
    """
    for step in STEPS[: draw.choice((1, 1, 1, 2, 3))]:
        KINDS[kind](out_dir / f'step-{step:08d}' / draw.choice(FILES), draw)
    # a file may have been restored by way of another checkpoint
    damaged = {
        path.parent.name
        for path, was in content.items()
        if path.parent != out_dir and (not path.exists() or path.read_bytes() != was)
    }
    expected = next((step for step in STEPS if f'step-{step:08d}' not in damaged), None)
    passed_over = [name for name in damaged if expected is None or name > f'step-{expected:08d}']
    said = []
    try:
        found, tensors = store.load(out_dir, 'latest', warn=said.append)
    except UserError as error:
        named = all(f'{name}/' in str(error) for name in passed_over)
        return ('none' if expected is None and named else 'wrong'), str(error)
    text = f'{found.step}: {said}'
    if found.path.name in damaged or not all(
        torch.equal(value, whole[found.step][part][name])
        for part in tensors
        for name, value in tensors[part].items()
    ):
        return 'silent', text
    named = len(said) == len(passed_over) and all(
        any(f'{name}/' in line for line in said) for name in passed_over
    )
    if found.step != expected or not named:
        return 'wrong', text
    return ('older' if passed_over else 'harmless'), text


if __name__ == '__main__':
    run_script(main)
