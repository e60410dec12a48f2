"""Llama, Qwen2 and Qwen3 as transformers writes them: one table, with small differences."""

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from model import GPTConfig
from nib.errors import UserError
from nib.hub.family import REQUIRED, Family

KEYS: dict[str, tuple[str, Any]] = {
    'vocab_size': ('vocab_size', REQUIRED),
    'max_position_embeddings': ('block_size', REQUIRED),
    'num_hidden_layers': ('n_layer', REQUIRED),
    'num_attention_heads': ('n_head', REQUIRED),
    'num_key_value_heads': ('n_kv_head', REQUIRED),
    'head_dim': ('head_dim', 0),
    'hidden_size': ('n_embd', REQUIRED),
    'intermediate_size': ('mlp_width', REQUIRED),
    'rms_norm_eps': ('norm_eps', 1e-6),
    'tie_word_embeddings': ('tied_head', False),
}
# Positions: rope_parameters since transformers 5, the other three before.
ROTARY: dict[str, tuple[type, ...]] = {
    'rope_parameters': (dict,),
    'rope_scaling': (dict,),
    'rope_theta': (int, float),
    'partial_rotary_factor': (int, float),
}
LLAMA3 = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
WINDOW: dict[str, tuple[type, ...]] = {
    'use_sliding_window': (bool,),
    'sliding_window': (int,),
    'max_window_layers': (int,),
    'layer_types': (list,),
}
ATTENTION, MLP = ('attn.c_attn', 'attn.c_proj'), ('mlp.c_fc', 'mlp.c_proj')
QKV = ('self_attn.q_proj.', 'self_attn.k_proj.', 'self_attn.v_proj.')
GATED = ('mlp.gate_proj.', 'mlp.up_proj.')

LLAMA = Family(
    model_type='llama',
    architecture='LlamaForCausalLM',
    keys=KEYS | {'num_key_value_heads': ('n_kv_head', 0)},
    fixed={
        'hidden_act': ('silu', 'swish'),
        'is_encoder_decoder': (False,),
        'pruned_heads': (None, {}),
    },
    needs={
        'position': ('rotary',),
        'norm': ('rms',),
        'mlp': ('swiglu',),
        'logit_cap': (0.0,),
        'smear': (0,),
        'qk_norm': (False,),
    },
    prefix='model.',
    outer={
        'transformer.wte.weight': 'model.embed_tokens.weight',
        'transformer.ln_f.weight': 'model.norm.weight',
        'lm_head.weight': 'lm_head.weight',
    },
    block='model.layers.{}.',
    inner={
        'ln_1.weight': ('input_layernorm.weight',),
        **{f'attn.c_attn.{kind}': tuple(n + kind for n in QKV) for kind in ('weight', 'bias')},
        'attn.q_norm.weight': ('self_attn.q_norm.weight',),
        'attn.k_norm.weight': ('self_attn.k_norm.weight',),
        **{f'attn.c_proj.{kind}': (f'self_attn.o_proj.{kind}',) for kind in ('weight', 'bias')},
        'ln_2.weight': ('post_attention_layernorm.weight',),
        **{f'mlp.c_fc.{kind}': tuple(n + kind for n in GATED) for kind in ('weight', 'bias')},
        **{f'mlp.c_proj.{kind}': (f'mlp.down_proj.{kind}',) for kind in ('weight', 'bias')},
    },
    ignored=re.compile(r'\.rotary_emb\.inv_freq$'),
)
QWEN2 = replace(
    LLAMA,
    model_type='qwen2',
    architecture='Qwen2ForCausalLM',
    keys=KEYS,
    needs={**LLAMA.needs, 'bias': (False,), 'qkv_bias': (True,)},
)
QWEN3 = replace(
    QWEN2,
    model_type='qwen3',
    architecture='Qwen3ForCausalLM',
    keys=KEYS | {'head_dim': ('head_dim', 128)},
    needs={**LLAMA.needs, 'qk_norm': (True,), 'bias': (False,)},
)
FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3)}


def read_config(config: dict) -> GPTConfig:
    """Returns the GPTConfig of a config.json of these families.

    Raises UserError, which names the key, if model.py does not support it.
    """
    family = FAMILIES[config['model_type']]
    special = ROTARY if family is LLAMA else ROTARY | WINDOW
    if family is not QWEN2:
        special = special | {'attention_bias': (bool,)}
    if family is LLAMA:
        special = special | {'mlp_bias': (bool,)}
    family.check_keys(config, special)
    base, scaling = _read_rotary(config)
    special_fields = {name: allowed[0] for name, allowed in family.needs.items()} | {
        'rotary_base': base,
        'rotary_scaling': scaling,
        'bias': bool(config.get('attention_bias') or config.get('mlp_bias')),
        'qkv_bias': family is QWEN2,
    }
    model = family.read_fields(config, special_fields)
    if family is not LLAMA:
        _check_window(config, model.n_layer)
    return model


def read(config: dict, model: GPTConfig, tensors: dict[str, torch.Tensor]):
    """Returns the GPTConfig and the state_dict of tensors of these families. model: of read_config.

    Raises UserError, which names the tensor, if model.py does not support it.
    """
    attention, mlp = (bool(config.get(key)) for key in ('attention_bias', 'mlp_bias'))
    if attention and not mlp and _drop_zero_biases(config, tensors):
        attention, model = False, replace(model, bias=False, qkv_bias=True)
    in_file = ATTENTION[:1] * model.qkv_bias + ATTENTION * attention + MLP * mlp
    return model, FAMILIES[config['model_type']].to_ours(tensors, model, frozenset(in_file))


def _drop_zero_biases(config: Mapping, tensors: dict[str, torch.Tensor]) -> bool:
    """Removes the biases of the output projections if all are zero. Returns whether they were.

    The attention of a Llama or Qwen3 has biases in all four projections, or in none.
    """
    names = [name for name in tensors if name.endswith('.self_attn.o_proj.bias')]
    are_zero = not any(tensors[name].any() for name in names)
    if not are_zero or len(names) != config.get('num_hidden_layers'):
        return False
    for name in names:
        del tensors[name]
    return True


def _check_window(config: Mapping, n_layer: int):
    """Raises UserError if a layer attends to a sliding window only."""
    if kinds := set(map(str, config.get('layer_types') or ())) - {'full_attention'}:
        raise UserError(
            f'config.json: layer_types has {", ".join(sorted(kinds))}, but only full_attention is '
            f'supported'
        )
    first = config.get('max_window_layers')
    slides = first is None or first < n_layer
    slides = slides and not config.get('layer_types')
    if config.get('use_sliding_window') and config.get('sliding_window') and slides:
        raise UserError('config.json: use_sliding_window is true, which is not supported')


def _read_rotary(config: Mapping) -> tuple[float, tuple]:
    """Returns rotary_base and rotary_scaling."""
    given = [config[key] for key in ('rope_parameters', 'rope_scaling') if config.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError('config.json: rope_parameters and rope_scaling differ')
    key = 'rope_parameters' if config.get('rope_parameters') else 'rope_scaling'
    values = {name: value for name, value in (given or [{}])[0].items() if value is not None}
    kinds = {str(values[name]) for name in ('rope_type', 'type') if name in values} or {'default'}
    known = {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor'}
    if kinds == {'llama3'}:
        known |= set(LLAMA3)
    elif kinds != {'default'}:
        raise UserError(
            f'config.json: {key} has the type {", ".join(sorted(kinds))}, but only '
            f'default and llama3 are supported'
        )
    if unknown := values.keys() - known:
        raise UserError(f'config.json: {key} has {", ".join(sorted(unknown))}, which is not known')
    for place in (values, config):
        if place.get('partial_rotary_factor') not in (None, 1):
            raise UserError(
                'config.json: partial_rotary_factor is '
                f'{place["partial_rotary_factor"]}, but only 1 is supported'
            )
    bases = values.get('rope_theta'), config.get('rope_theta')
    base = next((base for base in bases if base is not None), 10000.0)
    numbers = [values.get(name) for name in LLAMA3] if kinds == {'llama3'} else []
    for name, number in zip(('rope_theta', *LLAMA3), [base, *numbers]):
        if not (type(number) in (int, float) and 0 < number <= sys.float_info.max):
            where = f'{name} in {key}' if given else name
            raise UserError(f'config.json: {where} is {number!r:.80}, expected a positive number')
    if numbers and numbers[1] >= numbers[2]:
        raise UserError(f'config.json: {key} has low_freq_factor above high_freq_factor')
    return float(base), tuple(map(float, numbers))


def pick(config: GPTConfig) -> Family:
    """Returns the family that fits best."""
    if config.qk_norm:
        return QWEN3
    return QWEN2 if config.qkv_bias and not config.bias else LLAMA


def write(config: GPTConfig, tensors: Mapping[str, torch.Tensor], as_qwen2: bool):
    """Returns config.json and the tensors of the family that pick() names, which must fit.

    as_qwen2: if False, what would be a Qwen2 is a Llama whose output projections have zero biases.
    """
    family = pick(config)
    if family is QWEN2 and not as_qwen2:
        family = LLAMA
    biases: tuple[str, ...] = ()
    rotary: dict[str, Any] = {'rope_type': 'default', 'rope_theta': config.rotary_base}
    if config.rotary_scaling:
        rotary |= {'rope_type': 'llama3', **dict(zip(LLAMA3, config.rotary_scaling, strict=True))}
        rotary[LLAMA3[3]] = int(rotary[LLAMA3[3]])
    written = family.write_fields(config) | {
        'rope_parameters': rotary,
        # What transformers read before version 5.
        'rope_theta': config.rotary_base,
        'rope_scaling': rotary if config.rotary_scaling else None,
    }
    if family is LLAMA:
        has_bias = config.bias or config.qkv_bias
        written |= {'attention_bias': has_bias, 'mlp_bias': config.bias}
        biases = ATTENTION * has_bias + MLP * config.bias
    elif family is QWEN2:
        biases = ATTENTION[:1]
    else:
        written |= {'attention_bias': config.qkv_bias}
        biases = ATTENTION * config.qkv_bias
    return written, family.to_theirs(tensors, config, frozenset(biases))


def why_not(config: GPTConfig) -> str | None:
    """Returns why a model is of none of these families; None if it is of one."""
    return pick(config).why_not(config)
