"""nanoGPT's checkpoint, ckpt.pt: the model, the state of its optimizer, and its config.

The names of the tensors are those of model.py. The model differs in one formula: its GELU is exact.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nib.errors import UserError
from nib.files import new_folder, read_json
from nib.hub.family import check_numbers
from nib.machine.device import ShapesOnly
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    tokenizer_from_json,
)
from nib.tokens import nanogpt_bins

SIZES = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')  # of model_args
GPT2_SIZES = (Gpt2Tokenizer.vocab_size, nanogpt_bins.PADDED_GPT2)
ARGUMENTS = (*SIZES, 'dropout')
# Keys of its config that train.py has, too, with the same meaning, and their types.
CONFIG: dict[str, type] = {
    'dataset': str,
    **dict.fromkeys('batch_size gradient_accumulation_steps eval_interval'.split(), int),
    **dict.fromkeys('max_iters warmup_iters lr_decay_iters'.split(), int),
    **dict.fromkeys('dropout learning_rate min_lr weight_decay'.split(), float),
    **dict.fromkeys('beta1 beta2 grad_clip'.split(), float),
}
PREFIXES = ('_orig_mod.', 'module.')  # of torch.compile and of DistributedDataParallel
MOMENTS = ('exp_avg', 'exp_avg_sq', 'step')  # names of AdamW's state, in torch and in nib/optim.py


@dataclass(frozen=True)
class NanoCheckpoint:
    """What a ckpt.pt contains, in the form of this project's checkpoints."""

    model: GPTConfig
    tensors: dict[str, dict[str, torch.Tensor]]  # 'model' and 'optimizer'
    step: int
    best_val_loss: float | None
    config: dict  # keys of train.py
    tokenizer: dict | None  # None: not found


def read(path: Path) -> NanoCheckpoint:
    """Reads a ckpt.pt, without running code in it.

    Raises UserError if it is damaged, contains more than tensors and numbers, or is not a model of
    nanoGPT.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about unusual pickles
            found = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else 'it ends early'
        if 'weights_only' in str(error):  # torch's advice is to trust the file
            name = re.search(r'GLOBAL (\S+)', str(error))
            such = f' such as {name[1]}' if name else ''
            reason = f'damaged, or with Python objects{such}, which can run code when they are read'
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}: {reason}): expected a checkpoint of '
            f'nanoGPT, which contains only tensors, numbers and strings: save yours again without '
            f'other objects; for other models use model.safetensors'
        ) from error
    try:
        return _interpret(path, found)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # wrong types
        raise UserError(
            f'{path} is not a valid nanoGPT checkpoint ({type(error).__name__}: {error})'
        ) from error


def _interpret(path: Path, found) -> NanoCheckpoint:
    match found:
        case {'model': dict(state), 'model_args': dict(arguments)} if set(SIZES) <= set(arguments):
            pass
        case _:
            raise UserError(f'{path} is not a nanoGPT checkpoint: expected model and model_args')
    weights = {_strip(name): tensor for name, tensor in state.items()}
    weights = {name: t for name, t in weights.items() if not name.endswith('.attn.bias')}  # masks
    model = _read_model(path, arguments, weights)
    given, step = found.get('config') or {}, found.get('iter_num', 0)
    config = {}
    for key, kind in CONFIG.items():
        value = given.get(key, 'auto')
        if value == 'auto':  # an older convert.py may have written it
            continue
        is_number = type(value) in (int, float) and (kind is float or value % 1 == 0)
        if not (type(value) is str if kind is str else is_number):
            raise UserError(
                f'{path}: in its config, {key} is {value!r:.80}, expected {kind.__name__}'
            )
        config[key] = kind(value)
    if type(step) is not int or step < 0:
        raise UserError(f'{path}: iter_num is {step!r:.80}, expected the number of steps')
    if given.get('decay_lr') is False:
        config |= {'lr_schedule': 'constant', 'warmup_iters': 0}
    return NanoCheckpoint(
        model=model,
        tensors={'model': weights, 'optimizer': _read_moments(path, found, model, weights)},
        step=step,
        best_val_loss=None if found.get('best_val_loss') is None else float(found['best_val_loss']),
        config=config,
        tokenizer=find_tokenizer(path, str(config.get('dataset', '')), model.vocab_size),
    )


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition('.')[2]
    return name


def _read_model(path: Path, arguments: dict, weights: dict[str, torch.Tensor]) -> GPTConfig:
    """Returns the config; removes the output head from `weights` if it is tied."""
    head, embedding = weights.get('lm_head.weight'), weights.get('transformer.wte.weight')
    is_tied = head is None or embedding is not None and torch.equal(head, embedding)
    if is_tied:
        weights.pop('lm_head.weight', None)
    for key in arguments.keys() - set(ARGUMENTS):
        if arguments[key] not in (None, False):
            raise UserError(
                f'{path}: model_args has {key} {arguments[key]!r:.80}: a modified nanoGPT is not '
                f'supported'
            )
    sizes = {name: arguments[name] for name in SIZES}
    if not all(type(size) is (bool if name == 'bias' else int) for name, size in sizes.items()):
        raise UserError(f'{path}: model_args is {sizes}, which are not all integers')
    try:
        config = GPTConfig(**sizes, mlp='gelu_erf', tied_head=is_tied)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    expected = _shapes(config)
    for name in sorted(expected.keys() | weights.keys()):
        have = tuple(weights[name].shape) if name in weights else 'missing'
        wanted = tuple(expected[name]) if name in expected else 'no such tensor'
        if have != wanted:
            raise UserError(
                f'{path}: {name} is {have}, but according to model_args, it should be {wanted}: '
                'a modified nanoGPT is not supported'
            )
        try:
            check_numbers(name, weights[name])
        except UserError as error:
            raise UserError(f'{path}: {error}') from error
    return config


def _shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Returns name -> shape of all parameters, in the order of nanoGPT's module."""
    with ShapesOnly():
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}


def _ordered(config: GPTConfig) -> tuple[list[str], int]:
    """Returns the parameters in the order of nanoGPT's optimizer, and how many have weight decay.

    Those with weight decay come first.
    """
    shapes = _shapes(config)
    names = sorted(shapes, key=lambda name: len(shapes[name]) < 2)
    return names, sum(len(shape) >= 2 for shape in shapes.values())


def _read_moments(path: Path, found: dict, model: GPTConfig, weights) -> dict[str, torch.Tensor]:
    """Returns the state of AdamW by parameter name, as Optimizer.named_state() does."""
    states = (found.get('optimizer') or {}).get('state') or {}
    names, _ = _ordered(model)
    if states and set(states) != set(range(len(names))):
        raise UserError(
            f'{path}: the optimizer has {len(states)} parameters, but the model has {len(names)}'
        )
    moments = {}
    for number, state in states.items():
        name = names[number]
        for key in MOMENTS:
            value = torch.as_tensor(state[key], dtype=torch.float32)
            if key != 'step' and value.shape != weights[name].shape:
                raise UserError(f'{path}: the optimizer does not fit {name}')
            moments[f'{name}/{key}'] = value
    return moments


def find_tokenizer(path: Path, dataset: str, vocab_size: int) -> dict | None:
    """Returns the tokenizer of the dataset that a checkpoint was trained on; None if not found.

    Its meta.pkl or meta.json is searched next to the checkpoint, in nanoGPT's data/ above it, and
    in data/ here. A model of GPT-2's size without one has GPT-2's tokenizer, as in nanoGPT.
    """
    datas = nanogpt_bins.data_folders(path) if dataset else ()
    for folder in (path.parent, *(data / dataset for data in datas)):
        if described := read_json(folder / 'meta.json').get('tokenizer'):
            try:
                tokenizer = tokenizer_from_json(described)
            except UserError as error:
                raise UserError(f'{folder / "meta.json"}: {error}') from error
        elif (folder / 'meta.pkl').exists():
            tokenizer = nanogpt_bins.read_tokenizer(folder, 0)
        else:
            continue
        if tokenizer.vocab_size == vocab_size:
            return tokenizer.to_json()
    return {'kind': 'gpt2'} if vocab_size in GPT2_SIZES else None


def write_folder(
    folder: Path,
    model: GPTConfig,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    tokenizer: Tokenizer,
    state: Mapping,
    config: Mapping,
):
    """Writes ckpt.pt, which nanoGPT's sample.py and train.py load, and meta.pkl for characters.

    tensors: 'model', and 'optimizer' to continue training there. state: that of the checkpoint.
    config: train.py's. Raises UserError, which names the key of GPTConfig, if nanoGPT has no such
    model.
    """
    if reason := why_not(model):
        raise UserError(f'this model cannot be written for nanoGPT: {reason}')
    if isinstance(tokenizer, (ByteTokenizer, HfTokenizer)):
        what = 'bytes' if isinstance(tokenizer, ByteTokenizer) else 'tokenizer.json'
        raise UserError(f"nanoGPT cannot use a tokenizer of {what}, only characters and GPT-2's")
    weights, moments = tensors['model'], tensors.get('optimizer', {})
    if config['optimizer'] != 'adamw':
        moments = {}
    names, n_decayed = _ordered(model)
    states = {
        number: {key: moments[f'{name}/{key}'] for key in MOMENTS}
        for number, name in enumerate(names)
        if moments
    }
    decays = (config['weight_decay'], range(n_decayed)), (0.0, range(n_decayed, len(names)))
    # What torch.optim.AdamW expects; nanoGPT sets the learning rate before every step.
    group = {'lr': config['learning_rate'], 'betas': (config['beta1'], config['beta2'])}
    group |= {'eps': 1e-8, **dict.fromkeys(('amsgrad', 'maximize', 'capturable'), False)}
    group |= {'foreach': None, 'fused': None, 'differentiable': False}
    checkpoint = {
        'model': {**weights, 'lm_head.weight': weights['transformer.wte.weight']},
        'optimizer': {
            'state': states,
            'param_groups': [
                {**group, 'weight_decay': decay, 'params': list(part)} for decay, part in decays
            ],
        },
        'model_args': {name: getattr(model, name) for name in ARGUMENTS},
        'iter_num': state['step'],
        'best_val_loss': state.get('train', {}).get('best_val_loss') or 1e9,
        'config': {key: config[key] for key in CONFIG},
    }
    with new_folder(folder) as temporary:
        torch.save(checkpoint, temporary / 'ckpt.pt')
        if isinstance(tokenizer, CharTokenizer):
            tokens = [*tokenizer.characters, END_OF_TEXT][: tokenizer.vocab_size]
            numbers = dict(enumerate(tokens))
            stoi = {token: number for number, token in numbers.items()}
            meta = {'vocab_size': len(tokens), 'itos': numbers, 'stoi': stoi}
            (temporary / 'meta.pkl').write_bytes(pickle.dumps(meta))


def why_not(config: GPTConfig) -> str | None:
    """Returns why nanoGPT does not support a model; None if it does."""
    needs = {
        'position': 'learned',
        'norm': 'layer',
        'qk_norm': False,
        'tied_head': True,
        'logit_cap': 0.0,
        'smear': 0,
        'mlp_units': 4 * config.n_embd,
        'kv_heads': config.n_head,
    }
    keys = {'mlp_units': 'mlp_width', 'kv_heads': 'n_kv_head'}  # that determine these
    reasons = [
        f'{keys.get(name, name)} is {value}, but nanoGPT only supports {wanted}'
        for name, wanted in needs.items()
        if (value := getattr(config, name)) != wanted
    ]
    if config.mlp not in ('gelu', 'gelu_erf'):
        reasons.append(f'mlp is {config.mlp}, but nanoGPT only supports gelu_erf')
    if config.norm_eps not in (0.0, 1e-5):
        reasons.append(f'norm_eps is {config.norm_eps}, but nanoGPT only supports 1e-05')
    if config.head_width * config.n_head != config.n_embd:
        reasons.append(f'head_dim is {config.head_dim}, but nanoGPT needs n_embd / n_head')
    if config.qkv_bias and not config.bias:
        reasons.append('qkv_bias is True, but nanoGPT has biases everywhere or nowhere')
    return '; '.join(reasons) or None
