"""The shares of a sharded optimizer, against sums by hand and the optimizer that is not sharded."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_resume import STEPS, digests, run_on_ranks

from model import GPT, GPTConfig
from nib.errors import UserError
from nib.machine.memory import fills_memory
from nib.machine.memory_plan import optimizer_bytes, parameter_shapes
from nib.machine.ranks import Ranks
from nib.machine.shares import Shares, assign
from nib.optim import Optimizer

CONFIG = GPTConfig(vocab_size=60, block_size=8, n_layer=3, n_head=2, n_embd=16, mlp_width=40)
METHODS = ['adamw', 'sgd', 'muon']


def sharded(model, method, n):
    return [Optimizer(model, method, ranks=Ranks(rank=r, world_size=n)) for r in range(n)]


def test_the_largest_tensor_is_assigned_first():
    assert assign([1, 1, 2], 2) == [1, 1, 0]


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_shares_are_as_equal_as_whole_tensors_allow(sizes, n):
    owners = assign(sizes, n)
    assert len(owners) == len(sizes)
    loads = [sum(size for size, owner in zip(sizes, owners) if owner == r) for r in range(n)]
    assert sum(loads) == sum(sizes)
    # The last tensor of the fullest rank went to the one with the least, which is at most the mean.
    assert max(loads) <= sum(sizes) / n + max(sizes, default=0)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('n', [1, 2, 3, 50])
def test_each_state_is_on_one_rank_and_takes_the_planned_memory(method, n):
    model = GPT(CONFIG)
    states = [optimizer.named_state(model) for optimizer in sharded(model, method, n)]
    names = [name for state in states for name in state]
    assert sorted(names) == sorted(Optimizer(model, method).named_state(model))
    values = {'optimizer': method, 'ranks': n, 'shard_optimizer': True}
    planned, _ = optimizer_bytes(parameter_shapes(CONFIG), values)
    taken = [sum(4 * t.numel() for t in state.values() if t.dim()) for state in states]
    assert planned == max(taken)
    whole = sum(taken)
    unsharded, _ = optimizer_bytes(parameter_shapes(CONFIG), values | {'shard_optimizer': False})
    assert unsharded == whole


@pytest.mark.parametrize('method', METHODS)
def test_the_shares_of_a_step_are_together_that_of_one_process(method):
    torch.manual_seed(0)
    model, x = GPT(CONFIG), torch.randint(60, (2, 8))
    loss = model(x, x)
    loss.backward()
    alone = GPT(CONFIG)
    alone.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        q.grad = p.grad.clone()
    optimizers = sharded(model, method, 3)
    for optimizer in (*optimizers, expected := Optimizer(alone, method)):
        optimizer.lr = 0.1
        optimizer.update(torch.tensor(True))
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q), name
    optimizers[0].zero_grad()
    assert all(p.grad is None for p in model.parameters())  # also those of the other ranks

    # Each rank takes its share out of a checkpoint, which contains the state of all.
    saved = expected.named_state(alone)
    for optimizer in sharded(model, method, 3):
        optimizer.load_named_state(model, saved)
        for name, tensor in optimizer.named_state(model).items():
            assert torch.equal(tensor, saved[name]), name
        with pytest.raises(UserError):
            optimizer.load_named_state(model, {'transformer.none/momentum': torch.ones(())})


def test_frozen_weights_are_in_no_share():
    model = GPT(CONFIG)
    model.transformer.wte.weight.requires_grad_(False)
    optimizers = sharded(model, 'adamw', 2)
    assert not any('wte' in name for o in optimizers for name in o.named_state(model))
    assert not any(o.shares.has(model.transformer.wte.weight) for o in optimizers)
    assert [p.shape for p in optimizers[0].params] == [
        p.shape for name, p in model.named_parameters() if 'wte' not in name
    ]


def test_the_trial_step_of_batch_size_auto_waits_for_no_other_rank():
    """If the memory of one rank is full, it does not get that far."""
    model = GPT(CONFIG)
    model.register_buffer('passes', torch.zeros(()))  # which a changed model.py may have
    model.register_forward_pre_hook(lambda *_: model.passes.add_(1) and None)
    t = SimpleNamespace(
        model=model,
        precision=torch.autocast('cpu', enabled=False),
        scaler=torch.amp.GradScaler('cpu', enabled=False),
        optimizer=Optimizer(model, ranks=Ranks(rank=0, world_size=2)),
        batches=SimpleNamespace(block_size=8),
        device='cpu',
    )
    assert not fills_memory(t, 1)
    assert model.passes == 0


def test_one_process_needs_no_communication():
    model = GPT(CONFIG)
    shares = Shares(list(model.parameters()))
    assert all(shares.has(p) for p in model.parameters())
    shares.exchange()
    state = {'a': torch.ones(2)}
    assert shares.collect(state) == state


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', METHODS)
def test_a_sharded_run_cut_and_resumed_equals_one_that_is_not_sharded(
    data_dir, tmp_path, optimizer
):
    """The checkpoints, too, are the same files: each run can continue the other."""
    flags = ['--gradient_accumulation_steps=4', f'--optimizer={optimizer}']
    run_on_ranks(2, data_dir, tmp_path, {'whole': []}, *flags)
    run_on_ranks(2, data_dir, tmp_path, {'cut': [10, 17]}, *flags, '--shard_optimizer')
    state = json.loads((tmp_path / f'cut/step-{STEPS:08d}/state.json').read_text())
    assert state['config']['shard_optimizer'] is True
    assert digests(tmp_path / 'cut') == digests(tmp_path / 'whole')


@pytest.mark.slow
def test_a_sharded_run_on_three_ranks_equals_one_that_is_not_sharded(data_dir, tmp_path):
    """Here rank 0 collects the states of two others."""
    flags = ['--gradient_accumulation_steps=3', '--optimizer=muon']
    run_on_ranks(3, data_dir, tmp_path, {'whole': []}, *flags)
    run_on_ranks(3, data_dir, tmp_path, {'cut': [10]}, *flags, '--shard_optimizer')
    assert digests(tmp_path / 'cut') == digests(tmp_path / 'whole')
