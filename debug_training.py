"""Puts one batch under the microscope: gradients and updates parameter by parameter, activations layer by layer.

    python debug_training.py config/train_shakespeare_char.py
    python debug_training.py config/train_shakespeare_char.py --init_from=resume    the run in out_dir, at its next step
    python debug_training.py config/train_shakespeare_char.py --explain             one step with real numbers
    python debug_training.py config/train_gpt2.py --dataset=                        no dataset: random tokens

Takes every key of train.py, but evaluates, compiles and saves nothing. The steps are train.py's own; none of them lasts, and
nothing is written to out_dir.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import configurator
import train
from nib.checkpoint.start import Weights, read_start
from nib.errors import UserError, run_script
from nib.lessons import examination, walkthrough
from nib.machine.device import has_bfloat16, pick_device, pick_dtype, seed_everything
from nib.machine.ranks import Ranks
from nib.optim import Optimizer
from nib.run.checks import check_config
from nib.text.tokenizer import tokenizer_from_json
from nib.tokens.dataset import TokenDataset
from nib.tokens.find import open_or_prepare

# what to show
explain: bool = False  # instead of the tables, walk through one step with real numbers
full: bool = False  # every layer of a deep model, instead of the first, the middle, the last and what is marked
# how much of the batch
batch_tokens: int = (
    0  # tokens to look at; 0: batch_size * block_size, on a CPU what it computes in seconds
)
overfit_steps: int = 50  # steps to learn the batch by heart in
vocab_size: int = 65  # of the random tokens that --dataset= asks for

QUICK = 2e11  # floating-point operations of a step that a CPU does in seconds


def main(argv):
    values, origins = configurator.configure(
        __file__, argv, settle={'device': pick_device}, base='train.py'
    )
    globals().update(values)
    values['dtype'] = 'float32' if explain else pick_dtype(values['dtype'], values['device'])[0]
    check_config(values | {'dataset': values['dataset'] or 'random tokens'}, world_size=1)
    for key, least in (('batch_tokens', 0), ('overfit_steps', 1), ('vocab_size', 2)):
        if not least <= values[key] < 1 << 31:
            raise UserError(
                f'{key} is {values[key]}: it must be at least {least} and less than {1 << 31:,}'
            )
    if values['dataset'] and origins['vocab_size'] != 'default':
        raise UserError(
            f'vocab_size ({origins["vocab_size"]}) is that of random tokens, but dataset {values["dataset"]} has its '
            f'own: leave it out, or take random tokens with --dataset='
        )
    start = read_start(values['init_from'], values['out_dir'], warn)
    if start:
        values = start.adopt(values, origins)
    if values['dataset']:
        data = open_dataset(values)
    else:
        data, start = random_tokens(values, start)
    training = Microscope(values, data, start)
    lesson = (
        walkthrough.walk_through(training)
        if explain
        else examination.examine(training, full, overfit_steps)
    )
    for line in lesson:
        print(line, flush=True)  # at once: the next one may take a while


def warn(line: str):
    print(line, file=sys.stderr, flush=True)


# -- what is looked at -----------------------------------------------------------------------------------------------


def open_dataset(values) -> TokenDataset:
    try:
        return open_or_prepare(
            values['dataset'],
            values['fallback_dataset'],
            values['data_dir'],
            values['prepare_dataset'],
            values['block_size'],
            Ranks(),
            warn,
        )
    except UserError as error:
        raise UserError(f'{error}; or take random tokens: --dataset=') from error


def random_tokens(values, start) -> tuple[TokenDataset, Weights | None]:
    """Tokens that a fresh model, or the weights' own vocabulary, can read; and the weights, for which no dataset is wrong."""
    size = start.model.vocab_size if start else values['vocab_size']
    n = 4 * (max(2, values['batch_size']) + 1) * values['block_size'] + 1  # windows for a few steps
    seed_everything(values['seed'], 'random tokens')
    tokens = torch.randint(size, (n,)).numpy()
    tokenizer = tokenizer_from_json(start.tokenizer) if start else None
    data = TokenDataset('random tokens', Path(), tokens, tokens, size, tokenizer, {}, '')
    return data, start and replace(start, resumed=None)


class Microscope:
    """A run's training, one step at a time and each undone, as its next step would have it."""

    def __init__(self, values, data, start):
        least = (
            2 if values['explain'] else 1
        )  # sequences: there is nothing to accumulate in a single one
        self.values = values | {
            'batch_size': max(values['batch_size'], least),
            'on_nonfinite': 'skip',
        }
        self.data, self.start = data, start
        self.has_text = can_decode(data.tokenizer)
        self.shown = 24 if self.has_text else 8  # tokens of a text that are shown
        self.training = train.Training.set_up(self.values, data, start)
        self.model, self.device, self.precision = (
            self.training.model,
            values['device'],
            self.training.precision,
        )
        saved = (
            start.resumed.state['train']
            if start and start.resumed
            else {'step': 0, 'passed_over': 0}
        )
        self.data_step = saved['step'] + saved['passed_over']
        self.batch_size = self.values['batch_size']
        self.n_sequences, self.n_positions = self.fit_batch(values['batch_tokens'], least)

    def fit_batch(self, limit: int, least: int) -> tuple[int, int]:
        """Sequences and positions of the batch that are looked at."""
        if not limit and (
            self.values['explain'] or self.device == 'cpu'
        ):  # parts of --explain are in float64, on the CPU
            limit = QUICK / (3 * sum(self.model.flops_per_token().values()))
        if not limit:
            return self.batch_size, self.values['block_size']
        sequences = min(self.batch_size, max(least, int(limit / self.values['block_size'])))
        return sequences, min(
            self.values['block_size'],
            max(1 if self.values['batch_tokens'] else 64, int(limit / sequences)),
        )

    def batch(self, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y (n_sequences, n_positions) of the number-th step from here."""
        return tuple(
            part[: self.n_sequences, : self.n_positions].contiguous()
            for part in self.training.batches.batch(self.data_step + number, 0)
        )

    @property
    def has_memory(self) -> bool:
        """Whether the optimizer goes on with what it has seen before."""
        return bool(self.start and 'optimizer' in self.start.tensors)

    def new_optimizer(self, method: str = '') -> Optimizer:
        """The run's optimizer at its full learning rate; or one of another method, which begins without a memory."""
        method = method or self.values['optimizer']
        optimizer = Optimizer.pick(
            self.values | {'optimizer': method}, self.model, has_bfloat16(self.device)
        )
        optimizer.lr = self.values['learning_rate']
        if self.has_memory and method == self.values['optimizer']:
            optimizer.load_named_state(self.model, self.start.tensors['optimizer'])
        return optimizer

    def accumulate(self, micro_batches) -> torch.Tensor:
        """Leaves the gradients of a step in the parameters, not clipped; returns the loss."""
        scaler = self.training.scaler
        while True:
            loss = train.accumulate_gradients(
                replace(self.training, micro_steps=len(micro_batches)),
                micro_batches,
                self.data_step,
            )
            if not scaler.is_enabled():
                return loss
            scale, gradients = (
                scaler.get_scale(),
                [p.grad for p in self.model.parameters() if p.grad is not None],
            )
            for gradient in gradients:
                gradient.div_(scale)
            if scale <= 1 or all(gradient.isfinite().all() for gradient in gradients):
                return loss
            scaler.update(scale / 2)  # as training finds the scale: by steps that it leaves out
            self.model.zero_grad(set_to_none=True)

    def step(self, optimizer, micro_batches) -> tuple[float, float]:
        """One train_step; returns loss and gradient norm."""
        training = replace(self.training, optimizer=optimizer, micro_steps=len(micro_batches))
        loss, norm = train.train_step(training, micro_batches, self.data_step)
        return float(loss), float(norm)

    @contextmanager
    def undone(self):
        """Steps inside do not last; gives the weights as they were, name -> tensor."""
        before = {
            name: parameter.detach().clone() for name, parameter in self.model.named_parameters()
        }
        try:
            yield before
        finally:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(before[name])
            self.model.zero_grad(set_to_none=True)

    def describe(self) -> str:
        return (
            f'{self.data.name}, {self.start.name if self.start else "a fresh model"}, '
            f'{self.model.num_params() / 1e6:.2f}M parameters, {self.values["dtype"]} on {self.device}'
        )

    def show_tokens(self, ids) -> str:
        """Token ids as a person reads them: their text, or themselves where there is none."""
        return (
            repr(self.data.tokenizer.decode(ids.tolist()))
            if self.has_text
            else ' '.join(map(str, ids.tolist()))
        )


def can_decode(tokenizer) -> bool:
    """Not that of random tokens, which there is none of, nor GPT-2's where its vocabulary is not here."""
    try:
        return tokenizer is not None and bool(tokenizer.decode([0]))
    except UserError:
        return False


if __name__ == '__main__':
    run_script(main)
