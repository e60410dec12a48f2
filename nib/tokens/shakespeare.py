"""Finds or downloads tiny Shakespeare, the text of two datasets."""

import hashlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from nib.errors import UserError
from nib.files import ELSEWHERE, command, shown
from nib.text import reading
from nib.text.download import DownloadError, download
from nib.text.tokenizer import END_OF_TEXT, Tokenizer
from nib.tokens.unfinished import locked
from nib.tokens.write import describe, write_text

URLS = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt',
    'https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt',
)
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SIZE = 1_115_394  # bytes


def prepare(script: str, given: str, out_dir: str, make_tokenizer: Callable[[str], Tokenizer]):
    """Prepares the dataset of a script data/NAME/prepare.py and prints what it contains.

    given: path of the text. If empty, the text is the first input.txt found in the script's folder,
    in out_dir, or in the folder of the other Shakespeare script. If there is none, it is downloaded
    into out_dir. A text that is not the published one is accepted with a note.
    out_dir: folder of the bins; empty: the script's folder.
    Raises DownloadError if the download fails, and UserError if the text is missing, empty or not
    UTF-8, or if the bins cannot be written.
    """
    here = Path(script).resolve().parent
    folder = Path(out_dir) if out_dir else here
    places = [
        place / 'input.txt'
        for place in (here, folder, here.parent / 'shakespeare', here.parent / 'shakespeare_char')
    ]
    path = Path(given) if given else next(filter(Path.exists, places), None) or _fetch(folder)
    text, digest = _read(path)
    if not text:
        raise UserError(f'{path} is empty; use --input=PATH to name a text file')
    meta = write_text(folder, text, make_tokenizer(text), {'file': path.name, 'sha256': digest})
    if digest != SHA256:
        print(
            f'note: {path} is not the published tiny Shakespeare (SHA-256 {digest}); '
            f'using it anyway',
            file=sys.stderr,
        )
    print(describe(folder, f'{len(text):,} characters', meta))


def _read(path: Path) -> tuple[str, str]:
    """Returns a file's text and the SHA-256 of its UTF-8. Raises UserError if it is not text."""

    def note(what: str):
        print(f'note: {path}: {what}', file=sys.stderr)

    if not path.exists():
        raise UserError(f'{path}: no such file; use --input=PATH to name a text file')
    text = ''.join(reading.read_file(path, note))
    if END_OF_TEXT in text:
        raise UserError(
            f'{path} contains {END_OF_TEXT}, so it has several documents, but this script prepares '
            f'one: use {command("data/text/prepare.py")} --input={shlex.quote(str(path))}'
        )
    return text, hashlib.sha256(text.encode()).hexdigest()


def _fetch(folder: Path) -> Path:
    path = folder / 'input.txt'
    try:
        with locked(folder):
            if not path.exists():  # another process may have downloaded it meanwhile
                download(URLS, shown(path), SHA256, max_bytes=SIZE)
    except DownloadError as error:
        raise DownloadError(
            f'{error}: download {URLS[0]} on another machine and save it under this name'
        ) from error
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}); {ELSEWHERE}') from error
    return path
