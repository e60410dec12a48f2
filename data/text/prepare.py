"""A dataset of your own text: .txt, .md, .jsonl and .parquet files, or folders of them.

    python data/text/prepare.py --input=notes
    python data/text/prepare.py --input=book.txt,letters --tokenizer=gpt2 --name=mine
    python train.py config/train_text.py --dataset=mine

Every .txt and .md file is a document, and so is every row of the others. Of several documents a tenth of the text, in whole
documents, is kept to validate on, and the end-of-text token follows each; of a single one, its last tenth.
"""

import os
import re
import shlex
import sys
from itertools import islice
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from nib.errors import UserError, run_script
from nib.files import shown
from nib.text import documents
from nib.text.tokenizer import ByteTokenizer, CharTokenizer, Gpt2Tokenizer
from nib.tokens.write import write_dataset

input: str = ''  # files and folders, separated by commas; hidden ones in folders are left out
field: str = 'text'  # the field of .jsonl and .parquet rows that holds the text
tokenizer: Literal['char', 'byte', 'gpt2'] = (
    'char'  # what a token is: a character, a byte, or GPT-2's pieces of words
)
name: str = ''  # of the dataset, which goes to data/NAME; empty: that of the input
out_dir: str = ''  # where the bins go; empty: data/NAME

LITTLE = 100_000  # characters; with fewer a model learns them by heart


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if not input:
        raise UserError('--input=PATH is missing: name the files and folders that hold your text')
    paths = [
        Path(os.path.expanduser(path))
        for path in ([input] if Path(input).exists() else input.split(','))
    ]
    folder = Path(out_dir) if out_dir else choose_folder(paths[0])
    files, ignored = documents.find_files(paths)
    if ignored:
        print(
            f'note: {ignored} file{"s" * (ignored > 1)} left out, of other types than {", ".join(documents.READERS)}',
            file=sys.stderr,
        )
    if tokenizer == 'gpt2':
        Gpt2Tokenizer().encode('')  # without its files, say so before reading all the text

    found = documents.survey(
        documents.read_documents(files, field), with_characters=tokenizer == 'char'
    )
    several = len(found.lengths) > 1
    val = documents.choose_val(found.lengths) if several else set()

    def read_pieces(start):
        pieces = documents.read_documents(files, field)
        split = (
            documents.split_documents(pieces, val)
            if several
            else documents.split_text((text for text, _ in pieces), found.lengths[0])
        )
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
    meta = write_dataset(folder, read_pieces, encoder, source, found.n_bytes)
    share = sum(map(found.lengths.__getitem__, val)) / sum(found.lengths)
    if several and not 0.5 * documents.VAL_FRACTION <= share <= 2 * documents.VAL_FRACTION:
        print(
            f'note: {share:.0%} of the text is kept to validate on, as documents stay whole',
            file=sys.stderr,
        )
    print(
        f'{shown(folder)}: documents {len(found.lengths):,}, characters {sum(found.lengths):,}, vocabulary '
        f'{meta["vocab_size"]:,}, {meta["splits"]["train"]["tokens"]:,} training and '
        f'{meta["splits"]["val"]["tokens"]:,} validation tokens'
    )
    if sum(found.lengths) < LITTLE:
        print(
            f'note: this is little text to learn from: {LITTLE:,} characters are a beginning',
            file=sys.stderr,
        )
    where = f' --data_dir={shlex.quote(str(folder.parent))}' if out_dir else ''
    print(
        f'to train on it: python train.py config/train_text.py --dataset={shlex.quote(folder.name)}{where}'
    )


def choose_folder(path: Path) -> Path:
    """data/NAME. UserError where the name is none for a folder, or taken by a dataset that has a script of its own."""
    wanted = name or (path.stem if path.is_file() else path.resolve().name)
    safe = re.sub(r'[^\w.-]+', '_', wanted).strip('._-')
    if not safe or name and safe != name:
        raise UserError(
            f'{wanted!r} is no name for a folder: give one of letters, digits, - and _, such as --name={safe or "notes"}'
        )
    folder = Path(__file__).resolve().parents[1] / safe
    if (folder / 'prepare.py').exists():
        raise UserError(
            f'data/{safe} belongs to data/{safe}/prepare.py: choose another --name=NAME'
        )
    return folder


if __name__ == '__main__':
    run_script(main)
