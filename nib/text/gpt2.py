"""GPT-2's tokenizer: tiktoken's, made faster by nib/text/bpe.py, and the files of its vocabulary.

nib/text/tokenizer.py describes the methods.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nib.errors import UserError
from nib.text.bpe import GPT2_SPLITS, WordTable
from nib.text.download import DownloadError, download
from nib.text.vocabulary import END_OF_TEXT, checked_ids, spelling, utf8

# The files of GPT-2's vocabulary as tiktoken reads them: name -> SHA-256.
GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
GPT2_FILES = {
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}


@dataclass(frozen=True)
class Gpt2Tokenizer:
    """GPT-2's byte pair encoding (Radford et al. 2019). It takes END_OF_TEXT as characters.

    The vocabulary's two files are downloaded on first use. Methods raise UserError if that fails.
    """

    spells_end_of_text: bool = False
    vocab_size = 50257
    end_of_text = 50256

    def encode(self, text: str) -> np.ndarray:
        return self.encode_texts([(text, False)]).astype(np.uint32)

    def encode_texts(self, texts: Iterable[tuple[str, bool]]) -> np.ndarray:
        return _gpt2_table(load_gpt2()).encode((utf8(text), ends) for text, ends in texts)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_bytes(self, ids) -> bytes:
        return load_gpt2().decode_bytes(checked_ids(ids, self.vocab_size).tolist())

    def to_json(self) -> dict:
        return {'kind': 'gpt2'} | spelling(self)


@functools.lru_cache(maxsize=1)
def _gpt2_table(encoding) -> WordTable:
    end = Gpt2Tokenizer.end_of_text

    def encode_words(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # One call, because a call costs more than a word. No word contains the mark between them.
        text = END_OF_TEXT.join([*words, ''])
        ids = encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT})
        ends = np.flatnonzero(ids == end)
        return ids[ids != end], np.diff(ends, prepend=-1) - 1

    return WordTable(encode_words, GPT2_SPLITS, [end], np.uint16)


@functools.cache
def load_gpt2():
    """Loads tiktoken's GPT-2 encoding, downloading its two files if they are missing.

    tiktoken's own download has no timeout and would hang on a network that drops packets.
    Raises DownloadError if the files are missing and cannot be downloaded.
    """
    import tiktoken  # most runs do not need it

    stored = vocabulary_paths()
    folder = stored['vocab.bpe'].parent
    try:
        for file, digest in GPT2_FILES.items():
            if not _has_digest(stored[file], digest):
                folder.mkdir(parents=True, exist_ok=True)
                download([GPT2_URL + file], stored[file], digest, max_bytes=2_000_000)
    except OSError as error:
        raise UserError(
            f"GPT-2's vocabulary cannot be stored in {folder} ({error.strerror}); set the "
            f'environment variable TIKTOKEN_CACHE_DIR to another folder'
        ) from error
    except DownloadError as error:
        wanted = ' and '.join(f'{GPT2_URL}{file} as {path.name}' for file, path in stored.items())
        raise DownloadError(
            f"GPT-2's vocabulary is missing ({error}); on a machine with a network, download "
            f'{wanted} into a folder, and set the environment variable TIKTOKEN_CACHE_DIR to it'
        ) from error
    os.environ['TIKTOKEN_CACHE_DIR'] = str(folder)  # if it were '', tiktoken would download again
    return tiktoken.get_encoding('gpt2')


def is_gpt2_stored() -> bool:
    """Returns whether load_gpt2 needs no network."""
    stored = vocabulary_paths()
    return all(_has_digest(stored[file], digest) for file, digest in GPT2_FILES.items())


def vocabulary_paths() -> dict[str, Path]:
    """Returns the path of each of GPT2_FILES, where tiktoken looks for it."""
    folder = Path(  # in its order
        os.environ.get('TIKTOKEN_CACHE_DIR')
        or os.environ.get('DATA_GYM_CACHE_DIR')
        or Path(tempfile.gettempdir(), 'data-gym-cache')
    ).expanduser()
    return {
        file: folder / hashlib.sha1((GPT2_URL + file).encode()).hexdigest() for file in GPT2_FILES
    }


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
