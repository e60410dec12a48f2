"""Tiny Shakespeare, which two datasets are made of: found on this machine or downloaded."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from nib.errors import UserError
from nib.files import shown
from nib.text.documents import not_utf8
from nib.text.download import download
from nib.text.tokenizer import Tokenizer
from nib.tokens.write import write_text

URLS = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt',
    'https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt',
)
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SIZE = 1_115_394  # bytes


def prepare(script: str, given: str, out_dir: str, make_tokenizer: Callable[[str], Tokenizer]):
    """Makes the dataset of the script data/NAME/prepare.py and says what it holds.

    given: path of the text; empty: input.txt beside the script, in out_dir or beside the other script, else it is
    downloaded into out_dir. out_dir: where the bins go; empty: beside the script. A text that is not tiny Shakespeare is
    taken, with a note.
    """
    here = Path(script).resolve().parent
    folder = Path(out_dir) if out_dir else here
    places = [
        place / 'input.txt'
        for place in (here, folder, here.parent / 'shakespeare', here.parent / 'shakespeare_char')
    ]
    path = Path(given) if given else next(filter(Path.exists, places), None) or _fetch(folder, here)
    text, digest = _read(path)
    if not text:
        raise UserError(f'{path} is empty; --input=PATH takes the path of a text file')
    meta = write_text(folder, text, make_tokenizer(text), {'file': path.name, 'sha256': digest})
    if digest != SHA256:
        print(
            f'note: {path} is not tiny Shakespeare as published (SHA-256 {digest}); taken all the same',
            file=sys.stderr,
        )
    print(
        f'{shown(folder)}: {len(text):,} characters, vocabulary {meta["vocab_size"]:,}, '
        f'{meta["splits"]["train"]["tokens"]:,} training and {meta["splits"]["val"]["tokens"]:,} validation tokens'
    )


def _read(path: Path) -> tuple[str, str]:
    """The text of a file and its SHA-256. UserError where it is missing or not UTF-8."""
    try:
        content = path.read_bytes()
        return content.decode('utf-8'), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise UserError(
            f'{path}: {error.strerror}; --input=PATH takes the path of a text file'
        ) from error
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from error


def _fetch(folder: Path, here: Path) -> Path:
    path = folder / 'input.txt'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download(URLS, path, SHA256, max_bytes=SIZE)
    except UserError as error:
        raise UserError(
            f'{error}; fetch {URLS[0]} elsewhere and put it at {here / "input.txt"}, or type '
            f'python data/{here.name}/prepare.py --input=PATH'
        ) from error
    except OSError as error:
        raise UserError(
            f'{path} cannot be written ({error.strerror}); name another folder as --out_dir=PATH'
        ) from error
    return path
