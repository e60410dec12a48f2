"""Datasets on disk: token ids in train.bin and val.bin, described by meta.json.

The bins have nanoGPT's format: little-endian uint16 ids, or uint32 for vocabularies above 65,536.
Bins made for nanoGPT, with or without a meta.pkl, are read as they are.
"""

import hashlib
import json
import math
import mmap
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nib.errors import UserError
from nib.files import ROOT, command
from nib.text.tokenizer import CharTokenizer, Tokenizer, count_bytes, tokenizer_from_json
from nib.tokens import nanogpt_bins
from nib.tokens.encode import SPLITS

FORMAT = 1
# Opening a dataset reads whole bins up to this size, and only samples of larger ones, so that a run
# on 20 GB starts as quickly as one on 20 MB.
LARGE = 1 << 26  # bytes
_SAMPLES = 128  # spread evenly from the first token to the last
_SAMPLE = 1 << 13  # tokens in a sample
_CHUNK = 1 << 20  # tokens read at once
SCRIPTS = ROOT / 'data'  # SCRIPTS/NAME/prepare.py prepares NAME


@dataclass(frozen=True)
class TokenDataset:
    """A checked dataset. train and val are memmaps of token ids (n,)."""

    name: str
    folder: Path
    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    tokenizer: Tokenizer
    meta: dict
    fingerprint: str  # SHA-256 of both bins' digests and the vocabulary size

    def split(self, name: str) -> np.ndarray:
        return {'train': self.train, 'val': self.val}[name]

    def bits_per_byte(
        self, loss: float, split: str = 'val', block_size: int | None = None
    ) -> float | None:
        """Converts a loss in nats per token to bits per byte of UTF-8 text.

        They do not depend on the tokenizer: all nats over all bytes of the text. End-of-text tokens
        have nats, but no bytes.
        block_size: given if the loss is that of all windows of the split. Then the bytes are those
        of the predicted tokens: not of the first token, nor of the incomplete last window. None:
        the loss is that of a sample, which is taken to have the split's bytes per token.
        Returns None if the bytes were not counted.
        """
        tokens, n_bytes, _ = self._count(split, block_size)
        return loss / math.log(2) * tokens / n_bytes if n_bytes else None

    def describe_loss(self, loss: float, block_size: int | None = None) -> str:
        """Formats a validation loss for people. block_size: as for bits_per_byte."""
        bits = self.bits_per_byte(loss, block_size=block_size)
        *_, is_exact = self._count('val', block_size)
        described = f'{loss:.4f} nats per token'
        if bits is None:
            return described
        return f'{described} ({"" if is_exact else "about "}{bits:.4f} bits per byte)'

    def _count(self, split: str, block_size: int | None) -> tuple[int, int | None, bool]:
        """Returns tokens, their bytes of text, and whether these are exactly the predicted ones."""
        tokens, n_bytes = (self.meta['splits'][split][key] for key in ('tokens', 'bytes'))
        if block_size is None or n_bytes is None:
            return tokens, n_bytes, tokens == n_bytes  # a byte each
        ids, n_predicted = self.split(split), (tokens - 1) // block_size * block_size
        try:
            # The text's own bytes, less the rest: a tokenizer may have normalized the text.
            n_bytes -= count_bytes(self.tokenizer, ids[:1], begins=True)
            n_bytes -= count_bytes(self.tokenizer, ids[1 + n_predicted :], begins=False)
        except UserError:  # its library or its files are missing
            return self._count(split, None)
        return n_predicted, n_bytes, True


def is_prepared(folder) -> bool:
    return all((Path(folder) / f'{split}.bin').exists() for split in SPLITS)


def open_dataset(folder, block_size: int, vocab_size: int = 0) -> TokenDataset:
    """Opens and checks a dataset.

    vocab_size: the number of tokens, for bins without a description; 0: GPT-2's tokens.
    Raises UserError if a file is missing or invalid, which says how to recreate it, or if a split
    has no block_size + 1 tokens.
    """
    folder = Path(folder)
    is_described = (folder / 'meta.json').is_file()
    try:
        for split in SPLITS:
            if not (folder / f'{split}.bin').is_file():
                raise UserError(f'{folder / split}.bin is missing')
        if is_described:
            meta, tokenizer = _read_meta(folder / 'meta.json')
        else:
            tokenizer = nanogpt_bins.read_tokenizer(folder, vocab_size)
            wide = tokenizer.vocab_size > 1 << 16
            meta = {'dtype': 'uint32' if wide else 'uint16', 'splits': {}}
        bins, found = {}, {}
        for split in SPLITS:
            recorded = meta['splits'].get(split)
            bins[split] = _map_bin(folder / f'{split}.bin', np.dtype(meta['dtype']), recorded)
        if not is_described:
            _check_undescribed(folder, bins, assumed=vocab_size == 0 and is_assumed(folder))
        for split in SPLITS:
            recorded = meta['splits'].get(split)
            found[split] = _check_bin(folder / f'{split}.bin', bins[split], tokenizer, recorded)
    except UserError as error:
        raise UserError(f'{error}; {_remedy(folder, is_described)}') from error
    if vocab_size not in (0, tokenizer.vocab_size):
        raise UserError(
            f'{folder} has a vocabulary of {tokenizer.vocab_size} tokens, but vocab_size is '
            f'{vocab_size}: leave vocab_size out'
        )
    split = min(SPLITS, key=lambda split: len(bins[split]))
    n = len(bins[split])
    if n < block_size + 1:
        smaller = f' or --block_size={n - 1}' if n > 1 else ''
        raise UserError(
            f'{folder / split}.bin has {n:,} tokens, fewer than block_size + 1 = '
            f'{block_size + 1:,}: use a longer text{smaller}'
        )
    digests = [found[split].get('sha256') or found[split]['sampled_sha256'] for split in SPLITS]
    identity = '\n'.join([*digests, str(tokenizer.vocab_size)])
    return TokenDataset(
        name=folder.name,
        folder=folder,
        train=bins['train'],
        val=bins['val'],
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        meta={**meta, 'splits': meta['splits'] or found},
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    )


def is_assumed(folder) -> bool:
    """Returns whether nothing describes a dataset's vocabulary, so that GPT-2's is assumed."""
    return not any((Path(folder) / name).exists() for name in ('meta.json', 'meta.pkl'))


def sampled_digest(path: Path, dtype: np.dtype, tokenizer: Tokenizer) -> str | None:
    """Returns the sampled_sha256 that meta.json records for a LARGE bin; None for a smaller bin."""
    if path.stat().st_size <= LARGE:
        return None
    return _read(path, _map_bin(path, dtype, recorded=None), tokenizer)['sampled_sha256']


def prepare_command(folder: Path) -> str:
    """Returns the command that prepares the dataset in this folder."""
    name, in_place = folder.resolve().name, folder.resolve().parent == SCRIPTS
    out_dir = f'--out_dir={shlex.quote(str(folder))}'
    if (SCRIPTS / name / 'prepare.py').exists():
        return command(f'data/{name}/prepare.py') + ('' if in_place else f' {out_dir}')
    where = f'--name={name}' if in_place else out_dir
    return f'{command("data/text/prepare.py")} --input=PATH {where}'


def _remedy(folder: Path, is_described: bool) -> str:
    if is_prepared(folder) and not is_described:
        another = 'set --vocab_size=N, its number of tokens'
        if is_assumed(folder):
            return f'if they are of another vocabulary, {another}'
        return f'correct meta.pkl, or remove it and {another}'
    return f'recreate it: {prepare_command(folder)}'


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
                    f'{path}: vocab_size is {size}, but its tokenizer has {tokenizer.vocab_size}'
                )
            return meta, tokenizer
    raise UserError(f'{path} does not describe a dataset of format {FORMAT}')


def _map_bin(path: Path, dtype: np.dtype, recorded: dict | None) -> np.ndarray:
    """Maps a bin's ids (n,). recorded: what meta.json says about it, if there is one."""
    size = path.stat().st_size
    if recorded:
        for other in ('uint16', 'uint32'):
            if other != dtype.name and size == recorded['tokens'] * np.dtype(other).itemsize > 0:
                raise UserError(
                    f'{path} contains {other} ids, but meta.json says {dtype.name}: it has '
                    f'{size:,} bytes for {recorded["tokens"]:,} tokens'
                )
    if size == 0 or size % dtype.itemsize:
        raise UserError(
            f'{path} has {size} bytes, expected a positive multiple of {dtype.itemsize}, '
            f'the size of an id'
        )
    tokens = np.memmap(path, dtype=dtype.newbyteorder('<'), mode='r')
    if tokens.nbytes > LARGE and hasattr(mmap, 'MADV_RANDOM'):
        # Without this the system may read megabytes around each window.
        tokens._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]  # not in the stubs
    return tokens


def _check_undescribed(folder: Path, bins: dict[str, np.ndarray], assumed: bool):
    """Raises UserError if bins without a meta.json do not look like what they are taken for.

    assumed: whether they are taken for GPT-2's tokens although nothing says so.
    """
    begins = {split: tokens[:_CHUNK] for split, tokens in bins.items()}
    for split, ids in begins.items():
        is_narrow = ids.dtype.itemsize == 2
        if is_narrow and len(ids) >= 16 and ids[::2].any() and not ids[1::2].any():
            raise UserError(
                f'{folder / split}.bin seems to contain uint32 ids, as every second uint16 is 0; '
                f'without a meta.json, ids of up to 65,536 tokens are read as uint16'
            )
    seen = np.flatnonzero(np.bincount(np.concatenate([*begins.values()])))
    largest = int(seen[-1])
    # GPT-2's ids are spread: a fifth of those that a text uses is above 40,000, and a text that
    # uses few of them still leaves most ids below its largest one out. Below 256 there are only
    # single bytes.
    is_other = len(seen) >= 200 or 10 * len(seen) > largest or largest < 256
    if assumed and largest < 40_000 and is_other:
        raise UserError(
            f"{folder} has neither meta.json nor meta.pkl, so its ids should be GPT-2's tokens, "
            f"but it uses {len(seen):,} ids from {seen[0]} to {largest}, and a text in GPT-2's "
            f'tokens uses ids up to 50,256'
        )


def _check_bin(path: Path, tokens: np.ndarray, tokenizer: Tokenizer, recorded: dict | None) -> dict:
    """Returns what _read finds. Raises UserError if that is not what meta.json records."""
    if recorded and len(tokens) != recorded['tokens']:
        raise UserError(
            f'{path} has {len(tokens):,} tokens, but meta.json says {recorded["tokens"]:,}'
        )
    found = _read(path, tokens, tokenizer)
    if not recorded:
        return found
    for key in ('sha256', 'sampled_sha256'):
        if key in found and found[key] != recorded.get(key, found[key]):
            raise UserError(f'{path} is not the file that meta.json describes (SHA-256 differs)')
    if found['bytes'] not in (None, recorded['bytes']):
        raise UserError(
            f'{path} has {found["bytes"]:,} bytes of text, but meta.json says {recorded["bytes"]:,}'
        )
    return found


def _read(path: Path, tokens: np.ndarray, tokenizer: Tokenizer) -> dict:
    """Returns a bin's number of tokens, bytes of text and sha256.

    A LARGE bin is only sampled: it has sampled_sha256 instead, and its bytes are None.
    Raises UserError for an id that is not in the vocabulary. An invalid id between the samples is
    found by the batch that contains it.
    """
    large, sizes = tokens.nbytes > LARGE, None
    # Counting the bytes of GPT-2's tokens would require the vocabulary's files.
    if isinstance(tokenizer, CharTokenizer) and not large:
        utf8 = [character.encode('utf-8', 'surrogatepass') for character in tokenizer.characters]
        sizes = np.array([*map(len, utf8)] + [0] * tokenizer.has_end_of_text, np.uint8)
    length = min(_SAMPLE if large else _CHUNK, len(tokens))
    starts: Sequence[int] = range(0, len(tokens), length)
    if large:
        starts = [(len(tokens) - length) * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
    digest, n_bytes = hashlib.sha256(str(len(tokens)).encode() if large else b''), 0
    for start in starts:
        chunk = tokens[start : start + length]
        check_ids(chunk, tokenizer.vocab_size, path, start)
        digest.update(chunk.data)
        n_bytes += 0 if sizes is None else int(sizes[chunk].sum())
    return {
        'tokens': len(tokens),
        'bytes': None if sizes is None else n_bytes,
        'sampled_sha256' if large else 'sha256': digest.hexdigest(),
    }


def check_ids(ids: np.ndarray, vocab_size: int, path, offset: int):
    """Raises UserError if an id is not in the vocabulary. offset: of the first id in the file."""
    if ids.size and ids.max() >= vocab_size:
        at = int((ids >= vocab_size).argmax())
        raise UserError(
            f'{path}: token id {ids.flat[at]} at offset {offset + at}, but the vocabulary has '
            f'{vocab_size} tokens (ids 0 to {vocab_size - 1}): '
            f'the bins were made with another vocabulary'
        )
