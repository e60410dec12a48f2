"""The stages of benchmarks/gpu.py that run train.py; gpu_stages.py says what a stage takes."""

import hashlib
import math
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.gpu_stages import ROOT, Setting
from nib.report.history import read_run
from nib.tokens import shakespeare

TARGET = 1.4697  # validation loss that nanoGPT publishes for config/train_shakespeare_char.py
PYTHON = [sys.executable, '-u']
TOY_FLAGS = (
    '--device=cpu --n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --max_iters=30 '
    '--eval_interval=15 --eval_iters=2 --log_interval=5 --compile=False'
).split()


def find_text(s: Setting) -> Path:
    """Returns the path of --text, or of a file made from Python's library."""
    path = Path(s.text or s.out / 'text.txt')
    if not path.exists():
        sources = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
        whole = ''.join(source.read_text(encoding='ascii', errors='ignore') for source in sources)
        path.write_text(whole[: 100_000 if s.rehearse else 5_000_000])
    return path


def write_characters(path: Path, folder: Path):
    """Writes the bins of a text's characters as nanoGPT does. Both projects read them."""
    whole = path.read_text(encoding='utf-8', errors='ignore')
    characters = sorted(set(whole))
    numbers = {character: number for number, character in enumerate(characters)}
    ids = np.array([numbers[character] for character in whole], dtype=np.uint16)
    n_train = int(0.9 * len(ids))
    folder.mkdir(parents=True, exist_ok=True)
    ids[:n_train].tofile(folder / 'train.bin')
    ids[n_train:].tofile(folder / 'val.bin')
    meta = {'vocab_size': len(characters), 'stoi': numbers, 'itos': dict(enumerate(characters))}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


def measure_char(s, figures, end):
    """The character model to nanoGPT's published loss; with another text, the time of its steps."""
    path, data = find_text(s), s.out / 'data' / 'shakespeare_char'
    is_shakespeare = (
        hashlib.sha256(path.read_bytes()).hexdigest() == shakespeare.SHA256 and not s.rehearse
    )
    write_characters(path, data)
    toy = TOY_FLAGS if s.rehearse else []
    ours = [f'--data_dir={data.parent}', '--fallback_dataset=', '--overwrite', '--no-report', *toy]
    train_py = [*PYTHON, 'train.py']
    char, fast_char = 'config/train_shakespeare_char.py', 'config/fast_shakespeare_char.py'
    runs = {
        'nibGPT': ([*train_py, char, f'--out_dir={s.out}/char', *ours], ROOT),
        'fast': ([*train_py, fast_char, f'--out_dir={s.out}/char-fast', *ours], ROOT),
    }
    if s.nanogpt:  # which prints only every log_interval-th step's time
        theirs = [*toy, f'--log_interval={1 if s.rehearse else 10}']
        command = [*train_py, char, f'--out_dir={s.out}/char-nanogpt', *theirs]
        runs['nanoGPT'] = command, copy_nanogpt(s, data)
    for i, (name, (command, folder)) in enumerate(runs.items()):
        left = (end - 5 - time.perf_counter()) / (len(runs) - i)
        if i < len(runs) - 1:
            left *= 1.2
        target = TARGET if is_shakespeare else math.inf
        evaluations, lines, reached = watch_run(command, folder, left, target)
        if is_shakespeare:
            seconds = evaluations[-1][0] if reached else 'not reached in its time'
            losses = ', '.join(f'{step}: {loss}' for _, step, loss in evaluations)
            figures.note(f'{name}: seconds to {TARGET}', seconds)
            figures.note(f'{name}: step, loss of each evaluation', losses)
        times = re.findall(r'^iter \d+: .*time ([\d.]+)ms', ''.join(lines), re.MULTILINE)
        if times:
            figures.note(f'{name}: ms per step', statistics.median(map(float, times)))
        elif name != 'nanoGPT' and len(evaluations) > 1:
            speeds = read_run(f'{s.out}/char{"-fast" * (name == "fast")}').values(
                'tokens_per_second'
            )
            tokens = 4 * 32 if s.rehearse else 64 * 256
            figures.note(f'{name}: ms per step', 1000 * tokens / statistics.median(speeds))
        else:
            said = lines[-1].strip() if lines else 'nothing'
            figures.note(name, f'no steps; it ended with: {said}')


def copy_nanogpt(s: Setting, data: Path) -> Path:
    """Copies the clone, with the dataset's tokens as its data."""
    folder = s.out / 'nanogpt'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(s.nanogpt) / 'config', folder / 'config')
    for path in Path(s.nanogpt).glob('*.py'):
        shutil.copy(path, folder)
    shutil.copytree(data, folder / 'data' / 'shakespeare_char')
    return folder


def watch_run(command, folder, limit: float, target: float):
    """Runs a training until an evaluation after step 0 is at most `target`, or for `limit` seconds.

    Returns its evaluations (seconds since the start, step, validation loss), its lines, and whether
    the target was reached.
    """
    started, evaluations, lines, reached = time.perf_counter(), [], [], False
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(max(1.0, limit), process.kill)
    timer.start()
    for line in process.stdout:
        print(line, end='')
        lines.append(line)
        if found := re.match(r'step (\d+): train loss [\d.]+, val loss ([\d.]+)', line):
            evaluations.append((time.perf_counter() - started, int(found[1]), float(found[2])))
            reached = int(found[1]) > 0 and float(found[2]) <= target
            if reached:
                break
    process.kill()
    process.wait()
    timer.cancel()
    return evaluations, lines, reached


def compare_recipes(s, figures, end):
    """fast_gpt2's recipe against train_gpt2's: the loss after the same training time."""
    path, data = find_text(s), s.out / 'data' / 'recipes'
    prepare = [*PYTHON, ROOT / 'data/text/prepare.py', f'--input={path}', f'--out_dir={data}']
    # GPT-2's tokenizer needs tiktoken, and files that it may have to download.
    if s.rehearse or subprocess.run([*prepare, '--tokenizer=gpt2']).returncode:
        shutil.rmtree(data, ignore_errors=True)
        write_characters(path, data)
    figures.note('tokens', 'characters' if (data / 'meta.pkl').exists() else 'gpt2')
    micro_steps = 2 if s.rehearse else 4
    size = TOY_FLAGS if s.rehearse else ['--batch_size=16', '--compile']
    size = [*size, f'--gradient_accumulation_steps={micro_steps}']
    tokens_per_step = micro_steps * (4 * 32 if s.rehearse else 16 * 1024)

    def run(name, steps):
        folder = s.out / name
        where = ['--dataset=recipes', f'--data_dir={data.parent}', f'--out_dir={folder}']
        schedule = [f'--max_iters={steps}', f'--warmup_iters={max(1, steps // 20)}']
        watching = [f'--eval_interval={steps}', '--eval_iters=5', '--log_interval=5', '--no-report']
        flags = [*where, '--overwrite', *size, *schedule, *watching]
        subprocess.run([*PYTHON, 'train.py', f'config/{name}.py', *flags], cwd=ROOT, check=True)
        return read_run(folder)

    for name in ('train_gpt2', 'fast_gpt2'):
        speed = max(run(name, 30 if s.rehearse else 20).values('tokens_per_second'))
        steps = 30 if s.rehearse else max(20, int(s.recipe_seconds * speed / tokens_per_step))
        done = run(name, steps)
        figures.note(f'{name}: tokens/s', speed)
        figures.note(f'{name}: steps', steps)
        figures.note(f'{name}: validation loss', done.values('loss/val_whole')[-1])
