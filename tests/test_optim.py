"""AdamW and clipping against figures worked by hand."""
import math

import pytest
import torch

from model import GPT, GPTConfig
from nib import optim


def adamw_by_hand(p, gradients, lr, beta1, beta2, eps, weight_decay):
    """Loshchilov and Hutter 2019, algorithm 2, in Python's floats."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        p *= 1 - lr * weight_decay
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p -= lr * (m / (1 - beta1 ** t)) / (math.sqrt(v / (1 - beta2 ** t)) + eps)
    return p


class OneMatrix(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 1), value))


def test_one_step_of_adamw_gives_the_figure_worked_by_hand():
    model = OneMatrix(0.523)
    optimizer = optim.adamw(model, 0.001, (0.9, 0.95), 0.1)
    model.weight.grad = torch.full((1, 1), -0.38)
    optimizer.step()
    # 0.523 * (1 - 0.001 * 0.1) - 0.001 * -0.38 / 0.38 = 0.5229477 + 0.001
    assert model.weight.item() == pytest.approx(0.5239477, abs=5e-8)


def test_many_steps_of_adamw_follow_the_algorithm():
    gradients = [-0.38, 0.7, 0.0, 12.5, -0.001, 3.0]
    model = OneMatrix(0.523)
    optimizer = optim.adamw(model, 0.01, (0.9, 0.95), 0.1)
    for gradient in gradients:
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    assert model.weight.item() == pytest.approx(adamw_by_hand(0.523, gradients, 0.01, 0.9, 0.95, 1e-8, 0.1), rel=1e-5)


def test_weight_decay_falls_on_matrices_and_embeddings_only():
    model = GPT(GPTConfig(vocab_size=7, block_size=4, n_layer=2, n_head=2, n_embd=8))
    decayed, spared = optim.parameter_groups(model, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed['weight_decay'], spared['weight_decay']) == (0.1, 0.0)
    assert {names[p] for p in spared['params']} == {n for n in names.values() if 'ln_' in n or n.endswith('bias')}
    assert len(decayed['params']) + len(spared['params']) == len(names)


def test_clipping_keeps_the_direction():
    gradient = torch.tensor([0.23, -0.45, 0.67, 234.56, -1892.34, 45629.12])
    parameter = torch.nn.Parameter(torch.zeros(6))
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    assert norm.item() == pytest.approx(45668.945, abs=0.01)
    assert parameter.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(parameter.grad, gradient / 45668.945, rtol=1e-5, atol=1e-9)


def test_state_by_name_survives_a_round_trip():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=2, n_embd=8)
    ids = torch.randint(7, (2, 5))

    def step(model, optimizer):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = GPT(config)
    optimizer = optim.adamw(first, 0.01, (0.9, 0.95), 0.1)
    step(first, optimizer)
    second = GPT(config)
    second.load_state_dict(first.state_dict())
    restored = optim.adamw(second, 0.01, (0.9, 0.95), 0.1)
    optim.load_named_state(restored, second, {k: v.clone() for k, v in optim.named_state(optimizer, first).items()})
    step(first, optimizer)
    step(second, restored)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
