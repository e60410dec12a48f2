"""The lesson of --explain: every number equals that of torch."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from microscope import ARCHITECTURES, plain_adamw
from torch.nn import functional as F

from nib.checkpoint.start import new_model
from nib.errors import UserError
from nib.lessons import walkthrough
from nib.tokens.batches import BatchLoader


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    st.floats(-2, 2),
    st.floats(1e-5, 0.1),
    st.floats(0, 0.99),
    st.floats(0, 0.999),
    st.floats(0, 0.5),
)
def test_adamw_by_hand_is_torchs(gradients, start, lr, beta1, beta2, decay):
    weight = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    by_hand = walkthrough.AdamWByHand(lr, beta1, beta2, decay)
    for gradient in gradients:
        step = by_hand.step(weight.item(), gradient)
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert step.after == pytest.approx(weight.item(), abs=1e-9, rel=1e-9)
        theirs = [optimizer.state[weight][key].item() for key in ('exp_avg', 'exp_avg_sq')]
        assert [step.m, step.v] == pytest.approx(theirs, abs=1e-9)


def test_finite_differences_against_derivatives_by_hand():
    w = torch.tensor([[2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    slope, plus, minus = walkthrough.finite_difference(
        lambda: w[0, 0] ** 3 * w[0, 1].exp(), w, (0, 0)
    )
    assert slope == pytest.approx(12 * math.exp(-3), rel=1e-8)
    assert (plus, minus) == pytest.approx(
        [(2 + h) ** 3 * math.exp(-3) for h in (1e-5, -1e-5)], rel=1e-12
    )
    assert w.tolist() == [[2.0, -3.0]]


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_number_of_the_walk_through_is_torchs(debug, make_training, name):
    flags = [
        f'--{key}={value}'
        for key, value in (
            ARCHITECTURES[name] | {'n_head': 4, 'dropout': 0.3, 'grad_clip': 0.5}
        ).items()
    ]
    done = debug('--explain', *flags, '--dtype=bfloat16')  # it is float32 all the same
    assert done.returncode == 0, done.stderr
    said = done.stdout

    def figures(label) -> list[float]:
        line = next(line for line in said.splitlines() if line.strip().startswith(label))
        return [
            float(word)
            for word in line.split(label)[1].split()
            if re.fullmatch(r'[+-]?[\d.]+(e[+-]\d+)?', word)
        ]

    training = make_training(*flags)
    values, data = training.values, training.data
    model = new_model(values, data, None).eval()
    batches = [
        BatchLoader(data.train, 16, 4, values['seed'], 1).batch(step, 0) for step in range(3)
    ]
    x, y = batches[0]
    losses = F.cross_entropy(model(x).flatten(0, 1).double(), y.flatten(), reduction='none')
    own = float(losses[15].detach())
    assert figures('loss of this token    -ln p = -ln') == pytest.approx(
        [math.exp(-own), own], rel=1e-4
    )
    assert figures('loss of the batch') == pytest.approx(
        [float(losses.mean().detach()), 64], rel=1e-5
    )
    assert figures('the target, p - 1') == pytest.approx([math.exp(-own) - 1] * 2, rel=1e-5)

    losses.mean().backward()
    gradient = model.transformer.h[0].mlp.c_fc.weight.grad.clone()
    index = tuple(map(int, re.search(r'c_fc\.weight\[(\d+), (\d+)\] = ', said).groups()))
    assert float(gradient[index].abs()) == float(gradient.abs().max())
    by_difference, by_autograd = (
        figures('(loss(w + h) - loss(w - h)) / 2h')[0],
        figures('loss.backward()')[0],
    )
    assert by_difference == pytest.approx(by_autograd, rel=1e-6)
    assert by_autograd == pytest.approx(float(gradient[index]), rel=1e-3)

    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    whole, divided, undivided = (
        figures(label)
        for label in (
            'the whole batch at once',
            'sum of loss / 4: train.py',
            'sum of loss, not divided',
        )
    )
    assert whole == pytest.approx([float(gradient[index]), norm], rel=1e-3, abs=1e-7)
    assert divided == pytest.approx(whole, rel=1e-4, abs=2e-8)
    assert undivided == pytest.approx([4 * figure for figure in whole], rel=1e-3, abs=1e-7)
    assert len(re.findall('micro batch . alone', said)) == 4

    factor = min(1.0, 0.5 / (norm + 1e-6))
    assert figures('norm before') == pytest.approx([norm], rel=1e-4)
    assert figures('factor, at most 1') == pytest.approx([factor] * 2, rel=1e-4)
    assert figures('gradient of the weight           ')[:2] == pytest.approx(
        [factor * float(gradient[index])] * 2, rel=1e-3
    )
    assert figures('norm after') == pytest.approx([min(norm, 0.5)] * 2, rel=1e-4)

    model.zero_grad()
    optimizer, weight, seen = plain_adamw(model, values), model.transformer.h[0].mlp.c_fc.weight, []
    for x, y in batches:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        seen.append((float(weight.detach()[index]), float(weight.grad[index])))
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state[weight]
        seen[-1] += (
            float(state['exp_avg'][index]),
            float(state['exp_avg_sq'][index]),
            float(weight.detach()[index]),
        )
    before, gradients, m, v, after = zip(*seen)
    for label, wanted in (
        ('w             the weight', before),
        ('w by hand     w + decay + update', after),
        ("w by torch    after train_step, by torch's fused kernel", after),
        ('g             its gradient, clipped', gradients),
    ):
        assert figures(label) == pytest.approx(wanted, abs=1e-6), label
    assert figures('m             0.9 m + 0.1 g')[-3:] == pytest.approx(m, abs=1e-6)
    assert figures('v             0.95 v + 0.05 g^2')[-3:] == pytest.approx(v, abs=1e-6)
    assert all(figure < 1e-6 for figure in figures('difference    the largest of m, v and w'))


def test_the_walk_through_is_adamws_whatever_the_optimizer(train_here, debug, tmp_path):
    def last_section(*flags):
        done = debug('--explain', *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.split('5. ADAMW\n')[1]

    sentence = (
        "\nIn this run, Muon updates the blocks' matrices and AdamW the rest. "
        'Here, AdamW updates all of them.\n'
    )
    assert last_section('--optimizer=muon') == sentence + last_section(
        '--optimizer=adamw'
    ).removeprefix('\n')
    train_here(tmp_path / 'run', '--max_iters=4', '--optimizer=muon')
    resumed = last_section(
        '--init_from=resume', f'--out_dir={tmp_path / "run"}'
    )  # Muon's memory is no AdamW's
    assert resumed.startswith(sentence) and ' t = 1 ' in resumed


@pytest.mark.parametrize('grad_clip', [0.0, 100.0])
def test_gradients_that_are_short_enough_are_not_clipped(debug, grad_clip):
    said = debug('--explain', f'--grad_clip={grad_clip}').stdout
    rows = {
        line[:28].strip(): line[28:].split() for line in said.split('4. CLIPPING')[1].splitlines()
    }
    assert rows['factor, at most 1'][:2] == ['1.00000000', '1.00000000']
    assert (
        rows['norm before'][0] == rows['norm after'][0]
        and 'nothing is clipped in this step' in said
    )


def ignore(training, monkeypatch, places):
    """Lets the loss ignore the targets at some places of every batch."""
    whole = training.training.batches.first_sequences

    def first_sequences(*arguments):
        x, y = whole(*arguments)
        y[places] = -1
        return x, y

    monkeypatch.setattr(training.training.batches, 'first_sequences', first_sequences)
    return whole(0, training.n_sequences)


def test_the_lesson_follows_a_sequence_that_has_targets(make_training, monkeypatch):
    training = make_training('--batch_size=4')
    places = torch.zeros(4, 16, dtype=torch.bool)
    places[0] = places[1, 9:] = places[2, :10] = True
    x, y = ignore(training, monkeypatch, places)
    with torch.no_grad():
        log_probs = training.model(x).log_softmax(dim=-1)
    losses = -log_probs.gather(2, y[..., None])[..., 0]
    said = '\n'.join(walkthrough.walk_through(training))
    own = re.search(r'loss of this token .* = ([\d.]+) nats', said)[1]
    assert float(own) == pytest.approx(float(losses[1, 8]), rel=1e-5)
    mean, n = re.search(r'loss of the batch +([\d.]+) nats, .* over (\d+) tokens', said).groups()
    assert n == '18'  # the third sequence has no target up to there
    assert float(mean) == pytest.approx(float(losses[[1, 3], :9].mean()), rel=1e-5)
    assert not re.search(r'\bnan\b', said)


def test_an_examination_without_targets_says_how_to_examine_more(make_training, monkeypatch):
    training = make_training('--batch_size=4', '--batch_tokens=32')
    with pytest.raises(UserError, match=r'32 tokens .*--batch_tokens=64 examines all'):
        ignore(training, monkeypatch, slice(0, 2))
        next(walkthrough.walk_through(training))
    training = make_training('--batch_size=4')
    with pytest.raises(UserError, match=r'64 tokens .* every batch must have some that count'):
        ignore(training, monkeypatch, slice(0, 4))
        next(walkthrough.walk_through(training))
