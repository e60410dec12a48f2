"""OpenWebText in GPT-2's tokens: 8 million web pages shared on Reddit, 9 billion tokens.

Downloads it from Hugging Face (pip install datasets; 54 GB in its cache, set HF_HOME to move it),
or reads --input=FOLDER. The split and the order are the same as nanoGPT's. A run that was stopped
continues where it left off.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import logging
import math
import os
import socket
from functools import partial

import numpy as np

import configurator
from nib.errors import UserError, optional, run_script
from nib.text import documents, inputs
from nib.text.download import DownloadError
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.rows import READERS, read_rows
from nib.tokens.write import describe, write_dataset

input: str = ''  # .jsonl or .parquet files or folders, a document per row; empty: download
field: str = 'text'  # the field of a row that contains its text
out_dir: str = ''  # output folder; empty: this file's folder

NAME = 'Skylion007/openwebtext'
EXPECTED = {'train': 9_035_582_198, 'val': 4_434_897}  # tokens, as published by nanoGPT
OFFLINE = (ConnectionError, TimeoutError, socket.gaierror)  # errors without a network
# Packages whose own errors mean the same.
NETWORK = ('requests', 'urllib3', 'httpx', 'httpcore', 'huggingface_hub')
VAL_FRACTION, SEED = 0.0005, 2357


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    folder = Path(out_dir) if out_dir else Path(__file__).resolve().parent
    Gpt2Tokenizer().encode('')  # fails before 54 GB are downloaded if its files are missing
    texts = load(folder)
    if len(texts) < 2:
        raise UserError(
            f'{input} contains {len(texts)} documents, but the split into training and validation '
            f'needs at least two'
        )
    n_val = math.ceil(VAL_FRACTION * len(texts))
    # The order of Hugging Face's train_test_split, which nanoGPT uses.
    order = np.random.default_rng(SEED).permutation(len(texts))
    splits = {'train': order[n_val:], 'val': order[:n_val]}

    def read_pieces(start):
        for split, rows in splits.items():
            for first in range(start, len(rows), 1000):
                for text in texts.read(rows[first : first + 1000]):
                    yield split, text or '', True
            start = max(0, start - len(rows))

    source = {
        'dataset': Path(input).name if input else NAME,
        'fingerprint': texts.fingerprint,
        'documents': {split: len(rows) for split, rows in splits.items()},
    }
    meta = write_dataset(folder, read_pieces, Gpt2Tokenizer(), source, texts.n_bytes)
    print(describe(folder, f'{len(texts):,} documents', meta))
    tokens = {split: counts['tokens'] for split, counts in meta['splits'].items()}
    if not input and tokens != EXPECTED:
        print(
            f'note: nanoGPT published {EXPECTED["train"]:,} and {EXPECTED["val"]:,} tokens; '
            f'{NAME} has changed since',
            file=sys.stderr,
        )


def load(folder: Path):
    """Returns the documents for random access, with len(), n_bytes, fingerprint and read(rows)."""
    if not input:
        return HubTexts()
    files, skipped = inputs.find_files(inputs.split_names(input), tuple(READERS))
    for what in inputs.told(skipped):
        print(f'note: skipped {what}', file=sys.stderr)
    files.sort(key=lambda file: file.suffix.lower() == '.parquet')
    texts = (
        text
        for file in files
        for text in read_rows(file, field, partial(print, f'note: {file}:', file=sys.stderr))
    )
    return documents.StoredTexts(folder, texts)


class HubTexts:
    """OpenWebText from Hugging Face's cache on this disk, downloaded first if it is missing."""

    def __init__(self):
        with optional('datasets', 'this dataset'):
            import datasets
        logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it warns about each retry
        if not sys.stderr.isatty():
            datasets.utils.disable_progress_bars()
        print(f'loading {NAME} from Hugging Face')
        try:
            rows = datasets.load_dataset(NAME, split='train', num_proc=os.cpu_count())
            self.rows = rows.select_columns('text')
        except Exception as error:  # network, disk and data set errors have many types
            cause: BaseException = error
            offline = False
            while True:
                offline |= isinstance(cause, OFFLINE) or type(cause).__module__.startswith(NETWORK)
                if not cause.__cause__:
                    break
                cause = cause.__cause__
            raise (DownloadError if offline else UserError)(
                f'{NAME} could not be loaded ({type(cause).__name__}: {cause}); download it on a '
                f'machine with a network, or use --input=FOLDER to name .jsonl or .parquet files'
            ) from cause
        self.n_bytes = self.rows.data.nbytes
        self.fingerprint = self.rows._fingerprint  # of the files that it was built from

    def __len__(self):
        return len(self.rows)

    def read(self, rows: np.ndarray) -> list[str]:
        return self.rows[rows.tolist()]['text']


if __name__ == '__main__':
    run_script(main)
