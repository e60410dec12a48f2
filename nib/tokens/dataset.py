"""Datasets on disk: train.bin and val.bin of raw token ids, meta.json that says what they are.

The bins are nanoGPT's format: little-endian ids, uint16, or uint32 for vocabularies above 65,536. Bins that nanoGPT made,
with its meta.pkl or without, are read as they are.
"""

import hashlib
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nib.errors import UserError
from nib.text.tokenizer import CharTokenizer, Gpt2Tokenizer, Tokenizer, tokenizer_from_json
from nib.tokens import nanogpt_bins
from nib.tokens.encode import SPLITS

FORMAT = 1
# A bin is read through when it is opened, but a larger one in places only: a run on 20 GB begins as soon as one on 20 MB.
LARGE = 1 << 26  # bytes
_SAMPLES, _SAMPLE = (
    128,
    1 << 13,
)  # places, spread evenly from the first token to the last, and tokens in each
_CHUNK = 1 << 20  # tokens
_PREPARE_SCRIPTS = Path(__file__).resolve().parents[2] / 'data'


@dataclass(frozen=True)
class TokenDataset:
    """A checked dataset. train and val are memmaps of token ids, one dimension each."""

    name: str
    folder: Path
    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    tokenizer: Tokenizer
    meta: dict
    fingerprint: (
        str  # SHA-256 over both bins' digests, of large ones of samples, and the vocabulary's size
    )

    def split(self, name: str) -> np.ndarray:
        return {'train': self.train, 'val': self.val}[name]

    def bits_per_byte(self, loss: float, split: str = 'val') -> float | None:
        """A loss in nats per token as bits per byte of UTF-8 text, which does not depend on the tokenizer; None where
        nobody has counted the bytes."""
        counts = self.meta['splits'][split]
        return loss / math.log(2) * counts['tokens'] / counts['bytes'] if counts['bytes'] else None

    def describe_loss(self, loss: float) -> str:
        """A validation loss for a person."""
        bits = self.bits_per_byte(loss)
        return f'{loss:.4f} nats per token' + (
            '' if bits is None else f' ({bits:.4f} bits per byte)'
        )


def is_prepared(folder) -> bool:
    return all((Path(folder) / f'{split}.bin').exists() for split in SPLITS)


def open_dataset(folder, block_size: int) -> TokenDataset:
    """Opens and checks a dataset. UserError names the file that is missing or wrong, and how to make it anew."""
    folder = Path(folder)
    try:
        for split in SPLITS:
            if not (folder / f'{split}.bin').is_file():
                raise UserError(f'{folder / split}.bin is missing')
        if (folder / 'meta.json').is_file():
            meta, tokenizer = _read_meta(folder / 'meta.json')
        else:
            meta, tokenizer = {'dtype': 'uint16', 'splits': {}}, nanogpt_bins.read_tokenizer(folder)
        bins = {
            split: _map_bin(folder / f'{split}.bin', meta['dtype'], meta['splits'].get(split))
            for split in SPLITS
        }
        if not meta['splits']:
            _check_undescribed(folder, bins, tokenizer)
        found = {
            split: _check_bin(
                folder / f'{split}.bin', bins[split], tokenizer, meta['splits'].get(split)
            )
            for split in SPLITS
        }
    except UserError as error:
        raise UserError(f'{error}; {_remedy(folder.resolve().name)}') from error
    for split in SPLITS:
        if len(bins[split]) < block_size + 1:
            raise UserError(
                f'{folder / split}.bin holds {len(bins[split]):,} tokens, fewer than block_size + 1 = '
                f'{block_size + 1:,}: take a longer text'
                + (f' or --block_size={len(bins[split]) - 1}' if len(bins[split]) > 1 else '')
            )
    digests = '\n'.join(
        [found[split].get('sha256') or found[split]['sampled_sha256'] for split in SPLITS]
        + [str(tokenizer.vocab_size)]
    )
    return TokenDataset(
        folder.name,
        folder,
        bins['train'],
        bins['val'],
        tokenizer.vocab_size,
        tokenizer,
        {**meta, 'splits': meta['splits'] or found},
        hashlib.sha256(digests.encode()).hexdigest(),
    )


def sampled_digest(path: Path, dtype: str, tokenizer: Tokenizer) -> str | None:
    """The sampled_sha256 that meta.json keeps of a bin that is too large to be read through; None of a smaller one."""
    if path.stat().st_size <= LARGE:
        return None
    return _read(path, _map_bin(path, dtype, None), tokenizer)['sampled_sha256']


def _remedy(name: str) -> str:
    if (_PREPARE_SCRIPTS / name / 'prepare.py').exists():
        return f'make it anew: python data/{name}/prepare.py'
    return f'make it anew: python data/text/prepare.py --input=PATH --name={name}'


def _read_meta(path: Path) -> tuple[dict, Tokenizer]:
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not JSON ({error})') from error
    match meta:
        case {
            'format': int(form),
            'dtype': 'uint16' | 'uint32',
            'vocab_size': int(size),
            'tokenizer': dict(),
            'splits': {
                'train': {'tokens': int(), 'bytes': int(), 'sha256': str()},
                'val': {'tokens': int(), 'bytes': int(), 'sha256': str()},
            },
        } if form == FORMAT:
            try:
                tokenizer = tokenizer_from_json(meta['tokenizer'])
            except UserError as error:
                raise UserError(f'{path}: {error}') from error
            if tokenizer.vocab_size != size:
                raise UserError(
                    f'{path}: vocab_size {size}, but its tokenizer has {tokenizer.vocab_size}'
                )
            return meta, tokenizer
    raise UserError(f'{path} does not describe a dataset of format {FORMAT}')


def _map_bin(path: Path, dtype: str, said: dict | None) -> np.ndarray:
    size, dtype = path.stat().st_size, np.dtype(dtype).newbyteorder('<')
    if said:
        for other in ('uint16', 'uint32'):
            if other != dtype.name and size == said['tokens'] * np.dtype(other).itemsize > 0:
                raise UserError(
                    f'{path} holds {other} ids, but meta.json says {dtype.name}: it has {size:,} bytes for '
                    f'{said["tokens"]:,} tokens'
                )
    if size == 0 or size % dtype.itemsize:
        raise UserError(
            f'{path} has {size} bytes: it must be a whole number of {dtype.itemsize}-byte ids, at least one'
        )
    tokens = np.memmap(path, dtype=dtype, mode='r')
    if tokens.nbytes > LARGE and hasattr(
        mmap, 'MADV_RANDOM'
    ):  # or the system may read megabytes around each window
        tokens._mmap.madvise(mmap.MADV_RANDOM)
    return tokens


def _check_undescribed(folder: Path, bins: dict[str, np.ndarray], tokenizer: Tokenizer):
    """UserError for bins without a meta.json that are surely not what such bins are taken for: uint16 ids of nanoGPT's."""
    begins = {split: tokens[:_CHUNK] for split, tokens in bins.items()}
    for split, ids in begins.items():
        if len(ids) >= 16 and ids[::2].any() and not ids[1::2].any():
            raise UserError(
                f'{folder / split}.bin holds uint32 ids, as every second uint16 in it is 0; there is no meta.json '
                f'beside it, and without one ids are read as uint16'
            )
    largest = max(int(ids.max()) for ids in begins.values())
    if isinstance(tokenizer, Gpt2Tokenizer) and largest < 256:
        raise UserError(
            f"{folder} has neither meta.json nor meta.pkl, so its ids would be GPT-2's tokens; but the largest "
            f'is {largest}, as of characters or bytes'
        )


def _check_bin(path: Path, tokens: np.ndarray, tokenizer: Tokenizer, said: dict | None) -> dict:
    """What _read finds, once all of it is as meta.json says."""
    if said and len(tokens) != said['tokens']:
        raise UserError(
            f'{path} holds {len(tokens):,} tokens, but meta.json says {said["tokens"]:,}'
        )
    found = _read(path, tokens, tokenizer)
    if said and any(
        found[key] != said.get(key, found[key])
        for key in ('sha256', 'sampled_sha256')
        if key in found
    ):
        raise UserError(f'{path} is not the file that meta.json describes (SHA-256 differs)')
    if said and found['bytes'] not in (None, said['bytes']):
        raise UserError(
            f'{path} holds {found["bytes"]:,} bytes of text, but meta.json says {said["bytes"]:,}'
        )
    return found


def _read(path: Path, tokens: np.ndarray, tokenizer: Tokenizer) -> dict:
    """The bin's number of tokens, bytes of text and sha256; of a large one sampled_sha256 instead, and nobody has counted
    the bytes. UserError for an id that the vocabulary lacks; one between the samples is met by the batch that holds it."""
    large, sizes = tokens.nbytes > LARGE, None
    if (
        isinstance(tokenizer, CharTokenizer) and not large
    ):  # of GPT-2's tokens, bytes would take the vocabulary's files
        sizes = [
            len(character.encode('utf-8', 'surrogatepass')) for character in tokenizer.characters
        ]
        sizes = np.array(sizes + [0] * tokenizer.has_end_of_text, np.uint8)
    length = min(_SAMPLE if large else _CHUNK, len(tokens))
    starts = range(0, len(tokens), length)
    if large:
        starts = [(len(tokens) - length) * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
    digest, n_bytes = hashlib.sha256(str(len(tokens)).encode() if large else b''), 0
    for start in starts:
        chunk = tokens[start : start + length]
        check_ids(chunk, tokenizer.vocab_size, path, start)
        digest.update(chunk)
        n_bytes += 0 if sizes is None else int(sizes[chunk].sum())
    return {
        'tokens': len(tokens),
        'bytes': None if sizes is None else n_bytes,
        'sampled_sha256' if large else 'sha256': digest.hexdigest(),
    }


def check_ids(ids: np.ndarray, vocab_size: int, path, offset: int):
    """UserError with the first id that the vocabulary lacks and its place. offset: of ids' first one in the file."""
    if ids.size and ids.max() >= vocab_size:
        at = int((ids >= vocab_size).argmax())
        raise UserError(
            f'{path}: token id {ids.flat[at]} at offset {offset + at}, but the vocabulary has {vocab_size} '
            f'(ids 0 to {vocab_size - 1}): the bins were made for another one'
        )
