"""Makes a dataset of your own text: .txt, .md, .jsonl and .parquet files, or folders of them.

    python data/text/prepare.py --input=notes
    python data/text/prepare.py --input=book.txt,letters --tokenizer=gpt2 --name=mine
    python train.py config/train_text.py --dataset=mine

Every .txt and .md file is a document, and so is every row of a .jsonl or .parquet file. With
several documents, whole documents make up the validation split, about a tenth of the text, and an
end-of-text token follows each document. With a single one, its last tenth is the validation split.
"""

import re
import shlex
import sys
from itertools import islice
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from nib.errors import UserError, run_script
from nib.files import read_json, shown
from nib.text import documents
from nib.text.tokenizer import ByteTokenizer, CharTokenizer, Gpt2Tokenizer
from nib.tokens.dataset import is_prepared
from nib.tokens.write import write_dataset

input: str = ''  # files and folders, separated by commas; hidden files in folders are skipped
field: str = 'text'  # the field of .jsonl and .parquet rows that contains the text
tokenizer: Literal['char', 'byte', 'gpt2'] = 'char'  # a token is a character, a byte or a word part
name: str = ''  # of the dataset, which is written to data/NAME; empty: named after the input
out_dir: str = ''  # output folder; empty: data/NAME
overwrite: bool = False  # replace the dataset of another text

LITTLE = 100_000  # characters; a model memorizes a shorter text


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if not input:
        raise UserError('--input=PATH is missing: name the files and folders that hold your text')
    names = [input] if Path(input).exists() else input.split(',')
    paths = [Path(path) for path in names]
    folder = Path(out_dir) if out_dir else choose_folder(paths[0])
    files, ignored = documents.find_files(paths)
    if ignored:
        print(
            f'note: skipped {ignored} file{"s" * (ignored > 1)} of other types than '
            + ', '.join(documents.READERS),
            file=sys.stderr,
        )
    if tokenizer == 'gpt2':
        Gpt2Tokenizer().encode('')  # fails before the text is read if its files are missing

    texts = documents.read_documents(files, field)
    found = documents.survey(texts, with_characters=tokenizer == 'char')
    several = len(found.lengths) > 1
    val = documents.choose_val(found.lengths) if several else set()

    def read_pieces(start):
        pieces = documents.read_documents(files, field)
        if several:
            split = documents.split_documents(pieces, val)
        else:
            split = documents.split_text((text for text, _ in pieces), found.lengths[0])
        return islice(split, start, None)

    encoder = {
        'char': CharTokenizer(found.characters, several),
        'byte': ByteTokenizer(),
        'gpt2': Gpt2Tokenizer(),
    }[tokenizer]
    source = {
        'input': [path.name for path in paths],
        'files': len(files),
        'documents': len(found.lengths),
        'sha256': found.sha256,
    }
    if not overwrite:
        check_replaceable(folder, found.sha256)
    meta = write_dataset(folder, read_pieces, encoder, source, found.n_bytes)
    share = sum(map(found.lengths.__getitem__, val)) / sum(found.lengths)
    if several and not 0.5 * documents.VAL_FRACTION <= share <= 2 * documents.VAL_FRACTION:
        print(
            f'note: the validation split has {share:.0%} of the text, as documents are not divided',
            file=sys.stderr,
        )
    tokens = {split: counts['tokens'] for split, counts in meta['splits'].items()}
    print(
        f'{shown(folder)}: documents {len(found.lengths):,}, characters {sum(found.lengths):,}, '
        f'vocabulary {meta["vocab_size"]:,}, '
        f'{tokens["train"]:,} training and {tokens["val"]:,} validation tokens'
    )
    if sum(found.lengths) < LITTLE:
        print(
            f'note: this is very little text to learn from; use at least {LITTLE:,} characters',
            file=sys.stderr,
        )
    where = f' --data_dir={shlex.quote(str(folder.parent))}' if out_dir else ''
    dataset = shlex.quote(folder.name)
    print(f'to train on it: python train.py config/train_text.py --dataset={dataset}{where}')


def check_replaceable(folder: Path, sha256: str):
    """Raises UserError if the folder contains a dataset of another text."""
    if not is_prepared(folder):
        return
    source = read_json(folder / 'meta.json').get('source')
    if not isinstance(source, dict) or source.get('sha256') != sha256:
        raise UserError(
            f'{shown(folder)} contains a dataset of another text, or of an earlier version of this '
            f'one: replace it (--overwrite), or use another --name=NAME'
        )


def choose_folder(path: Path) -> Path:
    """Returns data/NAME.

    Raises UserError if the name is not suitable for a folder or belongs to another prepare script.
    """
    wanted = name or (path.stem if path.is_file() else path.resolve().name)
    safe = re.sub(r'[^\w.-]+', '_', wanted).strip('._-')
    if not safe or name and safe != name:
        raise UserError(
            f'{wanted!r} is not suitable as a folder name: use letters, digits, - and _, '
            f'such as --name={safe or "notes"}'
        )
    folder = Path(__file__).resolve().parents[1] / safe
    if (folder / 'prepare.py').exists():
        raise UserError(f'data/{safe} belongs to data/{safe}/prepare.py: use another --name=NAME')
    return folder


if __name__ == '__main__':
    run_script(main)
