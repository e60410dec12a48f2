"""CUDA graphs, as far as they can be tested without a GPU; tests/test_gpu.py tests the rest."""

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configurator
import train as training
from model import Block
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
        ({'recompute': True}, False),
    ],
)
def test_small_passes_of_one_gpu_are_captured(changes, expected):
    case = {'batch_size': 7, 'device': 'cuda', 'world_size': 1, 'recompute': False, **changes}
    t = SimpleNamespace(
        raw_model=SimpleNamespace(config=SimpleNamespace(recompute=case['recompute'])),
        flops_per_token=1e9,
        batches=SimpleNamespace(batch_size=case['batch_size'], block_size=512),
        device=case['device'],
        ranks=SimpleNamespace(world_size=case['world_size']),
    )
    assert graphs.has_small_passes(t) is expected


@pytest.mark.parametrize('wanted', [True, False])
@pytest.mark.parametrize('small', [True, False])
def test_a_run_captures_small_passes(monkeypatch, data_dir, wanted, small):
    """Those of the compiled model, if it is compiled."""
    monkeypatch.setattr(training, 'has_small_passes', lambda t: small)
    monkeypatch.setattr(training, 'compile_model', lambda model, *args: ('compiled', model))
    monkeypatch.setattr(training, 'capture_model', lambda model, *args: ('captured', model))
    shape = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2)
    config = configurator.read_block(training.__file__).defaults | shape
    config |= {'device': 'cpu', 'dtype': 'float32', 'cuda_graph': wanted}
    for compiled in (True, False):
        t = training.Training.set_up(config, open_dataset(data_dir / 'tiny', 8))
        t.compile_and_distribute(compiled, print)
        expected = ('compiled', t.raw_model) if compiled else t.raw_model
        assert t.model == (('captured', expected) if wanted and small else expected)


@pytest.mark.parametrize(
    'error, free, reason',
    [
        (None, 60 * GB, ''),
        (None, 30 * GB, 'only 30.0 of 80.0 GB would remain free'),
        (RuntimeError('called a synchronizing CUDA operation\nsecond line'), 60 * GB, 'called a'),
        (AttributeError("'tuple' object has no attribute 'backward'"), 60 * GB, "'tuple' object"),
        (AssertionError(), 60 * GB, 'AssertionError'),
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
    assert said[0].startswith('continuing without CUDA graphs') and reason in said[0]
    assert 'second line' not in said[0]


def test_what_a_graph_cannot_follow_changes_the_fingerprint_of_a_model():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.1))
    before = graphs.fingerprint(model)
    model[0].weight.data += 1.0  # a graph reads the weights in every pass
    assert graphs.fingerprint(model) == before
    for change in (
        lambda: setattr(model[1], 'p', 0.2),
        lambda: setattr(model[1], 'scale', 3),
        model[1].eval,
        lambda: model[1].register_forward_hook(print),
        lambda: setattr(model[0], 'weight', torch.nn.Parameter(torch.ones(2))),
        lambda: setattr(model[0], 'running_mean', model[0].running_mean + 1.0),
        lambda: model[0].bias.requires_grad_(False),
        lambda: model.append(torch.nn.ReLU()),
    ):
        change()
        assert graphs.fingerprint(model) != before
        before = graphs.fingerprint(model)


# -- passes on a CPU, with operations instead of kernels -------------------------------------------


class Graph:
    """Stands for a CUDA graph: repeats operations on the tensors that they were recorded with."""

    def __init__(self):
        self.calls = []

    def pool(self):
        return None

    @torch.no_grad()
    @torch.autocast('cpu', enabled=False)  # the recorded operations have been cast
    def replay(self):
        for function, args, kwargs, results in self.calls:
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class Record(TorchDispatchMode):
    """Stands for torch.cuda.graph."""

    def __init__(self, graph, pool):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_dropout = any(name in str(function) for name in ('dropout', 'bernoulli', 'random_'))
        with torch.random.fork_rng(enabled=is_dropout):  # a GPU has a generator of its own
            results = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results


@pytest.fixture
def make_training(monkeypatch, data_dir):
    """Returns a function that sets up a small model, captured or not, and what it said."""
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'graph', Record)
    monkeypatch.setattr(graphs, 'warm_up', lambda function, device: (function(), function()))
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (80 * GB, 80 * GB))
    data = open_dataset(data_dir / 'tiny', 16)

    def make(capture=True, **changes):
        config = configurator.read_block(training.__file__).defaults | {
            'device': 'cpu',
            'dtype': 'float32',
            'n_layer': 2,
            'n_head': 2,
            'n_embd': 16,
            'block_size': 16,
            'batch_size': 4,
            'gradient_accumulation_steps': 3,
            'dropout': 0.2,
            **changes,
        }
        t, said = training.Training.set_up(config, data), []
        t.optimizer.lr = 1e-2
        if capture:
            batch = t.batches.batch(0, 0)
            t.model = graphs.capture_model(t.model, batch, t.precision, said.append)
        return t, said

    return make


def train_steps(t, n=2):
    """The losses and gradient norms of n steps, and all weights and buffers after them."""
    steps = [training.train_step(t, t.batches.micro_batches(step), step) for step in range(n)]
    return [*sum(steps, ()), *(tensor.clone() for tensor in t.raw_model.state_dict().values())]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_steps_with_graphs_equal_those_without(make_training, dtype):
    """With dropout and accumulated gradients; also after gradients were removed or replaced."""
    graphed, _ = make_training(dtype=dtype)
    plain, _ = make_training(capture=False, dtype=dtype)
    assert isinstance(graphed.model, graphs.GraphedModel) and plain.model is plain.raw_model
    for clear in (lambda model: None, lambda model: model.zero_grad(set_to_none=True)):
        clear(graphed.raw_model)
        for ours, expected in zip(train_steps(graphed), train_steps(plain), strict=True):
            assert torch.equal(ours, expected)
    for t in (graphed, plain):  # a micro step with the graph, one without, and one with it
        for i, batch in enumerate(t.batches.micro_batches(9)):
            training.seed_everything(i)
            with t.precision:
                loss = (t.raw_model if i == 1 else t.model)(*batch)
            loss.backward()
            for p in t.raw_model.parameters():
                p.grad = p.grad.clone()
    for ours, expected in zip(graphed.raw_model.parameters(), plain.raw_model.parameters()):
        assert torch.equal(ours.grad, expected.grad)


def test_a_frozen_parameter_and_a_buffer_are_as_without_graphs(make_training, monkeypatch):
    forward = Block.forward

    def counted(self, x, rotary=None):
        self.passes.add_(1)
        return forward(self, x, rotary)

    results = []
    for capture in (True, False):
        monkeypatch.setattr(Block, 'forward', forward)
        t, _ = make_training(capture=False)
        t.raw_model.transformer.wpe.weight.requires_grad_(False)
        for block in t.raw_model.transformer.h:
            block.register_buffer('passes', torch.zeros(()))
        t.optimizer = training.Optimizer(t.raw_model)
        t.optimizer.lr = 1e-2
        monkeypatch.setattr(Block, 'forward', counted)
        if capture:
            t.model = graphs.GraphedModel(t.model, t.batches.batch(0, 0), t.precision)
        results.append(train_steps(t))
        assert t.raw_model.transformer.h[0].passes == 2 * 3
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def count_passes(block):
    block.n_passes = getattr(block, 'n_passes', 0) + 1


def replace_buffer(block):
    block.register_buffer('ema', getattr(block, 'ema', torch.zeros(())) * 0.9)


@pytest.mark.parametrize(
    'change', [count_passes, replace_buffer, lambda _: random.random(), lambda _: torch.rand(())]
)
def test_a_pass_whose_python_code_matters_is_not_captured(make_training, monkeypatch, change):
    forward = Block.forward
    monkeypatch.setattr(
        Block, 'forward', lambda self, x, rotary=None: (change(self), forward(self, x, rotary))[1]
    )
    t, said = make_training(dropout=0.0)
    assert t.model is t.raw_model and 'a graph would not repeat' in said[0]
    assert all(p.grad is None for p in t.raw_model.parameters())


def test_a_smaller_batch_runs_without_the_graph_and_a_loss_stays(make_training):
    t, _ = make_training(dropout=0.0)
    x, y = t.batches.batch(0, 0)
    first, expected = t.model(x, y), t.raw_model(x, y).item()
    assert t.model(x[:3], y[:3]).item() == t.raw_model(x[:3], y[:3]).item() != expected
    t.model(*t.batches.batch(0, 1))
    assert first.item() == expected


def test_a_model_that_has_changed_runs_without_its_graph(make_training):
    t, _ = make_training()
    seen = []
    t.model(*t.batches.batch(0, 0))
    hook = t.raw_model.transformer.h[0].register_forward_hook(lambda *args: seen.append(args))
    t.model(*t.batches.batch(0, 0))
    assert len(seen) == 1
    hook.remove()
    t.model(*t.batches.batch(0, 0))
    assert len(seen) == 1
