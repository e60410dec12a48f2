"""What one batch does in a model, against a forward pass by hand."""

import copy
import itertools
import math

import pytest
import torch
from microscope import ARCHITECTURES
from torch.nn import functional as F

import model as model_file
from model import GPT, CausalSelfAttention, GPTConfig
from nib.doctor import health, inspection
from nib.machine.device import autocast


@pytest.mark.parametrize('name', ARCHITECTURES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_weights_times_values_are_what_attention_computes(name, dtype):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=31, block_size=12, n_layer=2, n_head=4, n_embd=32, **ARCHITECTURES[name]
        )
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention that has something to tell apart
    seen = []
    outputs = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(
            lambda module, args, output: outputs.append((module, output))
        )
    with torch.no_grad(), autocast(dtype, 'cpu'):
        with inspection.watch_attention(model, lambda *qkv: seen.append(qkv)):
            model(torch.randint(31, (3, 10)))
        model(torch.randint(31, (3, 10)))  # not watched
        assert len(seen) == 2
        for (q, k, v), (attention, output) in zip(seen, outputs):
            values = model_file.share_heads(v, q.shape[1])
            weights_ = inspection.attention_scores(q, k).softmax(dim=-1)
            again = attention.c_proj(
                (weights_.to(values.dtype) @ values).transpose(1, 2).reshape(output.shape)
            )
            assert weights_.shape == (3, 4, 10, 10) and weights_.dtype == torch.float32
            assert float(weights_.triu(1).abs().max()) == 0.0
            assert (again - output).abs().max() < (
                1e-5 if dtype == 'float32' else 0.05
            ) * output.abs().max()
    assert weights_.max() > 0.5  # it was no even spread that agreed


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_layers_have_the_figures_of_a_forward_pass_made_by_hand(name):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=31,
        block_size=12,
        n_layer=2,
        n_head=4,
        n_embd=32,
        dropout=0.5,
        **ARCHITECTURES[name],
    )
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, y = torch.randint(31, (2, 3, 10))
    loss, rows = inspection.measure_layers(model, x, y, autocast('float32', 'cpu'), 2)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert loss == pytest.approx(
            float(F.cross_entropy(model(x).flatten(0, 1), y.flatten())), rel=1e-6
        )
        h = model.transformer.wte(x)
        h = h + model.transformer.wpe.weight[:10] if config.position == 'learned' else h
        rotary = model.rotary(torch.arange(10)) if config.position == 'rotary' else None
        assert (rows[0].mean, rows[0].std) == pytest.approx(
            (float(h.mean()), float(h.std(correction=0))), rel=1e-4
        )
        for row, block in zip(rows[1:-1], model.transformer.h):
            attended = block.attn(block.ln_1(h), rotary)
            assert row.entropy == pytest.approx(
                entropy_by_hand(block.attn, block.ln_1(h[:2]), rotary, config), rel=1e-4
            )
            h = h + attended
            added = block.mlp(block.ln_2(h))
            hidden = block.mlp.c_fc(block.ln_2(h)).flatten(0, 1)[:, : config.mlp_units]
            limit = {'gelu': -3.0, 'swiglu': -6.0, 'relu2': 0.0}[config.mlp]
            assert (
                row.dead
                == sum(bool((unit <= limit).all()) for unit in hidden.t()) / config.mlp_units
            )
            h = h + added
            wanted = [
                float(figure)
                for figure in (h.mean(), *(t.std(correction=0) for t in (h, attended, added)))
            ]
            assert [row.mean, row.std, row.attention_std, row.mlp_std] == pytest.approx(
                wanted, rel=1e-4
            )
        assert rows[-1].std == pytest.approx(
            float(model.transformer.ln_f(h).std(correction=0)), rel=1e-4
        )


def test_a_block_at_several_places_has_the_figures_of_each():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, block_size=12, n_layer=3, n_head=2, n_embd=16)).eval()
    first, second, _ = model.transformer.h
    model.transformer['h'] = torch.nn.ModuleList([first, second, first])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    copied = copy.deepcopy(model)
    copied.transformer['h'] = torch.nn.ModuleList(map(copy.deepcopy, model.transformer.h))
    x = torch.randint(31, (2, 10))
    expected, actual = (
        inspection.measure_layers(one, x, x, autocast('float32', 'cpu'), 2)
        for one in (copied, model)
    )
    assert actual == expected
    names, stds = zip(*((row.name, row.std) for row in actual[1]))
    assert names == ('embedding', 'h.0', 'h.1', 'h.2', 'ln_f') and len(set(stds)) == 5


class SetByInstance(CausalSelfAttention):
    def __init__(self, config):
        super().__init__(config)
        self.attend = model_file.attend


class SetToModule(CausalSelfAttention):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return model_file.attend(q, k, v)

    def __init__(self, config):
        super().__init__(config)
        self.attend = self.Attend()


class AnotherArgument(CausalSelfAttention):
    def forward(self, x, rotary=None):
        y = self.attend(*self.query_key_value(x, rotary), scale=2.0)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def attend(self, q, k, v, scale):
        return scale * model_file.attend(q, k, v)


@pytest.mark.parametrize('layer', [SetByInstance, SetToModule, AnotherArgument])
def test_another_way_to_attend_is_watched_and_stays(layer):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=31, block_size=12, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config).eval()
    for block in model.transformer.h:
        block.attn = layer(config)
    attend = model.transformer.h[0].attn.attend
    x = torch.randint(31, (2, 10))
    loss = float(model(x, x).detach())
    for _ in range(2):
        measured, rows = inspection.measure_layers(model, x, x, autocast('float32', 'cpu'), 2)
        assert measured == loss == float(model(x, x).detach())
        assert [row.entropy is None for row in rows] == [True, False, False, True]
    assert model.transformer.h[0].attn.attend == attend


class NoAttend(CausalSelfAttention):
    attend = property()  # raises AttributeError, as if model.py did not define it

    def forward(self, x, rotary=None):
        y = model_file.attend(*self.query_key_value(x, rotary))
        return self.c_proj(y.transpose(1, 2).flatten(2))


class LastToken(torch.nn.Module):
    """In place of attention: a position reads the one before it."""

    def forward(self, x, rotary=None):
        return x.roll(1, dims=1)


@pytest.mark.parametrize('layer', [lambda config: LastToken(), NoAttend])
def test_a_layer_in_place_of_attention_has_no_entropy(layer):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=31, block_size=12, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config).eval()
    model.transformer.h[0].attn = layer(config)
    x = torch.randint(31, (2, 10))
    _, rows = inspection.measure_layers(model, x, x, autocast('float32', 'cpu'), 2)
    assert rows[1].attention_std > 0.0
    assert [row.entropy is None for row in rows[1:3]] == [True, False]
    assert [row.attention_logit is None for row in rows[1:3]] == [True, False]


def entropy_by_hand(attention, x, rotary, config) -> float:
    """Head by head and position by position, in Python's floats."""
    D = config.head_width
    q, k, _ = attention.c_attn(x).split(
        [config.n_head * D, config.kv_heads * D, config.kv_heads * D], dim=2
    )
    total = []
    for b, head in itertools.product(range(len(x)), range(config.n_head)):
        shared = head // (config.n_head // config.kv_heads)
        query, key = (
            attention.q_norm(q[b, :, head * D :][:, :D]),
            attention.k_norm(k[b, :, shared * D :][:, :D]),
        )
        if rotary is not None:  # two dimensions are one complex number, turned by its angle
            cos, sin = (part[0].chunk(2, dim=-1)[1] for part in rotary)  # (T, D / 2)
            turn = torch.complex(cos.contiguous(), sin.contiguous())
            query, key = (torch.complex(*part.chunk(2, dim=1)) * turn for part in (query, key))
            query, key = (torch.cat((part.real, part.imag), dim=1) for part in (query, key))
        for t in range(x.shape[1]):
            scores = [math.exp(float(query[t] @ key[s]) / math.sqrt(D)) for s in range(t + 1)]
            total.append(-sum(p * math.log(p) for p in (score / sum(scores) for score in scores)))
    return sum(total) / len(total)


def test_an_activation_that_the_inspection_does_not_know_is_measured_by_its_output(monkeypatch):
    monkeypatch.setitem(model_file.ACTIVATIONS, 'gelu', torch.nn.ReLU)
    model = GPT(GPTConfig(vocab_size=31, block_size=12, n_layer=1, n_head=4, n_embd=32))
    mlp, x = model.transformer.h[0].mlp, torch.randint(31, (2, 10))
    mlp.kind = 'relu'
    with torch.no_grad():
        mlp.c_fc.bias[:32] = -100.0  # a quarter of the units never opens
    _, rows = inspection.measure_layers(model, x, x, autocast('float32', 'cpu'), 2)
    assert rows[1].dead == pytest.approx(0.25, abs=0.02)


class TwoMlps(torch.nn.Module):
    """Applies one MLP to a few tokens or none, and another one to the rest."""

    def __init__(self, config, sizes):
        super().__init__()
        self.sizes = sizes  # tokens of each MLP; the MLP with the first 8 units closed comes last
        self.mlps = torch.nn.ModuleList(model_file.MLP(config) for _ in sizes)
        torch.nn.init.constant_(self.mlps[-1].c_fc.bias[:8], -100.0)

    def forward(self, x):
        parts = x.flatten(0, 1).split(self.sizes)
        return torch.cat([mlp(part) for mlp, part in zip(self.mlps, parts)]).view_as(x)


@pytest.mark.parametrize('kind', ['relu', 'swiglu', 'relu2'])
@pytest.mark.parametrize('sizes, dead', [([127, 1], 0.0), ([1, 127], 0.5), ([0, 128], 0.5)])
def test_the_mlp_with_the_most_tokens_tells_how_many_units_are_dead(kind, sizes, dead):
    """One token leaves half of the units closed, which is not a fault."""
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=31, block_size=32, n_layer=1, n_head=2, n_embd=16, mlp=kind, mlp_width=16
    )
    model = GPT(config)
    model.transformer.h[0].mlp = TwoMlps(config, sizes)
    x = torch.randint(31, (4, 32))
    _, rows = inspection.measure_layers(model, x, x, autocast('float32', 'cpu'), 4)
    assert rows[1].dead == pytest.approx(dead, abs=0.07)


def test_entropies_against_sums_by_hand():
    for n in (1, 2, 7, 64):
        even = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
        assert health.largest_entropy(n) == pytest.approx(
            sum(math.log(t) for t in range(1, n + 1)) / n
        )
        assert float(inspection.entropy(even).mean()) == pytest.approx(
            health.largest_entropy(n), abs=1e-6
        )
    assert float(inspection.entropy(torch.tensor([0.0, 1.0, 0.0]))) == 0.0
    assert inspection.unigram_entropy(torch.tensor([[3, 3], [5, 7]])) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(4)
    )


def test_targets_that_the_loss_ignores_are_neither_wrong_nor_counted():
    x, y = torch.tensor([[3, 5, 7, 2]]), torch.tensor([[5, -1, -1, 4]])
    assert float(inspection.shifted_share(x, y)) == 1.0
    y[0, 0] = 3
    assert float(inspection.shifted_share(x, y)) == pytest.approx(2 / 3)
    assert inspection.unigram_entropy(torch.tensor([[3, -1], [5, -1]])) == math.log(2)


def test_frozen_parameters_are_not_measured():
    model = GPT(GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=1, n_embd=8))
    model.transformer.wte.weight.requires_grad_(False)
    measured = [row.name for row in inspection.measure_parameters(model)]
    assert measured == [name for name, p in model.named_parameters() if p.requires_grad]


def test_closed_units_let_hardly_any_gradient_through():
    for kind, function, slope in (
        ('gelu', lambda x: F.gelu(x, approximate='tanh'), 0.012),
        ('swiglu', F.silu, 0.0125),
        ('relu2', lambda x: F.relu(x).square(), 0.0),
    ):
        x = torch.linspace(
            inspection.CLOSED_BELOW[kind] - 20,
            inspection.CLOSED_BELOW[kind],
            1000,
            requires_grad=True,
        )
        function(x).sum().backward()
        assert x.grad.abs().max() <= slope
    hidden = torch.tensor([[[-1.0, -7.0, 0.0, 3.0], [-9.0, -8.0, -2.0, -8.0]]])  # (1, 2, 4)
    assert inspection.dead_share('relu2', hidden) == 0.75
    assert inspection.dead_share('gelu', hidden) == 0.25
    assert inspection.dead_share('swiglu', hidden) == 0.5  # of the two gates
