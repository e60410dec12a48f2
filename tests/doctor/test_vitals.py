"""Vital signs equal values computed by hand; measuring neither waits nor changes the training."""

import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import records
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.doctor.vitals import KEPT, SAMPLE, EvaluationSigns, Vitals, gradient_noise, sample
from nib.optim import Optimizer
from nib.tokens.batches import BatchLoader

NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)
VOCAB = 11
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 2000).astype(np.uint16)


def make(method='adamw', micro_steps=1, batch_size=4, **changes):
    """A model whose every matrix is small enough to be looked at whole, and all that watches it."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(VOCAB, **{'block_size': 8, 'n_layer': 2, 'n_head': 2, 'n_embd': 16} | changes)
    )
    assert all(p.numel() <= SAMPLE for p in model.parameters())
    optimizer = Optimizer(model, method, betas=(0.9, 0.95))
    batches = BatchLoader(TOKENS, model.config.block_size, batch_size, 0, micro_steps)
    return model, optimizer, batches, Vitals(model, optimizer, NO_SCALER, batches, nullcontext())


def step(model, optimizer, batches, vital_signs, number, lr=1e-2):
    """A training step; returns the gradients."""
    for x, y in vital_signs.begin(batches.micro_batches(number)):
        loss = model(x, y) / batches.micro_steps
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.lr = lr
    optimizer.step(torch.tensor(True))
    optimizer.zero_grad()
    vital_signs.note(loss.detach(), torch.tensor(1.0))
    return gradients


# -- weights and gradients -------------------------------------------------------------------------


GROUPS = {'attention': '.attn.', 'mlp': '.mlp.', 'head': 'lm_head.', 'embedding': 'transformer.w'}


def matrices(model, part) -> np.ndarray:
    return np.concatenate(
        [
            p.detach().double().numpy().ravel()
            for name, p in model.named_parameters()
            if p.dim() > 1 and part in name
        ]
    )


@pytest.mark.parametrize('method', ['adamw', 'muon'])
@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'tied_head': False, 'bias': True},
        {'zero_init': True, 'position': 'rotary', 'mlp': 'swiglu'},
        {'n_layer': 1, 'block_size': 1},
    ],
    ids=str,
)
def test_ratio_rms_and_gradients_are_those_of_the_whole_matrices(method, changes):
    model, optimizer, batches, vital_signs = make(method, **changes)
    groups = {
        group: part
        for group, part in GROUPS.items()
        if group != 'head' or not model.config.tied_head
    }
    memory = {name: 0.0 for name, p in model.named_parameters() if '.h.' in name and p.dim() > 1}
    for number in range(3):
        before = {group: matrices(model, part) for group, part in groups.items()}
        gradients = step(model, optimizer, batches, vital_signs, number)
        for name in memory:
            g = gradients[name].double().numpy()
            memory[name] = 0.95 * memory[name] + 0.05 * (g if method == 'muon' else g**2)
        read = vital_signs.read(number + 1, 1e-2, 1.0)
        after = {group: matrices(model, part) for group, part in groups.items()}
        norm = np.linalg.norm
        assert read.update_ratio == pytest.approx(
            {g: norm(after[g] - before[g]) / norm(before[g]) for g in groups}, rel=1e-3
        )
        assert read.weight_rms == pytest.approx(
            {g: np.sqrt(np.mean(after[g] ** 2)) for g in groups}, rel=1e-5
        )
        for block, rms in enumerate(read.block_grad_rms):
            mine = np.concatenate(
                [m.ravel() for name, m in memory.items() if f'.h.{block}.' in name]
            )
            assert rms == pytest.approx(
                np.sqrt(np.mean(mine**2 if method == 'muon' else mine)), rel=1e-4
            )
        assert len(read.block_grad_rms) == model.config.n_layer
    if not model.config.zero_init:
        assert min(read.update_ratio.values()) > 1e-3


def test_weights_whose_storage_was_replaced_are_still_watched():
    """A fork may swap the weights with their mean for an evaluation."""
    model, optimizer, batches, vital_signs = make('adamw')
    for p in model.parameters():
        p.data = p.detach().clone()
    before = {group: matrices(model, GROUPS[group]) for group in ('attention', 'mlp')}
    step(model, optimizer, batches, vital_signs, 0)
    ratios = vital_signs.read(1, 1e-2, 1.0).update_ratio
    for group, was in before.items():
        moved = np.linalg.norm(matrices(model, GROUPS[group]) - was)
        assert ratios[group] == pytest.approx(moved / np.linalg.norm(was), rel=1e-3)


def test_weights_of_zeros_have_no_ratio():
    model, optimizer, batches, vital_signs = make()
    with torch.no_grad():
        for part in ('wte', 'wpe'):
            model.transformer[part].weight.zero_()
    step(model, optimizer, batches, vital_signs, 0)
    assert math.isnan(vital_signs.read(1, 1e-2, 1.0).update_ratio['embedding'])


@pytest.mark.parametrize('shape', [(300, 400), (4097, 1), (65, 1000), (50257, 8)])
def test_a_sample_stands_for_its_matrix(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        0.5, 1.5, shape[1]
    )
    for given in (matrix, matrix.t()):
        few = sample(given)
        assert (
            SAMPLE / 3 < few.numel() <= SAMPLE
            and few.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
        )
        assert few.square().mean().sqrt().item() == pytest.approx(
            matrix.square().mean().sqrt().item(), rel=0.06
        )
    columns = {
        index % shape[1] for index in few.storage_offset() + few.stride(0) * np.arange(few.numel())
    }
    assert len(columns) == min(shape[1], few.numel())


def test_small_matrices_are_taken_whole():
    matrix = torch.arange(4096.0).view(64, 64)
    assert sample(matrix).tolist() == matrix.flatten().tolist()


# -- every step ------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 7, KEPT, KEPT + 5])
def test_losses_and_norms_of_every_step_arrive(n):
    model, optimizer, batches, vital_signs = make()
    for first in (0, n):  # twice, as nothing of the first time may be left
        list(vital_signs.begin(batches.micro_batches(0)))
        for i in range(first, first + n):
            vital_signs.note(torch.tensor(float(i)), torch.tensor(-float(i)))
        read = vital_signs.read(first + n, 0.0, 1.0)
        assert read.losses == [float(i) for i in range(first, first + n)][-KEPT:]
        assert read.grad_norms == [-loss for loss in read.losses]


def test_metrics_name_what_was_clipped():
    model, optimizer, batches, vital_signs = make()
    list(vital_signs.begin(batches.micro_batches(0)))
    for norm in (0.5, 2.0, 3.0, math.inf):
        vital_signs.note(torch.tensor(1.0), torch.tensor(norm))
    read = vital_signs.read(4, 0.0, 1.0)
    assert (
        read.metrics(grad_clip=1.0)['clipped'] == 0.75
        and read.metrics(grad_clip=0.0)['clipped'] is None
    )
    assert set(read.metrics(1.0)) == {
        'loss/mean',
        'loss/max',
        'clipped',
        'loss_scale',
        'update_ratio/attention',
        'update_ratio/mlp',
        'update_ratio/embedding',
    }


class Waiting(TorchDispatchMode):
    """Notes the operations whose result the host waits for on a GPU."""

    WAITS = ('_local_scalar_dense', 'nonzero', 'equal', 'is_nonzero', 'masked_select', 'unique')

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.WAITS):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_only_the_reading_waits_and_it_waits_once():
    model, optimizer, batches, vital_signs = make()
    given = list(batches.micro_batches(0))
    with Waiting() as waiting:
        list(vital_signs.begin(iter(given)))
        vital_signs.note(torch.tensor(1.0), torch.tensor(1.0))
        vital_signs.read(1, 0.0, 1.0)  # by one tolist(), which is no operation
    assert waiting.seen == []
    with Waiting() as waiting:
        float(torch.tensor(1.0))
    assert waiting.seen  # it would have been noticed


# -- batches ---------------------------------------------------------------------------------------


def look_at(vital_signs, *micro_batches):
    assert [id(batch) for batch in vital_signs.begin(iter(micro_batches))] == [
        id(batch) for batch in micro_batches
    ]
    vital_signs.note(torch.tensor(1.0), torch.tensor(1.0))
    read = vital_signs.read(1, 0.0, 1.0)
    return read.repeated, read.shifted, read.copied


def test_shares_of_known_batches():
    vital_signs = make()[3]
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    next_token = torch.tensor([[2, 3, 4, 9], [6, 7, 8, 9]])
    other = torch.tensor([[1, 2, 3, 9], [9, 9, 9, 9]])
    assert look_at(vital_signs, (x, next_token), (other, other)) == (
        None,
        1.0,
        0.0,
    )  # the first micro batch is looked at
    assert look_at(vital_signs, (x, next_token)) == (1.0, 1.0, 0.0)
    assert look_at(vital_signs, (other, x)) == (3 / 8, 0.0, 3 / 8)
    assert look_at(vital_signs, (x, x)) == (3 / 8, 0.0, 1.0)
    # As from a changed loader, whose first batches are shorter or have fewer rows.
    assert look_at(vital_signs, (x[:, :3], next_token[:, :3])) == (0.0, 1.0, 0.0)
    assert look_at(vital_signs, (x[:1], next_token[:1])) == (0.0, 1.0, 0.0)


def test_a_block_of_one_token_shows_nothing_of_the_shift():
    vital_signs = make(block_size=1)[3]
    assert look_at(vital_signs, (torch.tensor([[1], [2]]), torch.tensor([[2], [2]]))) == (
        None,
        1.0,
        0.5,
    )


# -- noise -----------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A loss whose gradient is the batch itself; with weights that are frozen or not used."""

    def __init__(self, n):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, n))
        self.frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.ones(2, 2))
        self.register_buffer('passes', torch.zeros(()))

    def forward(self, x, y):
        self.passes += 1  # the passes of training only
        return (self.weight * x).sum()


def noise_of(gradients) -> float:
    model = Linear(gradients.shape[1])
    found = gradient_noise(
        model, NO_SCALER, ((g[None].float(), None) for g in gradients), nullcontext()
    )
    assert model.weight.grad is None and model.passes == 0
    return found


def test_noise_scale_of_a_known_distribution():
    generator = torch.Generator().manual_seed(0)
    signal, sigma = torch.linspace(-1, 1, 60), 0.7
    gradients = signal + sigma * torch.randn(800, 60, generator=generator)
    assert noise_of(gradients) == pytest.approx(
        60 * sigma**2 / float(signal.square().sum()), rel=0.05
    )  # tr(Sigma) / |G|^2


def test_noise_scale_by_hand():
    gradients = np.array([[1.0, 2.0], [3.0, 0.0], [2.0, 2.0]])
    pairs = [float(a @ b) for a, b in combinations(gradients, 2)]
    signal, square = sum(pairs) / 3, (5 + 9 + 8) / 3
    assert pairs == [3.0, 6.0, 6.0]
    assert noise_of(torch.tensor(gradients)) == pytest.approx((square - signal) / signal)


def test_noise_scale_at_its_ends():
    same = torch.ones(4, 3)
    assert noise_of(same) == 0.0
    assert noise_of(torch.tensor([[1.0], [-1.0]])) == math.inf  # no signal
    assert math.isnan(noise_of(torch.tensor([[1.0], [math.inf]]))) and math.isnan(
        noise_of(torch.full((3, 2), math.nan))
    )


@pytest.mark.parametrize('micro_steps', [1, 3])
def test_noise_of_the_model_is_that_of_its_batches_gradients(micro_steps):
    model, optimizer, batches, vital_signs = make(
        micro_steps=micro_steps, batch_size=64
    )  # 512 tokens, so 12 batches
    val_batch = batches.batch(99, 0)
    gradients = []
    for i in range(12):
        loss = model(*batches.batch(i, 0))
        gradients.append(
            np.concatenate(
                [
                    g.double().numpy().ravel()
                    for p, g in zip(
                        model.parameters(), torch.autograd.grad(loss, list(model.parameters()))
                    )
                    if p.dim() > 1
                ]
            )
        )
    products = np.array(gradients) @ np.array(gradients).T
    signal = (products.sum() - products.trace()) / (12 * 11)
    shown = vital_signs.evaluate(1, 1, 2.0, 2.0, val_batch)
    assert shown.noise_scale == pytest.approx(
        (products.trace() / 12 - signal) / signal / micro_steps, rel=1e-3
    )
    assert all(p.grad is None for p in model.parameters())


def test_noise_is_measured_with_the_first_second_fourth_and_eighth_evaluation():
    model, optimizer, batches, vital_signs = make(batch_size=512)
    measured = [
        vital_signs.evaluate(number, number, 2.0, 2.0, batches.batch(0, 0)).noise_scale is not None
        for number in range(10)
    ]
    assert [number for number, was in enumerate(measured) if was] == [
        1,
        2,
        4,
        8,
    ]  # and not before the first step


def test_an_evaluation_is_read_from_its_record():
    record = {
        'step': 4,
        'loss/train': 2.0,
        'loss/val': 2.5,
        'dead_units': 0.0,
        'attention_logit': 3.0,
        'attention_entropy': 0.5,
        'activation_std': 1.0,
    }
    vital_signs = EvaluationSigns(4, 2.0, 2.5, 0.0, 3.0, 0.5, 1.0, None)
    assert (
        EvaluationSigns.of_record({**record, 'sample': 'text', 'bits_per_byte/val': 3.0})
        == vital_signs
    )
    assert EvaluationSigns.of_record({**record, 'noise_scale': 7.0}) == replace(
        vital_signs, noise_scale=7.0
    )
    assert EvaluationSigns.of_record({**record, 'noise_scale': None}) == replace(
        vital_signs, noise_scale=math.inf
    )
    for damage in (
        {'loss/val': None},
        {'dead_units': '0.1'},
        {'noise_scale': 'large'},
        {'loss/train': [2.0]},
        {'attention_logit': 10**400},
    ):
        assert EvaluationSigns.of_record(record | damage) is None
    assert EvaluationSigns.of_record({'step': 4, 'loss/step': 2.0}) is None


def test_a_gradient_that_overflows_leaves_the_noise_unknown():
    model, optimizer, batches, vital_signs = make()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.inf)
    assert vital_signs.evaluate(1, 1, 2.0, 2.0, batches.batch(0, 0)).noise_scale is None


@pytest.mark.parametrize(
    'changes', [{'block_size': 1}, {'n_layer': 1}, {'mlp': 'relu2', 'bias': True}], ids=str
)
def test_activations_of_a_fresh_model_are_in_their_ranges(changes):
    model, optimizer, batches, vital_signs = make(**changes)
    shown = vital_signs.evaluate(0, 0, 2.0, 2.0, batches.batch(0, 0))
    assert (
        0.0 <= shown.dead_units < 0.5
        and shown.attention_logit < 1.0
        and 0.9 < shown.attention_entropy <= 1.0 + 1e-6
    )
    assert model.training and set(shown.metrics()) == {
        'dead_units',
        'attention_logit',
        'attention_entropy',
        'activation_std',
        'noise_scale',
    }


# -- the training ----------------------------------------------------------------------------------


LOOKS = ['--log_interval=1', '--eval_interval=4'], ['--log_interval=1000', '--eval_interval=1000']


@pytest.mark.parametrize(
    'flags',
    [
        ['--dropout=0.2'],
        ['--dtype=float16', '--max_iters=10'],
        ['--optimizer=muon', '--zero_init', '--no-tied_head'],
    ],
    ids=lambda flags: flags[0],
)
def test_looking_leaves_the_training_as_it_is(train_here, tmp_path, flags):
    ends = []
    for i, looks in enumerate(LOOKS):
        done = train_here(tmp_path / str(i), *flags, *looks)
        assert done.returncode == 0, done.stderr
        ends.append(store.load(tmp_path / str(i)))
    (first, tensors), (second, others) = ends
    assert first.step == second.step >= 10
    for kind in ('model', 'optimizer'):
        assert tensors[kind].keys() == others[kind].keys()
        for name, tensor in tensors[kind].items():
            assert torch.equal(tensor, others[kind][name]), name
    assert first.state['train']['scaler'] == second.state['train']['scaler']
    looked, seldom = (
        sum('update_ratio/mlp' in record for record in records(tmp_path / str(i))) for i in range(2)
    )
    assert looked == first.step and seldom == 1


@pytest.mark.parametrize(
    'frozen, n_ratios', [('weight', 0), ('.h.', 1), ('attn', 2)], ids=['matrices', 'blocks', 'attn']
)
def test_a_model_with_frozen_weights_is_watched(
    frozen, n_ratios, train_here, tmp_path, monkeypatch
):
    initialize = GPT.__init__

    def freeze(model, config):
        initialize(model, config)
        for name, p in model.named_parameters():
            p.requires_grad_(frozen not in name)

    monkeypatch.setattr(GPT, '__init__', freeze)
    done = train_here(tmp_path / 'run', '--bias', '--max_iters=6', '--eval_interval=3')
    assert done.returncode == 0 and 'Warning' not in done.stderr, done.stderr
    written = records(tmp_path / 'run')
    assert max(sum('update_ratio/' in key for key in record) for record in written) == n_ratios
    assert any('noise_scale' in record for record in written) == (n_ratios > 0)


@pytest.mark.parametrize(
    'flags',
    [
        ['--block_size=1', '--batch_size=1'],
        ['--n_layer=1', '--zero_init'],
        ['--gradient_accumulation_steps=6'],
    ],
    ids=lambda flags: flags[0],
)
def test_signs_of_odd_runs_are_recorded(train_here, tmp_path, flags):
    done = train_here(
        tmp_path / 'run', *flags, '--max_iters=6', '--lr_decay_iters=6', '--eval_interval=3'
    )
    assert done.returncode == 0 and 'Warning' not in done.stderr, done.stderr
    written = records(tmp_path / 'run')
    assert sum('update_ratio/attention' in record for record in written) == 6
    assert [record['step'] for record in written if 'noise_scale' in record] == [
        3
    ]  # not in the last evaluation
    evaluated = [record for record in written if 'loss/val' in record]
    for record, vital_signs in zip(evaluated, map(EvaluationSigns.of_record, evaluated)):
        assert (vital_signs.step, vital_signs.train_loss, vital_signs.val_loss) == (
            record['step'],
            record['loss/train'],
            record['loss/val'],
        )
        assert vital_signs.metrics().items() - {('noise_scale', None)} <= record.items()
    assert [record for record in written if EvaluationSigns.of_record(record)] == evaluated and len(
        evaluated
    ) == 3
    assert not any(
        'finding/constant_batches' in record or 'finding/targets_not_shifted' in record
        for record in written
    )
