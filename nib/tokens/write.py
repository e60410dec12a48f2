"""Makes datasets: text to token bins and a meta.json, which nib/tokens/dataset.py reads."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from nib.text import documents
from nib.text.tokenizer import CharTokenizer, Tokenizer
from nib.tokens.dataset import FORMAT, sampled_digest
from nib.tokens.encode import SPLITS, Piece, encode_all
from nib.tokens.unfinished import UnfinishedBins


def write_char_dataset(folder, text: str, source: dict) -> dict:
    """Makes a character dataset of one text, split by position; returns its meta. UserError for a text too short.

    source: where the text came from, recorded in meta.json.
    """
    return write_text(folder, text, CharTokenizer.train(text), source)


def write_text(folder, text: str, tokenizer: Tokenizer, source: dict) -> dict:
    """Makes a dataset of one text that is in memory, split by position; returns its meta."""

    def read_pieces(start):
        chunks = (
            text[first : first + documents.PIECE] for first in range(0, len(text), documents.PIECE)
        )
        return islice(documents.split_text(documents.cut(chunks), len(text)), start, None)

    return write_dataset(folder, read_pieces, tokenizer, source)


def write_dataset(
    folder,
    read_pieces: Callable[[int], Iterator[Piece]],
    tokenizer: Tokenizer,
    source: dict,
    n_bytes: int | None = None,
) -> dict:
    """Encodes pieces of text on all cores and writes the bins and meta.json; returns what meta.json holds.

    read_pieces(n): the pieces from the n-th on. source: where the text came from, recorded in meta.json; it must differ
    where the text does, as a run with the same source and tokenizer as one that was stopped goes on with what that one
    wrote. n_bytes: of all the text, for the progress bar. What was in the folder stays until all is written.
    """
    from tqdm import tqdm  # here: only a run that writes a dataset pays for the import

    folder = Path(folder)
    tokenizer.encode('')  # one that cannot be loaded says so now
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
    key = {
        'format': FORMAT,
        'piece': documents.PIECE,
        'source': source,
        'tokenizer': tokenizer.to_json(),
    }
    with UnfinishedBins(folder, key, dtype.itemsize) as unfinished:
        with tqdm(
            total=n_bytes,
            initial=sum(unfinished.done['bytes'].values()),
            unit='B',
            unit_scale=True,
            desc=folder.name,
            leave=False,
            disable=None,
        ) as bar:
            for encoded in encode_all(read_pieces(unfinished.done['pieces']), tokenizer, dtype):
                unfinished.add(encoded)
                bar.update(sum(encoded.n_bytes.values()))
        splits = {
            split: {
                'tokens': unfinished.done['tokens'][split],
                'bytes': unfinished.done['bytes'][split],
                'sha256': unfinished.digests[split].hexdigest(),
            }
            for split in SPLITS
        }
        unfinished.save()
        for split, path in unfinished.paths.items():
            if digest := sampled_digest(path, dtype.name, tokenizer):
                splits[split] |= {'sampled_sha256': digest}
        meta = {
            'format': FORMAT,
            'dtype': dtype.name,
            'vocab_size': tokenizer.vocab_size,
            'splits': splits,
            'source': source,
            'tokenizer': tokenizer.to_json(),
        }
        unfinished.finish(meta)
    return meta
