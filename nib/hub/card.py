"""The model card: the README.md of a folder that transformers loads."""

from collections.abc import Mapping

from model import GPT, GPTConfig
from nib.errors import UserError
from nib.machine.device import ShapesOnly
from nib.text.tokenizer import CharTokenizer, Tokenizer

SHOWN = (  # keys of train.py that say how a model was trained
    *'dataset block_size batch_size gradient_accumulation_steps max_iters learning_rate'.split(),
    *'min_lr warmup_iters lr_schedule weight_decay optimizer dropout dtype seed'.split(),
)


def model_card(source: str, config: GPTConfig, tokenizer: Tokenizer, state: Mapping) -> str:
    """Returns Markdown: what the model is, how it was trained, its loss, and how to use it.

    source: where the weights come from. state: that of the run's checkpoint; empty for others.
    """
    trained = state.get('config', {})
    with ShapesOnly():
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
        f"inputs = tokenizer({_prompt(tokenizer)!r}, return_tensors='pt')",
        f'ids = model.generate(**inputs, max_new_tokens={min(50, config.block_size // 2)})[0]',
        'print(tokenizer.decode(ids))',
        '```',
        '',
        *_known_characters(tokenizer),
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


def _prompt(tokenizer: Tokenizer) -> str:
    try:
        tokenizer.encode('The')
        return 'The'
    except UserError:  # unknown characters
        return tokenizer.decode([0])


def _known_characters(tokenizer: Tokenizer) -> list[str]:
    """Returns a paragraph about the characters if the tokenizer rejects all others."""
    if not isinstance(tokenizer, CharTokenizer):
        return []
    n = len(tokenizer.characters)
    return [
        f'The tokenizer only knows the {n} characters of the training text. For any other one,',
        'it raises "Missing [UNK] token".',
        '',
    ]


def _architecture(config: GPTConfig) -> dict:
    """Returns the fields that differ from GPT-2's, and the sizes."""
    plain = vars(GPTConfig())
    sizes = 'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'
    return {k: v for k, v in vars(config).items() if k in sizes or v != plain[k]}


def _table(values: Mapping) -> list[str]:
    return ['| key | value |', '|---|---|', *(f'| {k} | {v} |' for k, v in values.items())]
