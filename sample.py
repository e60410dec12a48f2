"""Generates text with a trained model.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
echo -n "To be" | python sample.py --out_dir=out-shakespeare-char --start=-
python sample.py --init_from=gpt2 --start="The meaning of life is"
python sample.py --init_from=Qwen/Qwen3-0.6B --chat
"""

import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback
from nib.startup import in_notebook

import itertools
import os
import re
import sys
from collections.abc import Callable
from typing import Literal

import torch

import configurator
from nib.api import stream
from nib.checkpoint.start import read_model
from nib.checkpoint.weights import Weights
from nib.errors import UserError, run_script, warn
from nib.generation import int8
from nib.generation.chat import Conversation
from nib.generation.sampling import check_sampling
from nib.machine.compiling import NO_COMPILER, explain_failure, has_compiler
from nib.machine.device import SMALL_MODEL, describe_device, limit_threads, pick_device, pick_dtype
from nib.machine.memory import check_samples
from nib.schema import check_range
from nib.text import reading
from nib.text.tokenizer import Tokenizer, encode_prompt

# which model
out_dir: str = 'out'  # folder of the training run
which: str = 'best'  # checkpoint: 'best', 'latest' or a step number
init_from: str = ''  # use another model: 'gpt2', a hub id, a model's folder, nanoGPT's ckpt.pt
# what to write
start: str = '\n'  # prompt, FILE:path or - (standard input); \n is a line break
chat: bool = False  # talk to an instruction-tuned model; start is then the system message
num_samples: int = 3  # continuations of the prompt; the first is shown while it is generated
max_new_tokens: int = 500  # tokens per sample
stop: str = ''  # end a sample after this text, such as <|endoftext|>
# how to choose tokens
temperature: float = 0.8  # below 1: more predictable; above 1: more varied; 0: most likely token
top_k: int | None = 200  # only the k most likely tokens; None: all
top_p: float | None = None  # only the most likely tokens with this total probability; None: all
seed: int = 1337  # a different seed gives different samples
# machine
device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'auto'  # of the weights
compile: bool | Literal['auto'] = False  # use torch.compile; for thousands of tokens on a GPU


def main(argv):
    values, origins = configurator.configure(__file__, argv, settle={'device': pick_device})
    for key in ('start', 'stop'):  # in a config file, Python has read the escapes
        if origins[key] == 'command line' and not values[key].startswith('FILE:'):
            values[key] = unescape(values[key], f'--{key}')
    globals().update(values)
    check_range(values, 'num_samples', least=1, below=1 << 20)
    if chat:
        check_chat(origins)
    given = None
    if origins['start'] != 'default':
        given = '' if chat and not start else read_prompt(start)  # a system message may be empty
    dtype_used, dtype_reason = pick_dtype(dtype, device)
    if dtype == 'int8' and (reason := int8.why_not(device)):
        raise UserError(f'--dtype=int8: {reason}')
    weights = read_model(init_from, out_dir, which, check=lambda weights: begin(weights, given))
    conversation, prompt, prompt_ids = begin(weights, given)
    tokenizer = weights.known_tokenizer()
    model = weights.build()
    # The other cells of a notebook need the threads.
    if device == 'cpu' and model.num_params() < SMALL_MODEL and not in_notebook():
        limit_threads(1)
    if dtype == 'int8':
        model = int8.quantize(model.float())
    else:
        model.to(device, getattr(torch, dtype_used))
    warn(f'{weights.describe()}; {describe_device(device)}, {dtype_used} ({dtype_reason})')
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if conversation:
        conversation.run(model, stop, **sampling)
        return

    def generate(compiled: bool):
        prompts = [prompt_ids] * num_samples
        return stream(model, tokenizer, prompts, max_new_tokens, stop, compile=compiled, **sampling)

    compiled = compile and can_compile(generate)
    show(prompt)
    texts = [''] * num_samples
    for pieces in generate(compiled):
        show(pieces[0])
        texts = [text + piece for text, piece in zip(texts, pieces)]
    for text in texts[1:]:
        show(f'\n---------------\n{prompt}{text}')
    show('\n')


def begin(weights: Weights, given: str | None) -> tuple[Conversation | None, str, list[int]]:
    """Returns the conversation, if there is one, the prompt and its token ids.

    given: the prompt or, in a conversation, its system message; None: the default. The tensors of
    the weights are not needed. Raises UserError if the model cannot generate what is asked for.
    """
    tokenizer = weights.known_tokenizer()
    conversation, prompt = None, given or ''
    if chat:
        conversation = Conversation.begin(weights, given, max_new_tokens, show)
        prompt_ids = conversation.opening_ids()
    else:
        prompt = prompt or default_prompt(tokenizer)
        prompt_ids = encode_start(tokenizer, prompt, weights.model.block_size)
    encode_prompt(tokenizer, stop, '--stop')  # raises UserError if a token is missing
    check_sampling(
        [prompt_ids], max_new_tokens, temperature, top_k, top_p, seed, tokenizer.vocab_size
    )
    if device == 'cpu' and not chat:
        check_samples(weights.model, num_samples, len(prompt_ids) + max_new_tokens)
    return conversation, prompt, prompt_ids


def check_chat(origins: dict):
    """Raises UserError if a key was set that has no meaning in a conversation."""
    for key in ('num_samples', 'compile'):
        if origins[key] != 'default':
            raise UserError(f'--{key} has no effect with --chat: leave it out')
    if start == '-':
        raise UserError(
            '--start=-: with --chat, standard input is the conversation; write the system message '
            'into a file and use --start=FILE:path'
        )


def can_compile(generate: Callable) -> bool:
    """Returns whether generation can be compiled, after a trial with two tokens.

    If it cannot, prints the reason on standard error.
    """
    chosen, reason = has_compiler(), NO_COMPILER
    if chosen:
        try:
            list(itertools.islice(generate(True), 2))
        except Exception as error:  # the compiler's errors have no common base class
            chosen, reason = False, explain_failure(error)
    if not chosen:
        warn(f'not compiled: {reason}')
    return chosen


def unescape(text: str, flag: str) -> str:
    r"""Returns a flag's text with \n, \t and \\ replaced by what they stand for in Python."""
    meanings = {r'\n': '\n', r'\t': '\t', r'\\': '\\'}
    if re.search(r'(?<!\\)\\[nt][a-z]', text):  # it could be \theta or a path
        warn(rf'note: {flag}: \n is a line break, \t a tab, and \\ a backslash')
    return re.sub(r'\\[nt\\]', lambda match: meanings[match[0]], text)


def read_prompt(start: str) -> str:
    """Returns the prompt; `start` is the text itself, FILE:path, or - for standard input.

    Raises UserError if it cannot be read or is empty.
    """

    def note(what: str):
        warn(f'note: --start: {what}')

    try:
        if start == '-':
            prompt = ''.join(reading.decode(sys.stdin.buffer, None, note))
        elif start.startswith('FILE:'):
            path = os.path.expanduser(start.removeprefix('FILE:'))
            prompt = ''.join(reading.read_file(path, note))
        else:
            if os.path.isfile(start):
                note(f'{start} is taken as text; to read the file, use FILE:{start}')
            prompt = reading.plain(start, note)
    except UserError as error:
        raise UserError(f'--start={start}: {error}') from error
    if not prompt:
        raise UserError(
            '--start: the prompt is empty; a model needs at least one character to start from'
        )
    return prompt


def default_prompt(tokenizer: Tokenizer) -> str:
    """Returns a line break or, if the vocabulary has none, its first token."""
    try:
        encode_prompt(tokenizer, start, '--start')
        return start
    except UserError:
        first = tokenizer.decode([0])
        return first.strip() or first


def encode_start(tokenizer: Tokenizer, prompt: str, block_size: int) -> list[int]:
    """Returns the token ids of the prompt.

    Raises UserError if the vocabulary cannot represent it, or it is longer than the context.
    """
    ids = encode_prompt(tokenizer, prompt, '--start')
    if len(ids) > block_size:
        n_fitting = len(tokenizer.decode(ids[-block_size:]))
        raise UserError(
            f'--start: the prompt has {len(ids):,} tokens, but the context of the model has '
            f'{block_size:,}: shorten it, for example to its last {n_fitting:,} characters'
        )
    return ids


def show(text: str):
    """Prints text at once; characters that the terminal lacks are replaced."""
    encoding = sys.stdout.encoding or 'utf-8'
    sys.stdout.write(text.encode(encoding, errors='replace').decode(encoding))
    sys.stdout.flush()


if __name__ == '__main__':
    run_script(main)
