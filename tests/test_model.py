"""The model against transformers' GPT-2 and Qwen3, and against arithmetic by hand."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import run_script
from small_models import ARCHITECTURES, MODERN, NAMES, SMALL, make_model
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from model import GPT, GPTConfig, attend, attend_by_definition
from nib.kernels import attention, cross_entropy, elementwise
from nib.kernels.attention import attend_in_blocks


@pytest.mark.parametrize('bias', [True, False])
def test_logits_equal_transformers_gpt2(bias):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = make_model(GPTConfig(**{**vars(SMALL), 'bias': bias}))
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=3, n_head=4)
    ).eval()
    weights = model.state_dict()
    copied = {}
    for name, parameter in theirs.transformer.state_dict().items():
        ours = weights.get('transformer.' + name)
        if ours is None:
            assert not bias and name.endswith('.bias'), f'{name} has no counterpart'
            ours = torch.zeros_like(parameter)  # no bias is a bias of zero
        transposed = any(
            part in name for part in ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
        )  # their Conv1D
        copied[name] = ours.t() if transposed else ours
    theirs.transformer.load_state_dict(copied)
    assert len(weights) == len([name for name in copied if bias or not name.endswith('.bias')])
    ids = torch.randint(61, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize('tied, n_kv_head', [(True, 2), (False, 0)])
def test_logits_equal_transformers_qwen3(tied, n_kv_head):
    """All modern choices together are what transformers calls Qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = make_model(
        GPTConfig(
            **{**vars(MODERN), 'tied_head': tied, 'n_kv_head': n_kv_head, 'rotary_base': 500.0}
        )
    )
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=model.config.mlp_units,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=n_kv_head or 4,
            head_dim=8,
            max_position_embeddings=16,
            rms_norm_eps=1e-6,
            attention_bias=False,
            rope_parameters={'rope_type': 'default', 'rope_theta': 500.0},
            tie_word_embeddings=tied,
        )
    ).eval()
    weights, copied = model.state_dict(), {}
    same = {
        'ln_1.weight': 'input_layernorm',
        'ln_2.weight': 'post_attention_layernorm',
        'attn.q_norm.weight': 'self_attn.q_norm',
        'attn.k_norm.weight': 'self_attn.k_norm',
        'attn.c_proj.weight': 'self_attn.o_proj',
        'mlp.c_proj.weight': 'mlp.down_proj',
    }
    for i in range(3):
        ours, layer = f'transformer.h.{i}.', f'model.layers.{i}.'
        for name, counterpart in same.items():
            copied[f'{layer}{counterpart}.weight'] = weights[ours + name]
        q, k, v = weights[ours + 'attn.c_attn.weight'].split(
            [32, 8 * (n_kv_head or 4), 8 * (n_kv_head or 4)]
        )
        gate, up = weights[ours + 'mlp.c_fc.weight'].chunk(2)
        for name, part in {
            'self_attn.q_proj': q,
            'self_attn.k_proj': k,
            'self_attn.v_proj': v,
            'mlp.gate_proj': gate,
            'mlp.up_proj': up,
        }.items():
            copied[f'{layer}{name}.weight'] = part
    copied['model.embed_tokens.weight'] = weights['transformer.wte.weight']
    copied['model.norm.weight'] = weights['transformer.ln_f.weight']
    copied['lm_head.weight'] = weights['transformer.wte.weight' if tied else 'lm_head.weight']
    theirs.load_state_dict(copied)
    assert sum(p.numel() for p in theirs.parameters()) == model.num_params()
    ids = torch.randint(61, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize('config', ARCHITECTURES, ids=NAMES)
def test_a_later_token_has_no_influence_on_an_earlier_logit(config):
    model = make_model(config)
    embedded = []
    model.transformer.wte.register_forward_hook(
        lambda module, args, out: embedded.append(out) or out.retain_grad()
    )
    model(torch.randint(61, (1, 16)))[0, 5].sum().backward()
    influence = embedded[0].grad[0].abs().sum(dim=-1)
    assert (influence[:6] > 0).all()
    assert (influence[6:] == 0).all()


@pytest.mark.parametrize('config', ARCHITECTURES, ids=NAMES)
def test_a_fresh_model_knows_nothing(config):
    for vocab_size in (65, 5000):
        torch.manual_seed(1)
        model = GPT(
            GPTConfig(
                **{
                    **vars(config),
                    'vocab_size': vocab_size,
                    'block_size': 32,
                    'n_layer': 4,
                    'n_embd': 128,
                }
            )
        )
        ids = torch.randint(vocab_size, (8, 33))
        loss = model(ids[:, :-1], ids[:, 1:]).item()
        assert abs(loss / math.log(vocab_size) - 1) < 0.03


def test_with_zero_init_every_block_begins_as_the_identity():
    model = GPT(replace(SMALL, zero_init=True)).eval()
    ids = torch.randint(SMALL.vocab_size, (2, 8))
    embedded = model.transformer.wte(ids) + model.transformer.wpe.weight[:8]
    torch.testing.assert_close(
        model.hidden_states(ids, torch.arange(8)), model.transformer.ln_f(embedded)
    )
    assert {
        name.split('.')[-2] for name, p in model.named_parameters() if p.dim() == 2 and not p.any()
    } == {'c_proj'}


@pytest.mark.parametrize('has_amx', [False, True])
@pytest.mark.parametrize(
    'T, heads, kv_heads', [(1, 2, 2), (40, 6, 3), (256, 2, 1), (600, 4, 2), (300, 1, 1)]
)
def test_attention_in_blocks_is_attention(monkeypatch, T, heads, kv_heads, has_amx):
    """Values and gradients: to rounding in float64, to a few roundings in bfloat16."""
    monkeypatch.setattr(attention, 'HAS_AMX', has_amx)
    monkeypatch.setattr(attention, 'CACHED_WEIGHTS', (heads - 1) * 256 * 600)  # 3, 3 and 2 heads
    torch.manual_seed(0)
    q, k, v, g = (
        torch.randn(2, h, T, 16, dtype=torch.float64) for h in (heads, kv_heads, kv_heads, heads)
    )

    def run(attend, dtype):
        inputs = [part.to(dtype, copy=True).requires_grad_() for part in (q, k, v)]
        y = attend(*inputs)
        y.backward(g.to(dtype))
        return [y.detach().double(), *(part.grad.double() for part in inputs)]

    exact = run(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        torch.float64,
    )
    for ours, expected in zip(run(attend_in_blocks, torch.float64), exact):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    for ours, expected in zip(run(attend_in_blocks, torch.bfloat16), exact):
        assert (ours - expected).norm() < 0.03 * expected.norm() + 1e-12


def test_bfloat16_on_a_cpu_attends_in_blocks_and_drops_out(monkeypatch):
    """Loss and gradients follow float32's; dropout zeroes some weights in training only."""
    torch.manual_seed(0)
    model, ids = GPT(MODERN), torch.randint(MODERN.vocab_size, (4, 17))
    calls = []
    monkeypatch.setattr(
        'model.attend_in_blocks', lambda *args: calls.append(args[3]) or attend_in_blocks(*args)
    )
    gradients = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        model.zero_grad()
    assert calls == [0.0] * MODERN.n_layer
    (loss, exact), (rounded_loss, rounded) = gradients
    assert rounded_loss == pytest.approx(loss, rel=5e-3)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    ones = torch.ones(1, 1, 64, 8)
    kept = attend_in_blocks(ones, ones, ones, 0.5)[
        0, 0, -1, 0
    ]  # of 64 equal probabilities half are dropped, the rest doubled
    assert (
        kept.item() == pytest.approx(1.0, abs=0.4)
        and (kept.item() * 32) % 1 == pytest.approx(0, abs=1e-4)
        and kept != 1.0
    )


def by_definition(q, k, v, dropout):
    positions = torch.arange(q.shape[2])
    return attend_by_definition(q, k, v, positions, positions, dropout)


@pytest.mark.parametrize('has_amx', [False, True])
@pytest.mark.parametrize('compute', [attend, attend_in_blocks, by_definition])
def test_weights_of_attention_drop_out(monkeypatch, compute, has_amx):
    """The mean of values that are all 1 is 1; of half of them, doubled, it is about that."""
    monkeypatch.setattr(attention, 'HAS_AMX', has_amx)
    ones = torch.ones(1, 4, 300, 8)
    assert compute(ones, ones, ones, 0.0).allclose(ones)
    half = compute(ones, ones, ones, 0.5)
    assert half.mean().item() == pytest.approx(1.0, abs=0.05) and 0.05 < half.std() < 0.5


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('p', [0.1, 0.5, 0.93])
def test_dropout_drops_each_element_with_probability_p(monkeypatch, p, dtype):
    """Five standard deviations; each of the four elements that share a number is as random."""
    monkeypatch.setattr(elementwise, 'DRAWS_IN_PARALLEL', False)
    torch.manual_seed(1)
    x = torch.full((500, 401), 3.0, dtype=dtype, requires_grad=True)
    y = elementwise.drop_out(x, p)
    y.sum().backward()
    kept = y != 0
    for part in (kept, *(kept.flatten()[i::4] for i in range(4))):
        std = math.sqrt(p * (1 - p) / part.numel())
        assert part.double().mean().item() == pytest.approx(1 - p, abs=5 * std)
    both = (kept.flatten()[0::4][:50_000] & kept.flatten()[1::4][:50_000]).double().mean().item()
    assert both == pytest.approx((1 - p) ** 2, abs=5 * (1 - p) / math.sqrt(50_000))
    assert y.dtype == dtype and y.max() == y[kept].min()
    assert y.max().item() == pytest.approx(
        3 / (1 - p), rel=1e-2 if dtype == torch.bfloat16 else 3e-4
    )
    torch.testing.assert_close(x.grad * 3, y.detach(), rtol=1e-2, atol=0)
    assert not torch.equal(kept, elementwise.drop_out(x, p) != 0)
    torch.manual_seed(1)
    assert torch.equal(y, elementwise.drop_out(x, p))


def test_dropout_of_nothing_and_of_everything(monkeypatch):
    monkeypatch.setattr(elementwise, 'DRAWS_IN_PARALLEL', False)
    x = torch.randn(3, 5)
    assert torch.equal(elementwise.drop_out(x, 0.0), x)
    assert not elementwise.drop_out(x, 1.0).any()
    assert elementwise.drop_out(torch.empty(0, 5), 0.5).shape == (0, 5)
    assert elementwise.drop_out(x, 1 - 1e-9).isfinite().all()
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match='probability'):
            elementwise.drop_out(x, p)
    module = elementwise.Dropout(0.5)
    assert not torch.equal(module(x), x) and torch.equal(module.eval()(x), x)


def test_torchs_dropout_is_used_where_it_draws_in_parallel(monkeypatch):
    """MKL takes one seed from the generator; otherwise each element takes a number."""
    draws = {True: lambda size: 1, False: lambda size: size}
    for parallel, count in draws.items():
        monkeypatch.setattr(
            torch.Tensor,
            'bernoulli_',
            lambda self, p, generator: torch.rand(count(len(self)), generator=generator),
        )
        assert elementwise.draws_in_parallel() is parallel
        monkeypatch.undo()
    x = torch.randn(64, 64)
    for parallel in draws:
        monkeypatch.setattr(elementwise, 'DRAWS_IN_PARALLEL', parallel)
        torch.manual_seed(0)
        ours = elementwise.drop_out(x, 0.5)
        torch.manual_seed(0)
        assert torch.equal(ours, F.dropout(x, 0.5)) is parallel


def test_dropout_is_where_gpt2_has_it_and_in_training_only():
    model, zeros = make_model(replace(SMALL, dropout=0.5)), {}

    def watch(name):
        def look(module, inputs, output):
            zeros[name] = (output == 0.0).float().mean().item()

        model.get_submodule(f'transformer.{name}').register_forward_hook(look)

    for name in ('drop', 'h.0.attn', 'h.0.mlp'):  # the embeddings and both branches
        watch(name)
    ones, layer = torch.ones(1, 4, 16, 8), model.transformer.h[0].attn
    for training in (True, False):
        model.train(training)
        model(torch.randint(61, (4, 16)))
        assert zeros == pytest.approx(dict.fromkeys(zeros, 0.5 * training), abs=0.1)
        assert len(zeros) == 3
        assert layer.attend(ones, ones, ones).allclose(ones) != training


def test_residual_projections_start_smaller_by_depth():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=100, block_size=8, n_layer=8, n_head=4, n_embd=256))
    for block in model.transformer.h:
        assert block.attn.c_proj.weight.std().item() == pytest.approx(
            0.02 / math.sqrt(16), rel=0.05
        )
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_loss_is_the_mean_negative_log_probability_of_the_targets_that_count():
    model = make_model()
    ids = torch.randint(61, (2, 16))
    targets = torch.randint(61, (2, 16))
    targets[0, :9] = -1
    with torch.no_grad():
        probabilities = model(ids).double().softmax(dim=-1)
        by_hand = [
            -math.log(probabilities[b, t, targets[b, t]])
            for b in range(2)
            for t in range(16)
            if targets[b, t] >= 0
        ]
        assert model(ids, targets).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_parameter_counts():
    with torch.device('meta'):
        gpt2 = GPT(GPTConfig())
        baby = GPT(
            GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)
        )
    assert gpt2.num_params() == 124_439_808
    assert gpt2.num_params(positions=False) == 124_439_808 - 1024 * 768
    assert f'{baby.num_params(positions=False) / 1e6:.2f}' == '10.65'
    # Of SwiGLU: two thirds of 4C are 85.3, 256 and 341.3.
    swiglu = [replace(SMALL, mlp='swiglu', n_embd=n_embd) for n_embd in (32, 96, 128)]
    assert [config.mlp_units for config in swiglu] == [96, 256, 352]


def compute_loss_in_chunks(monkeypatch, V: int):
    """7 tokens of float32 logits, or 14 in bfloat16, at a time, and the softmax of 3 of them."""
    monkeypatch.setattr(cross_entropy, 'MANY_LOGITS', 7 * V)
    monkeypatch.setattr(cross_entropy, 'LOSS_CHUNK', 4 * 7 * V)
    monkeypatch.setattr(cross_entropy, 'CACHED_LOGITS', 3 * V)


def test_the_loss_in_chunks_is_the_loss_with_its_gradients(monkeypatch):
    """Against all logits at once. The last chunk and the last part of each are shorter."""
    monkeypatch.setattr(cross_entropy, 'COLUMNS', 300)
    config = GPTConfig(**{**vars(SMALL), 'vocab_size': 997})
    ids, targets = torch.randint(997, (3, 16)), torch.randint(997, (3, 16))
    targets[1, 4:9] = -1
    for changes in ({}, {'tied_head': False}, {'logit_cap': 3.0}):
        model = make_model(GPTConfig(**{**vars(config), **changes}), scale=0.05)
        whole = model(ids, targets)
        (3 * whole).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        with monkeypatch.context() as patch:
            compute_loss_in_chunks(patch, 997)
            chunked = model(ids, targets)
            (3 * chunked).backward()
            with torch.no_grad():
                assert model(ids, targets).item() == pytest.approx(whole.item(), rel=1e-6)
            x = torch.randn(48, 32)
            before = x.clone()
            cross_entropy.head_cross_entropy(x, model.head_weight, targets.flatten(), 0.0)
            assert x.equal(before)
        assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=0)


def test_the_loss_in_chunks_of_bfloat16_follows_float32s(monkeypatch):
    config, ids = GPTConfig(**{**vars(SMALL), 'vocab_size': 997}), torch.randint(997, (3, 17))
    model, found = make_model(config, scale=0.05), []
    compute_loss_in_chunks(monkeypatch, 997)
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append((loss.item(), model.transformer.wte.weight.grad.clone()))
        model.zero_grad()
    (loss, exact), (rounded_loss, rounded) = found
    assert (
        rounded_loss == pytest.approx(loss, rel=2e-3)
        and (rounded - exact).norm() < 0.03 * exact.norm()
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_gelu_for_the_compiler_is_as_exact_as_the_plain_one(monkeypatch, dtype):
    x = torch.cat((torch.linspace(-12, 12, 4801), torch.tensor([-1e4, 1e4]))).to(dtype)
    gradient = torch.linspace(-2, 2, len(x)).to(dtype)

    def run(x, gradient):
        x = x.clone().requires_grad_()
        y = elementwise.tanh_gelu(x)
        y.backward(gradient)
        return y.detach(), x.grad

    exact = run(x.double(), gradient.double())
    plain = run(x, gradient)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    for found, as_usual, true in zip(run(x, gradient), plain, exact):
        assert found.dtype == dtype
        bound = 2 * (as_usual - true).abs().max() + 1e-14 * true.abs().max()
        assert (found - true).abs().max() <= bound


@pytest.mark.slow
def test_the_loss_in_chunks_can_be_compiled():
    x, weight, targets = (
        torch.randn(40, 8),
        torch.randn(97, 8, requires_grad=True),
        torch.randint(97, (40,)),
    )

    def loss(x, weight):
        return cross_entropy.ChunkedLoss.apply(x, weight, targets, 0.0, True, 4 * 30 * 97)

    found = []
    for run in (loss, torch.compile(loss)):
        value = run(x, weight)
        value.backward()
        found.append((value.item(), weight.grad.clone()))
        weight.grad = None
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize('config', [SMALL, MODERN], ids=['gpt2', 'modern'])
def test_recomputing_blocks_changes_no_gradient(config):
    """Nor the dropout, and each block runs twice."""
    ids = torch.randint(config.vocab_size, (4, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model, runs = GPT(replace(config, recompute=recompute, dropout=0.2)), []
        model.transformer.h[0].register_forward_pre_hook(lambda *_: runs.append(1))
        model(ids[:, :-1], ids[:, 1:]).backward()
        assert len(runs) == 1 + recompute
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_the_loss_never_holds_all_logits_of_a_large_vocabulary():
    """The largest block of memory that a step allocates, seen by torch's profiler."""
    model = GPT(GPTConfig(vocab_size=50_000, block_size=512, n_layer=1, n_head=1, n_embd=8))
    ids = torch.randint(50_000, (4, 512))  # 102 million logits
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(ids, ids).backward()
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert 50_000 * 600 < largest / 4 <= cross_entropy.LOSS_CHUNK / 4 < 50_000 * 700


def traced_size(function, *inputs) -> int:
    """The number of operators in a function and its gradients, as the compiler sees them."""
    from torch._dynamo.backends.common import aot_autograd  # takes a second
    from torch._functorch.aot_autograd import make_boxed_func

    sizes = []

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    torch.compile(function, backend=backend, fullgraph=True)(*inputs).sum().backward()
    assert len(sizes) == 2
    return sum(sizes)


@pytest.mark.parametrize('has_amx', [False, True])
def test_the_compiler_sees_neither_chunks_nor_blocks(monkeypatch, has_amx):
    """It would unroll them, which takes minutes for GPT-2."""
    monkeypatch.setattr(attention, 'HAS_AMX', has_amx)
    x, weight, targets = (
        torch.randn(40, 8, requires_grad=True),
        torch.randn(97, 8, requires_grad=True),
        torch.randint(97, (40,)),
    )
    one, ten = (
        traced_size(
            lambda *xw: cross_entropy.ChunkedLoss.apply(*xw, targets, 0.0, True, size), x, weight
        )
        for size in (4 * 40 * 97, 4 * 4 * 97)
    )
    assert one == ten
    short, long = (
        traced_size(attention.LongAttention.apply, *torch.randn(3, 1, 2, T, 4, requires_grad=True))
        for T in (300, 900)
    )
    assert short == long


WITHOUT_THE_COMPILER = """
import sys, torch
from nib.kernels import attention, cross_entropy
attention.HAS_AMX = False  # the library's kernel needs no operator of ours
x, weight = torch.randn(40, 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
targets = torch.randint(97, (40,))
cross_entropy.ChunkedLoss.apply(x, weight, targets, 0.0, True, 4 * 4 * 97).backward()
qkv = torch.randn(3, 1, 2, 300, 4, requires_grad=True)
attention.LongAttention.apply(*qkv).sum().backward()
sys.exit('torch._dynamo' in sys.modules)
"""


@pytest.mark.slow
def test_without_compilation_the_compiler_is_not_imported():
    """That takes a second. An operator's first call would do it."""
    done = run_script('-c', WITHOUT_THE_COMPILER, python=sys.executable)
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('with_gradients', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_operators_are_what_the_compiler_is_told(dtype, with_gradients):
    """Shapes, types and strides, and that they change and return none of their inputs."""
    x, weight, targets = torch.randn(40, 8), torch.randn(97, 8), torch.randint(97, (40,))
    tests = ('test_schema', 'test_faketensor')
    loss = x, weight, targets, 0.0, with_gradients, 4 * 4 * 97, dtype
    torch.library.opcheck(cross_entropy.loss_operator, loss, test_utils=tests)
    for batch in (1, 4):
        qkv = torch.randn(batch, 300, 6, 8, dtype=dtype).transpose(1, 2).split(2, dim=1)
        grads = torch.randn_like(qkv[0])
        torch.library.opcheck(attention.weighted_values_operator, qkv, test_utils=tests)
        torch.library.opcheck(
            attention.attention_gradients_operator, (*qkv, grads), test_utils=tests
        )


def test_parameters_with_more_than_two_dimensions_count_in_the_flops():
    """Such as the kernel of a convolution, in a changed model.py."""
    model = make_model(SMALL)
    before = model.flops_per_token()['h.0.mlp']
    model.transformer.h[0].mlp.conv = torch.nn.Conv1d(32, 32, 3, groups=32)
    assert model.flops_per_token()['h.0.mlp'] == before + 2 * 32 * 3


@pytest.mark.parametrize('config', ARCHITECTURES, ids=NAMES)
def test_flops_by_layer_add_up_to_the_formula_for_the_whole(config):
    with torch.device('meta'):
        model = GPT(
            GPTConfig(
                **{**vars(config), 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024}
            )
        )
    layers = model.flops_per_token()
    embedding = 'wte' if not config.tied_head else 'wpe'  # looked up, not multiplied
    matrices = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.dim() == 2 and embedding not in n and 'wpe' not in n and 'smear' not in n
    )
    assert (
        3 * sum(layers.values()) == 6 * matrices + 12 * 12 * 768 * 1024
    )  # PaLM, appendix B: 6N + 12LHQT
    assert len(layers) == 2 * 12 + 1


def test_smear_adds_the_weighted_embeddings_of_the_previous_tokens():
    assert (GPT(replace(SMALL, smear=2)).transformer.smear.weight == 0.5).all()
    model = make_model(replace(SMALL, smear=2))
    ids = torch.randint(61, (3, 16))
    x, weight = model.transformer.wte(ids), model.transformer.smear.weight
    expected = torch.zeros_like(x)
    for row in range(3):
        for t in range(16):
            expected[row, t] = x[row, t]
            for back in (1, 2):
                if t >= back:
                    expected[row, t] += weight[back - 1] * x[row, t - back]
    positions = torch.arange(16)
    padded = model.transformer.wte(torch.nn.functional.pad(ids, (2, 0), value=7))
    torch.testing.assert_close(model.transformer.smear(padded, positions), expected)
    later = model.transformer.smear(x[:, 3:], positions[5:])  # the first two are earlier tokens
    torch.testing.assert_close(later, expected[:, 5:])


@pytest.mark.parametrize(
    'broken',
    [
        dict(n_embd=30),
        dict(n_layer=0),
        dict(dropout=1.0),
        dict(vocab_size=-1),
        dict(n_kv_head=3),
        dict(n_kv_head=-1),
        dict(position='absolute'),
        dict(mlp='tanh'),
        dict(norm='batch'),
        dict(n_embd=20, position='rotary'),
        dict(head_dim=5, position='rotary'),
        dict(logit_cap=-1.0),
        dict(head_dim=-1),
        dict(mlp_width=-1),
        dict(norm_eps=-1.0),
        dict(rotary_base=0.0, position='rotary'),
    ],
)
def test_a_config_that_cannot_be_names_its_field(broken):
    with pytest.raises(ValueError, match=next(iter(broken))):
        GPTConfig(**{**vars(SMALL), **broken})
