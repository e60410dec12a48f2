"""Checks that a change to the code keeps every loss: trains two revisions and compares them.

    python benchmarks/same_losses.py --base=main             the working tree against branch main
    python benchmarks/same_losses.py --base=main --timing    tokens/s of both, alternating

Run it before and after a refactoring. Each case is a short training run on the CPU with both
revisions. The loss of every step and evaluation, every gradient norm and the sampled text must be
equal. Both revisions train on the bins that the base revision wrote, and the working tree also
resumes a run that the base revision began: existing datasets and checkpoints must still load. The
script uses the revisions only through their command line and metrics.jsonl.

The exit code is 1 if anything differs. A comparison takes about two minutes on two cores.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from nib.errors import UserError, run_script
from nib.schema import check_range

base: str = 'HEAD'  # what to compare the working tree with: a git reference or the path of a copy
cases: str = ''  # names of the cases to run, separated by commas; empty: all
timing: bool = False  # compare tokens/s instead of losses
rounds: int = 5  # turns of each revision, for --timing
device: str = 'cpu'  # for --timing; losses are compared on the CPU, whose results are reproducible
result: str = ''  # also write the table to this file


@dataclass(frozen=True)
class Case:
    """A training run, described by the flags of train.py."""

    flags: str
    ranks: int = 1  # processes
    cut: int = 0  # step at which the run is stopped and resumed; 0 runs it in one piece


SMALL = (
    '--n_layer=2 --n_head=4 --n_embd=64 --block_size=32 --batch_size=4 --warmup_iters=4 '
    '--gradient_accumulation_steps=1 --learning_rate=3e-3 --lr_schedule=constant --max_iters=24 '
    '--eval_interval=8 --eval_iters=4 --log_interval=1 --dtype=float32 --sample_tokens=16'
)
GPT2 = f'{SMALL} --bias'
MODERN = f'{SMALL} --position=rotary --norm=rms --qk_norm --mlp=swiglu --n_kv_head=2 --no-tied_head'
NOISY = '--dropout=0.2 --gradient_accumulation_steps=4'
MUON = '--optimizer=muon --learning_rate=0.01'
LARGE = (  # a micro batch has more logits than a chunk of the loss
    f'{SMALL} --dataset=squares --vocab_size=60000 --n_embd=16 --batch_size=20 --logit_cap=9 '
    '--max_iters=3 --eval_interval=3 --eval_iters=1'
)
SHORT = '--eval_interval=10 --eval_iters=4 --log_interval=1'
CASES = {
    'GPT-2': Case(GPT2),
    'GPT-2 bfloat16': Case(f'{GPT2} --dtype=bfloat16'),
    'GPT-2 float16': Case(f'{GPT2} --dtype=float16'),
    'GPT-2 Muon': Case(f'{GPT2} {MUON}'),
    'GPT-2 accumulation': Case(f'{GPT2} {NOISY}'),
    'GPT-2 2 ranks': Case(f'{GPT2} {NOISY}', ranks=2),
    'GPT-2 resumed': Case(f'{GPT2} {NOISY}', cut=16),
    'GPT-2 large vocabulary': Case(LARGE),
    'modern': Case(MODERN),
    'modern Muon bfloat16': Case(f'{MODERN} {MUON} --dtype=bfloat16'),
    'modern relu2 recompute': Case(f'{MODERN} --mlp=relu2 --logit_cap=9 --recompute --grad_clip=0'),
    'modern Muon resumed': Case(f'{MODERN} {MUON} --zero_init', cut=16),
    'train_shakespeare_char': Case(f'config/train_shakespeare_char.py {SHORT} --max_iters=20'),
    'fast_shakespeare_char': Case(f'config/fast_shakespeare_char.py {SHORT} --max_iters=40'),
}
TIMED = {
    'train_shakespeare_char': 'config/train_shakespeare_char.py --max_iters=250',
    'fast_shakespeare_char': 'config/fast_shakespeare_char.py --max_iters=100',
}
Row = tuple[str, int, str]  # name, number of values compared, first difference or ''
COMPARED = ('loss/', 'grad_norm', 'sample')  # beginnings of the names in metrics.jsonl


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'rounds', least=1)
    chosen = choose_cases(TIMED if timing else CASES)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        old = Path(base) if (Path(base) / 'train.py').exists() else check_out(base, scratch / 'old')
        text = scratch / 'text.txt'
        text.write_text(make_text(), encoding='utf-8')
        for name, tree in (('old', old), ('new', ROOT)):
            bins = scratch / f'data-{name}' / 'shakespeare_char'
            prepare = ['data/shakespeare_char/prepare.py', f'--input={text}', f'--out_dir={bins}']
            run([sys.executable, *prepare], tree)
        write_squares(scratch / 'data-old' / 'squares')
        if timing:
            table, same = measure_speed(chosen, old, scratch), True
        else:
            table, same = compare_losses(chosen, old, scratch)
    if result:
        Path(result).write_text(table, encoding='utf-8')
    return 0 if same else 1


def choose_cases(known: dict) -> dict:
    """Returns the cases that --cases names, or all."""
    names = [name.strip() for name in cases.split(',') if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f'--cases: no case is named {name!r}; known: {", ".join(known)}')
    return {name: known[name] for name in names} or known


# -- losses


def compare_losses(chosen: dict[str, Case], old: Path, scratch: Path) -> tuple[str, bool]:
    """Trains all cases with both revisions; returns the table and whether everything is equal."""
    lines, same = [f'{"case":38}{"compared":>9}  {base} and the working tree'], True
    print(lines[-1], flush=True)
    for name, count, difference in compare_all(chosen, old, scratch):
        same = same and not difference
        lines.append(f'{name:38}{count:>9}  {difference or "equal"}')
        print(lines[-1], flush=True)
    return '\n'.join(lines) + '\n', same


def compare_all(chosen: dict[str, Case], old: Path, scratch: Path) -> Iterator[Row]:
    yield 'dataset (bytes)', *compare_bins(scratch / 'data-old', scratch / 'data-new')
    for name, case in chosen.items():
        try:
            yield from compare_case(name, case, old, scratch)
        except UserError as error:
            yield name, 0, str(error)


def compare_case(name: str, case: Case, old: Path, scratch: Path) -> Iterator[Row]:
    """Compares a case; if it is resumed, also when the new revision resumes the old one's run."""
    folder = scratch / 'run'
    shutil.rmtree(folder, ignore_errors=True)
    if case.cut:
        part = f'--max_iters={case.cut}'
        train(old, case, folder / 'old', scratch, part)
        train(ROOT, case, folder / 'new', scratch, part)
        shutil.copytree(folder / 'old', folder / 'mixed')
    part = '--init_from=resume' if case.cut else ''
    train(old, case, folder / 'old', scratch, part)
    train(ROOT, case, folder / 'new', scratch, part)
    expected = read_values(folder / 'old')
    yield name, *compare(expected, read_values(folder / 'new'))
    if case.cut:
        train(ROOT, case, folder / 'mixed', scratch, part)
        yield f'{name}, begun by {base}', *compare(expected, read_values(folder / 'mixed'))


def train(tree: Path, case: Case, out_dir: Path, scratch: Path, part: str):
    """Runs one part of a case with the revision in `tree`, on the bins of the old revision."""
    command = [sys.executable]
    if case.ranks > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={case.ranks}']
    command += ['train.py', '--dataset=shakespeare_char', *case.flags.split(), '--device=cpu']
    command += [f'--data_dir={scratch / "data-old"}', f'--out_dir={out_dir}', '--compile=False']
    run([*command, *part.split()], tree, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')


def read_values(out_dir: Path) -> dict[str, object]:
    """Returns what a run has logged, in order: 'step 3 loss/step' -> value."""
    values = {}
    for line in (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name.startswith(COMPARED):
                values[f'step {record["step"]} {name}'] = value
    return values


def compare(old: dict[str, object], new: dict[str, object]) -> tuple[int, str]:
    """Returns how many values were compared and the first difference, '' if there is none.

    The values are compared as printed, which tells any two numbers apart.
    """
    for place in [*old, *(place for place in new if place not in old)]:
        before, after = (
            repr(values[place]) if place in values else 'nothing' for values in (old, new)
        )
        if before != after:
            return len(old), f'{place}: {before} became {after}'
    return len(old), '' if old else 'the runs have logged no losses'


def compare_bins(old: Path, new: Path) -> tuple[int, str]:
    """Returns the bytes compared and a sentence if train.bin or val.bin differs."""
    size = 0
    for name in ('train.bin', 'val.bin'):
        before, after = ((folder / 'shakespeare_char' / name).read_bytes() for folder in (old, new))
        if before != after:
            return size, f'{name} differs'
        size += len(before)
    return size, ''


# -- speed


def measure_speed(chosen: dict[str, str], old: Path, scratch: Path) -> str:
    """Trains every config with both revisions, alternating; returns a table of their speeds."""
    lines = [
        f'{rounds} rounds on {device}; new / old: median (lowest to highest)',
        f'{"config":24}{"old tokens/s":>14}{"new tokens/s":>14}{"speed":>26}{"whole process":>26}',
    ]
    print('\n'.join(lines), flush=True)
    for name, flags in chosen.items():
        old_runs, new_runs = [], []
        for turn in range(rounds):
            in_turn = [(old_runs, old), (new_runs, ROOT)]
            for runs, tree in reversed(in_turn) if turn % 2 else in_turn:  # each goes first in turn
                runs.append(time_run(tree, flags, scratch))
        old_rates, old_seconds = zip(*old_runs, strict=True)
        new_rates, new_seconds = zip(*new_runs, strict=True)
        lines.append(
            f'{name:24}{statistics.median(old_rates):14,.0f}{statistics.median(new_rates):14,.0f}'
            f'{ratio(new_rates, old_rates):>26}{ratio(old_seconds, new_seconds):>26}'
        )
        print(lines[-1], flush=True)
    return '\n'.join(lines) + '\n'


def time_run(tree: Path, flags: str, scratch: Path) -> tuple[float, float]:
    """Returns a run's tokens/s, the median of all logged lines but the first, and its seconds."""
    command = [sys.executable, 'train.py', *flags.split(), f'--device={device}', '--compile=False']
    command += [f'--data_dir={scratch / "data-old"}', f'--out_dir={scratch / "run"}', '--overwrite']
    started = time.perf_counter()
    run(command, tree)
    seconds = time.perf_counter() - started
    lines = (scratch / 'run' / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    logged = [json.loads(line).get('tokens_per_second') for line in lines]
    rates = [rate for rate in logged if rate is not None]
    return statistics.median(rates[1:]), seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Shows the ratio of each round, because a machine's speed drifts: median, lowest, highest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})'


# -- the two revisions


def check_out(reference: str, folder: Path) -> Path:
    """Writes the files of a git reference to a folder; the repository itself is not touched."""
    command = ['git', 'archive', '--format=zip', reference]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors='replace').strip().splitlines()[-1]
        raise UserError(
            f'--base={reference}: neither a git reference nor a copy of nibGPT ({reason})'
        )
    zipfile.ZipFile(io.BytesIO(done.stdout)).extractall(folder)
    return folder


def run(command: Sequence[str], tree: Path, **variables: str):
    """Runs a script of a revision. Raises UserError with the end of its output if it fails."""
    done = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        which = 'the working tree' if tree == ROOT else base
        end = ' '.join(done.stdout.split())[-300:]
        raise UserError(f'{which} fails with exit code {done.returncode}: {end}')


def make_text() -> str:
    """Returns 47,000 characters with something to learn: digits written out, and squares."""
    digits = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
    lines = []
    for number in range(1900):
        words = ' '.join(digits[int(digit)] for digit in str(number))
        lines.append(f'{words}: {number * number}\n')
    return ''.join(lines)


def write_squares(folder: Path):
    """Writes bins of ids below 60,000, as nanoGPT's: without a meta.json."""
    folder.mkdir()
    squares = array('H', [number * number % 60_000 for number in range(3000)])
    for name, ids in (('train.bin', squares[:2000]), ('val.bin', squares[2000:])):
        (folder / name).write_bytes(ids.tobytes())


if __name__ == '__main__':
    run_script(main)
