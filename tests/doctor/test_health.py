"""The healthy ranges: what they are derived from, and where they end."""

import math

import pytest
import torch
from microscope import ARCHITECTURES
from torch.nn import functional as F

from model import GPT, GPTConfig
from nib.doctor import health, remedies


def test_adamws_first_step_is_as_much_larger_as_it_is_said():
    torch.manual_seed(0)
    for beta1 in (0.0, 0.5, 0.9):
        weight = torch.zeros(20_000, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(beta1, 0.999), weight_decay=0.0)
        sizes = []
        for _ in range(60):
            before = weight.detach().clone()
            weight.grad = torch.randn_like(weight)
            optimizer.step()
            sizes.append(float((weight.detach() - before).square().mean().sqrt()))
        assert sizes[0] == pytest.approx(1.0, abs=1e-4)
        assert sizes[0] / sizes[-1] == pytest.approx(health.first_step_factor(beta1), rel=0.05)


def test_the_tolerance_of_the_first_loss_covers_what_fresh_models_have():
    """Their spread, which it is derived from, and themselves."""
    for n_embd, vocab_size, kind in (
        (64, 65, 'GPT-2'),
        (256, 65, 'modern'),
        (256, 1000, 'one key for all'),
    ):
        for seed in range(3):
            torch.manual_seed(seed)
            sizes = {
                'vocab_size': vocab_size,
                'block_size': 32,
                'n_layer': 2,
                'n_head': 4,
                'n_embd': n_embd,
            }
            model = GPT(GPTConfig(**sizes, **ARCHITECTURES[kind]))
            x, y = torch.randint(vocab_size, (2, 4, 32))
            with torch.no_grad():
                logits = model(x)
            others = (
                torch.ones_like(logits).scatter(2, x[..., None], 0).bool()
            )  # a tied head has guessed the input itself
            assert float(logits[others].var()) == pytest.approx(0.02**2 * n_embd, rel=0.15)
            excess = float(F.cross_entropy(logits.flatten(0, 1), y.flatten())) - math.log(
                vocab_size
            )
            assert abs(excess) < health.start_tolerance(n_embd, 128)


def test_marks_are_where_the_ranges_end():
    def row(ratio, name='h.0.mlp.c_fc.weight', shape=(4, 4), norm=1.0):
        return health.ParameterStats(name, shape, 0.02, 0.0, 0.1, 0.1, norm, ratio)

    limits = health.update_limits(0.9, first=False, trained=True)
    assert limits == pytest.approx((0.001 / health.SLACK, 0.01 * 2 * health.SLACK))
    for ratio, mark in (
        (0.001, ''),
        (0.01, ''),
        (limits[1] * 1.01, 'update too large'),
        (limits[0] * 0.99, 'update too small'),
    ):
        assert remedies.mark_parameter(row(ratio), limits) == mark
        assert remedies.mark_parameter(row(ratio, shape=(4,)), limits) == ''
    large = {'attention': 0.2, 'mlp': 0.05, 'head': 9.0, 'embedding': 9.0}
    for name, wanted in (
        ('h.0.attn.c_proj.weight', limits),
        ('h.0.mlp.c_proj.weight', (limits[0], math.inf)),  # the MLPs together are not too large
        ('lm_head.weight', (limits[0], math.inf)),
        ('wte.weight', (0.0, math.inf)),  # a batch does not have all tokens
    ):
        assert health.limits_of(row(0.3, name), large, limits) == wanted
    embedding = health.limits_of(row(0.3, 'wte.weight'), large, limits)
    assert remedies.mark_parameter(row(limits[0] * 0.99), embedding) == ''
    assert remedies.mark_parameter(row(0.0), embedding) == 'update too small'
    assert remedies.mark_parameter(row(None), limits) == ''
    assert remedies.mark_parameter(row(0.005, norm=0.0), limits) == 'no gradient'
    assert (
        health.update_limits(0.9, first=True, trained=True)[0] == 0.0
    )  # fine-tuning may take small steps
    first = health.update_limits(0.9, first=True, trained=False)
    assert first == pytest.approx([math.sqrt(19) * end for end in (0.001 / 5, 0.01 * 5)])
    for warmup_iters, high in ((9, first[1]), (10, 1.0)):  # a warm-up avoids such a step
        with_warmup = health.update_limits(0.9, True, False, warmup_iters=warmup_iters)
        assert with_warmup == (first[0], high)
    muon = health.update_limits(0.9, False, True, method='muon')
    assert muon == pytest.approx(
        [limit * end for limit, end in zip((1 / 5, 10), health.MUON_RATIO)]
    )
    first = health.update_limits(0.9, True, False, method='muon')
    assert first == pytest.approx((muon[0], muon[1] / 2))  # it is no larger than the others
    for norm, found in (
        (0.09, 'below'),
        (0.11, ''),
        (9.9, ''),
        (10.1, 'above'),
        (math.inf, 'above'),
        (math.nan, 'nan'),
    ):
        assert found in ''.join(
            finding.what for finding in remedies.judge_grad_norm(norm, health.GRAD_NORM)
        )
        assert bool(found) == bool(remedies.judge_grad_norm(norm, health.GRAD_NORM))
    assert health.grad_norm_limits(12, 768, fresh=True) == (0.1, 96.0)
    assert (
        health.grad_norm_limits(12, 768, fresh=False)
        == health.grad_norm_limits(1, 16, fresh=True)
        == (0.1, 10.0)
    )
    assert (
        remedies.judge_start(3.0, 65, None) == []
        and 'worse' in remedies.judge_start(4.2, 65, None)[0].remedy
    )
