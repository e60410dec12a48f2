"""OpenWebText by GPT-2's tokens: 8 million pages that people on Reddit recommended, 9 billion tokens.

Fetches it from Hugging Face (pip install datasets; 54 GB in its cache, HF_HOME says where), or takes --input=FOLDER. The
split and the order are nanoGPT's. A run that was stopped goes on where it was.
"""

import logging
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np

import configurator
from nib.errors import UserError, run_script
from nib.files import shown
from nib.text import documents
from nib.text.tokenizer import Gpt2Tokenizer
from nib.tokens.write import write_dataset

input: str = ''  # .jsonl and .parquet files, or a folder of them, whose rows are documents; empty: OpenWebText itself
field: str = 'text'  # the field of these rows that holds the text
out_dir: str = ''  # where the bins go; empty: beside this file

NAME = 'Skylion007/openwebtext'
EXPECTED = {'train': 9_035_582_198, 'val': 4_434_897}  # tokens, as nanoGPT has published them
VAL_FRACTION, SEED = 0.0005, 2357


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    folder = Path(out_dir) if out_dir else Path(__file__).resolve().parent
    Gpt2Tokenizer().encode('')  # without its files, say so before fetching 54 GB
    texts = load(folder)
    if len(texts) < 2:
        raise UserError(
            f'{input} holds {len(texts)} documents: it takes two to have one of them to validate on'
        )
    n_val = math.ceil(VAL_FRACTION * len(texts))
    order = np.random.default_rng(SEED).permutation(
        len(texts)
    )  # as Hugging Face's train_test_split has it
    splits = {'train': order[n_val:], 'val': order[:n_val]}

    def read_pieces(start):
        for split, rows in splits.items():
            for first in range(start, len(rows), 1000):
                yield from (
                    (split, text or '', True) for text in texts.read(rows[first : first + 1000])
                )
            start = max(0, start - len(rows))

    source = {
        'dataset': Path(input).name if input else NAME,
        'fingerprint': texts.fingerprint,
        'documents': {split: len(rows) for split, rows in splits.items()},
    }
    meta = write_dataset(folder, read_pieces, Gpt2Tokenizer(), source, texts.n_bytes)
    tokens = {split: counts['tokens'] for split, counts in meta['splits'].items()}
    print(
        f'{shown(folder)}: documents {len(texts):,}, vocabulary {meta["vocab_size"]:,}, {tokens["train"]:,} training and '
        f'{tokens["val"]:,} validation tokens'
    )
    if not input and tokens != EXPECTED:
        print(
            f'note: nanoGPT has published {EXPECTED["train"]:,} and {EXPECTED["val"]:,} tokens; {NAME} has changed since',
            file=sys.stderr,
        )


def load(folder: Path):
    """All documents, as something that is read in any order: it has a length, n_bytes, a fingerprint and read(rows)."""
    if not input:
        return HubTexts()
    files, _ = documents.find_files(input.split(','))
    files = [
        file for ending in ('.jsonl', '.parquet') for file in files if file.suffix.lower() == ending
    ]
    if not files:
        raise UserError(f'{input} holds no .jsonl or .parquet file')
    return documents.StoredTexts(
        folder, (text for text, _ in documents.read_documents(files, field, with_empty=True))
    )


class HubTexts:
    """OpenWebText in Hugging Face's cache on this disk, fetched where it is not there."""

    def __init__(self):
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                'this dataset needs a package that is not installed: pip install datasets'
            ) from error
        logging.getLogger('huggingface_hub').setLevel(
            logging.ERROR
        )  # it tells of every one of five attempts
        if not sys.stderr.isatty():
            datasets.utils.disable_progress_bars()
        print(f'loading {NAME} from Hugging Face')
        try:
            self.rows = datasets.load_dataset(
                NAME, split='train', num_proc=os.cpu_count()
            ).select_columns('text')
        except Exception as error:  # what can go wrong between here and the Hub is of many types
            while error.__cause__:
                error = error.__cause__
            raise UserError(
                f'{NAME} could not be loaded ({type(error).__name__}: {error}); fetch it where there is a network, '
                f'or name a folder of .jsonl or .parquet files: --input=FOLDER'
            ) from error
        self.n_bytes, self.fingerprint = (
            self.rows.data.nbytes,
            self.rows._fingerprint,
        )  # of the files that it was made of

    def __len__(self):
        return len(self.rows)

    def read(self, rows: np.ndarray) -> list[str]:
        return self.rows[rows.tolist()]['text']


if __name__ == '__main__':
    run_script(main)
