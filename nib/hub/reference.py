"""The architectures of model.py, computed plainly, to detect a changed model.py.

Other programs receive weights and the name of an architecture. If a changed model.py computes
something else, they would compute other logits from the same weights.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from nib.errors import UserError
from nib.text.tokenizer import Tokenizer

TOKENIZERS = ('char', 'byte', 'gpt2', 'hf', 'vocabulary', 'ids')  # the kinds of nib/text/
TOLERANCE = 1e-3  # of the logits' standard deviation; rounding costs less than a hundredth of it

ACTIVATIONS = {
    'gelu': lambda x: F.gelu(x, approximate='tanh'),
    'gelu_erf': F.gelu,
    'relu': F.relu,
    'relu2': lambda x: F.relu(x) ** 2,
    'swiglu': lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
}


def check_model(config: GPTConfig):
    """Raises UserError if model.py does not compute the architecture that the config describes.

    Compares the logits of a model of two layers with random weights and up to 1,024 positions. So a
    change that only concerns later layers or longer distances is not found.
    """
    if config.smear:  # no format supports it
        return
    small = replace(
        config,
        vocab_size=64,
        n_layer=min(config.n_layer, 2),
        block_size=min(config.block_size, 1024),
        dropout=0.0,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        model = GPT(small).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():  # also gains, biases, and added buffers
            if tensor.is_floating_point():
                tensor.normal_(std=0.2, generator=generator)
    if not is_original(model, model.state_dict()):
        raise UserError(
            'model.py has been changed: other programs would compute something different from '
            'these weights, so nothing was written; convert.py can only write models of the '
            'original model.py'
        )


def check_tokenizer(tokenizer: Tokenizer):
    """Raises UserError if the tokenizer is of a kind that has been added to nib/text/."""
    kind = tokenizer.to_json()['kind']
    if kind not in TOKENIZERS:
        raise UserError(
            f'this model has a tokenizer of the kind {kind}: other programs would split '
            f'the same text into different tokens, so nothing was written'
        )


@torch.no_grad()
def is_original(model: GPT, weights: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether a model, without smear, has the logits of the original architecture.

    weights: those that the original architecture would use.
    """
    config = model.config
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (1, config.block_size), generator=generator)
    try:
        expected = compute_logits(config, weights, ids)
    except (KeyError, RuntimeError):  # a parameter has another name or shape
        return False
    return bool((model(ids) - expected).abs().max() <= TOLERANCE * expected.std())


def crop(
    config: GPTConfig, weights: Mapping[str, torch.Tensor]
) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """Returns the first two layers, 32 positions and 64 tokens of a model, in float32."""
    small = replace(
        config,
        vocab_size=min(config.vocab_size, 64),
        n_layer=min(config.n_layer, 2),
        block_size=min(config.block_size, 32),
    )
    lengths = {'transformer.wpe.weight': small.block_size}
    lengths |= dict.fromkeys(('transformer.wte.weight', 'lm_head.weight'), small.vocab_size)
    later = re.compile(r'transformer\.h\.(?![01]\.)')
    return small, {
        name: weight[: lengths.get(name)].float()
        for name, weight in weights.items()
        if not later.match(name)
    }


def compute_logits(config: GPTConfig, weights: Mapping[str, torch.Tensor], ids):
    """Returns the logits (B, T, vocab_size) of ids (B, T), without smear and dropout.

    weights: those of GPT.state_dict(). Raises KeyError if one is missing.
    """

    def linear(x, name):
        return F.linear(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'))

    def norm(x, name):
        gain, bias = weights[f'{name}.weight'], weights.get(f'{name}.bias')
        if config.norm == 'layer':
            return F.layer_norm(x, gain.shape, gain, bias, config.norm_eps or 1e-5)
        return x / (x.square().mean(-1, keepdim=True) + (config.norm_eps or 1e-6)).sqrt() * gain

    T, D = ids.shape[1], config.head_width
    x = weights['transformer.wte.weight'][ids]  # (B, T, C)
    if config.position == 'learned':
        x = x + weights['transformer.wpe.weight'][:T]
    else:
        angles = torch.arange(T)[:, None] * rotary_frequencies(config)
        cos, sin = angles.cos().float(), angles.sin().float()  # (T, D/2)

    def rotate(x):  # (B, H, T, D)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    is_later = torch.ones(T, T, dtype=torch.bool).triu(1)
    heads = [config.n_head, config.kv_heads, config.kv_heads]
    for layer in range(config.n_layer):
        name = f'transformer.h.{layer}'
        qkv = linear(norm(x, f'{name}.ln_1'), f'{name}.attn.c_attn')
        qkv = qkv.unflatten(-1, (-1, D)).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = qkv.split(heads, dim=1)
        if config.qk_norm:
            q, k = norm(q, f'{name}.attn.q_norm'), norm(k, f'{name}.attn.k_norm')
        if config.position == 'rotary':
            q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(heads[0] // heads[1], dim=1) for part in (k, v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(D)).masked_fill(is_later, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (B, T, H * D)
        x = x + linear(y, f'{name}.attn.c_proj')
        y = ACTIVATIONS[config.mlp](linear(norm(x, f'{name}.ln_2'), f'{name}.mlp.c_fc'))
        x = x + linear(y, f'{name}.mlp.c_proj')
    head = 'transformer.wte' if config.tied_head else 'lm_head'
    logits = F.linear(norm(x, 'transformer.ln_f'), weights[f'{head}.weight'])
    return config.logit_cap * torch.tanh(logits / config.logit_cap) if config.logit_cap else logits


def rotary_frequencies(config: GPTConfig) -> torch.Tensor:
    """Returns the angles (D/2) by which rotary positions turn at each step; see model.Rotary."""
    D = config.head_width
    frequencies = config.rotary_base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    if not config.rotary_scaling:
        return frequencies
    factor, low, high, length = config.rotary_scaling
    turns = length * frequencies / (2 * math.pi)  # in `length` positions
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return share * frequencies + (1 - share) * frequencies / factor
