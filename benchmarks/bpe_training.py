"""Trains a tokenizer on texts of growing size: time, memory, and the tokenizers library beside it.

    python benchmarks/bpe_training.py --input=FOLDER --megabytes=1000

Each turn is a process of its own. The library's trainer gets the same texts and the same pattern,
and its tokenizer must be equal if no words were dropped; it is only run up to --library megabytes.
"""

import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from nib.errors import UserError, run_script
from nib.text import documents, inputs, train_bpe
from nib.text.hf_tokenizer import import_library

input: str = ''  # files and folders of text, separated by commas: .txt, .md, .jsonl, .parquet
megabytes: float = 1000.0  # size of the largest text; also measured: a tenth and three tenths of it
library: float = 100.0  # megabytes up to which the library is measured
vocab_size: int = 32768  # tokens
result: str = ''  # file to write the table to; empty: standard output only
one: str = ''  # used by the script itself: 'nibGPT' or 'library', to take one turn


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if not input:
        raise UserError('--input=PATH is missing: name the files and folders that hold the text')
    if one:
        return take_turn()
    from benchmarks import measure  # it imports torch, which would count as memory of a turn

    lines = [
        f'{vocab_size:,} tokens; {measure.describe_machine()}',
        '',
        f'{"":10}{"MB":>8}{"seconds":>10}{"CPU s":>10}{"peak MB":>10}  merges',
    ]
    for share in (0.1, 0.3, 1.0):
        size = share * megabytes
        digests = set()
        for contestant in ('nibGPT', *['library'] * (size <= library)):
            flags = [f'--{key}={values[key]}' for key in ('input', 'vocab_size')]
            flags += [f'--megabytes={size}', f'--one={contestant}']
            done = subprocess.run(
                [sys.executable, __file__, *flags], capture_output=True, text=True
            )
            if done.returncode:
                raise UserError(f'{contestant} failed: {done.stderr[-500:]}')
            figures, digest = done.stdout.rstrip().rsplit(maxsplit=1)
            lines.append(f'{contestant:10}{figures}  {digest}')
            print(lines[-1], flush=True)
            digests.add(digest)
        if len(digests) > 1:
            raise UserError('the two tokenizers differ')
    table = '\n'.join(lines) + '\n'
    print(table)
    if result:
        Path(result).write_text(table)


def take_turn():
    """Trains once; prints the figures, and the beginning of the SHA-256 of the merges."""
    n_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal n_bytes
        files, _ = inputs.find_files([Path(name).expanduser() for name in input.split(',')])
        for text, _ in documents.read_documents(files, 'text'):
            yield text
            n_bytes += len(text.encode())
            if n_bytes >= megabytes * 1e6:
                return

    started = time.perf_counter()
    if one == 'library':
        tokenizers = import_library()
        trained = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(train_bpe.PATTERN), 'isolated')
        to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=to_bytes.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator(texts(), trainer)
        content = trained.to_str()
    else:
        content = train_bpe.train_bpe(texts(), vocab_size).content
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    digest = hashlib.sha256(json.dumps(json.loads(content)['model']['merges']).encode()).hexdigest()
    cpu = used.ru_utime + used.ru_stime
    print(
        f'{n_bytes / 1e6:8.0f}{seconds:10.1f}{cpu:10.1f}{used.ru_maxrss / 1000:10.0f} {digest[:12]}'
    )


if __name__ == '__main__':
    run_script(main)
