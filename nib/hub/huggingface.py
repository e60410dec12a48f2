"""Models in Hugging Face's format: config.json, model.safetensors and a tokenizer."""

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from model import GPTConfig
from nib.checkpoint import tensorfile
from nib.errors import UserError
from nib.files import new_folder
from nib.hub import gpt2, llama
from nib.hub.files import Repository
from nib.hub.tokenizer import is_qwen2, read_tokenizer, write_tokenizer
from nib.text.hf_tokenizer import HfTokenizer

FAMILIES = {'gpt2': gpt2, **dict.fromkeys(llama.FAMILIES, llama)}  # model_type -> its module


def read(
    name: str, check: Callable[[GPTConfig, dict | None], object] = lambda model, tokenizer: None
) -> tuple[GPTConfig, dict[str, torch.Tensor], dict | None]:
    """Returns a model's config, its state_dict and its tokenizer (None: not known to nibGPT).

    name: a folder or a hub id. check: is called with the config and the tokenizer before the
    weights, which may be large, are downloaded. Raises UserError if the model cannot be represented
    exactly.
    """
    repository = Repository(name)
    try:
        if not repository.find('config.json'):
            raise UserError(f'{name} has no config.json; download it again')
        config = repository.read_json('config.json')
    except UserError:
        repository.reject_other_formats()  # these may lack config.json
        raise
    kind = config.get('model_type')
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f'{name}: config.json has the model_type {kind!r}, but only {", ".join(FAMILIES)} are '
            f'supported'
        )
    with _explained(name):
        model = FAMILIES[kind].read_config(config)
    tokenizer = read_tokenizer(repository, model.vocab_size)
    check(model, tokenizer)
    tensors = repository.read_tensors()
    with _explained(name):
        model, ours = FAMILIES[kind].read(config, model, tensors)
    return model, ours, tokenizer


@contextmanager
def _explained(name: str):
    """Within this context, errors say which model cannot be used."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{name} cannot be used: {error}') from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # of a wrong type
        raise UserError(f'{name} cannot be used: config.json is not valid ({error})') from error


def why_not(config: GPTConfig) -> str | None:
    """Returns why a model cannot be written for transformers; None if it can."""
    return (gpt2 if config.position == 'learned' else llama).why_not(config)


def write(
    folder: str, config: GPTConfig, tensors: Mapping[str, torch.Tensor], tokenizer, card: str
):
    """Writes a model so that AutoModelForCausalLM and AutoTokenizer load it.

    folder: must not exist. card: the text of README.md. Raises UserError, which names the key of
    GPTConfig, if no architecture of transformers is this model.
    """
    if reason := why_not(config):
        raise UserError(f'this model cannot be written for transformers: {reason}')
    if config.position == 'learned':
        keys, theirs = gpt2.write(config, tensors)
    else:
        keys, theirs = llama.write(config, tensors, as_qwen2=is_qwen2(tokenizer))
    begin = tokenizer.end_of_text
    if isinstance(tokenizer, HfTokenizer):
        begin = next(iter(tokenizer.first_ids), None)
    ends = {'bos_token_id': begin, 'eos_token_id': tokenizer.end_of_text}
    with new_folder(folder) as temporary:
        _write_json(temporary / 'config.json', {**keys, **ends, 'dtype': 'float32'})
        _write_json(temporary / 'generation_config.json', {**ends, 'do_sample': True})
        tensorfile.write(
            temporary / 'model.safetensors',
            {name: tensor.float() for name, tensor in theirs.items()},
            metadata={'format': 'pt'},  # transformers requires it
        )
        write_tokenizer(temporary, tokenizer, config.block_size)
        (temporary / 'README.md').write_text(card, encoding='utf-8')


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
