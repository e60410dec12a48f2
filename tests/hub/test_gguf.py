"""GGUF files: read again by the formulas of llama.cpp, and by llama.cpp itself where it is installed."""

import json
from dataclasses import replace

import gguf
import pytest
import torch
from small_models import make_model
from small_tokenizers import byte_fallback, byte_level
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from model import GPTConfig
from nib.errors import UserError
from nib.hub import gguf as hub_gguf
from nib.hub.gguf import WORDS
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import ByteTokenizer, CharTokenizer, Gpt2Tokenizer, IdTokenizer

SMALL = GPTConfig(vocab_size=67, block_size=19, n_layer=3, n_head=4, n_embd=32, bias=False)
MODERN = replace(SMALL, position='rotary', norm='rms', mlp='swiglu', n_kv_head=2)
LLAMA3 = dict(rotary_base=50.0, rotary_scaling=(4.0, 1.0, 3.0, 12.0))
MODELS = {
    'gpt2': (SMALL, 'gpt2'),
    'gpt2 biases, untied, wide': (
        replace(SMALL, bias=True, tied_head=False, mlp_width=40, norm_eps=1e-3),
        'gpt2',
    ),
    'llama': (MODERN, 'llama'),
    'llama untied, head_dim': (
        replace(MODERN, tied_head=False, head_dim=12, n_kv_head=0, mlp_width=64, norm_eps=1e-3),
        'llama',
    ),
    'llama biases': (replace(MODERN, bias=True), 'llama'),
    'llama 3': (replace(MODERN, **LLAMA3), 'llama'),
    'qwen2': (replace(MODERN, qkv_bias=True), 'qwen2'),
    'qwen2 head_dim': (replace(MODERN, qkv_bias=True, head_dim=12), 'llama'),
    'qwen2 scaled': (replace(MODERN, qkv_bias=True, **LLAMA3), 'llama'),
    'qwen3': (replace(MODERN, qk_norm=True), 'qwen3'),
    'qwen3 untied, biases, head_dim': (
        replace(MODERN, qk_norm=True, qkv_bias=True, head_dim=12, tied_head=False),
        'qwen3',
    ),
}
CHARACTERS = CharTokenizer(''.join(map(chr, range(40, 40 + 67))))


def save(path, model, tokenizer=CHARACTERS, dtype='f32'):
    hub_gguf.write(str(path), model.config, model.state_dict(), tokenizer, dtype)
    return gguf.GGUFReader(path)


def read(reader):
    """The metadata, and the tensors in float32."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return fields, tensors


def rotate(x, base, divisors, is_llama):
    """Rotates x (H, T, D): neighbors in llama, halves in Qwen."""
    D = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, D, 2) / D) / divisors
    first, second = (x[..., ::2], x[..., 1::2]) if is_llama else x.chunk(2, -1)
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.stack(turned, -1).flatten(-2) if is_llama else torch.cat(turned, -1)


def logits_by_formula(reader, ids):
    """The logits (T, V) of ids (T), from nothing but the file, as llama.cpp defines its models."""
    fields, tensors = read(reader)
    kind = fields['general.architecture']
    sizes = {n.removeprefix(f'{kind}.'): v for n, v in fields.items() if n.startswith(kind)}
    H, K = sizes['attention.head_count'], sizes['attention.head_count_kv']
    T = len(ids)

    def apply(x, name):
        bias = tensors.get(f'{name}.bias')
        if name.endswith('norm'):
            if kind == 'gpt2':
                eps = sizes['attention.layer_norm_epsilon']
                return F.layer_norm(x, x.shape[-1:], tensors[f'{name}.weight'], bias, eps)
            eps = sizes['attention.layer_norm_rms_epsilon']
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * tensors[f'{name}.weight']
        return F.linear(x, tensors[f'{name}.weight'], bias)

    x = tensors['token_embd.weight'][ids]
    if kind == 'gpt2':
        x = x + tensors['position_embd.weight'][:T]
    for i in range(sizes['block_count']):
        block = f'blk.{i}.'
        h = apply(x, block + 'attn_norm')
        if kind == 'gpt2':
            parts = apply(h, block + 'attn_qkv').chunk(3, -1)
        else:
            parts = [apply(h, block + name) for name in ('attn_q', 'attn_k', 'attn_v')]
        q, k, v = (
            part.view(T, heads, -1).transpose(0, 1) for part, heads in zip(parts, (H, K, K))
        )
        if kind == 'qwen3':
            q, k = apply(q, block + 'attn_q_norm'), apply(k, block + 'attn_k_norm')
        if kind != 'gpt2':
            D = sizes['attention.key_length']
            assert q.shape[-1] == sizes['rope.dimension_count'] == D
            divisors = tensors.get('rope_freqs.weight', torch.ones(D // 2))
            q, k = (
                rotate(part, sizes['rope.freq_base'], divisors, kind == 'llama') for part in (q, k)
            )
        k, v = (part.repeat_interleave(H // K, 0) for part in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((T, T), -torch.inf).triu(1)
        x = x + apply((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), block + 'attn_output')
        h = apply(x, block + 'ffn_norm')
        up = apply(h, block + 'ffn_up')
        gated = (
            F.gelu(up, approximate='tanh')
            if kind == 'gpt2'
            else F.silu(apply(h, block + 'ffn_gate')) * up
        )
        x = x + apply(gated, block + 'ffn_down')
    head = 'output' if 'output.weight' in tensors else 'token_embd'
    return apply(apply(x, 'output_norm'), head)


@pytest.mark.parametrize('config, architecture', MODELS.values(), ids=MODELS)
def test_the_file_holds_the_model(config, architecture, tmp_path):
    model = make_model(config)
    reader = save(tmp_path / 'model.gguf', model)
    fields, _ = read(reader)
    assert fields['general.architecture'] == architecture
    assert fields[f'{architecture}.context_length'] == 19
    assert fields[f'{architecture}.vocab_size'] == len(fields['tokenizer.ggml.tokens']) == 68
    ids = torch.randint(67, (19,))
    with torch.no_grad():
        ours = model(ids[None])[0]
        theirs = logits_by_formula(reader, ids)
    assert (theirs[:, :67] - ours).abs().max() < 1e-5 * ours.abs().max()
    # The end-of-text token that llama.cpp needs is never the most likely.
    torch.testing.assert_close(theirs[:, 67], ours.mean(-1), atol=1e-4, rtol=1e-4)
