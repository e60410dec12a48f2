"""Generation against whole forward passes without a cache; sampling against sums by hand."""

import itertools
import math
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from small_models import ARCHITECTURES, MODERN, NAMES, SMALL, make_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as model_file
from model import GPT, MLP, CausalSelfAttention, GPTConfig
from nib.doctor import inspection
from nib.generation import sampling
from nib.generation.caches import BagCache, KVCache
from nib.generation.check import check_generation
from nib.generation.int8 import Int8Linear, _quantized, quantize
from nib.generation.layers import FewRowNorm, PackedLinear, RowLinear, for_generation
from nib.generation.sampling import sample_tokens
from nib.generation.window import Window
from nib.kernels.attention import is_causal_attention


def greedy_without_cache(model, prompt, n):
    """The documented behavior: a full window drops its oldest half before the next token."""
    size = model.config.block_size
    window, made = list(prompt)[-size:], []
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([window]))[0, -1].argmax())
        made.append(token)
        if len(window) == size:
            window = window[size - size // 2 :]
        window.append(token)
    return made


def generate(model, prompts, n, **options):
    """The tokens of each row, without the -1 after its end."""
    steps = [tokens.tolist() for tokens in model.generate(prompts, n, **options)]
    return [[token for token in row if token >= 0] for row in zip(*steps)]


@pytest.mark.parametrize('config', ARCHITECTURES, ids=NAMES)
@pytest.mark.parametrize('lengths, n', [((3,), 30), ((1, 7, 16, 20), 15)])
def test_greedy_with_the_cache_equals_greedy_without_it(config, lengths, n):
    """Prompts of unequal lengths, within block_size and past it, each as if it were alone.

    All caches of a CPU are tried.
    """
    model = make_model(config)
    prompts = [torch.randint(61, (length,)).tolist() for length in lengths]
    expected = [greedy_without_cache(model, p, n) for p in prompts]
    for cache in CACHES:
        with pytest.MonkeyPatch.context() as patch:
            use_cache(cache, patch)
            assert generate(model, prompts, n, temperature=0.0) == expected


CACHES = ['plain', 'bags', 'amx']


def use_cache(name, monkeypatch):
    """One of the caches of a CPU; bags are in blocks of which a small model fills several."""
    for module in ('caches', 'window'):
        monkeypatch.setattr(f'nib.generation.{module}.HAS_AMX', name == 'amx')
    if name != 'bags':
        return
    monkeypatch.setattr(BagCache, 'pays', lambda *shape: True)
    monkeypatch.setattr(BagCache, 'BLOCK', 5)
    monkeypatch.setattr('nib.generation.window.KVCache', None)


def test_the_cache_of_large_models_is_for_cpus_and_for_many_numbers_in_full_blocks():
    """From 2^20 numbers of keys and values in a layer: 2 * rows * slots * n_embd of GPT-2."""
    weight, shape = torch.zeros(1), GPTConfig()
    assert BagCache.pays(shape, 1, 700, weight) and not BagCache.pays(shape, 1, 600, weight)
    assert BagCache.pays(shape, 1024, 64, weight) and not BagCache.pays(shape, 1024, 63, weight)
    assert BagCache.pays(replace(shape, n_kv_head=3), 4, 700, weight) != BagCache.pays(
        replace(shape, n_kv_head=3), 3, 700, weight
    )
    assert not BagCache.pays(shape, 1024, 64, weight.to('meta'))


@pytest.mark.parametrize('config', [SMALL, MODERN], ids=['gpt2', 'modern'])
@pytest.mark.parametrize(
    'dtype, autocast, tolerance',
    [
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 0.03),
        (torch.float16, False, 0.004),
        (torch.float32, True, 0.03),
    ],
)
@pytest.mark.parametrize('cache', ['bags', 'amx'])
def test_rows_of_unequal_length_in_a_large_models_cache_have_each_the_logits_of_its_text(
    config, cache, dtype, autocast, tolerance, monkeypatch
):
    use_cache(cache, monkeypatch)
    model, texts = (
        make_model(config, scale=0.1).to(dtype),
        torch.randint(61, (2, config.block_size)).tolist(),
    )
    with torch.inference_mode(), torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        window = Window(model, [texts[0][:3], texts[1][:9]], 7, compile=False)
        for i in range(7):
            logits = window.next_logits()
            alone = torch.stack(
                [model(torch.tensor([text[: n + i]]))[0, -1] for text, n in zip(texts, (3, 9))]
            )
            assert (logits - alone).std() <= tolerance * alone.std()
            window.append(torch.tensor([texts[0][3 + i], texts[1][9 + i]]))


@pytest.mark.parametrize('cache', CACHES)
def test_generation_is_on_the_models_device_whatever_the_default_one_is(cache, monkeypatch):
    model = make_model()
    expected = generate(model, [[1], [2, 3]], 11, seed=1)
    use_cache(cache, monkeypatch)
    BagCache._places.cache_clear()
    with torch.device('meta'):
        assert generate(model, [[1], [2, 3]], 11, seed=1) == expected


def cached_and_uncached_logits(monkeypatch, model, prompt, n):
    """The logits (n, V) of generation, and those of one forward pass over the whole text."""
    cached = []
    with monkeypatch.context() as patch:
        patch.setattr(
            sampling,
            'sample_tokens',
            lambda logits, *options: cached.append(logits) or sample_tokens(logits, *options),
        )
        made = generate(model, [prompt], n, temperature=0.0)[0]
    with torch.no_grad():
        return torch.cat(cached), model(torch.tensor([prompt + made[:-1]]))[0, len(prompt) - 1 :]


@pytest.mark.parametrize('config', ARCHITECTURES, ids=NAMES)
@pytest.mark.parametrize('cache', CACHES)
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float64, 1e-6), (torch.float32, 1e-5)]
)  # the rotary table is float32
def test_cached_logits_equal_uncached_ones(config, dtype, tolerance, cache, monkeypatch):
    monkeypatch.setattr(
        PackedLinear, 'SMALLEST', 1
    )  # where a CPU can, all matrices of float32 are packed
    use_cache(cache, monkeypatch)
    model = make_model(config, scale=0.3 if dtype == torch.float64 else 0.05).to(dtype)
    cached, full = cached_and_uncached_logits(
        monkeypatch, model, torch.randint(61, (4,)).tolist(), 12
    )
    torch.testing.assert_close(cached, full, atol=tolerance, rtol=0)


@pytest.mark.slow
def test_cached_logits_of_gpt2_equal_uncached_ones_and_bfloat16_weights_come_near(monkeypatch):
    """The shape of GPT-2 (124M): packed matrices, if the CPU has them, and a long context."""
    monkeypatch.setattr('nib.generation.window.KVCache', None)
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    prompt = torch.randint(50257, (700,)).tolist()
    cached, full = cached_and_uncached_logits(monkeypatch, model, prompt, 20)
    torch.testing.assert_close(cached, full, atol=1e-4, rtol=0)
    rounded, rounded_full = cached_and_uncached_logits(monkeypatch, model.bfloat16(), prompt, 20)
    assert 0 < (rounded[0] - cached[0]).std() < 0.02 * cached[0].std()  # bfloat16 has 8 bits: 0.4%
    assert (rounded - rounded_full).std() < 0.02 * cached.std()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_torch_without_the_operators_of_packed_matrices_generates_all_the_same(
    dtype, monkeypatch
):
    model = make_model(scale=0.05).to(dtype)
    packed, _ = cached_and_uncached_logits(monkeypatch, model, [1, 2], 1)
    monkeypatch.setattr(torch.ops, 'mkldnn', SimpleNamespace())
    plain, _ = cached_and_uncached_logits(monkeypatch, model, [1, 2], 1)
    torch.testing.assert_close(plain, packed, atol=0.02 * float(packed.std()), rtol=0)


@pytest.mark.parametrize('size', [0.0, 1e-4, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01)]
)
def test_the_rms_norm_of_generation_equals_that_of_the_model(dtype, tolerance, size):
    """Also where eps counts: it is 1e-6."""
    torch.manual_seed(0)
    norm, x = model_file.RMSNorm(40, eps=1e-6).to(dtype), size * torch.randn(3, 2, 40, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    with torch.inference_mode():
        y = for_generation(norm, PackedLinear)(x)
        assert y.dtype == dtype and y.shape == x.shape
        torch.testing.assert_close(y, norm(x), rtol=tolerance, atol=tolerance)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    model = make_model(scale=0.05)
    first, again, other = (generate(model, [[1, 2]], 30, seed=seed)[0] for seed in (7, 7, 8))
    assert first == again != other


def test_generation_leaves_the_model_and_the_global_random_state_as_they_were():
    """Also between two tokens, when the model may be used for something else."""
    model = make_model(GPTConfig(**{**vars(SMALL), 'dropout': 0.5})).train()
    state, weights = (
        torch.get_rng_state(),
        {name: p.clone() for name, p in model.named_parameters()},
    )
    for _ in model.generate([[1]], 5, temperature=0.0):
        assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert generate(model, [[1]], 5, temperature=0.0)[0] == greedy_without_cache(
        model.eval(), [1], 5
    )  # without dropout


def test_generation_reads_the_weights_as_they_are_when_it_starts():
    model, other = make_model(), make_model(seed=1)
    generate(model, [[1, 2]], 3)
    for parameter, new in zip(model.parameters(), other.parameters()):
        parameter.data.copy_(new)
    assert generate(model, [[1, 2]], 30, temperature=0.0) == generate(
        other, [[1, 2]], 30, temperature=0.0
    )


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_tokens(monkeypatch):
    """Rows of unequal length, past block_size, with no second compilation on the way."""
    from nib.machine.compiling import has_compiler

    if not has_compiler():
        pytest.skip('no C compiler')
    model, prompts = make_model(GPTConfig(**{**vars(MODERN), 'n_layer': 1})), [[1], [4, 5, 6, 7, 8]]
    torch._dynamo.utils.counters.clear()
    for options in ({'temperature': 0.0}, {'seed': 3}):
        expected = generate(model, prompts, 30, **options)
        with monkeypatch.context() as patch:
            patch.setattr(
                'nib.generation.window.BagCache', SimpleNamespace(pays=lambda *shape: True)
            )  # cannot be made
            assert generate(model, prompts, 30, **options, compile=True) == expected
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def test_tokens_are_handed_out_as_they_are_made():
    model = make_model()
    passes = []
    model.transformer.ln_f.register_forward_hook(lambda *args: passes.append(1))
    stream = model.generate([[1, 2, 3]], 10, temperature=0.0)
    for made in range(1, 5):
        next(stream)
        assert len(passes) == made


def test_a_row_ends_after_its_stop_sequence_while_others_go_on():
    model = make_model()
    prompts = [[5], [9, 3]]
    free = generate(model, prompts, 30, temperature=0.0)
    stop = free[0][3:5]
    end = next(i for i in range(2, 31) if free[0][i - 2 : i] == stop)
    rows = generate(model, prompts, 30, temperature=0.0, stop=[stop])
    assert rows[0] == free[0][:end]
    assert rows[1][:1] == free[1][:1] and len(rows[1]) <= 30
    alone = generate(model, prompts[:1], 30, temperature=0.0, stop=[[stop[0]]])[0]
    assert alone == free[0][: free[0].index(stop[0]) + 1]


@pytest.mark.parametrize('kind', ['gelu', 'gelu_erf', 'relu'])
def test_packed_matrices_keep_the_activation(monkeypatch, kind):
    monkeypatch.setattr(PackedLinear, 'SMALLEST', 1)
    mlp = make_model(replace(SMALL, mlp=kind)).transformer.h[0].mlp
    x = 20 * torch.randn(2, 3, 32)  # large hidden units, for which the two kinds of GELU differ
    with torch.no_grad():
        torch.testing.assert_close(for_generation(mlp, PackedLinear)(x), mlp(x), atol=2e-6, rtol=0)


@pytest.mark.parametrize('linear', [PackedLinear, RowLinear, Int8Linear])
def test_a_linear_layer_can_get_no_rows(linear):
    """As an expert that no token chooses."""
    if linear is PackedLinear and not linear.pays(torch.empty(512, 512)):
        pytest.skip('oneDNN is not available')
    layer = nn.Linear(512, 512)
    with torch.no_grad():
        assert linear(layer.weight, layer.bias)(torch.empty(0, 512)).shape == (0, 512)


@pytest.mark.parametrize('shape', [(1, 50257), (3, 1000), (2, 200)])
@pytest.mark.parametrize('k', [1, 7, 100])
def test_the_largest_logits_are_those_of_a_full_sort(shape, k):
    torch.manual_seed(0)
    logits = torch.randn(shape)
    logits[0, 50:100] = logits[0].amax() + torch.arange(50)  # neighbors
    expected, ids = logits.sort(dim=1, descending=True)
    values, places = sampling.largest(logits, k)
    assert values.equal(expected[:, :k]) and places.equal(ids[:, :k])
    values, places = sampling.largest(logits - 100, k)  # all negative
    assert values.equal(expected[:, :k] - 100) and places.equal(ids[:, :k])


def test_sampling_draws_tokens_by_their_probability():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(40_000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(temperature, top_k, top_p):
        drawn = sample_tokens(logits, temperature, top_k, top_p, generator)
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    by_hand = [math.exp(x / 2) for x in (2, 1, 0, -1)]
    assert shares(2.0, None, None) == pytest.approx([p / sum(by_hand) for p in by_hand], abs=0.01)
    by_hand = [math.exp(x) for x in (2, 1)]
    assert shares(1.0, 2, None) == pytest.approx(
        [p / sum(by_hand) for p in by_hand] + [0, 0], abs=0.01
    )
    # probabilities 0.644, 0.237, 0.087, 0.032: the first two are the fewest that hold 0.7
    assert shares(1.0, None, 0.7) == pytest.approx(
        [p / sum(by_hand) for p in by_hand] + [0, 0], abs=0.01
    )
    assert shares(1.0, None, 0.6) == [1, 0, 0, 0]
    assert shares(1.0, 2, 0.7) == [1, 0, 0, 0]  # of the two likeliest alone, the first holds 0.731
    assert shares(0.0, None, None) == shares(1e-39, None, None) == [1, 0, 0, 0]
    logits = torch.tensor([[0.001, 0.0]]).repeat(40_000, 1)
    assert shares(0.001, None, None)[:2] == pytest.approx([0.731, 0.269], abs=0.01)
    logits = torch.zeros(1000, 4)
    assert sum(share > 0 for share in shares(1.0, 1, None)) == 1  # of equals, top_k still takes k


@pytest.mark.parametrize(
    'options, named',
    [
        (dict(prompts=[[]]), 'prompt is empty'),
        (dict(prompts=[[61]]), 'token id 61'),
        (dict(temperature=-1.0), 'temperature'),
        (dict(temperature=math.nan), 'temperature'),
        (dict(seed=-1), 'seed'),
        (dict(seed=1 << 70), 'seed'),
        (dict(top_k=0), 'top_k'),
        (dict(top_p=1.5), 'top_p'),
        (dict(max_new_tokens=-1), 'max_new_tokens'),
        (dict(stop=[[2], []]), 'stop contains an empty'),
    ],
)
def test_what_cannot_be_sampled_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        next(make_model().generate(**{'prompts': [[1]], 'max_new_tokens': 1, **options}))


# -- one definition of attention -------------------------------------------------------------------

FEATURES = {
    'position': ['learned', 'rotary'],
    'norm': ['layer', 'rms'],
    'mlp': ['gelu', 'relu2', 'swiglu'],
    'qk_norm': [False, True],
    'n_kv_head': [0, 2],
    'tied_head': [True, False],
}


def every_architecture():
    """All combinations of FEATURES; the others alternate."""
    for i, values in enumerate(itertools.product(*FEATURES.values())):
        yield GPTConfig(
            vocab_size=61,
            block_size=12,
            n_layer=2,
            n_head=4,
            n_embd=32,
            bias=i % 2 == 0,
            logit_cap=5.0 * (i % 3 == 0),
            zero_init=i % 5 == 0,
            head_dim=16 * (i % 3 == 1),
            mlp_width=40 * (i % 3 == 2),
            qkv_bias=i % 4 == 1,
            rotary_scaling=(4.0, 1.0, 2.0, 6.0) if i % 5 < 2 else (),
            **dict(zip(FEATURES, values, strict=True)),
        )


@pytest.mark.slow
def test_every_architecture_generates_what_whole_passes_find_most_likely():
    """Prompts of unequal lengths, past a full context."""
    for seed, config in enumerate(every_architecture()):
        model, prompts = make_model(config, seed), [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]
        assert generate(model, prompts, 14, temperature=0.0) == [
            greedy_without_cache(model, p, 14) for p in prompts
        ], config
        assert check_generation(model, [*range(20)]) is None, config


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype):
    for seed, config in enumerate(ARCHITECTURES):
        model = make_model(config, seed, scale=0.1)
        assert check_generation(model, [*range(30)], precision=torch.autocast('cpu', dtype)) is None
        assert check_generation(model.to(dtype), [*range(30)]) is None


def window_of_4(q, k, query_positions, key_positions):
    scores = model_file.causal_scores(q, k, query_positions, key_positions)
    return scores.masked_fill(
        key_positions.unsqueeze(-2) <= query_positions.unsqueeze(-1) - 4, -math.inf
    )


def alibi(q, k, query_positions, key_positions):
    """Press et al. 2022: every head has its own penalty for distance."""
    slopes = 2.0 ** -torch.arange(1.0, q.shape[1] + 1)[:, None, None]
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    return (
        model_file.causal_scores(q, k, query_positions, key_positions)
        - slopes.type_as(q) * distance
    )


@pytest.fixture
def define_attention(monkeypatch):
    """define_attention(scores): as a person would, in this one place."""
    monkeypatch.setattr(model_file, 'causal_scores', model_file.attention_scores, raising=False)
    return lambda scores: monkeypatch.setattr(model_file, 'attention_scores', scores)


@pytest.mark.parametrize('scores', [window_of_4, alibi])
@pytest.mark.parametrize('config', [SMALL, MODERN], ids=['gpt2', 'modern'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_generation_follows_a_changed_definition_of_attention(
    config, scores, dtype, define_attention, monkeypatch
):
    model, prompts, ids = (
        make_model(config).to(dtype),
        [[*range(9)], [5, 6]],
        torch.arange(12)[None],
    )
    before = generate(model, prompts, 20, temperature=0.0)
    with torch.no_grad():
        logits = model(ids)
        define_attention(scores)
        assert not torch.allclose(model(ids), logits)  # so does training
    monkeypatch.setattr(BagCache, 'SMALLEST', 0)
    monkeypatch.setattr(BagCache, 'BLOCK', 1)
    assert check_generation(model, [*range(30)]) is None
    if dtype == torch.float32:
        after = generate(model, prompts, 20, temperature=0.0)
        assert after == [greedy_without_cache(model, p, 20) for p in prompts] != before


def test_training_and_the_inspection_follow_a_window(define_attention):
    """A token has no influence beyond the windows of the layers; attention is over 4 places."""
    define_attention(window_of_4)
    model, embedded = make_model(replace(SMALL, n_layer=2)), []
    hook = model.transformer.wte.register_forward_hook(
        lambda module, args, out: embedded.append(out) or out.retain_grad()
    )
    ids = torch.arange(16)[None]
    model(ids)[0, 12].sum().backward()
    hook.remove()
    influence = embedded[0].grad[0].abs().sum(dim=-1)
    assert ((influence > 0) == torch.tensor([12 - 2 * 3 <= t <= 12 for t in range(16)])).all()
    q, k, _ = model.transformer.h[0].attn.query_key_value(torch.randn(1, 16, 32))
    scores = inspection.attention_scores(q, k)
    assert ((scores > -math.inf).sum(dim=-1) == torch.arange(1, 17).clamp(max=4)).all()
    _, rows = inspection.measure_layers(model, ids, ids, torch.autocast('cpu', enabled=False), 1)
    assert all(row.entropy <= math.log(4) for row in rows if row.entropy is not None)


@pytest.mark.slow
def test_a_compiled_step_follows_a_changed_definition_of_attention(define_attention):
    from nib.machine.compiling import has_compiler

    if not has_compiler():
        pytest.skip('no C compiler')
    define_attention(window_of_4)
    model, prompts = make_model(replace(MODERN, n_layer=1)), [[1], [4, 5, 6, 7, 8]]
    torch._dynamo.reset()  # a compiled step belongs to the definition that it was compiled with
    try:
        assert generate(model, prompts, 15, temperature=0.0, compile=True) == [
            greedy_without_cache(model, p, 15) for p in prompts
        ]
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize(
    'changed',
    [
        lambda s, q, k: s * 1.01,
        lambda s, q, k: 50 * torch.tanh(s / 50),
        lambda s, q, k: s.masked_fill(k < q - 100_000, -math.inf),
        lambda s, q, k: s.masked_fill(k // 512 != q // 512, -math.inf),
        lambda s, q, k: s.masked_fill((k == 0) & (q > 0), -math.inf),
        lambda s, q, k: torch.cat(
            (s[:, :-1], s[:, -1:].masked_fill(k < q - 8, -math.inf)), dim=1
        ),  # of one head
        lambda s, q, k: s - 0.001 * (q - k).clamp(min=0),
        lambda s, q, k: s + torch.zeros(6, 1, 1),
        lambda s, q, k: s + torch.zeros(32)[q - k],
    ],
    ids=[
        'scale',
        'soft cap',
        'wide window',
        'chunks',
        'no first token',
        'one head',
        'bias',
        'for 6 heads',
        'for 32 positions',
    ],
)
def test_no_fused_kernel_is_used_for_changed_scores(changed):
    def scores(q, k, query_positions, key_positions):
        return changed(
            model_file.attention_scores(q, k, query_positions, key_positions),
            query_positions.unsqueeze(-1),
            key_positions.unsqueeze(-2),
        )

    assert not is_causal_attention(scores)


DOCUMENTS: list = [None]  # (B, T): the document of each token, which the model sets


class Batch:
    documents = None


def hides_documents(scores, documents):
    if documents is None:
        return scores
    return scores.masked_fill(documents[:, None, :, None] != documents[:, None, None, :], -1e9)


def by_variable(*args):
    return hides_documents(model_file.attention_scores(*args), DOCUMENTS[0])


def by_attribute_of_a_class(*args):
    return hides_documents(model_file.attention_scores(*args), Batch.documents)


def by_function_inside(*args):
    def documents():
        return DOCUMENTS[0]

    return hides_documents(model_file.attention_scores(*args), documents())


def by_helper(*args):
    return by_variable(*args)


class WithState:
    documents = None

    def __call__(self, *args):
        return hides_documents(model_file.attention_scores(*args), self.documents)


current_window = 0
WINDOW = 1 << 30


def by_number(q, k, query_positions, key_positions):
    """A layer may set the number."""
    too_far = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2) >= current_window > 0
    return model_file.attention_scores(q, k, query_positions, key_positions).masked_fill(
        too_far, -math.inf
    )


def by_default(q, k, query_positions, key_positions, documents=DOCUMENTS):
    return hides_documents(
        model_file.attention_scores(q, k, query_positions, key_positions), documents[0]
    )


def by_attribute(*args):
    return hides_documents(model_file.attention_scores(*args), by_attribute.documents)


by_attribute.documents = None


def by_module(*args):
    return hides_documents(model_file.attention_scores(*args), settings.documents)


settings = ModuleType('settings')
settings.documents = DOCUMENTS


def make_closure():
    documents = [None]
    return lambda *args: hides_documents(model_file.attention_scores(*args), documents[0])


@pytest.mark.parametrize(
    'scores',
    [
        by_variable,
        by_attribute_of_a_class,
        by_function_inside,
        by_number,
        by_default,
        by_attribute,
        by_module,
        by_helper,
        WithState(),
        make_closure(),
        partial(by_helper),
    ],
    ids=[
        'variable',
        'class',
        'inside',
        'number',
        'default',
        'attribute',
        'module',
        'helper',
        'object',
        'closure',
        'partial',
    ],
)
def test_no_fused_kernel_is_used_for_scores_that_depend_on_a_variable(scores):
    """It holds nothing yet when the scores are compared, so they are still causal."""
    assert not is_causal_attention(scores)


def visible(n: int, query, key):
    return seen_at_once(n - 1, query, key) if n else key.unsqueeze(-2) <= query.unsqueeze(-1)


def seen_at_once(n: int, query, key):
    return visible(n, query, key)


def test_the_fused_kernels_are_used_for_scores_by_functions_that_call_each_other():
    def scores(q, k, query_positions, key_positions):
        hidden = ~visible(2, query_positions, key_positions)
        return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)

    assert is_causal_attention(scores)


def test_the_fused_kernels_are_used_for_the_same_scores_written_otherwise():
    def scores(q, k, query_positions, key_positions):
        visible = query_positions.unsqueeze(-1) >= key_positions.unsqueeze(-2)
        return torch.where(visible, (q / q.shape[-1] ** 0.5) @ k.mT, -math.inf)

    assert is_causal_attention(scores) and model_file.kernels_fit()


def test_a_constant_that_changes_between_two_runs_counts(monkeypatch):
    def scores(q, k, query_positions, key_positions):
        too_far = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2) >= WINDOW
        hidden = too_far | (query_positions.unsqueeze(-1) < key_positions.unsqueeze(-2))
        return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)

    fit = []
    for window in (1 << 30, 8, 1 << 30):
        monkeypatch.setitem(globals(), 'WINDOW', window)
        fit.append(is_causal_attention(scores))
    assert fit == [True, False, True]


def test_the_comparison_runs_under_any_choice_of_kernels():
    def scores(*args):
        return model_file.attention_scores(*args)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # which a CPU does not have
        assert is_causal_attention(scores)


@pytest.mark.parametrize('config', ARCHITECTURES, ids=NAMES)
def test_attention_by_definition_is_what_the_kernels_compute(config, monkeypatch):
    """Losses and gradients of a whole model."""
    model, ids, found = make_model(config).double(), torch.randint(61, (3, 17)), []
    for fit in (True, False):
        monkeypatch.setattr(model_file, 'kernels_fit', lambda fit=fit: fit)
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize('layer', [CausalSelfAttention, MLP])
def test_generation_follows_a_changed_layer(layer, monkeypatch):
    forward = layer.forward
    monkeypatch.setattr(PackedLinear, 'SMALLEST', 1)
    monkeypatch.setattr(
        layer, 'forward', lambda self, x, *rest: forward(self, x, *rest) * torch.sigmoid(x)
    )
    for config in (SMALL, MODERN):
        model = make_model(config)
        assert check_generation(model, [*range(30)]) is None
        assert generate(model, [[1, 2]], 20, temperature=0.0) == [
            greedy_without_cache(model, [1, 2], 20)
        ]


def change_mlp(monkeypatch):
    monkeypatch.setattr(
        MLP, 'forward', lambda self, x: self.c_proj(self.activation(self.c_fc(x) - x.mean()))
    )


def change_norm(monkeypatch):
    forward = model_file.RMSNorm.forward
    monkeypatch.setattr(model_file.RMSNorm, 'forward', lambda self, x: forward(self, x) + 1.0)


def change_head(monkeypatch):
    logits = GPT.logits
    monkeypatch.setattr(
        GPT, 'logits', lambda self, x: logits(self, x) * (0.5 if self.config.tied_head else 1.0)
    )


@pytest.mark.parametrize('change', [change_mlp, change_norm, change_head])
@pytest.mark.parametrize('linear', [PackedLinear, RowLinear])
def test_faster_layers_are_used_only_if_they_compute_what_model_py_does(
    change, linear, monkeypatch
):
    change(monkeypatch)
    monkeypatch.setattr(PackedLinear, 'SMALLEST', 1)
    ids = torch.arange(1)[None]
    for config in (SMALL, replace(MODERN, tied_head=True)):
        model = make_model(config)
        with torch.no_grad():
            expected = model(ids)
            torch.testing.assert_close(for_generation(model, linear)(ids), expected)
            if change is change_head:
                assert (quantize(model)(ids) - expected).abs().max() < expected.abs().max() / 10


def test_the_faster_layers_are_used_for_the_original_code(monkeypatch):
    monkeypatch.setattr(PackedLinear, 'SMALLEST', 1)
    for dtype in (torch.float32, torch.bfloat16):
        for config in (SMALL, replace(MODERN, tied_head=True)):
            model = make_model(config).to(dtype)
            if not PackedLinear.pays(model.transformer.wte.weight):
                pytest.skip('no packed matrices here')
            twin = for_generation(model, PackedLinear)
            assert isinstance(twin.lm_head, PackedLinear) and not twin.config.tied_head
            if config.norm == 'rms':
                assert isinstance(twin.transformer.ln_f, FewRowNorm)
            if config.mlp == 'gelu':
                assert twin.transformer.h[0].mlp.c_fc.then[0] == 'gelu'


def test_each_attention_of_a_block_has_its_own_cache(monkeypatch):
    class TwoAttentions(CausalSelfAttention):
        def __init__(self, config):
            super().__init__(config)
            self.other = CausalSelfAttention(config)

        def forward(self, x, rotary=None):
            return super().forward(x, rotary) - 0.5 * self.other(x, rotary)

    monkeypatch.setattr(model_file, 'CausalSelfAttention', TwoAttentions)
    model = make_model(SMALL)
    assert generate(model, [[1, 2]], 20, temperature=0.0) == [
        greedy_without_cache(model, [1, 2], 20)
    ]


def test_generation_keeps_what_a_linear_layer_or_a_norm_adds(monkeypatch):
    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 3.0 * super().forward(x)

    class Shifted(model_file.RMSNorm):
        def forward(self, x):
            return super().forward(x) + 1.0

    monkeypatch.setattr(PackedLinear, 'SMALLEST', 1)
    model = make_model(MODERN)
    for part in model.modules():
        if type(part) is torch.nn.Linear:
            part.__class__ = Louder
        elif type(part) is model_file.RMSNorm:
            part.__class__ = Shifted
    assert check_generation(model, [*range(30)]) is None
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(_quantized(model)(ids), model(ids))  # no plain layer to quantize


def test_a_change_that_generation_does_not_know_of_is_found(monkeypatch):
    """attend() itself is changed, which a cache does not go through for a single token."""
    model, plain = make_model(scale=0.1).train(), model_file.attend

    def window(q, k, v, dropout=0.0):
        positions = torch.arange(q.shape[2])
        hidden = (positions[:, None] < positions) | (positions[:, None] - 4 >= positions)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)

    assert check_generation(model, [*range(16)]) is None
    for changed in (
        window,
        lambda *args: 1.2 * plain(*args),
        lambda q, k, v, dropout: plain(q, k, torch.nan * v),
    ):
        monkeypatch.setattr(model_file, 'attend', changed)
        said = check_generation(model, [*range(16)])
        assert 'the logits of generate() differ' in said and '%' in said
    monkeypatch.setattr(model_file, 'attend', plain)
    assert model.training and check_generation(model, [*range(16)]) is None


def test_a_small_difference_is_found_on_a_cpu(monkeypatch):
    """As in a model that has hardly been trained, whose logits hardly depend on attention."""
    model, plain = make_model(scale=0.02), model_file.attend
    assert check_generation(model, [*range(16)]) is None
    monkeypatch.setattr(model_file, 'attend', lambda *args: 1.005 * plain(*args))
    said = check_generation(model, [*range(16)])
    assert 'by 0.2% of their standard deviation' in said


def test_generation_that_fails_is_found(monkeypatch):
    monkeypatch.setattr(CausalSelfAttention, 'attend', None)
    use_cache('plain', monkeypatch)
    monkeypatch.setattr(KVCache, 'attend', lambda self, q, k: q)
    assert check_generation(make_model(), [1]).startswith('generate() fails with TypeError')


@pytest.mark.parametrize('n_tokens', [1, 8, 40])
@pytest.mark.parametrize('prompt', [[1], [1, 2], [*range(16)], [*range(60)]], ids=len)
def test_generation_is_checked_after_any_prompt(prompt, n_tokens):
    for config in (SMALL, replace(SMALL, block_size=1), replace(SMALL, block_size=2)):
        assert check_generation(make_model(config), prompt, n_tokens) is None
