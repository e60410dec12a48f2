"""The weights that a run starts from: its own checkpoint, another run's, or an open model's."""

import difflib
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.checkpoint.wrong_folder import explain, is_checkpoint, is_run
from nib.errors import UserError, warn
from nib.files import command
from nib.hub import huggingface, nanogpt, reference
from nib.machine.device import ShapesOnly, seed_everything
from nib.run.checks import pick_model
from nib.text.tokenizer import Tokenizer, tokenizer_from_json
from nib.tokens.dataset import TokenDataset

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # in openai-community/ on the hub
PLANNED = 'planned'  # origin of the keys that --budget or --params has chosen


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
    def as_start(self) -> str:
        """The init_from that starts a new run from the weights of a resumed one."""
        path = Path(self.name)
        return shlex.quote(str(path.parent if path.is_file() else path))  # of a ckpt.pt the folder

    @property
    def continues_nanogpt(self) -> bool:
        return bool(self.resumed) and 'source' in self.resumed.state

    def adopt(self, values: Mapping, origins: dict) -> dict:
        """Returns the config's values with this model's architecture.

        A resumed run keeps its plan, which is noted in origins, except for keys of the command
        line. Raises UserError if the user has set a key to a value that contradicts the model.
        dropout and recompute may differ, and in a new run, block_size may be smaller.
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
            if origins['batch_size'].endswith('(auto)'):  # chosen once
                for key in ('batch_size', 'gradient_accumulation_steps'):
                    adopted[key] = before[key]
        conflicts = []
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
                conflicts.append(key)
        if conflicts:
            own = ', '.join(f'{key} {fixed[key]}' for key in conflicts)
            says = [f'{origins[key]} says {values[key]}' for key in conflicts]
            places = ', '.join(says).replace('command line', 'the command line')
            begin = 'train a new model with --init_from=scratch'
            if conflicts == ['block_size'] and values['block_size'] < self.model.block_size:
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
                    f'--{key} plans a new run, but {self.name} was begun with '
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
                f'{self.name} has another tokenizer ({kind}, vocabulary '
                f'{self.model.vocab_size}) than dataset {data.name} (vocabulary '
                f"{data.vocab_size}): prepare your text with the model's tokenizer, "
                f'{command("data/text/prepare.py")} --input=PATH --tokenizer={borrowed}'
            )

    def describe(self) -> str:
        """Returns the name, and for a run the step and the dataset."""
        if not self.resumed:
            return self.name
        state = self.resumed.state
        dataset = state.get('dataset') or state['config'].get('dataset', 'an unknown dataset')
        return f'{self.name}: step {state["step"]}, trained on {dataset}'

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


def new_model(config: Mapping, data: TokenDataset, start: Weights | None) -> GPT:
    """Returns a model with the weights of `start`, or with random ones, the same on all ranks.

    Raises UserError if the shape is impossible, or if `start` does not fit the dataset.
    """
    model_config = pick_model(config, data.vocab_size)
    seed_everything(config['seed'])
    if start is None:
        return GPT(model_config)
    start.check_dataset(data)
    # adopt() has given the config this model's other keys, and has checked block_size.
    own = {name: config[name] for name in ('dropout', 'recompute', 'block_size')}
    model = GPT(replace(start.model, **own))
    weights = dict(start.tensors['model'])
    if model.config.position == 'learned':
        name = 'transformer.wpe.weight'
        weights[name] = weights[name][: model.config.block_size]
    # What a changed model.py adds keeps its initial values.
    model.load_state_dict(model.state_dict() | weights)
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
    return read_weights(init_from, warn, words=('scratch', 'resume', *GPT2_NAMES))


def read_model(
    init_from: str, out_dir: str, which: str = 'best', read: tuple[str, ...] = ('model',)
) -> Weights:
    """Returns the weights of the run in out_dir, or those that init_from names.

    init_from: '' or 'resume' for the run. which: its checkpoint, 'best', 'latest' or a step number.
    read: files of the checkpoint to read. Raises UserError if they are missing or not usable.
    """
    if init_from not in ('', 'resume'):
        return read_weights(init_from, which=which)
    run, which = store.locate(out_dir, which)
    found, tensors = store.load(run, which, read=read, check=check_shapes)
    return _from_checkpoint(found, tensors, resumed=True)


def read_weights(
    name: str,
    warn: Callable[[str], None] = warn,
    which: str = 'best',
    words: tuple[str, ...] = GPT2_NAMES,
) -> Weights:
    """Returns the weights of a run, of an open model, or of nanoGPT.

    name: the folder of a run or a model, a ckpt.pt (whose training then continues) or its folder,
    or a hub id. which: the checkpoint of a run. words: what else the user may write, for the error.
    Raises UserError if they are missing or not usable.
    """
    path = Path(name)
    run, which = store.locate(name, which)
    if store.exists(run):
        found, tensors = store.load(run, which, read=('model',), warn=warn, check=check_shapes)
        return _from_checkpoint(found, tensors, resumed=False)
    if path.suffix == '.pt' and path.is_file():
        return _compared(_from_nanogpt(path, resumed=True), warn)
    if (path / 'ckpt.pt').is_file():
        return _compared(_from_nanogpt(path / 'ckpt.pt', resumed=False), warn)
    if is_run(path):  # whose config.json is that of train.py
        raise UserError(explain(name))
    is_hub_id = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in '..'
    is_hub_id = is_hub_id and not is_run(path.parent)  # a step that it does not have
    if (path / 'config.json').is_file() or not path.exists() and (name in GPT2_NAMES or is_hub_id):
        repository = (
            f'openai-community/{name}' if name in GPT2_NAMES and not path.exists() else name
        )
        model, model_tensors, tokenizer = huggingface.read(repository)
        return _compared(Weights(name, model, tokenizer, {'model': model_tensors}), warn)
    instead = explain(name, may_train=False)
    near = [] if path.exists() else difflib.get_close_matches(name, words, n=1, cutoff=0.8)
    if near and 'did you mean' not in instead:
        instead = f'did you mean {near[0]!r}?'
    if path.exists() and name in GPT2_NAMES:
        instead = f'{path.resolve()} hides the model of this name: use openai-community/{name}'
    if 'did you mean' not in instead:
        instead = (
            f'expected {", ".join(map(repr, words))}, the id of a model on the Hugging Face hub, '
            f'the folder of a run or of a model, or a ckpt.pt of nanoGPT; {instead}'
        )
    raise UserError(f'{name!r} is not a model: {instead}')


def _compared(weights: Weights, warn: Callable[[str], None]) -> Weights:
    """Warns of what a changed model.py does with the weights of another project."""
    config, tensors = reference.crop(weights.model, weights.tensors['model'])
    try:
        model = build_model(config, tensors)
        is_original = reference.is_original(model, tensors)
        added = [name for name in model.state_dict() if name not in tensors]
    except Exception:  # a changed model.py may need more than two layers
        is_original, added = False, []
    if added:
        warn(
            f'note: model.py has parameters that {weights.name} lacks, such as {added[0]}: they '
            f'keep their initial values'
        )
    if not is_original:
        warn(
            f'warning: model.py has been changed: with the weights of {weights.name}, its logits '
            f'differ from those of the original model'
        )
    return weights


def _from_nanogpt(path: Path, resumed: bool) -> Weights:
    found = nanogpt.read(path)
    train = {'step': found.step, 'passed_over': 0, 'best_val_loss': found.best_val_loss}
    config = {'optimizer': 'adamw', 'init_from': str(path), **found.config}
    state = {'step': found.step, 'train': train, 'config': config, 'source': 'nanoGPT'}
    return Weights(
        name=str(path),
        model=found.model,
        tokenizer=found.tokenizer,
        tensors=found.tensors if resumed else {'model': found.tensors['model']},
        resumed=store.Checkpoint(path, state) if resumed else None,
    )


def _from_checkpoint(found: store.Checkpoint, tensors, resumed: bool) -> Weights:
    return Weights(
        name=str(found.path),
        model=GPTConfig(**found.state['model']),
        tokenizer=found.state['tokenizer'],
        tensors=tensors,
        resumed=found if resumed else None,
    )


CHANGED = 'it was trained with another model.py: use that one'


def check_shapes(found: store.Checkpoint, tensors: dict[str, dict[str, torch.Tensor]]):
    """Raises Damaged if the tensors do not have the shapes of the checkpoint's model.

    As they are what was saved, it is model.py that has been changed.
    """
    try:
        with ShapesOnly():
            shapes = {
                name: tensor.shape
                for name, tensor in GPT(GPTConfig(**found.state['model'])).state_dict().items()
            }
    except (TypeError, ValueError) as error:
        raise store.Damaged(
            f'{found.path / "state.json"}: its model cannot be built ({error}); {CHANGED}'
        ) from error
    have = {name: tensor.shape for name, tensor in tensors['model'].items()}
    for name in sorted(have.keys() | shapes.keys()):
        if have.get(name) != shapes.get(name):
            what = _difference(name, have.get(name), shapes.get(name))
            raise store.Damaged(f'{found.path / "model.safetensors"} {what}; {CHANGED}')
    for full_name, tensor in tensors.get('optimizer', {}).items():
        shape = shapes.get(full_name.rpartition('/')[0])
        # Optimizers may keep fewer numbers than one per weight.
        if shape is None or tensor.dim() == len(shape) and tensor.shape != shape:
            what = _difference(full_name, tensor.shape, shape)
            raise store.Damaged(f'{found.path / "optimizer.safetensors"} {what}; {CHANGED}')


def _difference(name: str, saved: torch.Size | None, built: torch.Size | None) -> str:
    if saved is None:
        return f'lacks {name}, which model.py has'
    if built is None:
        return f'has {name}, which model.py lacks'
    return f'has {name} of shape {tuple(saved)}, and model.py of shape {tuple(built)}'
