"""Batches: every window once per epoch, the same for any number of ranks and order of requests."""

import time
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import records
from hypothesis import given
from hypothesis import strategies as st

from nib.errors import UserError
from nib.machine.ranks import Ranks
from nib.tokens.batches import BatchLoader, eval_starts, permute

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6).map(
    lambda words: np.array(words, dtype=np.uint64)
)
WINDOWS = 23
GOLDEN = [[323, 291, 355, 179], [55, 167, 7, 183]]


def own_place(n):
    """Tokens that tell where they were: token i is i."""
    return np.arange(n, dtype=np.uint32)


def make_loader(n_tokens=24 * 16 + 5, **changes):
    options = dict(block_size=16, batch_size=4, seed=1, micro_steps=3)
    return BatchLoader(own_place(n_tokens), **{**options, **changes})


def starts(loader, step, micro_step=0):
    """Where a batch's windows begin, read from the batch itself."""
    return loader.batch(step, micro_step)[0][:, 0].tolist()


@given(
    n=st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 1023, 1025, 4096, 5000])),
    key=KEYS,
)
def test_a_permutation_takes_every_value_once(n, key):
    with np.errstate(all='raise'):
        assert sorted(permute(np.arange(n, dtype=np.uint64), n, key).tolist()) == list(range(n))


@given(n=st.integers(1, 2**48), key=KEYS, data=st.data())
def test_a_permuted_value_does_not_depend_on_the_others_asked_for(n, key, data):
    positions = np.array(
        data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9)), dtype=np.uint64
    )
    together = permute(positions, n, key)
    assert (together < n).all() and len(set(together.tolist())) == len(set(positions.tolist()))
    assert together.tolist() == [
        permute(positions[i : i + 1], n, key)[0] for i in range(len(positions))
    ]


def test_a_permutation_is_no_pattern():
    """As in a random order, about one pair of neighbors remains, and the mean move is n / 3."""
    n, draw = 10_000, np.random.default_rng(0)
    for _ in range(5):
        order = permute(
            np.arange(n, dtype=np.uint64), n, draw.integers(2**64, size=6, dtype=np.uint64)
        ).astype(int)
        assert (np.abs(np.diff(order)) == 1).sum() < 12
        assert np.abs(order - np.arange(n)).mean() == pytest.approx(n / 3, rel=0.05)


@pytest.mark.parametrize('n_tokens', [24 * 16, 24 * 16 + 5, 24 * 16 + 15])
def test_an_epoch_takes_every_window_once_in_an_order_and_at_an_offset_of_its_own(n_tokens):
    """Batches straddle the epochs, as 4 does not divide 23; the starts come from the batches."""
    loader = make_loader(n_tokens, micro_steps=1)
    assert loader.n_windows == WINDOWS
    seen = [start for step in range(WINDOWS) for start in starts(loader, step)]
    epochs = [seen[first : first + WINDOWS] for first in range(0, len(seen), WINDOWS)]
    assert len(epochs) == 4
    for epoch in epochs:
        offset = min(epoch)
        assert 0 <= offset < 16
        assert sorted(epoch) == [offset + 16 * window for window in range(WINDOWS)]
    assert len({min(epoch) for epoch in epochs}) > 1
    assert len({tuple(start - min(epoch) for start in epoch) for epoch in epochs}) == 4


def test_offsets_reach_the_last_token_and_never_past_it():
    """One window, with no room to move or with room for 5 offsets: all offsets occur."""
    for n_tokens, offsets in ((17, {0}), (16 + 5, {0, 1, 2, 3, 4})):
        loader = make_loader(n_tokens, batch_size=1, micro_steps=1)
        assert {start for step in range(100) for start in starts(loader, step)} == offsets


@given(n_tokens=st.integers(2, 300), block_size=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_text_longer_than_a_block_gives_whole_windows(n_tokens, block_size, seed):
    loader = make_loader(
        max(n_tokens, block_size + 1), block_size=block_size, batch_size=50, seed=seed
    )
    x, y = loader.batch(3, 1)
    assert x.shape == y.shape == (50, block_size) and int(y.max()) < len(loader.tokens)


def test_targets_are_the_inputs_one_token_later_and_both_are_the_file_s(tmp_path):
    content = np.random.default_rng(0).integers(1000, size=500, dtype=np.uint16)
    content.tofile(tmp_path / 'train.bin')
    tokens = np.memmap(tmp_path / 'train.bin', dtype='<u2', mode='r')
    loader = BatchLoader(tokens, block_size=16, batch_size=4, seed=1, micro_steps=1)
    x, y = loader.batch(7, 0)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    for row, start in enumerate(loader.starts(7, 0)):
        assert x[row].tolist() == content[start : start + 16].tolist()
        assert y[row].tolist() == content[start + 1 : start + 17].tolist()


def test_another_seed_gives_another_order():
    orders = [
        [starts(loader, step) for step in range(5)]
        for loader in (make_loader(), make_loader(seed=2))
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize('world_size', [2, 4])
def test_the_order_of_sequences_is_the_same_for_any_number_of_ranks(world_size):
    alone = make_loader(micro_steps=4)
    ranks = [
        make_loader(micro_steps=4 // world_size, ranks=Ranks(rank, rank, world_size))
        for rank in range(world_size)
    ]
    for step in range(8):  # across the first epoch's end
        expected = [start for micro_step in range(4) for start in starts(alone, step, micro_step)]
        for loader in (alone, *ranks):
            x, _ = loader.first_sequences(step, 3)
            assert torch.equal(x, loader._cut(loader.tokens, np.array(expected[:3]))[0])
        assert [
            start
            for micro_step in range(4 // world_size)
            for loader in ranks
            for start in starts(loader, step, micro_step)
        ] == expected


def test_a_batch_depends_on_its_step_alone():
    in_order, backwards = make_loader(), make_loader()
    expected = {
        (step, micro): starts(in_order, step, micro) for step in range(6) for micro in range(3)
    }
    assert {place: starts(backwards, *place) for place in reversed(expected)} == expected
    assert starts(make_loader(), 4, 2) == expected[4, 2]


def test_the_order_of_a_seed_stays_what_it_is():
    """Golden: resumed runs depend on it. Change it only together with the checkpoint format."""
    assert [starts(make_loader(), 0), starts(make_loader(), 100, 2)] == GOLDEN


def test_a_batch_of_a_thousand_epochs_takes_no_longer_than_a_thousand_batches_of_one():
    options = dict(block_size=1, n_tokens=1001, micro_steps=1)
    began = time.process_time()
    expected = [make_loader(batch_size=1000, **options).starts(epoch, 0) for epoch in range(1000)]
    between = time.process_time()
    found = make_loader(batch_size=1_000_000, **options).starts(0, 0)
    assert time.process_time() - between < 2.5 * (between - began)
    assert np.array_equal(found, np.concatenate(expected))


def test_batches_prepared_ahead_are_the_batches():
    loader = make_loader()
    for step in (0, 1, 2, 9, 8, 8, 0):  # in order, and not
        taken = list(loader.micro_batches(step))
        assert len(taken) == 3
        for micro_step, (x, y) in enumerate(taken):
            expected = make_loader().batch(step, micro_step)
            assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])


def test_a_step_left_in_its_middle_spoils_no_other():
    loader = make_loader()
    next(loader.micro_batches(5))
    assert [x[:, 0].tolist() for x, _ in loader.micro_batches(5)] == [
        starts(make_loader(), 5, micro) for micro in range(3)
    ]


def test_each_batch_is_made_once_and_the_next_steps_first_one_at_the_end_of_a_step():
    loader, made = make_loader(), []
    make = loader.batch
    loader.batch = lambda *place: made.append(place) or make(*place)
    for step in (0, 1):
        list(loader.micro_batches(step))
    assert made == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_an_id_outside_the_vocabulary_is_named_by_whoever_asks(tmp_path):
    content = np.zeros(500, dtype=np.uint16)
    content[321] = 77
    content.tofile(tmp_path / 'train.bin')
    tokens = np.memmap(tmp_path / 'train.bin', dtype='<u2', mode='r')
    loader = BatchLoader(tokens, 16, batch_size=40, seed=1, micro_steps=1, vocab_size=77)
    for ask in (
        lambda: loader.batch(0, 0),
        lambda: next(loader.micro_batches(0)),
        lambda: list(loader.eval_batches(tokens)),
    ):
        with pytest.raises(UserError, match='train.bin: token id 77 at offset 321'):
            ask()


def evaluated(n_tokens, ranks=1, max_batches=None):
    """The inputs of the evaluation batches of three windows, for each rank."""
    loaders = [make_loader(batch_size=3, ranks=Ranks(n, n, ranks)) for n in range(ranks)]
    batches = [loader.eval_batches(own_place(n_tokens), max_batches) for loader in loaders]
    return [[x for x, _ in own] for own in batches]


def windows_of(*arguments):
    return [[row for x in own for row in x[:, 0].tolist()] for own in evaluated(*arguments)]


@pytest.mark.parametrize('ranks', [1, 2, 3])
@pytest.mark.parametrize('n_tokens', [17, 16 * 10, 16 * 10 + 1, 16 * 10 + 9])
def test_evaluation_reads_every_window_once_over_all_ranks(ranks, n_tokens):
    shares = windows_of(n_tokens, ranks)
    everything = [start for share in shares for start in share]
    # Independently: every multiple of 16 whose window and its last target are there.
    assert sorted(everything) == [
        start for start in range(0, n_tokens, 16) if start + 16 < n_tokens
    ]


def test_evaluation_gives_out_batches_in_turn_and_a_last_one_as_large_as_is_left():
    sizes = [[len(x) for x in own] for own in evaluated(16 * 11 + 1, 2)]
    assert sizes == [[3, 3], [3, 2]]


def test_evaluation_targets_are_the_inputs_one_token_later():
    for x, y in make_loader().eval_batches(own_place(16 * 11 + 1)):
        assert torch.equal(y, x + 1)


@given(n_tokens=st.integers(2, 5000), block_size=st.integers(1, 50), max_windows=st.integers(1, 60))
def test_a_short_evaluation_spreads_distinct_windows_over_the_split(
    n_tokens, block_size, max_windows
):
    n = (n_tokens - 1) // block_size
    windows = np.array(eval_starts(n_tokens, block_size, max_windows)) / block_size
    assert len(windows) == len(set(windows)) == min(n, max_windows)
    if len(windows) > 1:
        gaps = np.diff(windows)
        assert windows[0] == 0 and n - windows[-1] <= n / len(windows) + 1
        assert gaps.max() - gaps.min() <= 1


def test_a_short_evaluation_is_the_same_for_any_number_of_ranks():
    expected = sorted(windows_of(5000, 1, 5)[0])
    assert len(expected) == 15
    assert sorted(chain(*windows_of(5000, 4, 5))) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_batches_on_the_gpu_are_those_on_the_cpu():
    loader = make_loader(device='cuda')
    for micro_step, (x, y) in enumerate(loader.micro_batches(3)):
        expected = make_loader().batch(3, micro_step)
        assert x.is_cuda and torch.equal(x.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])


def test_training_does_not_see_how_often_it_is_evaluated(train_here, tmp_path):
    """Neither its batches nor its dropout."""
    for name, flags in (
        ('often', ['--eval_interval=1', '--eval_iters=2']),
        ('once', ['--eval_interval=8', '--eval_iters=1']),
    ):
        assert train_here(tmp_path / name, '--dropout=0.1', '--max_iters=8', *flags).returncode == 0
    often, once = (
        [record['loss/step'] for record in records(tmp_path / name) if 'loss/step' in record]
        for name in ('often', 'once')
    )
    assert often == once and len(once) == 8
    often, once = (
        (tmp_path / name / 'step-00000008/model.safetensors').read_bytes()
        for name in ('often', 'once')
    )
    assert often == once
