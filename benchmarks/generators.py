"""Measures generation against llama.cpp, CTranslate2 and transformers, alternating.

    pip install llama-cpp-python ctranslate2 transformers gguf
    python benchmarks/generators.py --shape=gpt2 --prompt_tokens=256

All use the same random weights, temperature 0.8 and top_k 200, and each runs in its own process
with the number of threads that was fastest in a short trial. tokens/s include reading the prompt;
for nibGPT, also packing the weights. int8 is q8_0 in llama.cpp. A program that is not installed is
left out.
"""

import functools
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from model import GPT, GPTConfig
from nib.errors import UserError, run_script, warn
from nib.generation.int8 import quantize
from nib.hub import gguf, huggingface
from nib.machine.device import pick_device, synchronize
from nib.schema import check_range
from nib.text.hf_tokenizer import HfTokenizer, byte_names
from nib.text.tokenizer import END_OF_TEXT, tokenizer_from_json

shape: Literal['gpt2', 'smollm2'] = 'gpt2'  # 124M parameters, or SmolLM2's 135M
dtypes: str = 'float32,bfloat16,int8'  # precisions of the weights
prompt_tokens: int = 256  # length of each prompt
n_prompts: int = 1  # prompts that are continued together
new_tokens: int = 100  # tokens after each prompt
rounds: int = 3  # rounds of measurements
device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
folder: str = ''  # keep the models of all programs here for the next run; empty: do not keep them
result: str = ''  # also write the table to this file

TEMPERATURE, TOP_K, SEED = 0.8, 200, 1
SHAPES = {
    'gpt2': GPTConfig(),
    'smollm2': GPTConfig(
        vocab_size=49152,
        n_layer=30,
        n_head=9,
        n_kv_head=3,
        n_embd=576,
        mlp='swiglu',
        mlp_width=1536,
        norm='rms',
        position='rotary',
        bias=False,
    ),
}
GGUF_TYPES = {'float32': 'f32', 'bfloat16': 'bf16', 'int8': 'q8_0'}


def main(argv):
    values, _ = configurator.configure(__file__, argv, settle={'device': pick_device})
    globals().update(values)
    check_range(values, 'rounds', least=1)
    if unknown := set(dtypes.split(',')) - set(GGUF_TYPES):
        raise UserError(f'dtypes has {min(unknown)}: choose among {", ".join(GGUF_TYPES)}')
    with tempfile.TemporaryDirectory() as temporary:
        table = compare(Path(folder or temporary) / shape)
    measure.publish(table, result)


def compare(models: Path) -> str:
    """Returns a table of all programs. models: their folder, which is written if needed."""
    if not models.exists():
        models.mkdir(parents=True)
        write_model(models, SHAPES[shape])
    turns: dict[str, list[dict]] = {}
    for name, (package, *_) in CONTESTANTS.items():
        if importlib.util.find_spec(package) is None:
            warn(f'{name} is left out: {package} is not installed')
        else:
            turns[name] = [{} for _ in range(rounds)]
    for dtype in dtypes.split(','):
        running = {
            name: measure.Worker(name, START, name, str(models), dtype, device)
            for name in turns
            if dtype in CONTESTANTS[name][2]
        }
        for turn in range(rounds):
            for name, generator in running.items():
                lines = (f'{prompt_tokens} {n_prompts} {n}' for n in (1, new_tokens))
                first, last = (generator.round(line)['seconds'] for line in lines)
                turns[name][turn] |= {
                    f'{dtype}: tokens/s': n_prompts * new_tokens / last,
                    f'{dtype}: first token, ms': 1000 * first,
                    f'{dtype}: step, ms': 1000 * (last - first) / (new_tokens - 1),
                }
            rates = {name: turns[name][turn][f'{dtype}: tokens/s'] for name in running}
            ours = rates.pop('nibGPT')
            if rates:
                turns['nibGPT'][turn][f'{dtype}: x the best other'] = ours / max(rates.values())
        for generator in running.values():
            generator.close()
    return (
        f'{shape}: {new_tokens} tokens after {prompt_tokens}, {n_prompts} prompts, {rounds} '
        f'alternating rounds; {measure.describe_machine(device)}\n\n{measure.make_table(turns)}'
    )


def generate_with_nibgpt(folder: Path, dtype: str, device: str) -> Callable:
    config, tensors, _ = huggingface.read(str(folder / 'hf'))
    model = GPT(config)
    model.load_state_dict(tensors)
    if dtype == 'int8':
        model = quantize(model)
    else:
        model.to(device, getattr(torch, dtype))

    def generate(prompts, new_tokens, threads):
        torch.set_num_threads(threads)
        for tokens in model.generate(prompts, new_tokens, TEMPERATURE, TOP_K, seed=SEED):
            tokens.tolist()  # waits for the device, like a program that prints them

    return generate


def generate_with_transformers(folder: Path, dtype: str, device: str) -> Callable:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / 'hf', dtype=getattr(torch, dtype))
    model.to(device).eval()
    options = {'do_sample': True, 'temperature': TEMPERATURE, 'top_k': TOP_K}

    def generate(prompts, new_tokens, threads):
        torch.set_num_threads(threads)
        ids = torch.tensor(prompts, device=device)
        lengths = {'max_new_tokens': new_tokens, 'min_new_tokens': new_tokens}
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, pad_token_id=0, **options, **lengths)

    return generate


def generate_with_ctranslate2(folder: Path, dtype: str, device: str) -> Callable:
    import ctranslate2

    path = folder / f'ct2-{dtype}'
    if not path.exists():
        converter = ctranslate2.converters.TransformersConverter(str(folder / 'hf'))
        converter.convert(str(path), quantization=dtype)
        described = json.loads((path / 'config.json').read_text())
        for key in ('bos_token', 'unk_token'):  # which it requires
            described[key] = described[key] or END_OF_TEXT
        (path / 'config.json').write_text(json.dumps(described))
    token = json.loads((path / 'vocabulary.json').read_text())[0]
    generators = {}

    def generate(prompts, new_tokens, threads):
        if threads not in generators:
            generators.clear()
            generators[threads] = ctranslate2.Generator(
                str(path), device=device, compute_type=dtype, intra_threads=threads
            )
        generators[threads].generate_batch(
            [[token] * len(prompt) for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=TOP_K,
            sampling_temperature=TEMPERATURE,
            include_prompt_in_result=False,
            max_batch_size=0,
        )

    return generate


def generate_with_llama_cpp(folder: Path, dtype: str, device: str) -> Callable:
    import llama_cpp as llama

    path = folder / f'{GGUF_TYPES[dtype]}.gguf'
    if not path.exists():
        config, tensors, tokenizer = huggingface.read(str(folder / 'hf'))
        gguf.write(str(path), config, tensors, tokenizer_from_json(tokenizer), GGUF_TYPES[dtype])
    silent = llama.llama_log_callback(lambda *message: None)
    llama.llama_log_set(silent, None)
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0 if device == 'cpu' else 999
    # Its AMX code for q8_0 ends with SIGILL on a virtual machine of the results.
    parameters.use_extra_bufts = dtype != 'int8'
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for part in (
        llama.llama_sampler_init_top_k(TOP_K),
        llama.llama_sampler_init_temp(TEMPERATURE),
        llama.llama_sampler_init_dist(SEED),
    ):
        llama.llama_sampler_chain_add(sampler, part)

    @functools.lru_cache(maxsize=1)
    def open_context(n_prompts, prompt_tokens, new_tokens, threads):
        options = llama.llama_context_default_params()
        options.n_seq_max, options.n_batch = n_prompts, n_prompts * prompt_tokens
        options.n_ctx = n_prompts * (prompt_tokens + new_tokens)
        options.n_threads = options.n_threads_batch = threads
        context = llama.llama_init_from_model(model, options)
        return context, llama.llama_batch_init(options.n_batch, 0, 1)

    def read(context, batch, rows, start):
        """Reads tokens (B, T), and returns where the logits of each row's last one are."""
        batch.n_tokens = len(rows) * len(rows[0])
        for n in range(batch.n_tokens):
            row, place = divmod(n, len(rows[0]))
            batch.token[n], batch.pos[n] = rows[row][place], start + place
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
            batch.logits[n] = place == len(rows[0]) - 1
        if llama.llama_decode(context, batch):
            raise RuntimeError('llama_decode failed')
        return [len(rows[0]) * (row + 1) - 1 for row in range(len(rows))]

    def generate(prompts, new_tokens, threads):
        context, batch = open_context(len(prompts), len(prompts[0]), max(new_tokens, 128), threads)
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        rows, start = prompts, 0
        for _ in range(new_tokens):
            places = read(context, batch, rows, start)
            start += len(rows[0])
            rows = [[llama.llama_sampler_sample(sampler, context, place)] for place in places]

    generate.silent = silent  # the library has only a pointer to it
    return generate


CONTESTANTS = {  # name -> the package it needs, how it generates, and its precisions
    'llama.cpp': ('llama_cpp', generate_with_llama_cpp, ('float32', 'bfloat16', 'int8')),
    'CTranslate2': ('ctranslate2', generate_with_ctranslate2, ('float32', 'int8')),
    'transformers': ('transformers', generate_with_transformers, ('float32', 'bfloat16')),
    'nibGPT': ('torch', generate_with_nibgpt, ('float32', 'bfloat16', 'int8')),
}


def write_model(folder: Path, config: GPTConfig):
    """Writes random weights in Hugging Face's format."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(config.vocab_size)
    huggingface.write(str(folder / 'hf'), config, GPT(config).state_dict(), tokenizer, '')


def make_tokenizer(vocab_size: int) -> HfTokenizer:
    """Returns a tokenizer of this size, as all formats need one: bytes and pairs of bytes."""
    characters = list(byte_names())
    pairs = list(itertools.product(characters, repeat=2))[: vocab_size - 257]
    vocabulary = [*characters, *map(''.join, pairs), END_OF_TEXT]
    level = {
        'type': 'ByteLevel',
        'add_prefix_space': False,
        'trim_offsets': True,
        'use_regex': True,
    }
    end = {'id': vocab_size - 1, 'content': END_OF_TEXT, 'special': True, 'normalized': False}
    end |= {'single_word': False, 'lstrip': False, 'rstrip': False}
    bpe = {
        'type': 'BPE',
        'vocab': {token: number for number, token in enumerate(vocabulary)},
        'merges': list(map(' '.join, pairs)),
    }
    described = {'version': '1.0', 'added_tokens': [end], 'model': bpe}
    described |= {'pre_tokenizer': level, 'decoder': level}
    return HfTokenizer.read(json.dumps(described))


START = """
import sys, warnings
warnings.simplefilter('ignore')
from benchmarks.generators import serve
serve(*sys.argv[1:])
"""


def serve(name: str, folder: str, dtype: str, device: str):
    """Runs in a measure.Worker. Measures for each line of standard input."""
    most = (pick_device(device), torch.get_num_threads())[1]
    generate = CONTESTANTS[name][1](Path(folder), dtype, device)

    def seconds(prompt_tokens, n_prompts, new_tokens, threads):
        prompts = [[0] * prompt_tokens] * n_prompts
        started = time.perf_counter()
        generate(prompts, new_tokens, threads)
        synchronize(device)
        return time.perf_counter() - started

    def best_threads(prompt_tokens, n_prompts):
        tried = {}
        for threads in range(1, most + 1):
            seconds(prompt_tokens, n_prompts, 2, threads)  # loads libraries
            tried[threads] = min(seconds(prompt_tokens, n_prompts, 16, threads) for _ in range(3))
        return min(tried, key=tried.get)

    best = None
    print('{}', flush=True)
    for line in sys.stdin:
        prompt_tokens, n_prompts, new_tokens = map(int, line.split())
        best = best or best_threads(prompt_tokens, n_prompts)
        result = seconds(prompt_tokens, n_prompts, new_tokens, best)
        print(json.dumps({'seconds': result, 'threads': best}), flush=True)


if __name__ == '__main__':
    run_script(main)
