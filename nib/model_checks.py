"""Checks of a model's shape. model.py calls check_shape() for every GPTConfig."""

import math
from typing import Literal, get_args, get_origin, get_type_hints

LARGE = 1 << 31  # sizes from here on would overflow the counts
RANGES = {  # field -> the least value, and the first one that is too large
    'vocab_size': (1, LARGE),
    'block_size': (1, LARGE),
    'n_layer': (1, 10_000),  # more would take hours to build
    'n_head': (1, LARGE),
    'n_embd': (1, LARGE),
    'head_dim': (0, LARGE),
    'mlp_width': (0, LARGE),
    'smear': (0, 10),
    'dropout': (0, 1),
    'norm_eps': (0, math.inf),
    'logit_cap': (0, math.inf),
}


def check_shape(config):
    """Raises ValueError if a field of a GPTConfig is invalid, with a value to try."""
    for name, (least, below) in RANGES.items():
        value = getattr(config, name)
        if not least <= value < below:
            limit = f'less than {below:,}' if below < math.inf else 'finite'
            raise ValueError(f'{name} is {value}: it must be at least {least} and {limit}')
    for name, kind in get_type_hints(type(config)).items():
        choices, value = get_args(kind), getattr(config, name)
        if get_origin(kind) is Literal and value not in choices:
            raise ValueError(f'{name} is {value!r}: it must be one of {", ".join(choices)}')
    n_embd, n_head, n_kv_head = config.n_embd, config.n_head, config.n_kv_head
    if n_embd % n_head and not config.head_dim:
        nearest = n_embd // n_head * n_head or n_head
        raise ValueError(
            f'n_embd {n_embd} is not divisible by n_head {n_head}: try n_embd {nearest}'
        )
    if n_kv_head < 0 or n_kv_head and n_head % n_kv_head:
        shared = math.gcd(n_head, n_kv_head)
        raise ValueError(
            f'n_head {n_head} is not divisible by n_kv_head {n_kv_head}: try n_kv_head {shared}'
        )
    if config.position == 'rotary' and config.head_width % 2:
        name = 'head_dim' if config.head_dim else 'n_embd / n_head'
        raise ValueError(
            f'{name} is {config.head_width}: rotary positions turn pairs of dimensions, so it '
            f'must be even: try head_dim {config.head_width + 1}'
        )
    if config.position == 'rotary' and not 0.0 < config.rotary_base < math.inf:
        raise ValueError(f'rotary_base is {config.rotary_base}: it must be a positive number')
