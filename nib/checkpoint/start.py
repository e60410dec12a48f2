"""The weights that a run starts from: its own checkpoint, another run's, or GPT-2's as Hugging Face publishes them."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import safetensors.torch
import torch

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.errors import UserError
from nib.machine.device import seed_everything
from nib.tokens.dataset import TokenDataset

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# GPT-2's own code keeps these matrices as (inputs, outputs); nn.Linear has (outputs, inputs).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')


@dataclass(frozen=True)
class Weights:
    """Weights, the model that they are of, and the tokenizer that this model reads."""

    name: str  # where they are from
    model: GPTConfig
    tokenizer: dict
    tensors: dict[str, dict[str, torch.Tensor]]  # 'model', and in a resumed run 'optimizer'
    resumed: store.Checkpoint | None = None

    def adopt(self, values: Mapping, origins: Mapping) -> dict:
        """The config's values, with this model's architecture where the user has not said otherwise.

        UserError where the user has: but for dropout and recompute, and block_size, which may be shorter in a new run.
        """
        adopted = dict(values)
        fixed = {field.name: getattr(self.model, field.name) for field in fields(GPTConfig)}
        if self.resumed:  # whose state is that of its optimizer
            fixed['optimizer'] = self.resumed.state['config'].get('optimizer', 'adamw')
            before = self.resumed.state['config']
            # The schedule of a run from before these keys had 'auto', unless what they depend on has changed.
            for key, depends_on in (('min_lr', 'learning_rate'), ('lr_decay_iters', 'max_iters')):
                is_same = before.get(depends_on) == values[depends_on] and type(
                    before.get(key)
                ) in (int, float)
                if values[key] == 'auto' and is_same:
                    adopted[key] = before[key]
        for key, own in fixed.items():
            if key in ('vocab_size', 'dropout', 'recompute') or values[key] == own:
                continue
            if origins[key] == 'default':
                adopted[key] = own
            elif key == 'block_size' and not self.resumed:
                if values[key] > own:
                    raise UserError(
                        f'{key} {values[key]} ({origins[key]}) is more than the {own} positions of {self.name}: '
                        f'use at most --block_size={own}'
                    )
            else:
                raise UserError(
                    f'{self.name} was trained with {key} {own}, but {origins[key]} says {values[key]}: leave '
                    f'{key} out, or train a new model with --init_from=scratch and another --out_dir'
                )
        return adopted

    def changes(self, config: Mapping) -> dict[str, list]:
        """Keys of a resumed run's config that have changed since the checkpoint -> [value then, value now]."""
        before = self.resumed.state['config']
        return {
            key: [before[key], value]
            for key, value in config.items()
            if before.get(key, value) != value and key not in ('init_from', 'overwrite', 'out_dir')
        }

    def check_dataset(self, data: TokenDataset):
        """UserError where a resumed run's dataset is not the one it had, or a dataset's tokens mean something else here."""
        if self.resumed:
            self.resumed.check_dataset(data.folder, data.fingerprint)
        if data.vocab_size != self.model.vocab_size or data.tokenizer.to_json() != self.tokenizer:
            raise UserError(
                f'{self.name} reads tokens of another tokenizer ({self.tokenizer["kind"]}, vocabulary '
                f'{self.model.vocab_size}) than dataset {data.name} has (vocabulary {data.vocab_size}): choose a '
                f'--dataset that was prepared with its tokenizer'
            )


def new_model(config: Mapping, data: TokenDataset, start: Weights | None) -> GPT:
    """A fresh model, with the same weights on every rank, or one with the weights of `start`. UserError for a shape that
    cannot be, or a vocabulary that is not the dataset's."""
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
    except RuntimeError as error:  # published weights have no digest that would tell
        if 'in loading state_dict' not in str(error):
            raise
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(
            f'the weights of {start.name} are not those of its config ({reason}); fetch both anew'
        ) from error
    model.crop_block_size(config['block_size'])
    return model


def read_start(init_from: str, out_dir: str, warn: Callable[[str], None]) -> Weights | None:
    """What init_from names; None for 'scratch'. UserError where it is not there or not usable."""
    if init_from == 'scratch':
        return None
    if init_from == 'resume':
        found, tensors = store.load(out_dir, 'latest', warn=warn, check=check_shapes)
        return Weights(
            str(found.path),
            GPTConfig(**found.state['model']),
            found.state['tokenizer'],
            tensors,
            found,
        )
    if store.exists(init_from):
        found, tensors = store.load(
            init_from, 'best', read=('model',), warn=warn, check=check_shapes
        )
        return Weights(
            str(found.path), GPTConfig(**found.state['model']), found.state['tokenizer'], tensors
        )
    if init_from in GPT2_NAMES or (Path(init_from) / 'config.json').exists():
        return read_gpt2(init_from)
    raise UserError(
        f"init_from {init_from!r} is neither 'scratch', 'resume', nor {', '.join(map(repr, GPT2_NAMES))}, nor the "
        f'folder of a run or of a Hugging Face GPT-2'
    )


def check_shapes(found: store.Checkpoint, tensors: dict[str, dict[str, torch.Tensor]]):
    """Damaged where the tensors are not those of the model that the checkpoint is of."""
    try:
        with torch.device('meta'):  # shapes alone
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
                f'{found.path / "model.safetensors"}: {name} is {_shape(have.get(name))}, where the '
                f'model has {_shape(shapes.get(name))}'
            )
    for full_name, tensor in tensors.get('optimizer', {}).items():
        shape = shapes.get(full_name.rpartition('/')[0])
        # other optimizers may keep less than a number for each weight
        if shape is None or tensor.dim() == len(shape) and tensor.shape != shape:
            raise store.Damaged(
                f'{found.path / "optimizer.safetensors"}: {full_name} is {_shape(tensor.shape)}, where '
                f'the model has {_shape(shape)}'
            )


def _shape(shape: torch.Size | None) -> str:
    return 'missing' if shape is None else f'of shape {tuple(shape)}'


def read_gpt2(name: str) -> Weights:
    """GPT-2 from a folder with Hugging Face's config.json and model.safetensors, or by name from its hub (fetched once)."""
    config_file, weights_file = (_find(name, file) for file in ('config.json', 'model.safetensors'))
    try:
        config = json.loads(config_file.read_bytes())
        tensors = safetensors.torch.load_file(weights_file)
        sizes = {
            own: config[theirs]
            for own, theirs in (
                ('vocab_size', 'vocab_size'),
                ('block_size', 'n_positions'),
                ('n_layer', 'n_layer'),
                ('n_head', 'n_head'),
                ('n_embd', 'n_embd'),
            )
        }
        if not all(type(size) is int for size in sizes.values()):
            raise ValueError(f'its config has {sizes}, which are no whole numbers')
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
            f'{config_file.parent} is no GPT-2 of Hugging Face ({type(error).__name__}: {error}): it takes their '
            f'config.json and model.safetensors; fetch both anew'
        ) from error
    renamed = {}
    for key, tensor in tensors.items():
        key = 'transformer.' + key.removeprefix('transformer.')
        if not key.endswith(
            ('.attn.bias', '.attn.masked_bias', 'lm_head.weight')
        ):  # masks, and the tied head
            renamed[key] = tensor.t().contiguous() if key.endswith(TRANSPOSED) else tensor
    return Weights(name, model, {'kind': 'gpt2'}, {'model': renamed})


def _find(name: str, file: str) -> Path:
    if name not in GPT2_NAMES:
        return Path(name) / file
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(
            f'--init_from={name} needs a package that is not here: pip install huggingface_hub'
        ) from error
    logging.getLogger('huggingface_hub').setLevel(
        logging.ERROR
    )  # it tells of every attempt; the line below sums them up
    try:
        return Path(hf_hub_download(f'openai-community/{name}', file))
    except Exception as error:  # its errors have no common base
        raise UserError(
            f'{name} could not be fetched from the Hugging Face hub ({type(error).__name__}); fetch config.json '
            f'and model.safetensors of openai-community/{name} elsewhere and name their folder: '
            f'--init_from=FOLDER'
        ) from error
