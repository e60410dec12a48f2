"""The weights that a run starts from: its own checkpoint, another run's, or published GPT-2."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import safetensors.torch
import torch

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.checkpoint.wrong_folder import explain
from nib.errors import UserError
from nib.machine.device import seed_everything
from nib.tokens.dataset import TokenDataset

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# Published GPT-2 stores these matrices as (inputs, outputs); nn.Linear has (outputs, inputs).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')


@dataclass(frozen=True)
class Weights:
    """Weights, the config of their model, and the tokenizer that the model was trained with."""

    name: str  # where they come from
    model: GPTConfig
    tokenizer: dict
    tensors: dict[str, dict[str, torch.Tensor]]  # 'model', and in a resumed run 'optimizer'
    resumed: store.Checkpoint | None = None

    def adopt(self, values: Mapping, origins: Mapping) -> dict:
        """Returns the config's values with this model's architecture.

        Raises UserError if the user has set a key to a value that contradicts the model. dropout
        and recompute may differ, and in a new run, block_size may be smaller.
        """
        adopted = dict(values)
        fixed = {field.name: getattr(self.model, field.name) for field in fields(GPTConfig)}
        if self.resumed:  # the checkpoint contains the state of its optimizer
            before = self.resumed.state['config']
            fixed['optimizer'] = before.get('optimizer', 'adamw')
            # The schedule stays as it was, unless the user sets it or changes what it depends on.
            for key, depends_on in (('min_lr', 'learning_rate'), ('lr_decay_iters', 'max_iters')):
                is_same = before.get(depends_on) == values[depends_on]
                is_number = type(before.get(key)) in (int, float)
                if origins[key] == 'default' and is_same and is_number:
                    adopted[key] = before[key]
            if origins['batch_size'].endswith('(auto)'):  # chosen once
                for key in ('batch_size', 'gradient_accumulation_steps'):
                    adopted[key] = before[key]
        for key, own in fixed.items():
            if key in ('vocab_size', 'dropout', 'recompute') or values[key] == own:
                continue
            if origins[key] == 'default':
                adopted[key] = own
            elif key == 'block_size' and not self.resumed:
                if values[key] > own:
                    raise UserError(
                        f'{key} {values[key]} ({origins[key]}) is greater than the {own} positions '
                        f'of {self.name}: use at most --block_size={own}'
                    )
            else:
                raise UserError(
                    f'{self.name} was trained with {key} {own}, but {origins[key]} says '
                    f'{values[key]}: leave {key} out, or train a new model with '
                    f'--init_from=scratch and another --out_dir'
                )
        return adopted

    def changes(self, config: Mapping) -> dict[str, list]:
        """Returns the keys that have changed since the checkpoint -> [value then, value now]."""
        before = self.resumed.state['config']
        return {
            key: [before[key], value]
            for key, value in config.items()
            if before.get(key, value) != value
            and key not in ('init_from', 'overwrite', 'out_dir', 'data_dir')
        }

    def check_dataset(self, data: TokenDataset):
        """Raises UserError if the model cannot be trained on this dataset.

        A resumed run needs the same dataset, and every model a dataset with its own tokenizer.
        """
        if self.resumed:
            self.resumed.check_dataset(data.folder, data.fingerprint)
        borrowed = self.name if self.tokenizer['kind'] == 'char' else self.tokenizer['kind']
        if data.vocab_size != self.model.vocab_size or data.tokenizer.to_json() != self.tokenizer:
            raise UserError(
                f'{self.name} needs tokens of another tokenizer ({self.tokenizer["kind"]}, '
                f'vocabulary {self.model.vocab_size}) than those of dataset {data.name} '
                f'(vocabulary {data.vocab_size}): prepare your text with its tokenizer, python '
                f'data/text/prepare.py --input=PATH --tokenizer={borrowed}'
            )


def new_model(config: Mapping, data: TokenDataset, start: Weights | None) -> GPT:
    """Returns a model with the weights of `start`, or with random ones, the same on all ranks.

    Raises UserError if the shape is impossible, or if `start` does not fit the dataset.
    """
    try:
        model_config = GPTConfig.pick(config, data.vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    if start is None:
        seed_everything(config['seed'])
        return GPT(model_config)
    start.check_dataset(data)
    model = GPT(replace(model_config, block_size=start.model.block_size))
    try:
        model.load_state_dict(start.tensors['model'])
    except RuntimeError as error:  # published weights, which have no digest, may be damaged
        if 'in loading state_dict' not in str(error):
            raise
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(
            f'the weights of {start.name} do not match its config ({reason}); '
            f'download both files again'
        ) from error
    model.crop_block_size(config['block_size'])
    return model


def read_start(init_from: str, out_dir: str, warn: Callable[[str], None]) -> Weights | None:
    """Returns the weights that init_from names; None for 'scratch'.

    Raises UserError if they are missing or not usable.
    """
    if init_from == 'scratch':
        return None
    if init_from == 'resume':
        found, tensors = store.load(out_dir, 'latest', warn=warn, check=check_shapes)
        return _from_checkpoint(found, tensors, resumed=True)
    run, which = store.locate(init_from, 'best')
    if store.exists(run):
        found, tensors = store.load(run, which, read=('model',), warn=warn, check=check_shapes)
        return _from_checkpoint(found, tensors, resumed=False)
    if init_from in GPT2_NAMES or (Path(init_from) / 'config.json').exists():
        return read_gpt2(init_from)
    instead = f'; {explain(init_from)}' if Path(init_from).exists() else ''
    raise UserError(
        f"init_from {init_from!r}: expected 'scratch', 'resume', "
        f'{", ".join(map(repr, GPT2_NAMES))}, or the folder of a run or of a Hugging Face GPT-2'
        f'{instead}'
    )


def _from_checkpoint(found: store.Checkpoint, tensors, resumed: bool) -> Weights:
    return Weights(
        name=str(found.path),
        model=GPTConfig(**found.state['model']),
        tokenizer=found.state['tokenizer'],
        tensors=tensors,
        resumed=found if resumed else None,
    )


def check_shapes(found: store.Checkpoint, tensors: dict[str, dict[str, torch.Tensor]]):
    """Raises Damaged if the tensors do not have the shapes of the checkpoint's model."""
    try:
        with torch.device('meta'):  # shapes only
            shapes = {
                name: tensor.shape
                for name, tensor in GPT(GPTConfig(**found.state['model'])).state_dict().items()
            }
    except (TypeError, ValueError) as error:
        raise store.Damaged(
            f'{found.path / "state.json"}: its model cannot be built ({error})'
        ) from error
    have = {name: tensor.shape for name, tensor in tensors['model'].items()}
    for name in sorted(have.keys() | shapes.keys()):
        if have.get(name) != shapes.get(name):
            raise store.Damaged(
                f'{found.path / "model.safetensors"}: {name} has {_shape(have.get(name))}, '
                f'expected {_shape(shapes.get(name))}'
            )
    for full_name, tensor in tensors.get('optimizer', {}).items():
        shape = shapes.get(full_name.rpartition('/')[0])
        # Optimizers may keep fewer numbers than one per weight.
        if shape is None or tensor.dim() == len(shape) and tensor.shape != shape:
            raise store.Damaged(
                f'{found.path / "optimizer.safetensors"}: {full_name} has {_shape(tensor.shape)}, '
                f'expected {_shape(shape)}'
            )


def _shape(shape: torch.Size | None) -> str:
    return 'no shape (missing)' if shape is None else f'shape {tuple(shape)}'


def read_gpt2(name: str) -> Weights:
    """Reads a GPT-2 in Hugging Face's format: config.json and model.safetensors.

    name: a folder, or one of GPT2_NAMES, which is downloaded once. Raises UserError if the files
    are missing or not valid.
    """
    config_file, weights_file = (_find(name, file) for file in ('config.json', 'model.safetensors'))
    try:
        config = json.loads(config_file.read_bytes())
        tensors = safetensors.torch.load_file(weights_file)
        sizes = {
            key: config['n_positions' if key == 'block_size' else key]
            for key in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd')
        }
        if not all(type(size) is int for size in sizes.values()):
            raise ValueError(f'its config has {sizes}, which are not all integers')
        model = GPTConfig(**sizes)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        raise UserError(
            f'{config_file.parent} is not a Hugging Face GPT-2 ({type(error).__name__}: {error}): '
            f'expected config.json and model.safetensors; download both again'
        ) from error
    renamed = {}
    for key, tensor in tensors.items():
        own_name = 'transformer.' + key.removeprefix('transformer.')
        # Not the masks, and not the head, which is tied.
        if not own_name.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight')):
            is_transposed = own_name.endswith(TRANSPOSED)
            renamed[own_name] = tensor.t().contiguous() if is_transposed else tensor
    return Weights(name, model, {'kind': 'gpt2'}, {'model': renamed})


def _find(name: str, file: str) -> Path:
    if name not in GPT2_NAMES or (Path(name) / file).exists():
        return Path(name) / file
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(
            f'--init_from={name} needs a package that is not installed: pip install huggingface_hub'
        ) from error
    # It logs every attempt; the message below sums them up.
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(f'openai-community/{name}', file))
    except Exception as error:  # its errors have no common base class
        raise UserError(
            f'{name} could not be downloaded from the Hugging Face hub ({type(error).__name__}); '
            f'download config.json and model.safetensors of openai-community/{name} elsewhere and '
            f'name their folder: --init_from=FOLDER'
        ) from error
