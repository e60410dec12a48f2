"""The weights that a run starts from: its own checkpoint, another run's, or an open model's."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.checkpoint.paths import explain, is_run, is_torch_file
from nib.checkpoint.weights import MAY_DIFFER, Weights, build_model
from nib.errors import UserError, warn
from nib.hub import huggingface, nanogpt, reference
from nib.machine.device import ShapesOnly, seed_everything
from nib.run.checks import pick_model
from nib.tokens.dataset import TokenDataset

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # in openai-community/ on the hub
Check = Callable[[Weights], object]


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
    own = {name: config[name] for name in ('block_size', *MAY_DIFFER)}
    model = GPT(replace(start.model, **own))
    weights = dict(start.tensors['model'])
    if model.config.position == 'learned':
        name = 'transformer.wpe.weight'
        weights[name] = weights[name][: model.config.block_size]
    # What a changed model.py adds keeps its initial values.
    built = model.state_dict()
    shapes = {name: built[name].shape for name in weights if name in built}
    for what in _differences(weights, shapes):
        had = {name: getattr(start.model, name) for name in MAY_DIFFER}
        said = ', '.join(f'{name} {value}' for name, value in had.items() if own[name] != value)
        why = f'it was trained with {said}; use the same' if said else CHANGED
        raise UserError(f'{start.name} {what}: {why}')
    model.load_state_dict(built | weights)
    return model


def read_start(
    init_from: str, out_dir: str, warn: Callable[[str], None], check: Check = lambda weights: None
) -> Weights | None:
    """Returns the weights that init_from names; None for 'scratch'.

    check: as for read_weights(). Raises UserError if they are missing or not usable.
    """
    if init_from == 'scratch':
        return None
    if init_from == 'resume':
        return _read_checkpoint(out_dir, 'latest', resumed=True, warn=warn)
    words = ('scratch', 'resume', *GPT2_NAMES)
    return read_weights(init_from, warn, words=words, check=check)


def read_model(
    init_from: str,
    out_dir: str,
    which: str = 'best',
    read: tuple[str, ...] = ('model',),
    check: Check = Weights.known_tokenizer,
) -> Weights:
    """Returns the weights of the run in out_dir, or those that init_from names.

    init_from: '' or 'resume' for the run. which: its checkpoint, 'best', 'latest' or a step number.
    read: files of the checkpoint to read. check: as for read_weights(). Raises UserError if they
    are missing or not usable.
    """
    if init_from not in ('', 'resume'):
        return read_weights(init_from, which=which, check=check)
    return _read_checkpoint(*store.locate(out_dir, which), resumed=True, read=read)


def read_weights(
    name: str,
    warn: Callable[[str], None] = warn,
    which: str = 'best',
    words: tuple[str, ...] = GPT2_NAMES,
    check: Check = lambda weights: None,
) -> Weights:
    """Returns the weights of a run, of an open model, or of nanoGPT.

    name: the folder of a run or a model, a ckpt.pt (whose training then continues) or its folder,
    or a hub id. which: the checkpoint of a run. words: what else the user may write, for the error.
    check: is called with an open model, without its tensors, before these are downloaded.
    Raises UserError if they are missing or not usable.
    """
    path = Path(name)
    run, which = store.locate(name, which)
    if store.exists(run):
        return _read_checkpoint(run, which, resumed=False, read=('model',), warn=warn)
    if is_torch_file(path):
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
        model, model_tensors, tokenizer = huggingface.read(
            repository, lambda model, tokenizer: check(Weights(name, model, tokenizer, {}))
        )
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


def _read_checkpoint(out_dir, which: str, resumed: bool, **options) -> Weights:
    """Reads the weights of a run. options: of store.load()."""
    found, tensors = store.load(out_dir, which, check=check_shapes, **options)
    return Weights(
        name=str(found.path),
        model=GPTConfig(**found.state['model']),
        tokenizer=found.state['tokenizer'],
        tensors=tensors,
        resumed=found if resumed else None,
    )


CHANGED = 'it was trained with a different model.py: use that one'


def check_shapes(found: store.Checkpoint, tensors: dict[str, dict[str, torch.Tensor]]):
    """Raises Damaged if the tensors do not have the shapes of the checkpoint's model.

    The tensors are as they were saved, so model.py must have been changed.
    """
    try:
        shapes = _built_shapes(GPTConfig(**found.state['model']))
    except (TypeError, ValueError) as error:
        raise store.Damaged(
            f'{found.path / "state.json"}: its model cannot be built ({error}); {CHANGED}'
        ) from error
    for what in _differences(tensors['model'], shapes):
        raise store.Damaged(f'{found.path / "model.safetensors"} {what}; {CHANGED}')
    for name, tensor in tensors.get('optimizer', {}).items():
        if name.rpartition('/')[0] not in shapes:  # the state may have any shape
            what = _difference(name, tensor.shape, None)
            raise store.Damaged(f'{found.path / "optimizer.safetensors"} {what}; {CHANGED}')


def check_readable(model: GPT):
    """Raises UserError if the model's config does not build the weights that the model has.

    Its checkpoints could not be loaded. For example, a changed train.py may have added weights.
    """
    for what in _differences(model.state_dict(), _built_shapes(model.config)):
        raise UserError(
            f'the model to train {what}, so its checkpoints could not be loaded: create all of its '
            f'weights in GPT.__init__, according to options of GPTConfig, and keep other models, '
            f'such as a teacher, in a tuple, so that their weights are not saved'
        )


def _built_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    with ShapesOnly():
        return {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}


def _differences(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> Iterator[str]:
    have = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(have.keys() | shapes.keys()):
        if have.get(name) != shapes.get(name):
            yield _difference(name, have.get(name), shapes.get(name))


def _difference(name: str, saved: torch.Size | None, built: torch.Size | None) -> str:
    if saved is None:
        return f'lacks {name}, which model.py has'
    if built is None:
        return f'has {name}, which model.py lacks'
    return f'has {name} of shape {tuple(saved)}, but model.py has shape {tuple(built)}'
