"""Encodes a text in GPT-2's tokens with nanoGPT's and nibGPT's scripts, alternating, on one core.

    git clone https://github.com/karpathy/nanoGPT && pip install datasets
    python benchmarks/encoding.py --nanogpt=nanoGPT --input=FOLDER

The scripts are the data/openwebtext/prepare.py of both projects. They read the same documents from
a .jsonl file, and their bins must be equal, byte for byte. With --tokenizer=PATH, a tokenizer.json,
nibGPT's table of words is compared with the batch encoding of the tokenizers library instead.

nanoGPT's script runs as it is in the clone, with three changes. It reads these documents. It starts
no other processes, because eight of them would share the core. It writes at most as many shards as
there are validation documents, because it fails if there are fewer documents than its 1,024 shards.
"""

import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np

import configurator
from benchmarks import measure
from nib.errors import UserError, run_script
from nib.schema import check_range
from nib.text import documents, hf_tokenizer, inputs
from nib.text.hf_tokenizer import import_library
from nib.tokens.borrow import read_tokenizer
from nib.tokens.encode import batched

nanogpt: str = ''  # path of a clone of karpathy/nanoGPT
input: str = ''  # files and folders of text, separated by commas: .txt, .md, .jsonl, .parquet
field: str = 'text'  # the field of .jsonl and .parquet rows that holds the text
megabytes: float = 100.0  # maximum size of the text to encode
rounds: int = 3  # turns of each contestant
tokenizer: str = ''  # a tokenizer.json: compare with its library, and not with nanoGPT
parts: bool = True  # also measure the peak memory on a tenth and three tenths of the text
result: str = ''  # also write the table to this file

# The lines that are changed in nanoGPT's script.
PROCESSES, SHARDS = 'num_proc = 8\n', 'total_batches = 1024\n'
# Both print the seconds from loaded documents to bins, which include loading the vocabulary.
NANOGPT = f"""
import sys, time
import datasets
script, file, out_dir = sys.argv[1:]
dataset = datasets.load_dataset('json', data_files=file)
datasets.load_dataset = lambda *names, **options: dataset
shards = max(1, min(1024, int(0.0005 * len(dataset['train']))))
code = open(script).read().replace({PROCESSES!r}, 'num_proc = None\\n')
code = code.replace({SHARDS!r}, f'total_batches = {{shards}}\\n')
started = time.perf_counter()
exec(compile(code, script, 'exec'), {{'__name__': '__main__', '__file__': out_dir + '/prepare.py'}})
print('seconds', time.perf_counter() - started)
"""
NIBGPT = """
import runpy, sys, time
script, file, out_dir = sys.argv[1:]
main = runpy.run_path(script)['main']
load, loading = main.__globals__['load'], []
def timed_load(folder):
    started = time.perf_counter()
    texts = load(folder)
    loading.append(time.perf_counter() - started)
    return texts
main.__globals__['load'] = timed_load
started = time.perf_counter()
main([f'--input={file}', f'--out_dir={out_dir}'])
print('seconds', time.perf_counter() - started - sum(loading))
"""


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if not input:
        raise UserError(
            '--input=PATH is missing: name the files and folders that hold the text to encode'
        )
    check_range(values, 'rounds', least=1)
    if not hasattr(os, 'sched_setaffinity'):
        raise UserError('this needs Linux, where a process can be kept on one core')
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # child processes inherit it
    table = compare_with_library() if tokenizer else compare_with_nanogpt()
    measure.publish(table, result)


def compare_with_library() -> str:
    """Returns a table of the speeds at which two libraries encode the same texts.

    Raises UserError if their ids differ.
    """
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    files, _ = inputs.find_files(inputs.split_names(input))
    pieces = [('', text, False) for text, _ in documents.read_documents(files, field)]
    ends = np.cumsum([len(text.encode()) for _, text, _ in pieces])
    pieces = pieces[: int(np.searchsorted(ends, megabytes * 1e6)) + 1]
    n_bytes = int(ends[len(pieces) - 1])
    batches = [[text for _, text, _ in batch] for batch, _ in batched(pieces)]
    del pieces

    ours = read_tokenizer(tokenizer)

    def by_library(texts):
        encoded = library.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, np.uint32) for encoding in encoded])

    def by_table(texts):
        return ours.encode_texts([(text, False) for text in texts])

    contestants = {'tokenizers': by_library, 'nibGPT': by_table}
    turns, digests = {name: [] for name in contestants}, set()
    for _ in range(rounds):
        for name, encode in contestants.items():
            # Both remember the words of texts that they have encoded.
            library = import_library().Tokenizer.from_file(tokenizer)
            hf_tokenizer._words.cache_clear()
            digest, started = hashlib.sha256(), time.perf_counter()
            for texts in batches:
                digest.update(encode(texts).astype('<u4').tobytes())
            seconds = time.perf_counter() - started
            turns[name].append({'s': seconds, 'MB/s': n_bytes / 1e6 / seconds})
            digests.add(digest.hexdigest())
    if len(digests) > 1:
        raise UserError('the ids differ')
    return (
        f'{rounds} alternating round{"s" * (rounds > 1)} on one core; '
        f'{measure.describe_machine()}; {n_bytes / 1e6:.1f} MB of UTF-8, '
        f'vocabulary {ours.vocab_size:,}; equal ids\n\n'
        f'{measure.make_table(turns)}'
    )


def compare_with_nanogpt() -> str:
    """Returns a table of the speed and the memory of both scripts. Raises UserError if one fails.

    Their bins must be equal.
    """
    theirs = Path(nanogpt) / 'data/openwebtext/prepare.py'
    code = theirs.read_text() if nanogpt and theirs.exists() else ''
    if PROCESSES not in code or SHARDS not in code:
        raise UserError(f'--nanogpt={nanogpt}: expected the path of a clone of karpathy/nanoGPT')
    contestants = {
        'nanoGPT': (NANOGPT, theirs),
        'nibGPT': (NIBGPT, ROOT / 'data/openwebtext/prepare.py'),
    }
    turns = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        n_documents, n_bytes = write_documents(scratch / 'whole.jsonl', int(megabytes * 1e6))
        for turn in range(rounds):
            for name, contestant in contestants.items():
                turns[name].append(
                    take_turn(*contestant, scratch / 'whole.jsonl', n_bytes, scratch / name)
                )
                measure.say_round(turn, name, turns[name][-1])
            for split in ('train.bin', 'val.bin'):
                if not filecmp.cmp(
                    *(scratch / name / split for name in contestants), shallow=False
                ):
                    raise UserError(f'the two {split} differ')
        lines = [
            (
                f'{rounds} alternating round{"s" * (rounds > 1)} on one core; '
                f'{measure.describe_machine()}; '
                f'{n_documents:,} documents, {n_bytes / 1e6:.1f} MB of UTF-8'
            ),
            'train.bin and val.bin equal byte for byte',
            '',
            measure.make_table(turns),
        ]
        for share in (0.1, 0.3) if parts else ():
            _, size = write_documents(scratch / 'part.jsonl', int(share * n_bytes))
            peaks = []
            for name, contestant in contestants.items():
                figures = take_turn(*contestant, scratch / 'part.jsonl', size, scratch / name)
                peaks.append(f'{name} {figures["peak memory MB"]:.0f}')
            lines.append(f'peak memory MB on {size / 1e6:.0f} MB of text: {", ".join(peaks)}\n')
    return '\n'.join(lines)


def write_documents(path: Path, most: int) -> tuple[int, int]:
    """Writes the input's documents to a .jsonl file, until it has `most` bytes of UTF-8.

    Returns the number of documents and of bytes.
    """
    files, _ = inputs.find_files(inputs.split_names(input))
    n_documents, n_bytes, document = 0, 0, []
    with open(path, 'w') as file:
        for text, ends in documents.read_documents(files, field):
            document.append(text)
            if ends:
                n_documents += 1
                n_bytes += sum(len(part.encode()) for part in document)
                file.write(json.dumps({'text': ''.join(document)}) + '\n')
                document = []
            if n_bytes >= most:
                break
    return n_documents, n_bytes


def take_turn(
    program: str, script: Path, file: Path, n_bytes: int, out_dir: Path
) -> dict[str, float]:
    """Runs a contestant's program in an empty folder; returns its figures.

    Raises UserError with the end of its output if it fails.
    """
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir()
    environment = {**os.environ, 'HF_HOME': str(out_dir / 'cache')}  # an empty cache
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, '-c', program, str(script.resolve()), str(file), str(out_dir)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = [0]
    watcher = threading.Thread(target=watch_memory, args=(process, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    whole = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise UserError(f'{script} failed: {output[-500:]}')
    seconds = float(output.split()[-1])
    return {
        'process s': whole,
        'MB/s, whole process': n_bytes / 1e6 / whole,
        'documents to bins s': seconds,
        'MB/s, documents to bins': n_bytes / 1e6 / seconds,
        'peak memory MB': peak[0] / 1000,
    }


def watch_memory(process: subprocess.Popen, peak: list[int]):
    """Stores the peak of the process's anonymous memory, in kB, in peak[0]."""
    with suppress(OSError):  # the process has ended
        while process.poll() is None:
            status = Path(f'/proc/{process.pid}/status').read_text()
            for line in status.splitlines():
                if line.startswith('RssAnon'):
                    peak[0] = max(peak[0], int(line.split()[1]))
            time.sleep(0.02)


if __name__ == '__main__':
    run_script(main)
