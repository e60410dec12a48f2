"""The source of Python's standard library in characters: about 11 MB of text without a download."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import hashlib
import platform
import sysconfig

import configurator
from nib.errors import UserError, run_script
from nib.tokens.write import describe, write_char_dataset

out_dir: str = ''  # output folder; empty: this file's folder

SKIPPED = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    folder = Path(out_dir) if out_dir else Path(__file__).resolve().parent
    library = Path(sysconfig.get_paths()['stdlib'])
    sources = read_sources(library)
    if not sources:
        raise UserError(
            f'{library} contains no Python source: use a Python whose library is installed as '
            f'.py files'
        )
    text = ''.join(sources)
    source = {
        'text': "source of Python's standard library",
        'python': platform.python_version(),
        'files': len(sources),
        'sha256': hashlib.sha256(text.encode()).hexdigest(),
    }
    meta = write_char_dataset(folder, text, source)
    of = f'{len(sources)} files of Python {platform.python_version()}'
    print(describe(folder, f'{len(text):,} characters of {of}', meta))


def read_sources(library: Path) -> list[str]:
    """Returns all ASCII .py files except tests, sorted by path. Each text ends with a newline."""
    texts = []
    paths = library.rglob('*.py')
    for path in sorted(paths, key=lambda path: path.relative_to(library).as_posix()):
        if path.is_file() and SKIPPED.isdisjoint(path.relative_to(library).parts):
            content = path.read_bytes()
            if content and content.isascii():
                text = content.decode('ascii').replace('\r\n', '\n').replace('\r', '\n')
                texts.append(text if text.endswith('\n') else text + '\n')
    return texts


if __name__ == '__main__':
    run_script(main)
