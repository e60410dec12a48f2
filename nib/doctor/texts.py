"""Examines the training and the validation text before the first step, in samples of them."""

from dataclasses import dataclass

import numpy as np

DATA_SAMPLE = 1 << 18  # tokens that represent a text
PARTS = 8  # parts of the text that they come from
RUNS = 32  # passages in each part
PROBES = 32  # passages of the validation text to search for in the training text
PROBE_LENGTH = 64  # tokens in such a passage
SEARCHED = 1 << 23  # tokens of the training text to search


@dataclass(frozen=True)
class DataSigns:
    """Measurements of a dataset."""

    vocab_size: int
    used: int  # different tokens in a sample of the training text
    sampled: int  # tokens in the sample
    entropy: float  # in nats: the loss of a model that only knows the frequency of each token
    leaked: float  # share of passages of the validation text that occur in the training text
    distance: float  # Jensen-Shannon divergence of the token frequencies of both texts, in nats
    usual_distance: float  # the largest one between a part of the training text and the rest


def examine_data(train: np.ndarray, val: np.ndarray, vocab_size: int) -> DataSigns:
    """Measures samples of both texts. Takes a fraction of a second, however large they are.

    train, val: token ids, one-dimensional.
    """
    length = min(len(val), max(1, len(train) // PARTS))  # equal, because short texts are far apart
    starts = np.arange(PARTS) * len(train) // PARTS
    texts = [train[start : start + length] for start in starts]
    parts = np.stack([_counts(text, vocab_size) for text in texts])  # (PARTS, V)
    whole, held_out = parts.sum(axis=0), _counts(val, vocab_size)
    return DataSigns(
        vocab_size,
        used=int((whole > 0).sum()),
        sampled=int(whole.sum()),
        entropy=_entropy(whole / whole.sum()),
        leaked=_leaked(train, val),
        distance=_distance(held_out, whole),
        usual_distance=max(_distance(part, whole - part) for part in parts),
    )


def _counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Counts each token in RUNS passages spread evenly over the text; in all of a short text."""
    if len(tokens) <= DATA_SAMPLE // PARTS:
        return np.bincount(tokens, minlength=vocab_size)
    size = DATA_SAMPLE // PARTS // RUNS
    starts = np.arange(RUNS) * (len(tokens) - size) // RUNS
    passages = np.concatenate([tokens[start : start + size] for start in starts])
    return np.bincount(passages, minlength=vocab_size)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _distance(counts: np.ndarray, others: np.ndarray) -> float:
    """Returns the Jensen-Shannon divergence in nats (Lin 1991).

    It is 0 for equal frequencies, and ln 2 for texts that share no token.
    """
    p, q = (n / max(1, n.sum()) for n in (counts, others))
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


def _leaked(train: np.ndarray, val: np.ndarray) -> float:
    """Returns the share of PROBES passages of val that occur at the end of train."""
    if len(val) < PROBE_LENGTH:
        return 0.0
    text = train[-SEARCHED:].tobytes()  # the end, where text is usually appended
    width = train.dtype.itemsize
    starts = np.arange(PROBES) * (len(val) - PROBE_LENGTH) // PROBES
    probes = [val[start : start + PROBE_LENGTH].tobytes() for start in starts]
    return sum(_occurs(probe, text, width) for probe in probes) / PROBES


def _occurs(probe: bytes, text: bytes, width: int) -> bool:
    at = text.find(probe)
    while at % width and at >= 0:  # found between two tokens, of `width` bytes each
        at = text.find(probe, at + 1)
    return at >= 0
