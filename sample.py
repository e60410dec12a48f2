"""Writes text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    echo -n "To be" | python sample.py --out_dir=out-shakespeare-char --start=-
"""
import sys
from pathlib import Path

import configurator
from model import GPT, GPTConfig
from nib import checkpoint, runtime
from nib.errors import UserError, run_script
from nib.tokenizer import tokenizer_from_json

# which model
out_dir: str = 'out'  # folder of the training run
which: str = 'best'  # checkpoint: 'best', 'latest' or a step number
# what to write
start: str = '\n'  # the prompt; FILE:path takes a file's text, - standard input
num_samples: int = 3  # continuations of the prompt; the first is shown as it is written
max_new_tokens: int = 500  # tokens in each
stop: str = ''  # end a sample after this text
# how to choose tokens
temperature: float = 0.8  # below 1 safer, above 1 wilder; 0 always takes the likeliest token
top_k: int | None = 200  # only the k likeliest tokens; None for all
top_p: float | None = None  # only the likeliest tokens that hold this much probability; None for all
seed: int = 1337  # another seed, other samples
# machine
device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'


def main(argv):
    values, _ = configurator.configure(__file__, argv, settle={'device': runtime.pick_device})
    globals().update(values)
    if num_samples < 1:
        raise UserError(f'num_samples is {num_samples}: it must be at least 1')
    prompt = read_prompt(start)
    found, tensors = checkpoint.load(out_dir, which, read=('model',))
    tokenizer = tokenizer_from_json(found.state['tokenizer'])
    model = GPT(GPTConfig(**found.state['model']))
    model.load_state_dict(tensors['model'])
    model.to(device)
    print(f'{found.path}: step {found.step}, trained on {found.state["dataset"]}; {runtime.describe_device(device)}',
          file=sys.stderr)

    prompt_ids = tokenizer.encode(prompt).tolist()
    stops = [tokenizer.encode(stop).tolist()] if stop else []
    rows = [[] for _ in range(num_samples)]
    try:
        show(prompt)
        for tokens in model.generate([prompt_ids] * num_samples, max_new_tokens, temperature, top_k, top_p, seed, stops):
            for row, token in zip(rows, tokens.tolist()):
                if token >= 0:  # this row goes on
                    row.append(token)
                    if row is rows[0]:
                        show(tokenizer.decode([token]))
    except ValueError as error:
        raise UserError(str(error)) from error
    for row in rows[1:]:
        show(f'\n---------------\n{prompt}{tokenizer.decode(row)}')
    show('\n')


def read_prompt(start: str) -> str:
    """The prompt itself, or what FILE:path or - stands for. UserError where that cannot be read or is empty."""
    try:
        if start == '-':
            prompt = sys.stdin.buffer.read().decode('utf-8')
        elif start.startswith('FILE:'):
            prompt = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8')
        else:
            prompt = start
    except OSError as error:
        raise UserError(f'--start={start}: {error.strerror}; it is FILE: and the path of a text file') from error
    except UnicodeDecodeError as error:
        raise UserError(f'--start={start}: not UTF-8 text (byte {error.start}); convert it: iconv -t UTF-8') from error
    if not prompt:
        raise UserError('--start: the prompt is empty; a model needs at least one character to start from')
    return prompt


def show(text: str):
    """Text on standard output at once, also where the terminal lacks a character of it."""
    encoding = sys.stdout.encoding or 'utf-8'
    sys.stdout.write(text.encode(encoding, errors='replace').decode(encoding))
    sys.stdout.flush()


if __name__ == '__main__':
    run_script(main)
