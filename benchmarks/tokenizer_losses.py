"""Trains one config on one text with several tokenizers, for equally many steps.

    python benchmarks/tokenizer_losses.py --input=input.txt

The table has the last line of each run: the loss on the whole validation split, in nats per token
and in bits per byte. Only the latter can be compared.
"""

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from nib.errors import UserError, run_script
from nib.files import read_json

input: str = ''  # file of text
max_iters: int = 500  # steps of each run
result: str = ''  # also write the table to this file

TOKENIZERS = {
    'char': ['--tokenizer=char'],
    'byte': ['--tokenizer=byte'],
    'bpe, 512': ['--tokenizer=bpe', '--vocab_size=512'],
    'bpe, 4096': ['--tokenizer=bpe', '--vocab_size=4096'],
    'gpt2': ['--tokenizer=gpt2'],
}
LOSS = r'val loss ([\d.]+) nats per token \(([\d.]+) bits per byte\) on the whole'


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if not input:
        raise UserError('--input=PATH is missing: name the file that holds the text')
    steps = [f'--max_iters={max_iters}', f'--lr_decay_iters={max_iters}']
    lines = [
        f'config/train_text.py {" ".join(steps)}; {measure.describe_machine()}',
        '',
        f'{"":12}{"tokens":>8}{"bytes per token":>17}{"nats per token":>16}{"bits per byte":>15}',
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in TOKENIZERS.items():
            data = Path(folder, name)
            measure.run('data/text/prepare.py', f'--input={input}', f'--out_dir={data}', *flags)
            where = [
                f'--dataset={data}',
                f'--out_dir={folder}/run',
                '--overwrite',
                '--report=False',
            ]
            said = measure.run('train.py', 'config/train_text.py', *where, *steps)
            nats, bits = re.findall(LOSS, said)[-1]
            meta = read_json(data / 'meta.json')
            counts = meta['splits']['val']
            size = counts['bytes'] / counts['tokens']
            lines.append(f'{name:12}{meta["vocab_size"]:8,}{size:17.2f}{nats:>16}{bits:>15}')
            print(lines[-1], flush=True)
    table = '\n'.join(lines) + '\n'
    measure.publish(table, result)


if __name__ == '__main__':
    run_script(main)
