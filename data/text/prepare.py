"""Makes a dataset of your own text: .txt, .md, .jsonl and .parquet files, or folders of them.

    python data/text/prepare.py --input=notes
    python data/text/prepare.py --input=book.txt,letters --tokenizer=gpt2 --name=mine
    python data/text/prepare.py --input=notes --tokenizer=bpe --vocab_size=8192
    python train.py config/train_text.py --dataset=mine

Every .txt and .md file is a document, and so is every row of a .jsonl or .parquet file. A document
also ends where its text has <|endoftext|>. With several documents, whole documents make up the
validation split, about a tenth of the text, and an end-of-text token follows each document. With a
single one, its last tenth is the validation split.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Literal

import configurator
from nib.errors import UserError, run_script
from nib.files import command, read_json, script_path, shown
from nib.text import documents, inputs, train_bpe
from nib.text.gpt2 import Gpt2Tokenizer, is_gpt2_stored
from nib.text.hf_tokenizer import HfTokenizer, import_library
from nib.text.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer
from nib.text.vocabulary import has_words
from nib.tokens.borrow import read_tokenizer
from nib.tokens.dataset import is_prepared
from nib.tokens.encode import Piece
from nib.tokens.write import describe, stored_tokenizer, write_dataset

input: str = ''  # files and folders, separated by commas; hidden files in folders are skipped
field: str = 'text'  # the field of .jsonl and .parquet rows that contains the text
tokenizer: str = 'char'  # 'char', 'byte', 'gpt2', 'bpe', a run, dataset, model or tokenizer.json
vocab_size: int = 4096  # tokens of --tokenizer=bpe; by default fewer if the text is short
replace_missing: str = ''  # replaces characters that are not in the vocabulary; empty: reject them
end_of_text: Literal['token', 'characters'] = 'token'  # how to read <|endoftext|> in the text
name: str = ''  # name of the dataset, written to data/NAME; empty: that of the input
out_dir: str = ''  # output folder; empty: data/NAME
overwrite: bool = False  # replace an existing dataset made from another text

LITTLE = 100_000  # characters; a shorter text is soon memorized
FEW = 10  # documents; with more, both splits are likely to contain all kinds of text
SAMPLE = 1 << 22  # characters of the validation split on which tokenizers are compared


def main(argv):
    values, origins = configurator.configure(__file__, argv)
    globals().update(values)
    paths = [Path(name) for name in inputs.split_names(input)]
    if sum(argument.partition('=')[0] == '--input' for argument in argv) > 1:
        raise UserError('--input is given more than once: separate several paths with commas')
    if not paths:
        raise UserError('--input=PATH is missing: name the files and folders that hold your text')
    folder = Path(out_dir) if out_dir else choose_folder(paths[0])
    files, skipped = inputs.find_files(paths)
    for what in inputs.told(skipped):
        note(f'skipped {what}')
    encoder = choose_tokenizer(origins)
    divide = end_of_text == 'token' and not encoder.spells_end_of_text
    found, n_marks = survey(files, encoder, divide)
    several = len(found.lengths) > 1
    encoder = fit_tokenizer(encoder, found, n_marks, divide)
    substitutes = str.maketrans(dict.fromkeys(found.missing, replace_missing))
    val = documents.choose_val(found.lengths) if several else set()

    def read_pieces(start):
        pieces = documents.read_documents(files, field, divide)
        if substitutes:
            pieces = ((text.translate(substitutes), ends) for text, ends in pieces)
        if several:
            split = documents.split_documents(pieces, val)
        else:
            texts = (text for text, _ in pieces)
            split = documents.split_text(texts, found.lengths[0], has_words(encoder))
        return islice(split, start, None)

    source = {
        'input': [path.name for path in paths],
        'files': len(files),
        'documents': len(found.lengths),
        'sha256': found.sha256,
    }
    if substitutes:
        source['replaced'] = {'characters': found.missing.total(), 'by': replace_missing}

    def check():
        if not overwrite:
            check_replaceable(folder, found.sha256)

    check()
    if not several:
        documents.split_position(found.lengths[0])  # fails before there is a folder
    if tokenizer == 'bpe':
        source['trained_tokens'] = vocab_size
        trained = stored_tokenizer(folder, source) or train_tokenizer(
            read_pieces, sum(found.lengths)
        )
        check_size(trained.vocab_size, origins)
        encoder = replace(trained, spells_end_of_text=encoder.spells_end_of_text)
    if isinstance(encoder, HfTokenizer):
        tell_changes(encoder, next(read_pieces(0))[1])
    before = read_json(folder / 'meta.json').get('splits')
    meta = write_dataset(folder, read_pieces, encoder, source, found.n_bytes, check)
    if before and before != meta['splits']:
        note(f'the tokens in {folder} were replaced: runs on the old ones cannot be resumed')
    share = sum(map(found.lengths.__getitem__, val)) / sum(found.lengths)
    if several and not 0.5 * documents.VAL_FRACTION <= share <= 2 * documents.VAL_FRACTION:
        note(f'the validation split has {share:.0%} of the text, because documents are kept whole')
    if divide and several and len(found.lengths) < FEW:
        note(
            f'with only {len(found.lengths)} documents, the validation split may contain a '
            f'different kind of text: put {END_OF_TEXT} between the parts of a document, such as '
            'chapters'
        )
    content = f'{len(found.lengths):,} document{"s" * several}, {sum(found.lengths):,} characters'
    print(describe(folder, content, meta))
    if tokenizer == 'bpe':
        print(compare(encoder, read_pieces))
    if sum(found.lengths) < LITTLE:
        note(f'this is very little text to learn from; use at least {LITTLE:,} characters')
    where = f' --data_dir={shlex.quote(str(folder.parent))}' if out_dir else ''
    dataset = shlex.quote(folder.name)
    config = shlex.quote(script_path('config/train_text.py'))
    is_run = (Path(tokenizer) / 'latest').is_file()
    start = f' --init_from={shlex.quote(tokenizer)}' if is_run else ''
    print(f'to train on it: {command("train.py")} {config} --dataset={dataset}{where}{start}')


def note(what: str):
    print(f'note: {what}', file=sys.stderr)


def check_replaceable(folder: Path, sha256: str):
    """Raises UserError if the folder contains a dataset of another text."""
    if not is_prepared(folder):
        return
    source = read_json(folder / 'meta.json').get('source')
    if not isinstance(source, dict) or source.get('sha256') != sha256:
        raise UserError(
            f'{shown(folder)} contains a dataset made from another text, or from an earlier '
            f'version of this one: replace it (--overwrite), or use another --name=NAME'
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


def choose_tokenizer(origins: Mapping[str, str]) -> Tokenizer:
    """Returns the tokenizer that the flags name; for 'char', one that has no characters yet.

    Raises UserError if it cannot be read, or if other flags contradict it.
    """
    own: dict[str, Tokenizer] = {
        'char': CharTokenizer(''),
        'byte': ByteTokenizer(),
        'gpt2': Gpt2Tokenizer(),
        'bpe': ByteTokenizer(),  # until its merges have been trained
    }
    if tokenizer == 'bpe':
        import_library()
        if not train_bpe.SMALLEST <= vocab_size <= train_bpe.LARGEST:
            raise UserError(
                f'--vocab_size={vocab_size}: expected {train_bpe.SMALLEST} (a token for each byte '
                f'and {END_OF_TEXT}) to {train_bpe.LARGEST}'
            )
    elif origins['vocab_size'] != 'default':
        raise UserError(
            f'--vocab_size={vocab_size} is for --tokenizer=bpe, but --tokenizer={tokenizer} has '
            f'its own vocabulary: leave --vocab_size out'
        )
    chosen = own.get(tokenizer) or read_tokenizer(tokenizer)
    chosen.encode('')  # fails before the text is read if its files are missing
    recorded = 'characters' if chosen.spells_end_of_text else 'token'
    if tokenizer not in own and origins['end_of_text'] != 'default' and end_of_text != recorded:
        raise UserError(
            f'--end_of_text={end_of_text}: the tokenizer of {tokenizer} has --end_of_text='
            f'{recorded}; leave --end_of_text out, or use another tokenizer'
        )
    characters = characters_of(chosen)
    if replace_missing and (len(replace_missing) > 1 or replace_missing not in characters):
        raise UserError(
            f'--replace_missing={replace_missing}: expected one character of the vocabulary of '
            f'--tokenizer=FOLDER'
            + (
                f', such as {suggest(characters)}'
                if characters
                else ', whose tokens are characters'
            )
        )
    return chosen


def train_tokenizer(
    read_pieces: Callable[[int], Iterator[Piece]], n_characters: int
) -> HfTokenizer:
    """Returns a tokenizer trained on the training split, and prints what it was trained on."""
    n_train = 0

    def texts():
        nonlocal n_train
        train = (text for split, text, _ in read_pieces(0) if split == 'train')
        for text in train_bpe.spread(train, n_characters):
            n_train += len(text)
            yield text

    started = time.perf_counter()
    trained = train_bpe.train_bpe(texts(), vocab_size)
    seconds = time.perf_counter() - started
    part = ', spread over the training split' if n_characters > train_bpe.MOST else ''
    print(f'trained {trained.vocab_size:,} tokens on {n_train:,} characters{part}; {seconds:.1f} s')
    return trained


def check_size(found: int, origins: Mapping[str, str]):
    """Prints that the text had too few pairs for vocab_size tokens.

    Raises UserError if a flag or a config file sets vocab_size.
    """
    if found >= vocab_size:
        return
    has = f'the text has enough repeated pairs for only {found:,} tokens'
    if origins['vocab_size'] != 'default':
        raise UserError(
            f'--vocab_size={vocab_size}: {has}; use --vocab_size={found} or less, or a longer text'
        )
    note(f'{has}, so the tokenizer has fewer than the default of {vocab_size:,}')


def compare(trained: Tokenizer, read_pieces: Callable[[int], Iterator[Piece]]) -> str:
    """Returns a line with the bytes per token of a tokenizer, of characters and of GPT-2."""
    texts, size = [], 0
    for split, text, _ in read_pieces(0):
        if split == 'val' and size < SAMPLE:
            texts.append((text, False))
            size += len(text)
    n_bytes = sum(len(text.encode()) for text, _ in texts)
    figures = [f'{n_bytes / len(trained.encode_texts(texts)):.2f}']
    figures.append(f'characters have {n_bytes / size:.2f}')
    if is_gpt2_stored():
        n_gpt2 = len(Gpt2Tokenizer().encode_texts(texts))
        figures.append(f'GPT-2 (50,257 tokens) has {n_bytes / n_gpt2:.2f}')
    else:
        figures.append("GPT-2's vocabulary is not on this machine, so it is not compared")
    return f'bytes per token on validation text: {"; ".join(figures)}'


def tell_changes(encoder: HfTokenizer, text: str):
    """Prints a note if encoding and decoding a text changes it."""
    decoded = encoder.decode(encoder.encode(text))
    if decoded != text:
        pairs = enumerate(zip(text, decoded))
        at = next((n for n, (a, b) in pairs if a != b), min(len(text), len(decoded)))
        note(
            f'the tokenizer of {tokenizer} changes the text: {text[at : at + 20]!r} becomes '
            f'{decoded[at : at + 20]!r}'
        )


def characters_of(encoder: Tokenizer) -> str:
    return encoder.characters if isinstance(encoder, CharTokenizer) else ''


def suggest(characters: str) -> str:
    """Returns a flag that replaces missing characters by one of these."""
    usual = next((character for character in '?_ ' if character in characters), characters[0])
    return f'--replace_missing={shlex.quote(usual)}'


def survey(files: list[Path], encoder: Tokenizer, divide: bool) -> tuple[documents.Survey, int]:
    """Reads all documents once and prints what reading has changed.

    Returns the survey, and how often the text contains END_OF_TEXT.
    """
    noted = Counter[str]()
    pieces = documents.read_documents(files, field, divide, noted)
    is_char = isinstance(encoder, CharTokenizer)
    found = documents.survey(pieces, is_char, characters_of(encoder))
    n_marks = noted.pop(END_OF_TEXT, 0)
    for what in inputs.told(noted):
        note(what)
    return found, n_marks


def fit_tokenizer(
    encoder: Tokenizer, found: documents.Survey, n_marks: int, divide: bool
) -> Tokenizer:
    """Returns the tokenizer for this text, and prints where the two do not agree.

    Raises UserError if it lacks characters that are not to be replaced.
    """
    several = len(found.lengths) > 1
    if tokenizer == 'char':
        encoder = CharTokenizer(found.characters, several)
    if n_marks:
        does = 'ends a document' if divide else 'stays ordinary characters, in prompts as well'
        note(f'{END_OF_TEXT} occurs {n_marks:,} time{"s" * (n_marks > 1)} in the text: each {does}')
        encoder = replace(encoder, spells_end_of_text=not divide)
    if several and encoder.end_of_text is None:
        note(f'the tokenizer of {tokenizer} has no {END_OF_TEXT}: nothing separates the documents')
    if found.missing:
        most = [f'{character!r} ({n:,})' for character, n in found.missing.most_common(10)]
        lacks = (
            f'the tokenizer of {tokenizer} lacks {len(found.missing):,} of the characters of this '
            f'text, which occur {found.missing.total():,} times: {", ".join(most)}'
            + ', ...'
            * (len(found.missing) > len(most))
        )
        if not replace_missing:
            raise UserError(f'{lacks}; replace them: {suggest(characters_of(encoder))}')
        note(f'{lacks}; each is replaced by {replace_missing!r}')
    return encoder


if __name__ == '__main__':
    run_script(main)
