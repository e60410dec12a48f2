"""Writes a trained model, and its tokenizer, for other programs.

python convert.py --out_dir=out-shakespeare-char --to=hf --dest=shakespeare
    a folder for transformers, vLLM, llama.cpp's converter and everything that reads such folders
python convert.py --out_dir=out-shakespeare-char --to=nanogpt --dest=nanoGPT/out
    ckpt.pt, for nanoGPT's sample.py and train.py
python convert.py --out_dir=out-shakespeare-char --to=gguf --dest=shakespeare.gguf
    a file for llama.cpp, Ollama and LM Studio
python convert.py --init_from=nanoGPT/out/ckpt.pt --to=hf --dest=shakespeare
    the same for a model from another project
"""

import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import os
from pathlib import Path
from typing import Literal

import configurator
from nib.checkpoint.paths import is_own_name
from nib.checkpoint.start import read_model
from nib.checkpoint.weights import Weights
from nib.errors import UserError, run_script
from nib.files import check_writable
from nib.hub import gguf, huggingface, nanogpt
from nib.hub.card import model_card
from nib.hub.reference import check_model, check_tokenizer
from nib.run.checks import settle_schedule
from nib.text.tokenizer import Tokenizer

# which model
out_dir: str = 'out'  # folder of the training run
which: str = 'best'  # checkpoint: 'best', 'latest' or a step number
init_from: str = ''  # use another model: 'gpt2', a hub id, a model's folder, nanoGPT's ckpt.pt
# what to write
to: Literal['hf', 'nanogpt', 'gguf'] = 'hf'  # Hugging Face's format, nanoGPT's ckpt.pt, or GGUF
dest: str = ''  # output folder (for GGUF, output file); it must not exist yet
dtype: Literal['f32', 'f16', 'bf16', 'q8_0'] = 'f32'  # precision of the matrices in GGUF


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if not dest:
        raise UserError('--dest=PATH is missing: name the folder or the GGUF file to write')
    if os.path.lexists(dest):
        raise UserError(f'dest {dest} already exists: choose another one')
    whole = Path(os.path.abspath(dest))
    if any(is_own_name(folder) for folder in (whole, *whole.parents)):
        raise UserError(
            f'dest {dest} is where a run keeps its checkpoints, and would be deleted with them: '
            f'choose another path'
        )
    check_writable(dest, 'dest')
    if (to == 'gguf') != dest.endswith('.gguf'):
        raise UserError(f'--to={to} does not fit dest {dest}: only GGUF files end in .gguf')
    if to != 'gguf' and dtype != 'f32':
        raise UserError(f'dtype is {dtype}, but --to={to} always writes float32: leave dtype out')
    # nanoGPT continues from the optimizer state.
    read = ('model', 'optimizer') if to == 'nanogpt' else ('model',)
    weights = read_model(init_from, out_dir, which, read)
    tokenizer = weights.known_tokenizer()
    check_model(weights.model)
    check_tokenizer(tokenizer)
    {'hf': write_hf, 'nanogpt': write_nanogpt, 'gguf': write_gguf}[to](weights, tokenizer)
    print(f'{weights.describe()}: written to {dest}')


def write_hf(weights: Weights, tokenizer: Tokenizer):
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load."""
    weights = weights.crop_vocabulary(tokenizer.vocab_size)
    state = weights.resumed.state if weights.resumed else {}
    card = model_card(weights.short_name, weights.model, tokenizer, state)
    huggingface.write(dest, weights.model, weights.tensors['model'], tokenizer, card)


def write_nanogpt(weights: Weights, tokenizer: Tokenizer):
    """Writes ckpt.pt, and meta.pkl for a model of characters."""
    state: dict = weights.resumed.state if weights.resumed else {'step': 0}
    train_script = Path(__file__).with_name('train.py')
    defaults = configurator.read_block(str(train_script)).defaults
    # The dataset of an open model has no name.
    config = defaults | {'dataset': Path(dest).name} | state.get('config', {})
    config = settle_schedule(config)
    nanogpt.write_folder(Path(dest), weights.model, weights.tensors, tokenizer, state, config)
    if (Path(dest) / 'meta.pkl').exists():
        print(f'nanoGPT looks for meta.pkl in its data/{config["dataset"]}/: move it there')
    if weights.model.mlp == 'gelu':
        print(
            'nanoGPT computes GELU exactly, but this model approximates it: logits differ by about '
            'a thousandth of the largest one'
        )


def write_gguf(weights: Weights, tokenizer: Tokenizer):
    """Writes a file that llama.cpp loads."""
    weights = weights.crop_vocabulary(tokenizer.vocab_size)
    gguf.write(dest, weights.model, weights.tensors['model'], tokenizer, dtype)
    if weights.model.mlp == 'gelu_erf':
        print(
            'llama.cpp approximates GELU, but this model computes it exactly: logits differ by '
            'about a thousandth of the largest one'
        )


if __name__ == '__main__':
    run_script(main)
