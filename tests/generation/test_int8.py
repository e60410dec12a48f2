"""8-bit weights against the same computation in float, and in text that a model writes."""

import pytest
import torch
from small_models import ARCHITECTURES, NAMES, make_model
from torch import nn

from nib.errors import UserError
from nib.generation.int8 import Int8Linear, quantize


def rounded_to_8_bits(matrix):
    """Each row as multiples of its largest absolute value / 127."""
    step = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (matrix / step).round() * step


@pytest.mark.parametrize('shape', [(1, 40), (1, 1, 40), (7, 40), (3, 5, 40)])
@pytest.mark.parametrize('has_bias', [True, False])
def test_a_product_is_that_of_the_dequantized_weights(shape, has_bias):
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=has_bias)
    layer.weight.data[3] = 0.0
    x = torch.randn(shape)
    expected = nn.functional.linear(x, rounded_to_8_bits(layer.weight), layer.bias)
    # x is rounded by at most half of 1/127 of its largest value.
    rounding = x.abs().amax() / 127 * layer.weight.abs().sum(dim=1).max() / 2
    with torch.no_grad():
        actual = Int8Linear(layer.weight, layer.bias)(x)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rounding
    assert (actual - expected).std() < 0.01 * expected.std()


def test_a_row_does_not_depend_on_the_size_of_other_rows():
    torch.manual_seed(0)
    linear, x = Int8Linear(torch.randn(24, 40), torch.randn(24)), torch.randn(4, 40)
    together = linear(torch.cat((x, 1000 * x)))
    assert torch.allclose(linear(torch.cat((x, x)))[:4], together[:4], atol=0.02)
    assert linear(torch.zeros(2, 40)).equal(linear.bias.expand(2, 24))


@pytest.mark.parametrize('config', ARCHITECTURES, ids=NAMES)
@torch.no_grad()
def test_every_architecture_generates_with_8_bit_weights(config):
    """With the cache or not, logits equal those of dequantized weights up to rounding of inputs."""
    model = make_model(config, scale=0.05)
    quantized, dequantized = quantize(model), make_model(config, scale=0.05)
    for module in dequantized.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(rounded_to_8_bits(module.weight))
    idx = torch.randint(config.vocab_size, (2, 12))
    hidden = dequantized.hidden_states(idx, torch.arange(12))
    expected = dequantized.logits(hidden)
    if config.tied_head:  # the embedding itself is not rounded
        expected = hidden @ rounded_to_8_bits(model.head_weight).T
    spread = (quantized(idx) - expected).std() / expected.std()
    assert spread < 0.05
    text = torch.stack(list(quantized.generate(idx.tolist(), 3, temperature=0.0)), dim=1)
    for n in range(3):  # the first tokens of whole passes, or as likely up to rounding
        logits = quantized(torch.cat((idx, text[:, :n]), dim=1))[:, -1]
        chosen = logits.gather(1, text[:, n : n + 1])[:, 0]
        assert (logits.amax(dim=1) - chosen < 0.1 * logits.std(dim=1)).all()
    assert all(p.dtype == torch.float32 for p in model.parameters()), 'the model is unchanged'


def test_8_bit_weights_need_a_cpu():
    with pytest.raises(UserError, match='need a CPU, but the device is meta'):
        quantize(make_model().to('meta'))
