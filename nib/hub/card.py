"""The model card: the README.md of a folder that transformers loads."""

from collections.abc import Mapping

import torch

from model import GPT, GPTConfig

SHOWN = (  # keys of train.py that say how a model was trained
    *'dataset block_size batch_size gradient_accumulation_steps max_iters learning_rate'.split(),
    *'min_lr warmup_iters lr_schedule weight_decay optimizer dropout dtype seed'.split(),
)


def model_card(source: str, config: GPTConfig, state: Mapping) -> str:
    """Returns Markdown: what the model is, how it was trained, its loss, and how to use it.

    source: where the weights come from. state: that of the run's checkpoint; empty for others.
    """
    trained = state.get('config', {})
    with torch.device('meta'):  # shapes only
        n_params = GPT(config).num_params()
    lines = [
        '---',
        'library_name: transformers',
        'pipeline_tag: text-generation',
        '---',
        '',
        f'# A GPT of {n_params / 1e6:.2f}M parameters',
        '',
        f'Written by nibGPT, from {source}.',
        '',
        '## Use',
        '',
        '```python',
        'from transformers import AutoModelForCausalLM, AutoTokenizer',
        '',
        "folder = '.'  # of this file",
        'tokenizer = AutoTokenizer.from_pretrained(folder)',
        'model = AutoModelForCausalLM.from_pretrained(folder)',
        "ids = tokenizer('The', return_tensors='pt').input_ids",
        'print(tokenizer.decode(model.generate(ids, max_new_tokens=50, do_sample=True)[0]))',
        '```',
        '',
        '## Model',
        '',
        *_table(_architecture(config)),
    ]
    if trained:
        values = {key: trained[key] for key in SHOWN if key in trained}
        lines += ['', '## Training', '', *_table({'steps': state['step'], **values})]
    loss = state.get('train', {}).get('best_val_loss')
    if loss is not None:
        lines += ['', '## Loss', '', f'The best validation loss was {loss:.4f} nats per token.']
    return '\n'.join([*lines, ''])


def _architecture(config: GPTConfig) -> dict:
    """Returns the fields that differ from GPT-2's, and the sizes."""
    plain = vars(GPTConfig())
    sizes = 'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'
    return {k: v for k, v in vars(config).items() if k in sizes or v != plain[k]}


def _table(values: Mapping) -> list[str]:
    return ['| key | value |', '|---|---|', *(f'| {k} | {v} |' for k, v in values.items())]
