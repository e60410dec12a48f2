"""Tiny Shakespeare by characters: 40,000 lines of his plays, a vocabulary of 65.

Takes --input=PATH, or else input.txt beside this file or in out_dir, or else downloads it into out_dir.
"""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator  # noqa: E402
from nib import corpus  # noqa: E402
from nib.download import download  # noqa: E402
from nib.errors import UserError, run_script  # noqa: E402

input: str = ''  # path of the text; empty: input.txt beside this file or in out_dir, else download
out_dir: str = ''  # where the bins go; empty: beside this file

URLS = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt',
    'https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt',
)
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SIZE = 1_115_394  # bytes


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    here = Path(__file__).resolve().parent
    folder = Path(out_dir) if out_dir else here
    path = Path(input) if input else here / 'input.txt'
    if not input and not path.exists():
        path = folder / 'input.txt'
    if not input and not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            download(URLS, path, SHA256, max_bytes=SIZE)
        except UserError as error:
            raise UserError(f'{error}; fetch {URLS[0]} elsewhere and put it at {here / "input.txt"}, or type '
                            f'python data/shakespeare_char/prepare.py --input=PATH') from error
        except OSError as error:
            raise UserError(f'{path} cannot be written ({error.strerror}); name another folder as --out_dir=PATH') from error
    text, digest = read(path)
    if digest != SHA256:
        print(f'note: {path} is not tiny Shakespeare as published (SHA-256 {digest}); going on with it', file=sys.stderr)
    meta = corpus.write_char_dataset(folder, text, {'file': path.name, 'sha256': digest})
    print(f'{folder}: {len(text):,} characters, vocabulary {meta["vocab_size"]}, '
          f'{meta["splits"]["train"]["tokens"]:,} training and {meta["splits"]["val"]["tokens"]:,} validation tokens')


def read(path: Path) -> tuple[str, str]:
    """The text of a file and its SHA-256. UserError where it is missing or not UTF-8."""
    try:
        content = path.read_bytes()
        return content.decode('utf-8'), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; --input=PATH takes the path of a text file') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text (byte {error.start}); convert it: iconv -t UTF-8') from error


if __name__ == '__main__':
    run_script(main)
