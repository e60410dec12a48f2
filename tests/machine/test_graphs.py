"""What of the CUDA graphs needs no GPU; tests/test_gpu.py has the rest."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import configurator
import train
from nib.machine import graphs
from nib.tokens.dataset import open_dataset

GB = 1e9


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({}, True),
        ({'batch_size': 9}, False),
        ({'device': 'cuda:1'}, True),
        ({'device': 'cpu'}, False),
        ({'device': 'mps'}, False),
        ({'world_size': 2}, False),
    ],
)
def test_small_passes_of_one_gpu_are_launch_bound(changes, expected):
    case = {'batch_size': 7, 'device': 'cuda', 'world_size': 1, **changes}
    t = SimpleNamespace(
        flops_per_token=1e9,
        batches=SimpleNamespace(batch_size=case['batch_size'], block_size=512),
        device=case['device'],
        ranks=SimpleNamespace(world_size=case['world_size']),
    )
    assert graphs.is_launch_bound(t) is expected


@pytest.mark.parametrize(
    'changes, captured', [({}, True), ({'cuda_graph': False}, False), ({'recompute': True}, False)]
)
@pytest.mark.parametrize('launch_bound', [True, False])
def test_a_run_captures_small_passes(monkeypatch, data_dir, changes, captured, launch_bound):
    """Those of the compiled model, if it is compiled."""
    monkeypatch.setattr(train, 'is_launch_bound', lambda t: launch_bound)
    monkeypatch.setattr(train, 'compile_model', lambda model, *args: ('compiled', model))
    monkeypatch.setattr(train, 'capture_model', lambda model, *args: ('captured', model))
    small = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2, device='cpu')
    config = configurator.read_block(train.__file__).defaults | small | {'dtype': 'float32'}
    for compiled in (True, False):
        t = train.Training.set_up(config | changes, open_dataset(data_dir / 'tiny', 8))
        t.compile_and_distribute(compiled, print)
        expected = ('compiled', t.raw_model) if compiled else t.raw_model
        assert t.model == (('captured', expected) if captured and launch_bound else expected)


@pytest.mark.parametrize(
    'error, free, reason',
    [
        (None, 60 * GB, ''),
        (None, 30 * GB, 'only 30.0 of 80.0 GB would be left'),
        (RuntimeError('called a synchronizing CUDA operation\nsecond line'), 60 * GB, 'called a'),
    ],
)
def test_a_model_that_cannot_be_captured_runs_as_usual(monkeypatch, error, free, reason):
    model, batch, said = torch.nn.Linear(2, 2), (torch.zeros(1), torch.zeros(1)), []

    class Graphed:
        def __init__(self, model, batch, context):
            model.weight.grad = torch.ones_like(model.weight)
            if error:
                raise error

    monkeypatch.setattr(graphs, 'GraphedModel', Graphed)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (free, 80 * GB))
    captured = graphs.capture_model(model, batch, contextlib.nullcontext(), said.append)
    assert len(said) == 1
    if not reason:
        assert isinstance(captured, Graphed) and 'captured as CUDA graphs in' in said[0]
        return
    assert captured is model and model.weight.grad is None
    assert said[0].startswith('no CUDA graph, continuing without it') and reason in said[0]
    assert 'second line' not in said[0]


def test_a_change_of_a_number_or_flag_is_seen_in_the_plain_values_of_a_model():
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(2, 2))
    before = graphs.plain_values(model)
    model[1].weight.data += 1.0  # a graph reads the weights in every pass
    assert graphs.plain_values(model) == before
    for change in (
        lambda: setattr(model[0], 'p', 0.2),
        lambda: setattr(model[1], 'scale', 3),
        model[1].eval,
    ):
        change()
        assert graphs.plain_values(model) != before
        before = graphs.plain_values(model)
