"""Weights with their model and tokenizer, and how a config is fitted to them."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.checkpoint.paths import is_checkpoint
from nib.errors import UserError
from nib.files import command
from nib.machine.device import ShapesOnly
from nib.schema import is_auto
from nib.text.tokenizer import Tokenizer, tokenizer_from_json
from nib.tokens.dataset import TokenDataset

PLANNED = 'planned'  # origin of the keys that --budget or --params has chosen
# Fields of GPTConfig that may differ from those of the weights that a run starts from.
MAY_DIFFER = ('dropout', 'recompute')


@dataclass(frozen=True)
class Weights:
    """Weights, the config of their model, and the tokenizer that the model was trained with."""

    name: str  # where they come from
    model: GPTConfig
    tokenizer: dict | None  # None: not known
    tensors: dict[str, dict[str, torch.Tensor]]  # 'model', and in a resumed run 'optimizer'
    # The checkpoint that the run continues: its own, or nanoGPT's.
    resumed: store.Checkpoint | None = None

    @property
    def short_name(self) -> str:
        """The name without where the folder or file is on this machine: run/step-100."""
        path = Path(os.path.abspath(self.name))
        if not path.exists():  # a hub id
            return self.name
        is_inside = path.is_file() or is_checkpoint(path)
        return '/'.join(path.parts[-2:] if is_inside else path.parts[-1:])

    @property
    def as_start(self) -> str | None:
        """The init_from that starts a new run from the weights of a resumed one."""
        path = Path(self.name)
        if path.is_file():  # of a ckpt.pt the folder
            return shlex.quote(str(path.parent)) if path.name == 'ckpt.pt' else None
        return shlex.quote(self.name)

    @property
    def continues_nanogpt(self) -> bool:
        return bool(self.resumed) and 'source' in self.resumed.state

    def adopt(self, values: Mapping, origins: dict) -> dict:
        """Returns the config's values with this model's architecture.

        A resumed run keeps its plan, which is noted in origins, except for keys of the command
        line. Raises UserError if the user has set a key to a value that contradicts the model.
        The keys in MAY_DIFFER may differ, and in a new run, block_size may be smaller.
        """
        if self.resumed:
            values = self.keep_plan(values, origins)
        adopted = dict(values)
        names = [field.name for field in fields(GPTConfig) if field.name in values]
        fixed = {name: getattr(self.model, name) for name in names}
        if self.resumed:  # the checkpoint contains the state of its optimizer
            before = self.resumed.state['config']
            fixed['optimizer'] = before.get('optimizer', 'adamw')
            default = {key for key in origins if origins[key].startswith('default')}
            if self.continues_nanogpt:  # train as it did
                adopted |= {key: value for key, value in before.items() if key in default}
            # The schedule stays as it was, unless the user sets it or changes what it depends on.
            for key, depends_on in (('min_lr', 'learning_rate'), ('lr_decay_iters', 'max_iters')):
                is_same = before.get(depends_on) == adopted[depends_on]
                is_number = type(before.get(key)) in (int, float)
                if key in default:
                    adopted[key] = before[key] if is_same and is_number else values[key]
            if is_auto(origins['batch_size']):  # chosen once
                for key in ('batch_size', 'gradient_accumulation_steps'):
                    adopted[key] = before[key]
        conflicts = []
        for key, own in fixed.items():
            if key in ('vocab_size', *MAY_DIFFER) or values[key] == own:
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
                conflicts.append(key)
        if conflicts:
            own = ', '.join(f'{key} {fixed[key]}' for key in conflicts)
            said: dict[str, list[str]] = {}  # place -> what it says
            for key in conflicts:
                said.setdefault(origins[key], []).append(f'{key} {values[key]}')
            says = [f'{place} says {", ".join(pairs)}' for place, pairs in said.items()]
            places = ', and '.join(says).replace('command line', 'the command line')
            begin = 'train a new model with --init_from=scratch'
            is_shorter = values['block_size'] < self.model.block_size
            if conflicts == ['block_size'] and is_shorter and self.as_start:
                begin = f'start a new run from these weights with --init_from={self.as_start}'
            raise UserError(
                f'{self.name} was trained with {own}, but {places}: leave '
                f'{", ".join(conflicts)} out, or {begin} and another --out_dir'
            )
        return adopted

    def keep_plan(self, values: Mapping, origins: dict) -> dict:
        """Returns the values with what --budget or --params chose when the run began."""
        before, chosen = self.resumed.state['config'], self.resumed.state.get('origins', {})
        for key in ('budget', 'params'):
            if origins.get(key) == 'command line' and values[key] != before.get(key, ''):
                raise UserError(
                    f'--{key} plans a new run, but {self.name} was started with '
                    f'{key} {before.get(key, "")!r}: leave it out, or change --max_iters instead'
                )
        kept = [key for key, origin in chosen.items() if origin == PLANNED and key in values]
        kept = [key for key in kept if origins[key] != 'command line']
        origins |= dict.fromkeys(kept, PLANNED)
        values = {**values, **{key: before[key] for key in kept}}
        if 'lr_decay_iters' in kept and values['max_iters'] != before['max_iters']:
            values['lr_decay_iters'] = values['max_iters']  # else further steps have the rate 0
        return values

    def changes(self, config: Mapping) -> dict[str, list]:
        """Returns the keys that have changed since the checkpoint -> [value then, value now]."""
        before = self.resumed.state['config']
        return {
            key: [before[key], value]
            for key, value in config.items()
            if before.get(key, value) != value
            and key not in ('init_from', 'eval_only', 'overwrite', 'out_dir', 'data_dir')
        }

    def check_dataset(self, data: TokenDataset):
        """Raises UserError if the model cannot be trained on this dataset.

        A resumed run needs the same dataset, and every model a dataset with its own tokenizer.
        """
        if self.resumed and not self.continues_nanogpt:  # which records no fingerprint
            self.resumed.check_dataset(data.folder, data.fingerprint)
        if data.tokenizer is None:  # random tokens, for debug_training.py
            return
        kind = self.known_tokenizer().to_json()['kind']
        borrowed = kind if kind in ('gpt2', 'byte') else shlex.quote(self.name)
        # Open models may have more embeddings than their tokenizer has tokens.
        if data.vocab_size > self.model.vocab_size or data.tokenizer.to_json() != self.tokenizer:
            raise UserError(
                f'{self.name} has a different tokenizer ({kind}, vocabulary '
                f'{self.model.vocab_size}) than dataset {data.name} (vocabulary '
                f"{data.vocab_size}): prepare your text with the model's tokenizer, "
                f'{command("data/text/prepare.py")} --input=PATH --tokenizer={borrowed}'
            )

    def describe(self) -> str:
        """Returns the name, and for a run the step and the dataset."""
        if not self.resumed:
            return self.name
        step, state = self.resumed.describe_step(), self.resumed.state
        dataset = state.get('dataset') or state['config'].get('dataset', 'an unknown dataset')
        return f'{self.name}: {step}, trained on {dataset}'

    def known_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises UserError if it is not known."""
        if self.tokenizer is None:
            raise UserError(
                f'the tokenizer of {self.name} is not known: for a nanoGPT checkpoint, copy the '
                f'meta.pkl of its dataset next to ckpt.pt; another model needs a tokenizer.json, '
                f'which transformers writes: '
                f"AutoTokenizer.from_pretrained('{self.name}').save_pretrained('FOLDER')"
            )
        return tokenizer_from_json(self.tokenizer)

    def build(self) -> GPT:
        """Returns the model without dropout, to look at and to generate with.

        Its vocabulary is that of its tokenizer, its dtype that of the file. Raises UserError if the
        tokenizer is not known.
        """
        weights = self.crop_vocabulary(self.known_tokenizer().vocab_size)  # padding has no text
        return build_model(weights.model, weights.tensors['model'])

    def crop_vocabulary(self, vocab_size: int) -> 'Weights':
        """Returns the weights without the embeddings that pad the vocabulary."""
        if vocab_size >= self.model.vocab_size:
            return self
        tensors = dict(self.tensors['model'])
        for name in tensors.keys() & {'transformer.wte.weight', 'lm_head.weight'}:
            tensors[name] = tensors[name][:vocab_size]
        model = replace(self.model, vocab_size=vocab_size)
        return replace(self, model=model, tensors={'model': tensors})


def build_model(config: GPTConfig, tensors: Mapping[str, torch.Tensor]) -> GPT:
    """Returns a model with copies of these weights. What a changed model.py adds is initialized."""
    with ShapesOnly():  # random weights would take longer than reading these
        model = GPT(config)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        model = GPT(config)
        model.load_state_dict(model.state_dict() | copies, assign=True)
    return model.eval()
