"""Writes datasets: encodes text into bins and a meta.json, which nib/tokens/dataset.py reads."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import numpy as np

from nib.errors import UserError
from nib.files import read_json, shown
from nib.text import documents
from nib.text.tokenizer import CharTokenizer, Tokenizer, tokenizer_from_json
from nib.text.vocabulary import has_words
from nib.tokens.dataset import FORMAT, sampled_digest
from nib.tokens.encode import SPLITS, Piece, encode_all
from nib.tokens.unfinished import UnfinishedBins, locked, read_digest, read_key, remove_unfinished


def write_char_dataset(folder, text: str, source: dict) -> dict:
    """Writes a character dataset of one text, split by position.

    source: where the text comes from, recorded in meta.json.
    Returns the content of meta.json. Raises UserError if the text is too short.
    """
    return write_text(folder, text, CharTokenizer.train(text), source)


def write_text(folder, text: str, tokenizer: Tokenizer, source: dict) -> dict:
    """Writes a dataset of one text in memory, split by position; see write_char_dataset."""
    documents.split_position(len(text))  # if the text is too short, fails before there is a folder

    def read_pieces(start):
        pieces = (piece for piece, _ in documents.cut([(text, True)]))
        return islice(documents.split_text(pieces, len(text), has_words(tokenizer)), start, None)

    return write_dataset(folder, read_pieces, tokenizer, source)


def write_dataset(
    folder,
    read_pieces: Callable[[int], Iterator[Piece]],
    tokenizer: Tokenizer,
    source: dict,
    n_bytes: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict:
    """Encodes pieces of text on all cores and writes the bins and meta.json.

    read_pieces(n): yields the pieces from index n on.
    source: where the text comes from, recorded in meta.json. It must differ for different texts: a
    run continues the bins of a stopped run with the same source and tokenizer.
    n_bytes: of the whole text, for the progress bar. check: is called before anything is written,
    when no other process writes here; it may raise UserError.
    An existing dataset in the folder stays until the new one is complete, or for good if it has the
    same source and tokenizer and is intact. One process writes at a time; others wait.
    Returns the content of meta.json. Raises UserError if the folder cannot be written.
    """
    folder = Path(folder)
    tokenizer.encode('')  # fails now, not later, if the tokenizer cannot be loaded
    with locked(folder):
        if existing := _read_intact(folder, source, tokenizer):
            remove_unfinished(folder)
            return existing
        check()
        return _write(folder, read_pieces, tokenizer, source, n_bytes)


def describe(folder: Path, content: str, meta: dict) -> str:
    """Returns a line about a dataset. content: what it was made from. meta: its meta.json."""
    train, val = (meta['splits'][split]['tokens'] for split in SPLITS)
    return (
        f'{shown(folder)}: {content}, vocabulary {meta["vocab_size"]:,}, {train:,} training and '
        f'{val:,} validation tokens'
    )


def stored_tokenizer(folder: Path, source: dict) -> Tokenizer | None:
    """Returns the tokenizer of this source's dataset, even an incomplete one; None if none."""
    for described in (read_json(folder / 'meta.json'), read_key(folder)):
        if described.get('source') == json.loads(json.dumps(source)):
            with suppress(UserError):
                return tokenizer_from_json(described.get('tokenizer'))
    return None


def _read_intact(folder: Path, source: dict, tokenizer: Tokenizer) -> dict | None:
    """Returns the content of meta.json if it describes this dataset and the bins are intact."""
    meta = read_json(folder / 'meta.json')
    described = [meta.get(key) for key in ('format', 'source', 'tokenizer')]
    if described != [FORMAT, json.loads(json.dumps(source)), tokenizer.to_json()]:
        return None
    try:
        for split in SPLITS:
            with open(folder / f'{split}.bin', 'rb') as file:
                if read_digest(file).hexdigest() != meta['splits'][split]['sha256']:
                    return None
    except (OSError, KeyError, TypeError):
        return None
    return meta


def _write(
    folder: Path,
    read_pieces: Callable[[int], Iterator[Piece]],
    tokenizer: Tokenizer,
    source: dict,
    n_bytes: int | None,
) -> dict:
    from tqdm import tqdm  # only needed to write a dataset

    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
    key = {
        'format': FORMAT,
        'piece': [documents.PIECE, documents.CUTTING],
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
            pieces = read_pieces(unfinished.done['pieces'])
            begun = unfinished.done['unfinished']
            # After Ctrl-C, its processes end here, not when the generator is garbage-collected.
            with closing(encode_all(pieces, tokenizer, dtype, begun)) as batches:
                for encoded in batches:
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
            if digest := sampled_digest(path, dtype, tokenizer):
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
