"""Changes open models' config.json at random, and checks that no other model is computed.

    python stress/foreign_models.py
    python stress/foreign_models.py --case=1234        one case again, with its messages

A case takes a small GPT-2, Llama, Qwen2 or Qwen3, written by transformers, and changes its
config.json or its tensors. It passes if nibGPT's logits equal those that transformers computes from
the same files, or if nibGPT rejects them in one line that names the key or the tensor. If
transformers cannot load the files, not even without nulls and keys that have no effect, the logits
must be those of the unchanged model.
"""

import contextlib
import io
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch
import transformers
from safetensors.torch import load_file, save_file

import configurator
from benchmarks import measure
from model import GPT
from nib import errors
from nib.checkpoint.start import read_weights
from nib.errors import run_script, warn
from nib.schema import check_range

cases: int = 1000  # number of cases to run
seed: int = 1  # determines the cases
case: int = -1  # the number of a case to run alone; -1 for all
result: str = ''  # also write the table to this file

SECONDS = 20  # limit for a case, of processor time
VOCAB_SIZE, CONTEXT = 67, 19
TOLERANCE = 1e-5  # of the largest logit
GPT2 = dict(
    vocab_size=VOCAB_SIZE,
    n_positions=CONTEXT,
    n_embd=24,
    n_layer=3,
    n_head=3,
    bos_token_id=0,
    eos_token_id=0,
)
LLAMA = dict(
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=CONTEXT,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
)
LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 50.0,
    'factor': 4.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 3.0,
    'original_max_position_embeddings': 12,
}
MODELS = {
    'gpt2': transformers.GPT2Config(**GPT2),
    'gpt2 untied': transformers.GPT2Config(**GPT2, tie_word_embeddings=False, n_inner=41),
    'llama': transformers.LlamaConfig(**LLAMA),
    'llama 3': transformers.LlamaConfig(**LLAMA, rope_parameters=LLAMA3, tie_word_embeddings=True),
    'llama biases': transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    'qwen2': transformers.Qwen2Config(**LLAMA),
    'qwen3': transformers.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True),
}
# Keys that these files may have; whether a model has them or not is drawn.
KEYS = """
    activation_function add_cross_attention alibi architectures attention_bias auto_map head_dim
    hidden_act hidden_size intermediate_size is_encoder_decoder layer_norm_epsilon layer_types
    logit_scale max_position_embeddings max_window_layers mlp_bias model_type n_embd n_head
    n_inner n_layer n_positions num_attention_heads num_hidden_layers num_key_value_heads
    partial_rotary_factor pruned_heads quantization_config reorder_and_upcast_attn rms_norm_eps
    rope_parameters rope_scaling rope_theta scale_attn_by_inverse_layer_idx scale_attn_weights
    sliding_window tie_word_embeddings use_sliding_window vocab_size attn_logit_softcapping
    final_logit_softcapping qk_layernorm use_qk_norm residual_multiplier embedding_multiplier
""".split()
# Keys that change neither the logits nor the meaning of the tokens.
HARMLESS = {
    'transformers_version': ['4.31.0', '5.0.0', None],
    'torch_dtype': ['float32', 'bfloat16'],
    'use_cache': [True, False],
    'initializer_range': [0.02, 0.5],
    'resid_pdrop': [0.0, 0.3],
    'attn_pdrop': [0.0, 0.3],
    'embd_pdrop': [0.0, 0.3],
    'attention_dropout': [0.0, 0.3],
    'bos_token_id': [0, 7],
    'eos_token_id': [0, 7],
    'pretraining_tp': [1],
    '_name_or_path': ['somewhere'],
    'task_specific_params': [{'text-generation': {'do_sample': True}}],
    'id2label': [{'0': 'no', '1': 'yes'}],
    'n_ctx': [1024],
    'max_length': [20],
    'temperature': [0.7],
    'gradient_checkpointing': [True],
    'unsloth_version': ['2025.1'],
}
WORDS = [
    'gelu', 'gelu_new', 'gelu_fast', 'quick_gelu', 'relu', 'silu', 'swish', 'tanh', 'default',
    'linear', 'yarn', 'llama3', 'gpt2', 'llama', 'qwen2', 'qwen3', 'mistral', 'gpt_neo', 'x', '',
    '1', 'é',
]  # fmt: skip
NUMBERS = [-1, 0, 1, 2, 3, 4, 6, 8, 12, 19, 24, 36, 52, 67, 1000, 10**6, 10**12, 10**400]
FLOATS = [-1.0, 0.0, 1e-6, 1e-5, 0.1, 0.5, 1.0, 2.0, 100.0, 1e308, float('nan'), float('inf')]
NESTED = [None, [], {}, [None], {'x': None}, [[]], {'rope_type': None}, ['full_attention'] * 3]
BAD = ('another model', 'no clear line', 'harmless, but rejected', 'too long')
OUTCOMES = ('equal', 'as unchanged', 'rejected', *BAD)


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'cases', least=1)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGPROF, give_up)
    began = time.monotonic()
    ended: dict[str, Counter[str]] = {kind: Counter() for kind in CHANGES}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # transformers'
        originals = {name: make_model(Path(scratch, name)) for name in MODELS}
        for number in range(cases) if case < 0 else [case]:
            kind, outcome, what = run_case(number, Path(scratch), originals)
            ended[kind][outcome] += 1
            if outcome in BAD or case >= 0:
                warn(f'case {number}, {kind}: {outcome}: {what}')
    table = make_table(ended, time.monotonic() - began)
    measure.publish(table, result)
    return int(any(counts[bad] for counts in ended.values() for bad in BAD))


def make_model(folder: Path) -> torch.Tensor:
    """Writes a model whose parameters, and the eps of its norms, all matter; returns its logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[folder.name]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_embedding = re.search(r'wte|wpe|embed_tokens', name)
            parameter.add_(torch.randn_like(parameter) * (0.002 if is_embedding else 0.15))
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(tokens(CONTEXT)).logits


def tokens(length: int) -> torch.Tensor:
    return torch.arange(3 * length).view(3, length) * 7 % VOCAB_SIZE


# -- one case --------------------------------------------------------------------------------------


def run_case(number: int, scratch: Path, originals) -> tuple[str, str, str]:
    """Returns the kind of the case, how it ended, and its changes and messages."""
    draw = random.Random(f'{seed} {number}')
    name = draw.choice(list(MODELS))
    kind = draw.choice(list(CHANGES))
    folder = scratch / 'changed'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scratch / name, folder)
    config = json.loads((folder / 'config.json').read_text())
    before = dict(config)
    names = CHANGES[kind](draw, config, folder)
    if 'model_type' in names:
        names += config  # by the keys of another family, any of them may be wrong
    (folder / 'config.json').write_text(json.dumps(config))
    changed = {key: config.get(key, 'missing') for key in names if key in {**before, **config}}
    said = f'{name}, {changed or names}'
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        code, message, logits = compute(folder)
    except TimeoutError:
        return kind, 'too long', said
    except Exception as error:  # a bug of nibGPT
        return kind, 'no clear line', f'{said}: {type(error).__name__}: {error}'
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    said += f': {message.strip()}'
    if code == 2:
        is_named = any(key in message for key in names) or 'the tensor ' in message
        is_line = message.startswith('error: ') and message.count('\n') == 1
        outcome = 'rejected' if is_named and is_line else 'no clear line'
        return kind, 'harmless, but rejected' if kind == HARMLESS_KEY else outcome, said
    theirs = reference(folder, logits.shape[1])
    if theirs is None:  # it rejects some nulls, and wrong types in keys that have no effect
        kept = {k: v for k, v in config.items() if v is not None and k not in HARMLESS}
        for key in ('rms_norm_eps', 'layer_norm_epsilon'):  # nor an integer there
            if type(kept.get(key)) is int:
                kept[key] = float(kept[key])
        (folder / 'config.json').write_text(json.dumps(kept))
        theirs = reference(folder, logits.shape[1])
    expected = originals[name][:, : logits.shape[1]] if theirs is None else theirs
    is_equal = logits.shape == expected.shape and (
        (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    )
    outcome = 'as unchanged' if theirs is None else 'equal'
    return kind, outcome if is_equal else 'another model', said


def compute(folder: Path) -> tuple[int | None, str, torch.Tensor | None]:
    """Returns nibGPT's exit code, what it printed, and its logits."""
    logits = None

    def compute_logits(argv):
        nonlocal logits
        start = read_weights(str(folder))
        model = GPT(start.model).eval()
        model.load_state_dict(start.tensors['model'])
        with torch.no_grad():
            logits = model(tokens(min(CONTEXT, model.config.block_size)))

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = errors.call(compute_logits, [])
    return code, printed.getvalue(), logits


def reference(folder: Path, length: int) -> torch.Tensor | None:
    """Returns the logits of transformers, or None if it cannot load all of the model."""
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        if found['missing_keys'] or found['mismatched_keys']:
            return None
        with torch.no_grad():
            return model.eval()(tokens(length)).logits
    except Exception:  # almost any
        return None


def give_up(number, frame):
    raise TimeoutError


# -- the changes -----------------------------------------------------------------------------------


def any_value(draw: random.Random):
    return draw.choice([*NUMBERS, *FLOATS, *WORDS, *NESTED, True, False, None])


def change_value(draw: random.Random, config: dict, folder: Path) -> list[str]:
    """Changes a value into another one of its type."""
    key = draw.choice([key for key in config if key in KEYS])
    value = config[key]
    if isinstance(value, bool):
        config[key] = not value
    elif isinstance(value, int):
        config[key] = draw.choice([value + 1, value - 1, value * 2, value // 2, *NUMBERS])
    elif isinstance(value, float):
        config[key] = draw.choice([value * 2, value / 10, *FLOATS])
    elif isinstance(value, str):
        config[key] = draw.choice(WORDS)
    else:
        config[key] = draw.choice(NESTED)
    return [key]


def change_type(draw: random.Random, config: dict, folder: Path) -> list[str]:
    key = draw.choice([key for key in config if key in KEYS])
    value = config[key]
    as_float = [float(value)] if isinstance(value, int) else []
    config[key] = draw.choice([str(value), [value], {key: value}, *as_float, any_value(draw)])
    return [key]


def add_key(draw: random.Random, config: dict, folder: Path) -> list[str]:
    key = draw.choice([*KEYS, 'surprise', 'é', ''])
    config[key] = any_value(draw)
    return [key]


def remove_key(draw: random.Random, config: dict, folder: Path) -> list[str]:
    key = draw.choice(list(config))
    del config[key]
    return [key]


def set_null(draw: random.Random, config: dict, folder: Path) -> list[str]:
    key = draw.choice(list(config))
    config[key] = None
    return [key]


def change_nested(draw: random.Random, config: dict, folder: Path) -> list[str]:
    """Changes the rotary positions, in their present or their earlier form, or the layer types."""
    rotary = dict(config.get('rope_parameters') or draw.choice([LLAMA3, {'rope_type': 'default'}]))
    inner = draw.choice([*LLAMA3, 'type', 'partial_rotary_factor', 'mscale', 'attention_factor'])
    how = draw.randrange(4)
    if how == 0:
        rotary.pop(inner, None)
    elif how == 1:
        rotary[inner] = any_value(draw)
    elif how == 2:
        rotary[inner] = None
    else:
        kinds = ['full_attention', 'sliding_attention', 'x', None]
        config['layer_types'] = draw.choices(kinds, [8, 1, 1, 1], k=draw.randint(0, 3))
        return ['layer_types']
    if draw.random() < 0.5:
        config['rope_parameters'] = rotary
        return ['rope_parameters', inner]
    config.pop('rope_parameters', None)
    theta = rotary.pop('rope_theta', None)
    config['rope_scaling'] = rotary
    if draw.random() < 0.8:
        config['rope_theta'] = theta
    return ['rope_scaling', 'rope_theta', inner]


def change_several(draw: random.Random, config: dict, folder: Path) -> list[str]:
    changes = (change_value, change_type, add_key, remove_key, set_null, change_nested)
    chosen = draw.choices(changes, k=draw.randint(2, 4))
    return [key for change in chosen for key in change(draw, config, folder)]


def change_harmless(draw: random.Random, config: dict, folder: Path) -> list[str]:
    keys = draw.sample(list(HARMLESS), draw.randint(1, 4))
    config.update((key, draw.choice(HARMLESS[key])) for key in keys)
    return keys


def change_tensors(draw: random.Random, config: dict, folder: Path) -> list[str]:
    """Takes a tensor out, or changes its shape, dtype or name, or adds one."""
    tensors = load_file(folder / 'model.safetensors')
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    how = draw.choice(['remove', 'cut', 'transpose', 'rename', 'add', 'bfloat16', 'int8', 'twice'])
    if how in ('remove', 'rename'):
        del tensors[name]
    if how == 'rename':
        tensors[f'{name}_2'] = tensor
    if how == 'add':
        tensors[name.replace('weight', 'bias') + '_extra'] = tensor
    changed = {
        'cut': lambda: tensor[:-1],
        'transpose': lambda: tensor.t() if tensor.dim() == 2 else tensor[None],
        'bfloat16': tensor.bfloat16,
        'int8': lambda: tensor.to(torch.int8),
        'twice': lambda: torch.cat((tensor, tensor)),
    }
    if how in changed:
        tensors[name] = changed[how]()
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / 'model.safetensors', metadata={'format': 'pt'})
    return [name]


HARMLESS_KEY = 'keys that change nothing'
CHANGES: dict[str, Callable[[random.Random, dict, Path], list[str]]] = {
    'another value': change_value,
    'another type': change_type,
    'a key is added': add_key,
    'a key is missing': remove_key,
    'null': set_null,
    'nested values': change_nested,
    'several of these': change_several,
    HARMLESS_KEY: change_harmless,
    'tensors': change_tensors,
}


def make_table(ended: dict[str, Counter[str]], seconds: float) -> str:
    count = sum(counts.total() for counts in ended.values())
    machine = f'{measure.describe_machine()}, transformers {transformers.__version__}'
    lines = [
        f'{count:,} cases, seed {seed}, in {seconds / 60:.1f} minutes; {machine}',
        '',
        f'{"":26}' + ''.join(f'{outcome:>23}' for outcome in OUTCOMES),
    ]
    total = sum(ended.values(), Counter[str]())
    for kind, counts in [*ended.items(), ('all', total)]:
        lines.append(f'{kind:26}' + ''.join(f'{counts[outcome]:>23,}' for outcome in OUTCOMES))
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    run_script(main)
