"""Datasets on disk: train.bin and val.bin of raw token ids, meta.json that says what they are.

The bins are nanoGPT's format: little-endian ids, uint16, or uint32 for vocabularies above 65,536.
"""
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nib.errors import UserError
from nib.files import atomic_write
from nib.tokenizer import CharTokenizer, tokenizer_from_json

FORMAT = 1
SPLITS = ('train', 'val')
# Larger bins are not read through before the first step, which would take minutes; the loader checks every batch.
CHECKED_BYTES = 1 << 30
_CHUNK = 1 << 24  # tokens


@dataclass(frozen=True)
class TokenDataset:
    """A checked dataset. train and val are memmaps of token ids, one dimension each."""
    name: str
    folder: Path
    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    tokenizer: CharTokenizer
    meta: dict
    fingerprint: str  # SHA-256 over both bins' digests and the vocabulary's size

    def split(self, name: str) -> np.ndarray:
        return {'train': self.train, 'val': self.val}[name]

    def bits_per_byte(self, loss: float, split: str = 'val') -> float:
        """A loss in nats per token as bits per byte of UTF-8 text, which does not depend on the tokenizer."""
        return loss / math.log(2) * self.meta['splits'][split]['tokens'] / self.meta['splits'][split]['bytes']


def write_char_dataset(folder, text: str, source: dict) -> dict:
    """Makes a character dataset of one text, split by position; returns its meta. UserError for a text too short.

    source: where the text came from, recorded in meta.json.
    """
    tokenizer = CharTokenizer.train(text)
    return write_dataset(folder, dict(zip(SPLITS, split_text(text))), tokenizer, source)


def split_text(text: str, val_fraction: float = 0.1) -> tuple[str, str]:
    """The first part of a text to train on, the rest to validate on, cut where nanoGPT cuts it."""
    cut = int(len(text) * (1 - val_fraction))
    if cut < 2 or len(text) - cut < 2:
        raise UserError(f'the text has {len(text)} characters: too few to split into training and validation')
    return text[:cut], text[cut:]


def write_dataset(folder, texts: dict[str, str], tokenizer, source: dict) -> dict:
    """Writes the bin of every split, each whole or not at all, and meta.json last; returns what meta.json holds."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{folder} cannot be made a folder ({error.strerror}): name another as --out_dir=PATH') from error
    (folder / 'meta.json').unlink(missing_ok=True)  # it would be wrong about the new bins
    dtype = 'uint16' if tokenizer.vocab_size <= 1 << 16 else 'uint32'
    splits = {}
    for split, text in texts.items():
        content = tokenizer.encode(text).astype(np.dtype(dtype).newbyteorder('<')).tobytes()
        with atomic_write(folder / f'{split}.bin') as file:
            file.write(content)
        splits[split] = {'tokens': len(content) // np.dtype(dtype).itemsize,
                         'bytes': len(text.encode('utf-8', 'surrogatepass')),
                         'sha256': hashlib.sha256(content).hexdigest()}
    meta = {'format': FORMAT, 'dtype': dtype, 'vocab_size': tokenizer.vocab_size, 'splits': splits, 'source': source,
            'tokenizer': tokenizer.to_json()}
    with atomic_write(folder / 'meta.json') as file:
        file.write(json.dumps(meta, indent=1).encode())
    return meta


def is_prepared(folder) -> bool:
    return all((Path(folder) / name).exists() for name in ('train.bin', 'val.bin', 'meta.json'))


def open_dataset(folder, block_size: int) -> TokenDataset:
    """Opens and checks a dataset. UserError names the file that is missing or wrong, and how to make it anew."""
    folder = Path(folder)
    remedy = f'make it anew: python data/{folder.name}/prepare.py'
    for name in ('train.bin', 'val.bin', 'meta.json'):
        if not (folder / name).is_file():
            raise UserError(f'{folder / name} is missing; {remedy}')
    meta = _read_meta(folder / 'meta.json', remedy)
    try:
        tokenizer = tokenizer_from_json(meta['tokenizer'])
    except UserError as error:
        raise UserError(f'{folder / "meta.json"}: {error}; {remedy}') from error
    if tokenizer.vocab_size != meta['vocab_size']:
        raise UserError(f'{folder / "meta.json"}: vocab_size {meta["vocab_size"]}, but its tokenizer has '
                        f'{tokenizer.vocab_size}; {remedy}')
    bins = {split: _open_bin(folder / f'{split}.bin', meta, split, block_size, remedy) for split in SPLITS}
    digests = '\n'.join([meta['splits'][split]['sha256'] for split in SPLITS] + [str(meta['vocab_size'])])
    return TokenDataset(folder.name, folder, bins['train'], bins['val'], meta['vocab_size'], tokenizer, meta,
                        hashlib.sha256(digests.encode()).hexdigest())


def _read_meta(path: Path, remedy: str) -> dict:
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f'{path} is not JSON ({error}); {remedy}') from error
    match meta:
        case {'format': int(), 'dtype': 'uint16' | 'uint32', 'vocab_size': int(), 'tokenizer': dict(), 'splits': {
                'train': {'tokens': int(), 'bytes': int(), 'sha256': str()},
                'val': {'tokens': int(), 'bytes': int(), 'sha256': str()}}} if meta['format'] == FORMAT:
            return meta
    raise UserError(f'{path} does not describe a dataset of format {FORMAT}; {remedy}')


def _open_bin(path: Path, meta: dict, split: str, block_size: int, remedy: str) -> np.ndarray:
    dtype = np.dtype(meta['dtype']).newbyteorder('<')
    size, said = path.stat().st_size, meta['splits'][split]
    if size == 0 or size % dtype.itemsize:
        raise UserError(f'{path} has {size} bytes: it must be a whole number of {dtype.itemsize}-byte ids, at least '
                        f'one; {remedy}')
    if size // dtype.itemsize != said['tokens']:
        raise UserError(f'{path} holds {size // dtype.itemsize:,} tokens, but meta.json says {said["tokens"]:,}; {remedy}')
    if said['tokens'] < block_size + 1:
        raise UserError(f'{path} holds {said["tokens"]:,} tokens, fewer than block_size + 1 = {block_size + 1:,}: '
                        f'lower --block_size or take a longer text')
    tokens = np.memmap(path, dtype=dtype, mode='r')
    if size <= CHECKED_BYTES:
        digest = hashlib.sha256()
        for start in range(0, len(tokens), _CHUNK):
            chunk = tokens[start:start + _CHUNK]
            check_ids(chunk, meta['vocab_size'], path, start)
            digest.update(chunk)
        if digest.hexdigest() != said['sha256']:
            raise UserError(f'{path} is not the file that meta.json describes (SHA-256 differs); {remedy}')
    return tokens


def check_ids(ids: np.ndarray, vocab_size: int, path, offset: int):
    """UserError with the first id that the vocabulary lacks and its place. offset: of ids' first one in the file."""
    if ids.size and ids.max() >= vocab_size:
        at = int((ids >= vocab_size).argmax())
        raise UserError(f'{path}: token id {ids.flat[at]} at offset {offset + at}, but the vocabulary has {vocab_size} '
                        f'(ids 0 to {vocab_size - 1}); make the bins anew with their prepare.py')
