"""GGUF, the format of llama.cpp, Ollama and LM Studio: weights, sizes and tokenizer in one file.

The names of the tensors come from those of transformers, by the table of the gguf package.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from model import GPTConfig
from nib.errors import UserError, optional
from nib.files import atomic_write
from nib.hub import gpt2, huggingface, llama
from nib.hub.gguf_vocabulary import Vocabulary, read_vocabulary
from nib.hub.reference import rotary_frequencies
from nib.text.tokenizer import END_OF_TEXT, Tokenizer


def write(
    path: str,
    config: GPTConfig,
    tensors: Mapping[str, torch.Tensor],
    tokenizer: Tokenizer,
    dtype: str,
):
    """Writes a model, with its tokenizer, so that llama.cpp loads it.

    dtype: of the matrices, 'f32', 'f16', 'bf16' or 'q8_0'. Vectors and positions stay in float32.
    Raises UserError, which names the key of GPTConfig or the part of the tokenizer, if llama.cpp
    does not support it.
    """
    with optional('gguf', '--to=gguf'):
        import gguf
    if reason := why_not(config):
        raise UserError(f'this model cannot be written for llama.cpp: {reason}')
    vocabulary = read_vocabulary(tokenizer)
    if vocabulary.end is None:
        vocabulary.add_end()
        config, tensors = _add_row(config, tensors)
    architecture = pick(config)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, architecture)
        writer.add_type('model')
        writer.add_name(Path(path).stem)
        kind = f'{"ALL" if dtype == "f32" else "MOSTLY"}_{dtype.upper()}'
        writer.add_file_type(gguf.LlamaFileType[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_sizes(writer, config)
        _add_vocabulary(writer, vocabulary, gguf.TokenType)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.n_layer)
        for theirs, tensor in _rename(config, tensors).items():
            layer, _, kind = theirs.rpartition('.')
            name = f'{names.get_name(layer)}.{kind}'
            is_matrix = tensor.dim() == 2 and name != 'position_embd.weight'
            quantization = gguf.GGMLQuantizationType[dtype.upper() if is_matrix else 'F32']
            if dtype == 'q8_0' and is_matrix and tensor.shape[1] % 32:  # its blocks have 32 weights
                quantization = gguf.GGMLQuantizationType.F16
            array = gguf.quantize(tensor.float().contiguous().numpy(), quantization)
            writer.add_tensor(name, array, raw_dtype=quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def pick(config: GPTConfig) -> str:
    """Returns llama.cpp's name of the architecture that fits best.

    Its llama supports the most: biases, any width of a head, and scaled rotations.
    """
    if config.position == 'learned':
        return 'gpt2'
    family = llama.pick(config)
    is_plain = config.head_width * config.n_head == config.n_embd and not config.rotary_scaling
    return 'llama' if family is llama.QWEN2 and not is_plain else family.model_type


def why_not(config: GPTConfig) -> str | None:
    """Returns why a model cannot be written for llama.cpp; None if it can."""
    if reason := huggingface.why_not(config):
        return reason
    architecture = pick(config)
    if architecture == 'gpt2' and config.mlp == 'relu':
        return "mlp is relu, but llama.cpp's gpt2 only supports gelu"
    if architecture == 'qwen3' and config.rotary_scaling:
        return f"rotary_scaling is {config.rotary_scaling}, but llama.cpp's qwen3 has none"
    return None


def _rename(config: GPTConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors by transformers' names, in the layout of llama.cpp."""
    if config.position == 'learned':
        return replace(gpt2.GPT2, transposed=()).to_theirs(tensors, config, gpt2.BIASES)
    biases = llama.ATTENTION[: 2 if config.bias else 1 if config.qkv_bias else 0]
    biases += llama.MLP * config.bias
    renamed = llama.pick(config).to_theirs(tensors, config, frozenset(biases))
    if pick(config) == 'llama':
        for name, tensor in renamed.items():
            if re.search(r'\.(q|k)_proj\.', name):
                # Its rotations turn dimensions 2i and 2i + 1, not i and i + D/2.
                halves = tensor.unflatten(0, (-1, 2, config.head_width // 2))
                renamed[name] = halves.transpose(1, 2).flatten(0, 2)
    if config.rotary_scaling:
        unscaled = rotary_frequencies(replace(config, rotary_scaling=()))
        renamed['rope_freqs.weight'] = unscaled / rotary_frequencies(config)
    return renamed


def _add_row(config: GPTConfig, tensors: Mapping[str, torch.Tensor]):
    """Adds a token whose logit is the mean of the others, so it is never the most likely one."""
    added = {
        name: torch.cat((tensors[name], tensors[name].mean(0, keepdim=True)))
        for name in tensors.keys() & {'transformer.wte.weight', 'lm_head.weight'}
    }
    return replace(config, vocab_size=config.vocab_size + 1), {**tensors, **added}


def _add_sizes(writer, config: GPTConfig):
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_units)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    if config.position == 'learned':
        writer.add_layer_norm_eps(gpt2.GPT2.write_fields(config)['layer_norm_epsilon'])
        return
    writer.add_layer_norm_rms_eps(llama.LLAMA.write_fields(config)['rms_norm_eps'])
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rotary_base)


def _add_vocabulary(writer, vocabulary: Vocabulary, types):
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.words if vocabulary.model == 'gpt2' else 'default')
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([types[name] for name in vocabulary.types])
    if vocabulary.model == 'gpt2':
        # llama.cpp requires a merge. This one can never apply.
        never = f'{END_OF_TEXT} {END_OF_TEXT}'
        writer.add_token_merges(vocabulary.merges or [never])
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_unk_token_id(vocabulary.types.index('UNKNOWN'))
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_eos_token_id(vocabulary.end)
    writer.add_bos_token_id(vocabulary.end if vocabulary.begin is None else vocabulary.begin)
    writer.add_add_bos_token(vocabulary.begin is not None)
    writer.add_add_eos_token(False)
