"""Writes a run as GGUF in every type, and compares logits, greedy text and file sizes.

    python benchmarks/gguf_types.py --runs=out-shakespeare-char,out-modern-shakespeare-char

Needs llama-cpp-python, whose installation compiles for a quarter of an hour. The text is that of
the run's dataset: whole contexts from the beginning of its validation split.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
from torch.nn import functional as F

import configurator
from model import GPT
from nib.checkpoint.start import read_model
from nib.errors import UserError, optional, run_script
from nib.hub import gguf
from nib.tokens.dataset import open_dataset

runs: str = ''  # folders of runs, separated by commas

CONTEXTS, GREEDY = 8, 100  # contexts to compare, tokens to generate
TYPES = 'f32', 'f16', 'bf16', 'q8_0'


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if not runs:
        raise UserError('runs is empty: name the folders of runs, separated by commas')
    with optional('llama-cpp-python', 'this'):
        from llama_cpp import Llama, llama_cpp
    make = llama_cpp.llama_model_default_params

    def defaults():
        made = make()
        made.use_extra_bufts = False  # kernels for AMX, which fail on some virtual machines
        return made

    llama_cpp.llama_model_default_params = defaults
    for run in runs.split(','):
        compare(run, Llama)


@torch.no_grad()
def compare(run: str, Llama):
    """Prints a table: a row for each type, and float32 caches except in the last row."""
    weights = read_model('', run)
    config, state = weights.resumed.state['config'], weights.tensors['model']
    tokenizer = weights.known_tokenizer()
    model = GPT(weights.model).eval()
    model.load_state_dict(state)
    T, V = weights.model.block_size, weights.model.vocab_size
    text = open_dataset(Path(config['data_dir'], config['dataset']), T).val[: CONTEXTS * T]
    contexts = torch.from_numpy(text.astype(np.int64)).view(CONTEXTS, T)
    ours = model(contexts)  # (CONTEXTS, T, V)
    prompt = contexts[0, :8].tolist()
    greedy = [int(t) for t in model.generate([prompt], min(GREEDY, T - 8), temperature=0)]
    print(f'{run}: {gguf.pick(weights.model)}, {model.num_params():,} parameters')
    print(f'{"type":22}{"MB":>8}{"largest":>11}{"KL nats":>11}{"same top":>10}{"same text":>11}')
    for dtype, cache in (*((dtype, 'f32') for dtype in TYPES), ('q8_0', 'f16')):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'model.gguf')
            gguf.write(path, weights.model, state, tokenizer, dtype)
            size = os.path.getsize(path) / 1e6
            kinds = dict(type_k=0, type_v=0) if cache == 'f32' else {}
            llama = Llama(path, n_ctx=T, n_threads=1, logits_all=True, verbose=False, **kinds)
            theirs = torch.stack([logits(llama, ids)[:, :V] for ids in contexts.tolist()])
            same = same_tokens(llama, prompt, greedy)
            llama.close()
        difference = (theirs - ours).abs().max() / ours.abs().max()
        kl = F.kl_div(
            theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction='none'
        )
        same_top = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
        print(
            f'{f"{dtype}, cache in {cache}":22}{size:8.2f}{difference:11.1e}'
            f'{kl.sum(-1).mean():11.1e}{same_top:10.2%}{f"{same} of {len(greedy)}":>11}'
        )


def logits(llama, ids: list[int]) -> torch.Tensor:
    """Returns the logits (T, V) of token ids (T)."""
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)])


def same_tokens(llama, prompt: list[int], greedy: list[int]) -> int:
    """Returns how many greedy tokens after the prompt equal those given, until one differs."""
    llama.reset()
    made = llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    same = 0
    while same < len(greedy) and next(made) == greedy[same]:
        same += 1
    return same


if __name__ == '__main__':
    run_script(main)
