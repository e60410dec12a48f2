"""Measurements of a dataset, of known texts."""

import math
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from nib.doctor.texts import PARTS, PROBE_LENGTH, SEARCHED, examine_data


def texts(*tokens, dtype=np.uint16):
    return [np.asarray(text, dtype=dtype) for text in tokens]


def entropy(*shares):
    return -sum(p * math.log(p) for p in shares if p)


@pytest.mark.parametrize('n', [400, 40_000, 4_000_000])  # looked at whole, partly, in a few places
def test_frequencies_of_a_known_text(n):
    train, val = texts(np.tile([0, 0, 0, 1], n // 4), np.tile([0, 0, 0, 1], n // 40))
    found = examine_data(train, val, 5)
    assert found.entropy == pytest.approx(entropy(0.75, 0.25), abs=0.02)
    assert (found.vocab_size, found.used) == (5, 2) and found.sampled <= n
    assert found.distance == pytest.approx(0.0, abs=1e-3) and found.usual_distance == pytest.approx(
        0.0, abs=1e-3
    )


def test_distance_is_that_of_jensen_and_shannon():
    train, val = texts(np.tile([0, 1], 20_000), np.tile([1, 1, 1, 2], 1000))
    found = examine_data(train, val, 3)
    by_hand = (
        entropy(0.25, 0.625, 0.125) - (entropy(0.5, 0.5) + entropy(0.75, 0.25)) / 2
    )  # of the mean, less the mean of both
    assert found.distance == pytest.approx(by_hand, abs=1e-3)
    assert examine_data(train, np.full(4000, 2, np.uint16), 3).distance == pytest.approx(
        math.log(2), abs=1e-6
    )  # no token shared


def test_parts_of_a_sorted_text_are_far_from_each_other():
    train = np.repeat(np.arange(8), 5000).astype(np.uint16)  # each eighth a token of its own
    found = examine_data(train, train[:4000], 8)
    assert found.usual_distance == pytest.approx(math.log(2), abs=1e-6)
    assert found.entropy == pytest.approx(math.log(8), abs=1e-6)


def test_leaks_are_found_where_they_are():
    draw = np.random.default_rng(1)
    train, val = (draw.integers(0, 500, n).astype(np.uint16) for n in (100_000, 20_000))
    assert examine_data(train, val, 500).leaked == 0.0
    for leaking in (
        np.concatenate((train, val)),
        np.concatenate((val, train)),
        np.concatenate((train[:777], val, train[777:])),
    ):
        assert examine_data(leaking, val, 500).leaked == 1.0
    half = np.concatenate((train, val[:10_000]))
    assert examine_data(half, val, 500).leaked == pytest.approx(0.5, abs=0.05)
    changed = val.copy()
    changed[:: PROBE_LENGTH // 2] += 1  # a token of every passage
    assert examine_data(np.concatenate((train, changed)), val, 501).leaked == 0.0


@pytest.mark.parametrize('dtype', ['<u2', '<u4'])
def test_half_a_token_is_no_leak(dtype):
    train, val = texts(
        np.full(1000, 0x0001), np.full(200, 0x0100), dtype=dtype
    )  # the same bytes, moved by one
    assert examine_data(train, val, 0x0101).leaked == 0.0
    assert examine_data(val.repeat(5), val, 0x0101).leaked == 1.0


@pytest.mark.parametrize(
    'n_train, n_val', [(2, 2), (9, 3), (70, PROBE_LENGTH - 1), (300, PROBE_LENGTH)]
)
def test_short_texts_are_looked_at_whole(n_train, n_val):
    train, val = (np.arange(n).astype(np.uint16) % 2 for n in (n_train, n_val))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = examine_data(train, val, 2)
    assert found.sampled <= max(PARTS, n_train) and found.used == 2
    assert all(map(math.isfinite, (found.entropy, found.distance, found.usual_distance)))
    assert found.leaked == (1.0 if n_val >= PROBE_LENGTH else 0.0)


def test_a_text_of_any_length_is_examined_in_a_moment(tmp_path):
    train = np.memmap(
        tmp_path / 'train.bin', dtype='<u2', mode='w+', shape=1 << 31
    )  # 4 GiB of nothing on the disk
    draw = np.random.default_rng(2)
    train[-SEARCHED:] = draw.integers(0, 50257, SEARCHED)
    val = draw.integers(0, 50257, 1 << 22).astype('<u2')
    started = time.process_time()
    train.flush()
    train = np.memmap(tmp_path / 'train.bin', dtype='<u2', mode='r')
    assert examine_data(train, val, 50257).leaked == 0.0
    assert time.process_time() - started < 60
    assert resident_bytes(tmp_path / 'train.bin') < train.nbytes / 2


def resident_bytes(path) -> int:
    """Returns how much of a mapped file this process has read; 0 if the system is not Linux."""
    if sys.platform != 'linux':
        return 0
    maps = Path('/proc/self/smaps').read_text()
    sizes = re.findall(rf'{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB', maps)
    return 1024 * sum(map(int, sizes))
