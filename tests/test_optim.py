"""AdamW, SGD, Muon and clipping, compared with hand-computed numbers and with torch."""

import math
from dataclasses import replace

import pytest
import torch

from model import GPT, GPTConfig
from nib import optim
from nib.errors import UserError

CONFIG = GPTConfig(vocab_size=7, block_size=4, n_layer=2, n_head=2, n_embd=8)
UNTIED = replace(CONFIG, tied_head=False)


def adamw_by_hand(p, gradients, lr, beta1, beta2, eps, weight_decay):
    """Loshchilov and Hutter 2019, algorithm 2, in Python's floats."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        p *= 1 - lr * weight_decay
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p -= lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps)
    return p


USABLE = torch.tensor(True)


def make(model, lr, *args, **options):
    optimizer = optim.Optimizer(model, *args, **options)
    optimizer.lr = lr
    return optimizer


class OneMatrix(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 1), value))


def test_one_step_of_adamw_gives_the_figure_worked_by_hand():
    model = OneMatrix(0.523)
    optimizer = make(model, 0.001, betas=(0.9, 0.95), weight_decay=0.1)
    model.weight.grad = torch.full((1, 1), -0.38)
    optimizer.step(USABLE)
    # 0.523 * (1 - 0.001 * 0.1) - 0.001 * -0.38 / 0.38 = 0.5229477 + 0.001
    assert model.weight.item() == pytest.approx(0.5239477, abs=5e-8)


def test_many_steps_of_adamw_follow_the_algorithm():
    gradients = [-0.38, 0.7, 0.0, 12.5, -0.001, 3.0]
    model = OneMatrix(0.523)
    optimizer = make(model, 0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for gradient in gradients:
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step(USABLE)
    assert model.weight.item() == pytest.approx(
        adamw_by_hand(0.523, gradients, 0.01, 0.9, 0.95, 1e-8, 0.1), rel=1e-5
    )


@pytest.mark.parametrize('method', ['adamw', 'sgd', 'muon'])
def test_weight_decay_falls_on_matrices_and_embeddings_only(method):
    model = GPT(CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    make(model, 0.5, method, weight_decay=0.1).step(USABLE)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), before[name] * (1 - 0.5 * 0.1 if p.dim() == 2 else 1), msg=name
        )


def test_clipping_keeps_the_direction():
    gradient = torch.tensor([0.23, -0.45, 0.67, 234.56, -1892.34, 45629.12])
    parameter = torch.nn.Parameter(torch.zeros(6))
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    assert norm.item() == pytest.approx(45668.945, abs=0.01)
    assert parameter.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(parameter.grad, gradient / 45668.945, rtol=1e-5, atol=1e-9)


def train_a_little(model, optimizers, steps, seed=0):
    """Steps on random tokens; every optimizer of the list steps on the same gradients."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(7, (2, 5), generator=draw)
        model(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step(USABLE) if isinstance(optimizer, optim.Optimizer) else optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize('momentum', [0.9, 0.0])
def test_sgd_follows_torchs_own(momentum):
    torch.manual_seed(0)
    ours, theirs = GPT(CONFIG), GPT(CONFIG)
    theirs.load_state_dict(ours.state_dict())
    own = make(ours, 0.3, 'sgd', momentum=momentum, weight_decay=0.1)
    decay = {True: 0.1, False: 0.0}  # of matrices and embeddings only
    groups = [
        {'params': [p for p in theirs.parameters() if (p.dim() == 2) == wide], 'weight_decay': w}
        for wide, w in decay.items()
    ]
    reference = torch.optim.SGD(groups, lr=0.3, momentum=momentum)
    for seed in range(5):
        train_a_little(ours, [own], 1, seed)
        train_a_little(theirs, [reference], 1, seed)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=name)


def test_muon_makes_a_matrix_orthogonal():
    """Singular values end near 1, even one a thousand times smaller; singular vectors stay."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 16, dtype=torch.float64)).Q for size in (16, 40))
    for spread in (1.0, 10.0, 1000.0):
        s = torch.logspace(0, -math.log10(spread), 16, dtype=torch.float64)
        matrix = (u @ s.diag() @ v.T)[None]
        x = optim.orthogonalize(matrix, 10, torch.float64)[0]
        for size in (1e-3, 1e3):  # which does not matter
            scaled = optim.orthogonalize(size * matrix, 10, torch.float64)[0]
            torch.testing.assert_close(scaled, x, atol=1e-9, rtol=0)
        values = (u.T @ x @ v).diag()
        assert values.min() > 0.6 and values.max() < 1.3
        torch.testing.assert_close(x, u @ values.diag() @ v.T, atol=1e-9, rtol=0)


def test_a_singular_value_follows_the_quintic():
    """Three iterations on 1 x 1 matrices: 1 -> 3.4445 - 4.7750 + 2.0315 = 0.701 -> ..."""
    s = 1.0
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    x = optim.orthogonalize(torch.tensor([[[-7.0]], [[0.02]]]), 3, torch.float32)
    assert x.flatten().tolist() == pytest.approx([-s, s], rel=1e-5)


@pytest.mark.skipif(
    not hasattr(torch.optim, 'Muon'), reason='this torch has no Muon to compare with'
)
@pytest.mark.parametrize('iterations', [5, 3])
def test_muon_follows_torchs_own(iterations):
    """torch processes one matrix at a time, in bfloat16.

    8 steps with decay and Nesterov's momentum; square, wide and tall matrices in one batch.
    """
    torch.manual_seed(0)
    ours, theirs = GPT(CONFIG), GPT(CONFIG)
    theirs.load_state_dict(ours.state_dict())
    own = make(
        ours,
        0.02,
        'muon',
        weight_decay=0.3,
        momentum=0.9,
        iterations=iterations,
        lr_ratio=2.0,
        dtype=torch.bfloat16,
    )
    matrices = [p for name, p in theirs.named_parameters() if p.dim() == 2 and '.h.' in name]
    assert len(matrices) == 8 and {tuple(p.shape) for p in matrices} == {
        (24, 8),
        (8, 8),
        (32, 8),
        (8, 32),
    }
    reference = torch.optim.Muon(
        matrices,
        lr=0.04,
        weight_decay=0.3,
        momentum=0.9,
        nesterov=True,
        ns_steps=iterations,
        adjust_lr_fn='match_rms_adamw',
    )
    gradients = torch.Generator().manual_seed(1)
    for _ in range(8):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn(p.shape, generator=gradients)
            q.grad = p.grad.clone()
        own.step(USABLE)
        reference.step()
    by_name = dict(ours.named_parameters())
    for name, q in theirs.named_parameters():
        if any(
            q is p for p in matrices
        ):  # 8 updates of 0.04 * 0.2 * sqrt(the longer side) in bfloat16
            torch.testing.assert_close(by_name[name], q, atol=3e-3, rtol=0, msg=name)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    """Each optimizer does its part as if it were alone."""
    torch.manual_seed(0)
    mixed, plain = GPT(UNTIED), GPT(UNTIED)
    plain.load_state_dict(mixed.state_dict())
    optimizers = make(mixed, 0.01, 'muon'), make(plain, 0.01)
    gradients = torch.Generator().manual_seed(1)
    for p, q in zip(mixed.parameters(), plain.parameters()):
        p.grad = torch.randn(p.shape, generator=gradients)
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step(USABLE)
    for (name, p), q in zip(mixed.named_parameters(), plain.parameters()):
        assert torch.equal(p, q) == (not ('.h.' in name and p.dim() == 2)), name


def test_muon_leaves_embeddings_inside_blocks_to_adamw():
    model = GPT(CONFIG)
    model.transformer.h[0].attn.value_table = torch.nn.Embedding(7, 8)
    state = optim.Optimizer(model, 'muon').named_state(model)
    assert 'transformer.h.0.attn.value_table.weight/exp_avg_sq' in state
    assert 'transformer.h.0.attn.c_attn.weight/momentum' in state


@pytest.mark.parametrize('method', ['adamw', 'sgd', 'muon'])
def test_the_optimizer_of_a_config_has_all_its_values(method):
    values = {'optimizer': method, 'beta1': 0.8, 'beta2': 0.7, 'weight_decay': 0.3}
    values |= {'muon_lr_ratio': 2.0, 'muon_momentum': 0.6, 'muon_iterations': 3}
    values |= {'sgd_momentum': 0.5, 'shard_optimizer': False}
    ours, theirs = GPT(CONFIG), GPT(CONFIG)
    theirs.load_state_dict(ours.state_dict())
    picked = optim.Optimizer.pick(values, ours, has_bfloat16=True)
    picked.lr = 0.01
    momentum = 0.5 if method == 'sgd' else 0.6
    options = {'lr_ratio': 2.0, 'iterations': 3, 'dtype': torch.bfloat16}
    direct = make(theirs, 0.01, method, (0.8, 0.7), 0.3, momentum=momentum, **options)
    for model, optimizer in ((ours, picked), (theirs, direct)):
        train_a_little(model, [optimizer], 2)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize('method', ['adamw', 'sgd', 'muon'])
def test_a_step_that_is_not_usable_changes_nothing(method):
    """Even if gradients are NaN; and the next steps are not affected either."""
    torch.manual_seed(0)
    model, untouched = GPT(CONFIG), GPT(CONFIG)
    untouched.load_state_dict(model.state_dict())
    optimizer, other = make(model, 0.01, method), make(untouched, 0.01, method)
    train_a_little(model, [optimizer], 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step(torch.tensor(False))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    train_a_little(untouched, [other], 2)
    for m, o in ((model, optimizer), (untouched, other)):
        train_a_little(m, [o], 2, seed=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name]), name


@pytest.mark.parametrize('method', ['adamw', 'sgd', 'muon'])
def test_state_by_name_survives_a_round_trip(method):
    torch.manual_seed(0)
    first, second = GPT(CONFIG), GPT(CONFIG)
    optimizer, restored = make(first, 0.01, method), make(second, 0.01, method)
    train_a_little(first, [optimizer], 2)
    second.load_state_dict(first.state_dict())
    state = {name: tensor.clone() for name, tensor in optimizer.named_state(first).items()}
    shapes = {name: tuple(p.shape) for name, p in first.named_parameters()}
    assert all(
        tensor.shape in ((), shapes[name.rpartition('/')[0]]) for name, tensor in state.items()
    )
    restored.load_named_state(second, state)
    for model, o in ((first, optimizer), (second, restored)):
        train_a_little(model, [o], 2, seed=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    for key in ('other', next(iter(state)).rpartition('/')[2]):  # an unknown one, another shape
        name, one = f'transformer.wte.weight/{key}', torch.ones(1)
        with pytest.raises(UserError, match=rf'optimizer state {name}, of shape \(1,\), which'):
            restored.load_named_state(second, {name: one})


@pytest.mark.parametrize('method', ['adamw', 'sgd', 'muon'])
def test_frozen_weights_stay_and_unused_ones_have_a_gradient_of_zero(method):
    torch.manual_seed(0)
    model, same = GPT(CONFIG), GPT(CONFIG)
    same.load_state_dict(model.state_dict())
    frozen, unused = model.transformer.wte.weight, model.transformer.h[0].mlp.c_fc.weight
    frozen.requires_grad_(False)
    optimizers = [make(one, 0.1, method, weight_decay=0.1) for one in (model, same)]
    for _ in range(2):
        for one in (model, same):
            torch.manual_seed(1)
            for p in one.parameters():
                p.grad = torch.randn_like(p)
        frozen.grad = unused.grad = None
        same.transformer.h[0].mlp.c_fc.weight.grad.zero_()
        for optimizer in optimizers:
            optimizer.step(USABLE)
    assert not any('wte' in name for name in optimizers[0].named_state(model))
    for name, p in model.named_parameters():
        other = same.get_parameter(name)
        assert torch.equal(p, other) != (p is frozen), name


def test_weights_that_are_unfrozen_at_a_resume_begin_at_their_own_first_step():
    """torch's AdamW counts the steps of each parameter, too: those in which it had a gradient."""
    torch.manual_seed(0)
    model, reference = GPT(CONFIG), GPT(CONFIG)
    reference.load_state_dict(model.state_dict())
    late = model.transformer.wte.weight.requires_grad_(False)
    options = {'betas': (0.9, 0.95), 'weight_decay': 0.0}
    torchs = torch.optim.AdamW(reference.parameters(), lr=0.01, **options)
    first = make(model, 0.01, **options)
    second = None
    for step in range(6):
        if step == 4:
            state = {name: tensor.clone() for name, tensor in first.named_state(model).items()}
            late.requires_grad_(True)
            second = make(model, 0.01, **options)
            second.load_named_state(model, state)
        for p, q in zip(model.parameters(), reference.parameters()):
            q.grad = torch.randn_like(q) if p.requires_grad else None
            p.grad = None if q.grad is None else q.grad.clone()
        (second or first).step(USABLE)
        torchs.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, reference.get_parameter(name), rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize('freeze', [True, False], ids=['frozen', 'unfrozen'])
def test_requires_grad_may_not_change_once_the_optimizer_exists(freeze):
    """It would go on moving a frozen weight by its momentum, and never move an unfrozen one."""
    model = GPT(CONFIG)
    weight = model.transformer.wte.weight
    weight.requires_grad_(freeze)
    optimizer = make(model, 0.1)
    optimizer.step(USABLE)
    weight.requires_grad_(not freeze)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match='requires_grad of a parameter has changed'):
        optimizer.step(USABLE)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize('make_copy', [float, torch.tensor])
def test_a_state_that_a_checkpoint_could_not_restore_is_rejected_before_training(
    monkeypatch, make_copy
):
    own = optim.AdamW.state

    def copied(self):
        return [(p, {**state, 'count': make_copy(3.0)}) for p, state in own(self)]

    monkeypatch.setattr(optim.AdamW, 'state', copied)
    with pytest.raises(UserError, match=r'AdamW.state\(\) in nib/optim.py returns count as a copy'):
        make(GPT(CONFIG), 0.1)


def test_a_count_that_a_checkpoint_does_not_contain_ends_the_first_step(monkeypatch):
    own = optim.AdamW.step

    def counting(self, lr, usable):
        self.count = getattr(self, 'count', 0) + 1
        own(self, lr, usable)

    monkeypatch.setattr(optim.AdamW, 'step', counting)
    optimizer = make(GPT(CONFIG), 0.1)
    with pytest.raises(UserError, match=r'AdamW.step\(\) in nib/optim.py changes count, with'):
        optimizer.step(USABLE)
