"""The source of the running Python's own standard library, by characters: about 11 MB of text that needs no network."""

import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from nib.errors import UserError, run_script
from nib.files import shown
from nib.tokens.write import write_char_dataset

out_dir: str = ''  # where the bins go; empty: beside this file

LEFT_OUT = {
    'test',
    'tests',
    'idle_test',
    'site-packages',
    'dist-packages',
    '__pycache__',
}  # folders


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    folder = Path(out_dir) if out_dir else Path(__file__).resolve().parent
    library = Path(sysconfig.get_paths()['stdlib'])
    sources = read_sources(library)
    if not sources:
        raise UserError(
            f'{library} holds no Python source: run a Python that has its library as .py files'
        )
    text = ''.join(sources)
    meta = write_char_dataset(
        folder,
        text,
        {
            'text': "source of Python's standard library",
            'python': platform.python_version(),
            'files': len(sources),
            'sha256': hashlib.sha256(text.encode()).hexdigest(),
        },
    )
    print(
        f'{shown(folder)}: {len(text):,} characters of {len(sources)} files of Python {platform.python_version()}, '
        f'vocabulary {meta["vocab_size"]}, {meta["splits"]["train"]["tokens"]:,} training and '
        f'{meta["splits"]["val"]["tokens"]:,} validation tokens'
    )


def read_sources(library: Path) -> list[str]:
    """The text of every ASCII .py file that is no test, in the order of their paths, each ending in a newline."""
    texts = []
    for path in sorted(
        library.rglob('*.py'), key=lambda path: path.relative_to(library).as_posix()
    ):
        if path.is_file() and LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            content = path.read_bytes()
            if content and content.isascii():
                text = content.decode('ascii').replace('\r\n', '\n').replace('\r', '\n')
                texts.append(text if text.endswith('\n') else text + '\n')
    return texts


if __name__ == '__main__':
    run_script(main)
