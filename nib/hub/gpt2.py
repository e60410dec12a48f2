"""GPT-2 as transformers writes it: GPT2LMHeadModel."""

import math
import re
from collections.abc import Mapping

import torch

from model import GPTConfig
from nib.errors import UserError
from nib.hub.family import Family

LAYERS = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')
INNER = [f'{layer}.{kind}' for layer in ('ln_1', 'ln_2', *LAYERS) for kind in ('weight', 'bias')]
BIASES = frozenset(('ln_1', 'ln_2', 'ln_f', *LAYERS))
# activation_function -> GPTConfig.mlp; the first of a kind is the one that is written
ACTIVATIONS = {
    'gelu_new': 'gelu',
    'gelu_pytorch_tanh': 'gelu',
    'gelu_fast': 'gelu',
    'gelu': 'gelu_erf',
    'relu': 'relu',
}
# Keys that transformers' GPT2Config also accepts under general names.
ALIASES = {
    'hidden_size': 'n_embd',
    'max_position_embeddings': 'n_positions',
    'num_attention_heads': 'n_head',
    'num_hidden_layers': 'n_layer',
}
SPECIAL = {
    'activation_function': (str,),
    'scale_attn_weights': (bool,),
    'scale_attn_by_inverse_layer_idx': (bool,),
}

GPT2 = Family(
    model_type='gpt2',
    architecture='GPT2LMHeadModel',
    keys={
        'vocab_size': ('vocab_size', 50257),
        'n_positions': ('block_size', 1024),
        'n_layer': ('n_layer', 12),
        'n_head': ('n_head', 12),
        'n_embd': ('n_embd', 768),
        'n_inner': ('mlp_width', 0),
        'layer_norm_epsilon': ('norm_eps', 1e-5),
        'tie_word_embeddings': ('tied_head', True),
    },
    fixed={
        'add_cross_attention': (False,),
        'is_encoder_decoder': (False,),
        'pruned_heads': (None, {}),
    },
    needs={
        'position': ('learned',),
        'norm': ('layer',),
        'mlp': ('gelu', 'gelu_erf', 'relu'),
        'qk_norm': (False,),
        'logit_cap': (0.0,),
        'smear': (0,),
    },
    prefix='transformer.',
    outer={
        'transformer.wte.weight': 'transformer.wte.weight',
        'transformer.wpe.weight': 'transformer.wpe.weight',
        'transformer.ln_f.weight': 'transformer.ln_f.weight',
        'transformer.ln_f.bias': 'transformer.ln_f.bias',
        'lm_head.weight': 'lm_head.weight',
    },
    block='transformer.h.{}.',
    inner={name: (name,) for name in INNER},
    transposed=LAYERS,
    ignored=re.compile(r'\.attn\.(masked_)?bias$'),  # causal masks
)


def read_config(config: dict) -> GPTConfig:
    """Returns the GPTConfig of a GPT-2's config.json, in which it replaces other names of keys.

    Raises UserError, which names the key, if model.py does not support it.
    """
    for alias, key in ALIASES.items():
        if alias in config and config.setdefault(key, config[alias]) != config.pop(alias):
            raise UserError(f'config.json: {alias} and {key} have different values')
    GPT2.check_keys(config, SPECIAL)
    activation = config.get('activation_function', 'gelu_new')
    if activation not in ACTIVATIONS:
        raise UserError(
            f'config.json: activation_function is {activation!r}, but only '
            f'{", ".join(ACTIVATIONS)} are supported'
        )
    return GPT2.read_fields(config, {'mlp': ACTIVATIONS[activation]})


def read(config: dict, model: GPTConfig, tensors: dict[str, torch.Tensor]):
    """Returns the GPTConfig and the state_dict of a GPT-2's tensors. model: of read_config.

    Raises UserError, which names the tensor, if model.py does not support it.
    """
    ours = GPT2.to_ours(tensors, model, BIASES)
    _scale_queries(config, model, ours)
    return model, ours


def _scale_queries(config: Mapping, model: GPTConfig, tensors: dict[str, torch.Tensor]):
    """Builds other scales of the attention scores than 1 / sqrt(D) into the queries."""
    is_scaled = config.get('scale_attn_weights') is not False  # null is the default, True
    for i in range(model.n_layer):
        scale = 1.0 if is_scaled else math.sqrt(model.head_width)
        if config.get('scale_attn_by_inverse_layer_idx', False):
            scale /= i + 1
        for kind in ('weight', 'bias') if scale != 1.0 else ():
            name = f'transformer.h.{i}.attn.c_attn.{kind}'
            tensors[name] = tensors[name].float()
            tensors[name][: model.n_embd] *= scale


def write(config: GPTConfig, tensors: Mapping[str, torch.Tensor]):
    """Returns config.json and the tensors of a GPT2LMHeadModel. The family must fit."""
    activation = next(name for name, mlp in ACTIVATIONS.items() if mlp == config.mlp)
    written = GPT2.write_fields(config) | {'activation_function': activation}
    return written, GPT2.to_theirs(tensors, config, BIASES)


def why_not(config: GPTConfig) -> str | None:
    """Returns why a model is no GPT2LMHeadModel; None if it is one."""
    reasons = []
    if config.kv_heads != config.n_head:
        reasons.append(
            f'n_kv_head is {config.n_kv_head}, but {GPT2.architecture} has no shared heads'
        )
    if config.head_width * config.n_head != config.n_embd:
        reasons.append(
            f'head_dim is {config.head_dim}, but {GPT2.architecture} needs n_embd / n_head'
        )
    return '; '.join([*reasons, *filter(None, [GPT2.why_not(config)])]) or None
