"""Prepares one dataset in several processes at once, and opens bins of other vocabularies.

python stress/datasets.py                               200 rounds of three processes, 700 bins
python stress/datasets.py --rounds=20 --vocabularies=50   a quick look

The processes are forked, so this program needs Linux or macOS. Half of all rounds kill one of the
three at a random moment. If GPT-2's vocabulary is available, texts in its tokens are opened, too.
"""

import multiprocessing
import os
import pickle
import random
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from nib.errors import UserError, run_script, warn
from nib.schema import check_range
from nib.text import documents
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.tokenizer import ByteTokenizer
from nib.tokens import encode, unfinished
from nib.tokens.dataset import open_dataset
from nib.tokens.write import write_dataset

rounds: int = 200  # times that three processes prepare a dataset together
vocabularies: int = 700  # bins to open, alternating between all kinds
seed: int = 0  # determines texts, vocabularies and kills
result: str = ''  # also write the table to this file

PROCESSES = 3
WAITED, BROKEN = 10, 11  # exit codes of a process, besides 0
ROUND = 'prepared by three processes at once'
KILLED = 'the same, and one is killed'


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'rounds', 'vocabularies', least=1)
    draw = random.Random(seed)
    prepared = {ROUND: Counter(), KILLED: Counter()}
    opened = {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            kind = (ROUND, KILLED)[number % 2]
            prepared[kind] += prepare_together(Path(scratch, f'd{number}'), kind == KILLED, draw)
        for number in range(vocabularies):
            kind = list(KINDS)[number % len(KINDS)]
            opened[kind][KINDS[kind](Path(scratch, 'foreign'), draw)] += 1
    table = '\n'.join(
        [
            measure.describe_machine(),
            '',
            *rows(prepared, ('processes', 'waited', 'killed', 'broken')),
            '',
            *rows(opened, ('right', 'rejected', 'wrong')),
            '',
        ]
    )
    measure.publish(table, result)
    wrong = [count['broken'] for count in prepared.values()]
    wrong += [count['wrong'] for kind, count in opened.items() if kind != FEW]
    return int(any(wrong))


def rows(counts: dict[str, Counter], columns) -> list[str]:
    heading = f'{"":54}' + ''.join(f'{column:>11}' for column in columns)
    return [heading] + [
        f'{kind:54}' + ''.join(f'{count[column]:>11,}' for column in columns)
        for kind, count in counts.items()
    ]


# -- several processes -----------------------------------------------------------------------------


def prepare_together(folder: Path, killing: bool, draw: random.Random) -> Counter:
    """Prepares a dataset in three processes at once; returns how they ended."""
    text = ''.join(draw.choices('to be or not\n', k=3000))
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=prepare, args=(folder, text)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    if killing:
        time.sleep(draw.uniform(0, 0.04))
        os.kill(processes[draw.randrange(PROCESSES)].pid, signal.SIGKILL)
    counts = Counter(processes=PROCESSES)
    for process in processes:
        process.join()
        code = process.exitcode
        counts['waited'] += code == WAITED
        counts['killed'] += code == -signal.SIGKILL
        counts['broken'] += code not in (0, WAITED, -signal.SIGKILL)
    # Whatever the killed process has left, the dataset is there.
    last = context.Process(target=prepare, args=(folder, text))
    last.start()
    last.join()
    names = sorted(path.name for path in folder.iterdir())
    intact = last.exitcode == 0 and names == ['meta.json', 'train.bin', 'val.bin']
    counts['broken'] += not intact
    if not intact:
        warn(f'broken: exit code {last.exitcode}, {names}')
    return counts


def prepare(folder: Path, text: str):
    """Prepares and opens the dataset; ends this process with an exit code."""
    encode.BATCH, encode.SERIAL_BATCHES, unfinished.JOURNAL_SECONDS = 100, 1 << 30, 0.0
    unfinished._POLL_SECONDS = 0.002

    def read_pieces(start):
        pieces = (text[first : first + 100] for first in range(0, len(text), 100))
        return list(documents.split_text(pieces, len(text)))[start:]

    messages = tempfile.TemporaryFile('w+')  # noqa: SIM115, ends with this process
    try:
        with redirect_stderr(messages):
            write_dataset(folder, read_pieces, ByteTokenizer(), {'text': text})
        data = open_dataset(folder, 16)
        intact = data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val) == text
        code = (WAITED if messages.tell() else 0) if intact else BROKEN
    except BaseException:
        traceback.print_exc()
        code = BROKEN
    os._exit(code)


# -- foreign vocabularies --------------------------------------------------------------------------


def draw_ids(size: int, n: int, draw: random.Random) -> np.ndarray:
    """Returns ids that are equally frequent, or distributed like words (Zipf 1949)."""
    generator = np.random.default_rng(draw.getrandbits(32))
    weights = 1 / np.arange(1, size + 1) if draw.random() < 0.5 else np.ones(size)
    weights = generator.permutation(weights)
    return generator.choice(size, n, p=weights / weights.sum())


def write(folder: Path, ids: np.ndarray, meta: dict | None):
    folder.mkdir(exist_ok=True)
    (folder / 'meta.pkl').unlink(missing_ok=True)
    if meta:
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    for split in ('train', 'val'):
        ids.astype('<u2').tofile(folder / f'{split}.bin')


def bare(folder: Path, draw: random.Random, lengths: tuple[int, int]) -> str:
    """Opens ids of an unknown vocabulary: right only if they are rejected."""
    ids = draw_ids(draw.randint(2, 32_000), draw.randint(*lengths), draw)
    write(folder, ids, None)
    try:
        open_dataset(folder, 16)
    except UserError:
        size = int(ids.max()) + 1
        is_right = open_dataset(folder, 16, vocab_size=size).vocab_size == size
        return 'rejected' if is_right else 'wrong'
    return 'wrong'


def described(folder: Path, draw: random.Random, tokens: list | None) -> str:
    """Opens ids with a meta.pkl: right if their text is what its itos says."""
    size = len(tokens) if tokens else draw.randint(2, 50_000)
    ids = draw_ids(size, 500, draw)
    meta: dict = {'vocab_size': size}
    if tokens:
        draw.shuffle(tokens)
        meta |= {'itos': dict(enumerate(tokens)), 'stoi': {t: n for n, t in enumerate(tokens)}}
    write(folder, ids, meta)
    data = open_dataset(folder, 16)
    if not tokens:
        expected = [str(number) for number in ids]
        text = data.tokenizer.decode(data.train).split()
    elif len(str(max(tokens, key=lambda token: len(str(token))))) > 1:
        expected, text = [str(tokens[n]) for n in ids], data.tokenizer.decode(data.train).split()
    else:
        expected, text = [tokens[n] for n in ids], list(data.tokenizer.decode(data.train))
    again = data.tokenizer.encode(data.tokenizer.decode(data.train))
    is_right = text == expected and (again == ids).all() and data.vocab_size == size
    return 'right' if is_right else 'wrong'


def gpt2_text(folder: Path, draw: random.Random) -> str:
    """Opens part of a module of Python, or of a document of this project, in GPT-2's tokens."""
    files = [*Path(sysconfig.get_paths()['stdlib']).glob('*.py'), *ROOT.glob('docs/*.md')]
    text = draw.choice(sorted(files)).read_text(encoding='utf-8', errors='replace')
    first = draw.randrange(max(1, len(text) - 200))
    try:
        ids = Gpt2Tokenizer().encode(text[first : first + draw.randint(200, 100_000)])
    except UserError:
        return 'no vocabulary'
    write(folder, ids, None)
    try:
        return 'right' if open_dataset(folder, 4).tokenizer == Gpt2Tokenizer() else 'wrong'
    except UserError:
        return 'wrong'


FEW = 'unknown vocabulary, 50 to 1,000 tokens'
KINDS = {
    FEW: lambda folder, draw: bare(folder, draw, (50, 1_000)),
    'unknown vocabulary, 2,000 to 100,000 tokens': (
        lambda folder, draw: bare(folder, draw, (2_000, 100_000))
    ),
    "text in GPT-2's tokens, no description": gpt2_text,
    'vocab_size alone': lambda folder, draw: described(folder, draw, None),
    'characters in any order': (
        lambda folder, draw: described(folder, draw, draw.sample('abcdefghij \néß天', 9))
    ),
    'words': lambda folder, draw: described(folder, draw, [f'w{n}' for n in range(100)]),
    'notes': lambda folder, draw: described(folder, draw, list(range(21, 109))),
}


if __name__ == '__main__':
    run_script(main)
