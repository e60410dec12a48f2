"""Small models of every architecture, shared by tests."""

import torch

from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=61, block_size=16, n_layer=3, n_head=4, n_embd=32)
CHOICES = {
    'position': 'rotary',
    'norm': 'rms',
    'qk_norm': True,
    'n_kv_head': 2,
    'tied_head': False,
    'logit_cap': 5.0,
    'mlp': 'swiglu',
    'smear': 2,
}
MODERN = GPTConfig(
    **{
        **vars(SMALL),
        'bias': False,
        'position': 'rotary',
        'norm': 'rms',
        'qk_norm': True,
        'n_kv_head': 2,
        'mlp': 'swiglu',
    }
)
# GPT-2, each choice alone, squared ReLU, all of them together
ARCHITECTURES = [
    SMALL,
    *(GPTConfig(**{**vars(SMALL), key: value}) for key, value in CHOICES.items()),
    GPTConfig(**{**vars(SMALL), 'mlp': 'relu2'}),
    GPTConfig(**{**vars(SMALL), **CHOICES, 'bias': False}),
]
NAMES = ['gpt2', *CHOICES, 'relu2', 'all']


def make_model(config=SMALL, seed=0, scale=0.3):
    """A model with large enough weights that its logits differ clearly."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale * (parameter.dim() > 1 or 0.1))
    return model
