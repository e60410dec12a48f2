"""The vital signs of a run: collected on the device in every step, read when a line is due.

Only read() waits for the device, and the loop calls it where it waits anyway. nib/doctor/rules.py
says what the values mean.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nib.doctor import health, inspection
from nib.machine.device import kept_buffers, seed_everything
from nib.machine.ranks import clear_gradients
from nib.machine.threads import seconds_without_core
from nib.optim import Optimizer
from nib.tokens.batches import BatchLoader

SAMPLE = 4096  # weights that represent a matrix: their root mean square is within about 1%
KEPT = 1000  # steps whose losses are kept until they are read


@dataclass(frozen=True)
class StepSigns:
    """Measurements of the steps since the last logged one, most of them of the last step."""

    step: int  # number of the last step; the first is 1
    learning_rate: float
    losses: list[float]  # of each step, in nats per token
    grad_norms: list[float]  # of each step, before clipping
    # By group of matrices, over samples: ||w after - w before|| / ||w before||.
    update_ratio: dict[str, float]
    weight_rms: dict[str, float]  # root mean square of the weights, by group
    # Root mean square of recent gradients of each block's matrices, first block first; [] if the
    # optimizer does not store them.
    block_grad_rms: list[float]
    repeated: float | None  # share of the batch's tokens that equal the batch of the last look
    shifted: float  # share of the targets that are the next token of the input
    copied: float  # share of the targets that are the same token as the input
    tokens_per_second: float
    loss_scale: float | None = None  # of float16
    core_wait: float | None = None  # share of the time that the main thread waited for a core

    def metrics(self, grad_clip: float) -> dict[str, float]:
        """Returns what metrics.jsonl and other logs record, by name."""
        clipped = None
        if grad_clip:
            clipped = statistics.fmean(norm > grad_clip for norm in self.grad_norms)
        return {
            'loss/mean': statistics.fmean(self.losses),
            'loss/max': max(self.losses),
            'clipped': clipped,
            'loss_scale': self.loss_scale,
            **{f'update_ratio/{group}': ratio for group, ratio in self.update_ratio.items()},
        }


@dataclass(frozen=True)
class EvaluationSigns:
    """Measurements of an evaluation, on one batch of the validation text."""

    step: int
    train_loss: float  # nats per token
    val_loss: float
    dead_units: float | None  # largest share of an MLP's hidden units closed for every token
    attention_logit: float  # the largest absolute score before the softmax
    attention_entropy: float  # the smallest mean of a layer, as a share of the maximum
    activation_std: float  # of the residual stream after the last block
    noise_scale: float | None  # of the gradient, in batches of a step; None if not measured

    @classmethod
    def of_record(cls, record: Mapping) -> 'EvaluationSigns | None':
        """Reads a record of metrics.jsonl.

        Returns None if the record is not of an evaluation, or has values that are not finite.
        """
        names = {'train_loss': 'loss/train', 'val_loss': 'loss/val'}
        vital_signs = {name: record.get(names.get(name, name)) for name in cls.__match_args__}
        if 'noise_scale' in record and vital_signs['noise_scale'] is None:
            vital_signs['noise_scale'] = math.inf  # which JSON cannot represent
        for name, value in vital_signs.items():
            may_be_none = name in ('noise_scale', 'dead_units')
            if name != 'step' and type(value) is not float and not (value is None and may_be_none):
                return None
        return cls(**vital_signs)

    def metrics(self) -> dict[str, float]:
        """Returns what metrics.jsonl and other logs record besides the losses, by name."""
        losses = ('step', 'train_loss', 'val_loss')
        return {name: value for name, value in asdict(self).items() if name not in losses}


def sample(matrix: torch.Tensor) -> torch.Tensor:
    """Returns a view of up to SAMPLE entries of a matrix, evenly spread.

    The stride is odd, so that it visits all columns.
    """
    flat = (matrix if matrix.is_contiguous() else matrix.t()).detach().view(-1)
    return flat[:: math.ceil(flat.numel() / SAMPLE) | 1]


def stored_gradients(state: Mapping[str, torch.Tensor], names: Iterable[str]):
    """Returns the name of the optimizer state that remembers gradients, and the order of its norm.

    AdamW stores mean squares: their sum, a norm of order 1, is a squared norm of gradients. Muon
    stores a mean of gradients: its norm has order 2. The name is None if there is neither.
    """
    for key, order in (('momentum', 2), ('exp_avg_sq', 1)):
        if all(f'{name}/{key}' in state for name in names):
            return key, order
    return None, 1


class Vitals:
    """Measures a training run.

    Call begin() before a step that is followed by a line, note() after every step, read() when the
    line is due, and evaluate() at an evaluation.

    model: the one that is trained, compiled or not, but not distributed, because the backward
    passes here are of this rank only. precision: context of forward passes.
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
        self.raw_model: Any = getattr(model, '_orig_mod', model)  # what torch.compile wraps
        parameters = self.raw_model.named_parameters()
        matrices = [(name, p) for name, p in parameters if p.dim() >= 2 and p.requires_grad]
        state = optimizer.named_state(self.raw_model)
        in_blocks = [name for name, _ in matrices if '.h.' in name]
        key, self._order = stored_gradients(state, in_blocks)
        self._groups: dict[str, list[torch.Tensor]] = {}  # matrices
        self._blocks: dict[int, list[torch.Tensor]] = {}  # samples of stored gradients
        for name, weight in matrices:
            self._groups.setdefault(health.group_of(name), []).append(weight)
            if '.h.' in name and key:
                block = int(name.split('.h.')[1].split('.')[0])
                self._blocks.setdefault(block, []).append(sample(state[f'{name}/{key}']))
        # Loss and gradient norm of each step since the last reading, on the device.
        self._noted: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=KEPT)
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._batch_before: tuple[torch.Tensor, torch.Tensor] | None = None
        self._before: dict[str, torch.Tensor] | None = None
        self._clock = time.perf_counter(), seconds_without_core()

    def begin(self, micro_batches: Iterator) -> Iterator:
        """Yields the micro batches. Remembers the first one, and the weights before the step."""
        self._before = self._sample_groups()
        self._batch_before, self._batch = self._batch, None
        for batch in micro_batches:
            self._batch = self._batch or batch
            yield batch

    def note(self, loss: torch.Tensor, grad_norm: torch.Tensor):
        self._noted.append((loss, grad_norm))

    @torch.no_grad()
    def read(self, step: int, learning_rate: float, tokens_per_second: float) -> StepSigns:
        """Returns the vital signs after a step that followed begin(). Waits for the device."""
        before, after = list(self._before.values()), list(self._sample_groups().values())
        moves = torch._foreach_sub(after, before) if after else []  # all may be frozen
        norms = torch._foreach_norm([*before, *after, *moves]) if after else []
        stored = [gradients for block in self._blocks.values() for gradients in block]
        stored_norms = torch._foreach_norm(stored, self._order) if stored else []
        noted = [value for pair in self._noted for value in pair]
        everything = [*norms, *stored_norms, *self._compare_batches(), *noted]
        numbers = iter(torch.stack(everything).tolist())  # the only wait

        norm_before, norm_after, moved = ([next(numbers) for _ in after] for _ in range(3))
        update_ratio, weight_rms = {}, {}
        for i, group in enumerate(self._groups):
            update_ratio[group] = moved[i] / norm_before[i] if norm_before[i] else math.nan
            weight_rms[group] = norm_after[i] / math.sqrt(after[i].numel())
        block_grad_rms = []
        for block in self._blocks.values():
            square = sum(next(numbers) ** self._order for _ in block)
            block_grad_rms.append(math.sqrt(square / sum(part.numel() for part in block)))
        repeated, shifted, copied = (next(numbers) for _ in range(3))
        rest = list(numbers)
        self._noted.clear()
        return StepSigns(
            step,
            learning_rate,
            losses=rest[0::2],
            grad_norms=rest[1::2],
            update_ratio=update_ratio,
            weight_rms=weight_rms,
            block_grad_rms=block_grad_rms,
            repeated=None if self._batch_before is None else repeated,
            shifted=shifted,
            copied=copied,
            tokens_per_second=tokens_per_second,
            loss_scale=self.scaler.get_scale() if self.scaler.is_enabled() else None,
            core_wait=self._core_wait(),
        )

    def evaluate(
        self,
        step: int,
        number: int,
        train_loss: float,
        val_loss: float,
        val_batch: tuple[torch.Tensor, torch.Tensor],
    ) -> EvaluationSigns:
        """Measures the activations on a batch of the validation text.

        Also measures the gradient noise at the first, second, fourth, eighth ... evaluation,
        because it costs as much time as some steps.

        number: of the evaluation; 0 before the first step, and for the last evaluation, which is
        too late to change anything.
        """
        is_power_of_2 = number > 0 and number & (number - 1) == 0
        noise_scale = self._noise_scale() if is_power_of_2 and self._groups else None
        x, y = val_batch
        _, layers = inspection.measure_layers(self.raw_model, x, y, self.precision, n_sequences=1)
        largest = health.largest_entropy(x.shape[1])
        logits = [row.attention_logit for row in layers if row.attention_logit is not None]
        entropies = [row.entropy for row in layers if row.entropy is not None]
        dead = [row.dead for row in layers if row.dead is not None]
        return EvaluationSigns(
            step,
            train_loss,
            val_loss,
            dead_units=max(dead, default=None),
            attention_logit=max(logits, default=0.0),  # 0 and 1 if no layer has attention
            attention_entropy=min(entropies, default=largest) / largest if largest else 1.0,
            activation_std=layers[-2].std,  # layers[-1] is the last norm
            noise_scale=noise_scale,
        )

    def _noise_scale(self) -> float | None:
        """Returns the gradient noise scale in batches of a step; None if float16 has overflowed."""
        tokens = self.batches.batch_size * self.batches.block_size
        k = min(max(4, 6144 // tokens), 32)  # more of the small batches, which are noisier
        micro_batches = (self.batches.batch(i, 0) for i in range(k))
        seed_everything('noise')  # for dropout: a resumed run must measure the same
        scale = gradient_noise(self.model, self.scaler, micro_batches, self.precision)
        scale /= self.batches.micro_steps * self.batches.ranks.world_size  # micro batches in a step
        return None if math.isnan(scale) else scale

    def _core_wait(self) -> float | None:
        """Returns the share of the time since the last call; None if unknown."""
        (then, waited), self._clock = self._clock, (time.perf_counter(), seconds_without_core())
        if waited is None or self._clock[1] is None:
            return None
        return (self._clock[1] - waited) / (self._clock[0] - then)

    def _sample_groups(self) -> dict[str, torch.Tensor]:
        return {group: torch.cat([*map(sample, ws)]) for group, ws in self._groups.items()}

    def _compare_batches(self) -> list[torch.Tensor]:
        """Returns the shares `repeated`, `shifted` and `copied` of StepSigns, on the device."""
        x, y = self._batch
        before = x if self._batch_before is None else self._batch_before[0]
        repeated, copied = torch.zeros_like(x, dtype=torch.float32), (x == y).float()
        if x.shape == before.shape:  # a changed loader may begin with smaller batches
            repeated = (x == before).float()
        return [repeated.mean(), inspection.shifted_share(x, y), copied.mean()]


@torch.enable_grad()
def gradient_noise(
    model: torch.nn.Module, scaler: torch.amp.GradScaler, batches: Iterable, precision
) -> float:
    """Returns the gradient noise scale tr(Sigma) / |G|^2 (McCandlish et al. 2018, section 2.2).

    It is the number of batches that contain as much signal as noise: infinite if there is no
    signal, NaN if a gradient is not finite.

    batches: K pairs (x, y). At equal weights, |G|^2 is the mean product of two different gradients,
    and |G|^2 + tr(Sigma) is the mean of their squared norms. The gradients are sampled from the
    matrices. Those of the model are cleared afterwards.
    """
    gradients = []
    for x, y in batches:
        with kept_buffers(model):
            with precision:
                loss = model(x, y)
            scaler.scale(loss).backward()
        matrices = [p for p in model.parameters() if p.dim() >= 2 and p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in matrices]
        gradients.append(torch.cat([sample(grad).float() for grad in grads]))
        clear_gradients(model.parameters())
    stacked = torch.stack(gradients)
    products = stacked @ stacked.t()  # (K, K)
    k = len(gradients)
    square = products.diagonal().mean()
    signal = (products.sum() - products.diagonal().sum()) / (k * (k - 1))
    if not products.isfinite().all():
        return math.nan
    return max(0.0, float((square - signal) / signal)) if signal > 0.0 else math.inf
