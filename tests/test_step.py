"""The functions of train.py, compared with arithmetic: one step, learning rate, evaluation."""

import math
from contextlib import contextmanager

import pytest
import torch

import train as training
from model import GPT, GPTConfig
from nib import guard, optim
from nib.machine.device import autocast
from nib.machine.ranks import Ranks
from nib.tokens.batches import BatchLoader

SMALL = GPTConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=32)


def step(model, optimizer, batches, grad_clip, seed=0, number=0):
    """train_step on one process, in float32."""
    t = training.Training(
        model,
        model,
        optimizer,
        torch.amp.GradScaler('cpu', enabled=False),
        None,
        guard.BadSteps(3, 'cpu'),
        autocast('float32', 'cpu'),
        Ranks(),
        'cpu',
        len(batches),
        grad_clip,
        seed,
    )
    return training.train_step(t, batches, number)


def test_gradients_are_exchanged_on_the_last_micro_step_only():
    class Replicas(
        torch.nn.Module
    ):  # as DistributedDataParallel, whose backward pass exchanges gradients unless no_sync
        def __init__(self):
            super().__init__()
            self.model, self.syncing, self.passes = GPT(SMALL), True, []

        @contextmanager
        def no_sync(self):
            self.syncing = False
            yield
            self.syncing = True

        def forward(self, x, y):
            loss = self.model(x, y)
            loss.register_hook(lambda grad: self.passes.append(self.syncing))
            return loss

    model = Replicas()
    x = torch.zeros(1, 4, dtype=torch.long)
    step(model, optim.Optimizer(model), [(x, x)] * 3, 1.0)
    assert model.passes == [False, False, True]


def test_accumulated_gradients_are_those_of_one_large_batch():
    torch.manual_seed(0)
    model = GPT(SMALL)
    ids = torch.randint(31, (64, 17))
    gradients = []
    for micro_steps in (1, 4):
        batches = [(part[:, :-1], part[:, 1:]) for part in ids.chunk(micro_steps)]
        caught = {}

        class Catch:  # an optimizer that only looks
            def step(self, usable):
                caught.update({name: p.grad.clone() for name, p in model.named_parameters()})

            def zero_grad(self):
                model.zero_grad()

        loss, norm = step(model, Catch(), batches, 0.0)
        gradients.append((caught, loss, norm))
    (once, loss, norm), (accumulated, loss4, norm4) = gradients
    for name in once:
        torch.testing.assert_close(once[name], accumulated[name], atol=1e-6, rtol=0)
    assert loss.item() == pytest.approx(loss4.item(), abs=1e-6)
    assert norm.item() == pytest.approx(norm4.item(), rel=1e-5)
    size = math.sqrt(sum(grad.square().sum().item() for grad in once.values()))
    assert size == pytest.approx(norm.item(), rel=1e-5)  # grad_clip 0 clips nothing


def test_a_step_equals_plain_pytorch():
    """Forward, backward, clip, AdamW, written out with torch.optim.AdamW's unfused loop."""
    torch.manual_seed(0)
    config = GPTConfig(
        **{**vars(SMALL), 'bias': False}
    )  # a key's bias has no gradient but rounding, which Adam would blow up
    ours, theirs = GPT(config), GPT(config)
    theirs.load_state_dict(ours.state_dict())
    optimizer = optim.Optimizer(ours, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.lr = 1e-2
    groups = [
        {'params': [p for p in theirs.parameters() if p.dim() == 1], 'weight_decay': 0.0},
        {'params': [p for p in theirs.parameters() if p.dim() == 2], 'weight_decay': 0.1},
    ]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False)
    for number in range(5):
        ids = torch.randint(31, (4, 17))
        loss, norm = step(ours, optimizer, [(ids[:, :-1], ids[:, 1:])], 0.5, (0, number, 0))
        expected = theirs(ids[:, :-1], ids[:, 1:])
        expected.backward()
        norm_by_hand = math.sqrt(
            sum(p.grad.double().square().sum().item() for p in theirs.parameters())
        )
        for p in theirs.parameters():
            p.grad *= min(1.0, 0.5 / norm_by_hand)
        plain.step()
        plain.zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert norm.item() == pytest.approx(norm_by_hand, rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    'schedule, by_hand',
    [
        (
            'cosine',
            {350: 1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2, 600: 5.5e-4, 1100: 1e-4, 5000: 1e-4},
        ),
        ('linear', {350: 1e-4 + 9e-4 * 0.75, 600: 5.5e-4, 1100: 1e-4, 1101: 1e-4}),
        (
            'wsd',
            {
                350: 1e-3,
                900: 1e-3,
                950: 1e-4 + 9e-4 * 0.75,
                1050: 1e-4 + 9e-4 * 0.25,
                1100: 1e-4,
                5000: 1e-4,
            },
        ),
        ('constant', {350: 1e-3, 1100: 1e-3, 5000: 1e-3}),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(monkeypatch, schedule, by_hand):
    for key, value in dict(
        learning_rate=1e-3,
        min_lr=1e-4,
        warmup_iters=100,
        lr_decay_iters=1100,
        cooldown_iters=200,
        lr_schedule=schedule,
    ).items():
        monkeypatch.setattr(training, key, value)
    for step, lr in ({0: 1e-3 / 101, 50: 1e-3 * 51 / 101, 100: 1e-3} | by_hand).items():
        assert training.get_lr(step) == pytest.approx(lr, rel=1e-9)


def test_evaluation_turns_dropout_off_and_weighs_every_token_alike():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SMALL), 'dropout': 0.5})).train()
    tokens = torch.randint(31, (16 * 7 + 1,)).numpy()
    precision = autocast('float32', 'cpu')
    together, in_parts = (
        training.evaluate(model, loader.eval_batches(tokens), precision, Ranks())
        for loader in (BatchLoader(tokens, 16, size, 0, 1) for size in (7, 4))
    )
    assert model.training
    x = torch.from_numpy(tokens)
    with torch.no_grad():
        by_hand = model.eval()(x[:-1].view(7, 16), x[1:].view(7, 16)).item()
    assert together == pytest.approx(by_hand, abs=1e-6) and in_parts == pytest.approx(
        by_hand, abs=1e-6
    )


def test_evaluation_does_not_count_targets_that_the_loss_ignores():
    torch.manual_seed(0)
    model = GPT(SMALL)
    x, y = torch.randint(31, (2, 4, 16))
    y[0, 3:] = y[2] = -1
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    found = training.evaluate(model, batches, autocast('float32', 'cpu'), Ranks())
    with torch.no_grad():
        assert found == pytest.approx(model(x, y).item(), abs=1e-6)
