"""OpenWebText by GPT-2's tokens: 8 million pages that people on Reddit recommended, 9 billion tokens.

Fetches it from Hugging Face (pip install datasets; 54 GB in its cache, HF_HOME says where), or takes --input=FOLDER. The
split and the order are nanoGPT's. A run that was stopped goes on where it was.
"""
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator  # noqa: E402
from nib import corpus, documents  # noqa: E402
from nib.errors import UserError, run_script  # noqa: E402
from nib.tokenizer import Gpt2Tokenizer  # noqa: E402

input: str = ''  # .jsonl and .parquet files, or a folder of them, whose rows have a text; empty: OpenWebText itself
out_dir: str = ''  # where the bins go; empty: beside this file

NAME = 'Skylion007/openwebtext'
EXPECTED = {'train': 9_035_582_198, 'val': 4_434_897}  # tokens, as nanoGPT has published them


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    folder = Path(out_dir) if out_dir else Path(__file__).resolve().parent
    Gpt2Tokenizer().encode('')  # without its files, say so before fetching 54 GB
    dataset = load()
    if len(dataset) < 2:
        raise UserError(f'{input} holds {len(dataset)} documents: it takes two to have one of them to validate on')
    parts = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    parts = {'train': parts['train'], 'val': parts['test']}

    def read_pieces(start):
        for split, part in parts.items():
            if start < len(part):
                for rows in part.skip(start).iter(1000):
                    yield from ((split, text or '', True) for text in rows['text'])
            start = max(0, start - len(part))

    # The fingerprint is Hugging Face's: of the files that the dataset was made of.
    source = {'dataset': Path(input).name if input else NAME, 'fingerprint': dataset._fingerprint,
              'documents': {split: len(part) for split, part in parts.items()}}
    meta = corpus.write_dataset(folder, read_pieces, Gpt2Tokenizer(), source, dataset.data.nbytes)
    tokens = {split: counts['tokens'] for split, counts in meta['splits'].items()}
    print(f'{folder}: documents {len(dataset):,}, vocabulary {meta["vocab_size"]:,}, {tokens["train"]:,} training and '
          f'{tokens["val"]:,} validation tokens')
    if not input and tokens != EXPECTED:
        print(f'note: nanoGPT has published {EXPECTED["train"]:,} and {EXPECTED["val"]:,} tokens; {NAME} has changed since',
              file=sys.stderr)


def load():
    """All documents, as a Hugging Face dataset with one column, text, that is read from the disk as it is needed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError('this dataset needs a package that is not installed: pip install datasets') from error
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it tells of every one of five attempts
    if not sys.stderr.isatty():
        datasets.utils.disable_progress_bars()
    try:
        if not input:
            print(f'loading {NAME} from Hugging Face')
            dataset = datasets.load_dataset(NAME, split='train', num_proc=os.cpu_count())
        else:
            files, _ = documents.find_files(input.split(','))
            parts = [datasets.load_dataset(kind, data_files=names, split='train').select_columns('text')
                     for kind, ending in (('json', '.jsonl'), ('parquet', '.parquet'))
                     if (names := [str(file) for file in files if file.suffix.lower() == ending])]
            if not parts:
                raise UserError(f'{input} holds no .jsonl or .parquet file')
            dataset = datasets.concatenate_datasets(parts)
            if dataset.features['text'].dtype not in ('string', 'large_string'):
                raise UserError(f"{input}: 'text' is no text but of type {dataset.features['text'].dtype}")
    except UserError:
        raise
    except Exception as error:  # what can go wrong between here and the Hub is of many types
        while error.__cause__:
            error = error.__cause__
        remedy = ('--input=FOLDER takes .jsonl and .parquet files with a field named text' if input else
                  'fetch it where there is a network, or name a folder of .jsonl or .parquet files: --input=FOLDER')
        raise UserError(f'{input or NAME} could not be loaded ({type(error).__name__}: {error}); {remedy}') from error
    return dataset.select_columns('text')


if __name__ == '__main__':
    run_script(main)
