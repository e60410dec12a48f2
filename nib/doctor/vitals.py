"""The vital signs of a run: collected on the device at every step, read when a line is due. nib/doctor/rules.py says what they mean.

Nothing here waits for the device but read(), which the loop calls where it waits anyway.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from nib.doctor import health, inspection
from nib.optim import Optimizer
from nib.tokens.batches import BatchLoader

SAMPLE = 4096  # weights of a matrix, evenly spread, that stand for all: a root mean square is 1 % off, and costs nothing
KEPT = 1000  # steps whose losses are kept until they are read
DATA_SAMPLE, PARTS, RUNS = (
    1 << 18,
    8,
    32,
)  # tokens that stand for a text, from so many parts of it, in so many passages of each
PROBES, PROBE_LENGTH = (
    32,
    64,
)  # passages of the validation text that are looked for in the training text, and their tokens
SEARCHED = 1 << 23  # tokens of the training text that are searched for them


@dataclass(frozen=True)
class StepSigns:
    """What the steps since the last look have shown, and the last of them more closely."""

    step: int  # the last one's number; the first is 1
    learning_rate: float
    losses: list[float]  # of each step, nats per token
    grad_norms: list[float]  # before clipping
    update_ratio: dict[
        str, float
    ]  # group of matrices -> ||w after - w before|| / ||w before||, over the samples of its matrices
    weight_rms: dict[str, float]  # root mean square of the same
    block_grad_rms: list[
        float
    ]  # of the recent gradients of each block's matrices, the first block first; [] if not known
    repeated: (
        float | None
    )  # share of the batch's tokens that stood at the same place when last looked at
    shifted: float  # share of the targets that are the input's next token
    copied: float  # share of the targets that are the input's own token
    tokens_per_second: float
    loss_scale: float | None = None  # float16's

    def metrics(self, grad_clip: float) -> dict[str, float]:
        """What metrics.jsonl and the others record of them, by name."""
        clipped = (
            statistics.fmean(norm > grad_clip for norm in self.grad_norms) if grad_clip else None
        )
        return {
            'loss/mean': statistics.fmean(self.losses),
            'loss/max': max(self.losses),
            'clipped': clipped,
            'loss_scale': self.loss_scale,
            **{f'update_ratio/{group}': ratio for group, ratio in self.update_ratio.items()},
        }


@dataclass(frozen=True)
class EvaluationSigns:
    step: int
    train_loss: float  # nats per token
    val_loss: float
    dead_units: (
        float | None
    )  # largest share of an MLP's hidden units that are closed for every token of a batch; None of
    # activations that nib/doctor/inspection.py does not know
    attention_logit: float  # the largest score before the softmax, in absolute value
    attention_entropy: float  # smallest mean of a layer, as a share of the largest possible
    activation_std: float  # of the residual stream behind the last block
    noise_scale: (
        float | None
    )  # of the gradient, in batches of a step; None where it was not measured

    @classmethod
    def of_record(cls, record: Mapping) -> 'EvaluationSigns | None':
        """Those of a line of metrics.jsonl; None where it is of no evaluation, or of one that was not finite."""
        names = {'train_loss': 'loss/train', 'val_loss': 'loss/val'}
        signs = {name: record.get(names.get(name, name)) for name in cls.__match_args__}
        if 'noise_scale' in record and signs['noise_scale'] is None:
            signs['noise_scale'] = math.inf  # which JSON cannot hold
        measured = [
            value
            for name, value in signs.items()
            if name != 'step' and (name not in ('noise_scale', 'dead_units') or value is not None)
        ]
        return cls(**signs) if all(type(value) is float for value in measured) else None

    def metrics(self) -> dict[str, float]:
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ('step', 'train_loss', 'val_loss')
        }


@dataclass(frozen=True)
class DataSigns:
    vocab_size: int
    used: int  # different tokens in a sample of the training text
    sampled: int  # tokens in it
    entropy: float  # in nats: the loss of a model that knows how often each token comes, and nothing else
    leaked: float  # share of passages of the validation text that stand in the training text word for word
    distance: float  # between the tokens' frequencies in both texts, Jensen-Shannon, in nats
    usual_distance: float  # the largest between a part of the training text and the rest of it


def group_of(name: str) -> str:
    """The group that a matrix's name puts it in."""
    return next(
        (
            group
            for part, group in (('.attn.', 'attention'), ('.mlp.', 'mlp'), ('lm_head', 'head'))
            if part in name
        ),
        'embedding',
    )


def sample(matrix: torch.Tensor) -> torch.Tensor:
    """A view of up to SAMPLE of its numbers, evenly spread. The stride is odd, so that it walks through the columns."""
    flat = (matrix if matrix.is_contiguous() else matrix.t()).detach().view(-1)
    return flat[:: math.ceil(flat.numel() / SAMPLE) | 1]


class Vitals:
    """begin() before a step that a line is due after, note() after every step, read() when it is due; evaluate() beside an
    evaluation.

    model: the one that trains, compiled or not, but not distributed: its backward pass here is this rank's alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        batches: BatchLoader,
        precision,
    ):
        self.model, self.scaler, self.batches, self.precision = model, scaler, batches, precision
        raw_model = getattr(model, '_orig_mod', model)  # what torch.compile wraps
        matrices = [
            (name, weight) for name, weight in raw_model.named_parameters() if weight.dim() >= 2
        ]
        state = optimizer.named_state(raw_model)
        self._groups, self._blocks = (
            {},
            {},
        )  # name -> samples of the weights; of the memory of the gradient or its square
        # AdamW remembers the square, whose sum is its norm of order 1; Muon the gradient, whose sum of squares is of order 2.
        # An optimizer that remembers neither shows nothing of the blocks' gradients.
        in_blocks = [name for name, _ in matrices if '.h.' in name]
        memory, self._order = next(
            (
                (memory, order)
                for memory, order in (('momentum', 2), ('exp_avg_sq', 1))
                if all(f'{name}/{memory}' in state for name in in_blocks)
            ),
            (None, 1),
        )
        for name, weight in matrices:
            self._groups.setdefault(group_of(name), []).append(sample(weight))
            if '.h.' in name and memory:
                block = int(name.split('.h.')[1].split('.')[0])
                self._blocks.setdefault(block, []).append(sample(state[f'{name}/{memory}']))
        self._noted = deque(
            maxlen=KEPT
        )  # loss and grad_norm of each step since the last reading, on the device
        self._batch = self._batch_before = self._before = None

    def begin(self, micro_batches: Iterator) -> Iterator:
        """Remembers the weights before the step, and its first micro batch on the way through."""
        self._before = self._sample_groups()
        self._batch_before, self._batch = self._batch, None
        for batch in micro_batches:
            self._batch = self._batch or batch
            yield batch

    def note(self, loss: torch.Tensor, grad_norm: torch.Tensor):
        self._noted.append((loss, grad_norm))

    @torch.no_grad()
    def read(self, step: int, learning_rate: float, tokens_per_second: float) -> StepSigns:
        """The signs after a step that begin() was called before. Waits for the device."""
        before, after = (list(groups.values()) for groups in (self._before, self._sample_groups()))
        norms = torch._foreach_norm([*before, *after, *torch._foreach_sub(after, before)])
        memories = [memory for block in self._blocks.values() for memory in block]
        memories = torch._foreach_norm(memories, self._order) if memories else []
        noted = [figure for pair in self._noted for figure in pair]
        numbers = iter(torch.stack([*norms, *memories, *self._compare_batches(), *noted]).tolist())
        norm_before, norm_after, moved = ([next(numbers) for _ in after] for _ in range(3))
        block_grad_rms = [
            math.sqrt(
                sum(next(numbers) ** self._order for _ in block)
                / sum(memory.numel() for memory in block)
            )
            for block in self._blocks.values()
        ]
        repeated, shifted, copied = (next(numbers) for _ in range(3))
        losses = list(numbers)
        self._noted.clear()
        return StepSigns(
            step,
            learning_rate,
            losses[0::2],
            losses[1::2],
            {
                group: m / n if n else math.nan
                for group, m, n in zip(self._groups, moved, norm_before)
            },
            {
                group: n / math.sqrt(weights.numel())
                for group, n, weights in zip(self._groups, norm_after, after)
            },
            block_grad_rms,
            None if self._batch_before is None else repeated,
            shifted,
            copied,
            tokens_per_second,
            self.scaler.get_scale() if self.scaler.is_enabled() else None,
        )

    def evaluate(
        self,
        step: int,
        number: int,
        train_loss: float,
        val_loss: float,
        val_batch: tuple[torch.Tensor, torch.Tensor],
    ) -> EvaluationSigns:
        """The activations on a batch of the validation text beside the losses of an evaluation; and, with the first, second,
        fourth, eighth ... evaluation, as it costs some steps' time, the noise of the gradient. number: of the evaluation, 0 before
        the first step and for the last one, which comes too late to change anything."""
        noise_scale = None
        if number and not number & (number - 1):
            tokens = self.batches.batch_size * self.batches.block_size
            k = min(max(4, 8192 // tokens), 32)  # more of small batches, each of which says little
            noise_scale = gradient_noise(
                self.model,
                self.scaler,
                (self.batches.batch(i, 0) for i in range(k)),
                self.precision,
            )
            noise_scale /= (
                self.batches.micro_steps * self.batches.world_size
            )  # a step's batch is so many of these
            noise_scale = None if math.isnan(noise_scale) else noise_scale  # float16's may overflow
        raw_model = getattr(self.model, '_orig_mod', self.model)
        _, layers = inspection.measure_layers(raw_model, *val_batch, self.precision, n_sequences=1)
        blocks = [row for row in layers if row.entropy is not None]
        largest = health.largest_entropy(val_batch[0].shape[1])
        dead = [row.dead for row in blocks if row.dead is not None]
        return EvaluationSigns(
            step,
            train_loss,
            val_loss,
            max(dead, default=None),
            max(row.attention_logit for row in blocks),
            min(row.entropy for row in blocks) / largest if largest else 1.0,
            blocks[-1].std,
            noise_scale,
        )

    def _sample_groups(self) -> dict[str, torch.Tensor]:
        return {group: torch.cat(weights) for group, weights in self._groups.items()}

    def _compare_batches(self) -> list[torch.Tensor]:
        x, y = self._batch
        before = x if self._batch_before is None else self._batch_before[0]
        shifted = (
            (y[:, :-1] == x[:, 1:]).float().mean()
            if x.shape[1] > 1
            else torch.ones((), device=x.device)
        )
        return [(x == before).float().mean(), shifted, (y == x).float().mean()]


@torch.enable_grad()
def gradient_noise(
    model: torch.nn.Module, scaler: torch.amp.GradScaler, batches: Iterable, precision
) -> float:
    """The gradient noise scale (McCandlish et al. 2018, section 2.2) in batches, tr(Sigma) / |G|^2: how many such batches
    together have as much signal as noise. Infinite where no signal is left, NaN where a gradient is not finite.

    Over K batches at the same weights, |G|^2 is the mean product of two different gradients, and |G|^2 + tr(Sigma) the mean of
    their squared norms. batches: K pairs (x, y). The gradients are samples of the matrices', and are None afterwards.
    """
    gradients = []
    for x, y in batches:
        with precision:
            loss = model(x, y)
        scaler.scale(loss).backward()
        gradients.append(
            torch.cat([sample(p.grad).float() for p in model.parameters() if p.dim() >= 2])
        )
        model.zero_grad(set_to_none=True)
    products = torch.stack(gradients) @ torch.stack(gradients).t()  # (K, K)
    k = len(gradients)
    square = products.diagonal().mean()
    signal = (products.sum() - products.diagonal().sum()) / (k * (k - 1))
    if not products.isfinite().all():
        return math.nan
    return max(0.0, float((square - signal) / signal)) if signal > 0.0 else math.inf


# -- the data --------------------------------------------------------------------------------------------------------


def examine_data(train: np.ndarray, val: np.ndarray, vocab_size: int) -> DataSigns:
    """Looks at samples of both texts; takes a fraction of a second however large they are."""
    length = min(
        len(val), max(1, len(train) // PARTS)
    )  # equally long, as few tokens are far from any text
    starts = np.arange(PARTS) * len(train) // PARTS
    parts = np.stack(
        [_counts(train[start : start + length], vocab_size) for start in starts]
    )  # (PARTS, V)
    whole, held_out = parts.sum(axis=0), _counts(val, vocab_size)
    usual = max(_distance(part, whole - part) for part in parts)
    return DataSigns(
        vocab_size,
        int((whole > 0).sum()),
        int(whole.sum()),
        _entropy(whole / whole.sum()),
        _leaked(train, val),
        _distance(held_out, whole),
        usual,
    )


def _counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token comes in RUNS passages, spread evenly over the text; in all of a short one."""
    if len(tokens) <= DATA_SAMPLE // PARTS:
        return np.bincount(tokens, minlength=vocab_size)
    size = DATA_SAMPLE // PARTS // RUNS
    starts = np.arange(RUNS) * (len(tokens) - size) // RUNS
    return np.bincount(
        np.concatenate([tokens[start : start + size] for start in starts]), minlength=vocab_size
    )


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _distance(counts: np.ndarray, others: np.ndarray) -> float:
    """Jensen-Shannon divergence in nats (Lin 1991): 0 for equal frequencies, ln 2 for texts that share no token."""
    p, q = (n / max(1, n.sum()) for n in (counts, others))
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


def _leaked(train: np.ndarray, val: np.ndarray) -> float:
    """The share of PROBES passages of the validation text that stand in the training text, of which up to SEARCHED tokens are
    searched."""
    if len(val) < PROBE_LENGTH:
        return 0.0
    searched, width = (
        train[-SEARCHED:].tobytes(),
        train.dtype.itemsize,
    )  # from the end, where a text is added to
    starts = np.arange(PROBES) * (len(val) - PROBE_LENGTH) // PROBES
    return (
        sum(
            _stands_in(val[start : start + PROBE_LENGTH].tobytes(), searched, width)
            for start in starts
        )
        / PROBES
    )


def _stands_in(probe: bytes, text: bytes, width: int) -> bool:
    at = text.find(probe)
    while at % width and at >= 0:  # found, but between two tokens
        at = text.find(probe, at + 1)
    return at >= 0
