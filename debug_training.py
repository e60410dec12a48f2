"""Examines one batch: gradients and updates by parameter, activations by layer.

    python debug_training.py config/train_shakespeare_char.py
    python debug_training.py config/train_shakespeare_char.py --init_from=resume
        examines the run in out_dir, at its next step
    python debug_training.py config/train_shakespeare_char.py --explain
        explains one step with real numbers
    python debug_training.py config/train_gpt2.py --dataset=
        uses random tokens instead of a dataset

Accepts every key of train.py except --budget and --params, but does not evaluate, compile or save.
The steps are those of train.py. Each one is undone, and nothing is written to out_dir.
"""

import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import configurator
import train
from nib.checkpoint import store
from nib.checkpoint.start import read_start
from nib.checkpoint.weights import Weights
from nib.errors import UserError, run_script, warn
from nib.kernels.cross_entropy import IGNORED
from nib.lessons import examination, walkthrough
from nib.machine.device import has_bfloat16, pick_device, pick_dtype, seed_everything
from nib.machine.memory import check_memory
from nib.machine.ranks import Ranks
from nib.optim import Optimizer
from nib.run.checks import check_config, check_schedule, pick_model, reject_plan, settle_schedule
from nib.run.folder import recall_config
from nib.schema import check_range
from nib.text.tokenizer import tokenizer_from_json
from nib.tokens.dataset import TokenDataset
from nib.tokens.find import open_or_prepare

# what to show
explain: bool = False  # explain one step with real numbers, instead of printing tables
full: bool = False  # show all layers of a deep model, not only three and the marked ones
# how much of the batch
batch_tokens: int = 0  # tokens in the batch; 0: all, or what a CPU can process in seconds
overfit_steps: int = 50  # training steps to memorize the batch

VOCAB_SIZE = 65  # of random tokens (--dataset=), unless vocab_size is set
MOST_RANDOM = 1 << 22  # random tokens of a batch; a larger one repeats them
QUICK = 2e11  # floating-point operations of a step that takes a CPU seconds


def main(argv):
    values, origins = configurator.configure(
        __file__, argv, settle={'device': pick_device}, base='train.py', recall=recall_config
    )
    globals().update(values)
    values['dtype'] = 'float32' if explain else pick_dtype(values['dtype'], values['device'])[0]
    reject_plan(values, origins)
    check_config(values | {'dataset': values['dataset'] or 'random tokens'}, world_size=1)
    check_range(values, 'batch_tokens', least=0, below=1 << 31)
    check_range(values, 'overfit_steps', least=1, below=1 << 31)
    start = read_start(values['init_from'], values['out_dir'], warn)
    if start:
        values = start.adopt(values, origins)
    values = settle_schedule(values)
    check_config(values | {'dataset': values['dataset'] or 'random tokens'}, world_size=1)
    check_schedule(values)
    model = pick_model(values, start.model.vocab_size if start else 1)
    check_memory(model, values | {'batch_size': 0})  # of the batch, a part is examined
    vars(train).update(values)  # which get_lr reads
    if values['dataset']:
        data = open_dataset(values)
    else:
        data, start = random_tokens(values, start)
    training = Microscope(values, data, start)
    if explain:
        lesson = walkthrough.walk_through(training)
    else:
        lesson = examination.examine(training, full, overfit_steps)
    for line in lesson:
        print(line, flush=True)  # now, because the next one may take a while


# -- what is examined ------------------------------------------------------------------------------


def open_dataset(values) -> TokenDataset:
    try:
        return open_or_prepare(values, Ranks(), warn)
    except UserError as error:
        hint = 'or use random tokens: --dataset='
        if values['init_from'] != 'resume' and store.exists(values['out_dir']):
            hint = f'to examine the run in {values["out_dir"]}, add --init_from=resume; {hint}'
        raise UserError(f'{error}; {hint}') from error


def random_tokens(values, start) -> tuple[TokenDataset, Weights | None]:
    """Returns a dataset of random tokens, and the weights without the run that they come from.

    start: the weights, whose vocabulary is used; None for a new model.
    """
    tokenizer = tokenizer_from_json(start.tokenizer) if start and start.tokenizer else None
    size = values['vocab_size'] or VOCAB_SIZE
    if start:  # an open model may have more embeddings than its tokenizer has tokens
        size = tokenizer.vocab_size if tokenizer else start.model.vocab_size
    if size < 2:
        raise UserError(f'vocab_size is {size}: random tokens need at least 2')
    block_size = values['block_size']
    n_sequences = min(max(2, values['batch_size']), max(2, MOST_RANDOM // block_size))
    n = 4 * (n_sequences + 1) * block_size + 1  # enough for a few steps
    seed_everything(values['seed'], 'random tokens')
    tokens = torch.randint(size, (n,)).numpy()
    data = TokenDataset('random tokens', Path(), tokens, tokens, size, tokenizer, {}, '')
    return data, start and replace(start, resumed=None)


class Microscope:
    """The training of a run at its next step, for single steps that are undone.

    data_step is the number of the batch. batch() is a part of it, of (n_sequences, n_positions).
    """

    def __init__(self, values, data, start):
        least = 2 if values['explain'] else 1  # sequences; accumulation needs two
        batch_size = max(values['batch_size'], least)
        self.values = values | {'batch_size': batch_size, 'on_nonfinite': 'skip'}
        self.data, self.start = data, start
        self.has_text = can_decode(data.tokenizer)
        self.shown = 24 if self.has_text else 8  # tokens to show
        self.training = train.Training.set_up(self.values, data, start)
        self.model, self.precision = self.training.model, self.training.precision
        self.device, self.steps_done, self.data_step = values['device'], 0, 0
        if start and start.resumed:
            saved = start.resumed.state['train']
            self.steps_done, self.data_step = saved['step'], saved['step'] + saved['passed_over']
        self.batch_size = batch_size
        self.n_sequences, self.n_positions = self.fit_batch(values['batch_tokens'], least)

    def fit_batch(self, limit: int, least: int) -> tuple[int, int]:
        """Returns the numbers of sequences and positions to examine.

        limit: tokens; 0 for as many as possible. least: sequences.
        """
        block_size = self.values['block_size']
        shortest = 1 if limit else 64
        on_cpu = self.device == 'cpu' or self.values['explain']  # which uses float64 on the CPU
        if not limit and on_cpu:
            limit = int(QUICK / self.training.flops_per_token)
        elif not limit:
            return self.batch_size, block_size
        sequences = min(self.batch_size, max(least, limit // block_size))
        return sequences, min(block_size, max(shortest, limit // sequences))

    def batch(self, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x and y (n_sequences, n_positions) of the step `number` steps from here.

        Sequences without a target that the loss counts come last. Raises UserError if all lack one.
        """
        batches = self.training.batches
        x, y = batches.first_sequences(self.data_step + number, self.n_sequences)
        x, y = x[:, : self.n_positions], y[:, : self.n_positions]
        counts = (y != IGNORED).any(dim=1)
        if not counts.any():
            tokens = self.batch_size * self.values['block_size']
            more = f'examine more (--batch_tokens={tokens} examines all)'
            raise UserError(
                f'the loss ignores all targets of the {y.numel():,} tokens that are examined: '
                f'{more if y.numel() < tokens else "every batch must have some that count"}'
            )
        order = counts.int().argsort(descending=True, stable=True)
        return x[order].contiguous(), y[order].contiguous()

    @property
    def scheduled_rate(self) -> float:
        """The learning rate that train.py would use for this step."""
        return train.get_lr(self.steps_done)

    @property
    def has_memory(self) -> bool:
        """Whether the optimizer continues with the state of a checkpoint."""
        return bool(self.start and 'optimizer' in self.start.tensors)

    def new_optimizer(self, method: str = '') -> Optimizer:
        """Returns the optimizer of the run at its full learning rate.

        method: use this optimizer instead, without state if it is not the one of the run.
        """
        method = method or self.values['optimizer']
        optimizer = Optimizer.pick(
            self.values | {'optimizer': method}, self.model, has_bfloat16(self.device)
        )
        optimizer.lr = self.values['learning_rate']
        if self.has_memory and method == self.values['optimizer']:
            optimizer.load_named_state(self.model, self.start.tensors['optimizer'])
        return optimizer

    def accumulate(self, micro_batches) -> torch.Tensor:
        """Computes the gradients of a step, without clipping; returns the loss."""
        scaler = self.training.scaler
        while True:
            training = replace(self.training, micro_steps=len(micro_batches))
            loss = train.accumulate_gradients(training, micro_batches, self.data_step)
            if not scaler.is_enabled():
                return loss
            scale = scaler.get_scale()
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            for gradient in gradients:
                gradient.div_(scale)
            if scale <= 1 or all(gradient.isfinite().all() for gradient in gradients):
                return loss
            scaler.update(scale / 2)  # as training does when it skips a step
            self.model.zero_grad(set_to_none=True)

    def step(self, optimizer, micro_batches) -> tuple[float, float]:
        """Runs train_step once; returns the loss and the norm of the gradients."""
        training = replace(self.training, optimizer=optimizer, micro_steps=len(micro_batches))
        loss, norm = train.train_step(training, micro_batches, self.data_step)
        return float(loss), float(norm)

    @contextmanager
    def undone(self):
        """Undoes the steps inside; yields the weights before them, name -> tensor."""
        parameters = dict(self.model.named_parameters())
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            yield before
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])
            self.model.zero_grad(set_to_none=True)

    def describe(self) -> str:
        name = self.start.name if self.start else 'a new model'
        millions = self.model.num_params() / 1e6
        return (
            f'{self.data.name}, {name}, {millions:.2f}M parameters, {self.values["dtype"]} on '
            f'{self.device}'
        )

    def show_tokens(self, ids) -> str:
        """Returns the text of token ids, or the ids if there is no tokenizer.

        A token that is only a part of a character appears as its bytes, such as <0xE4>. Targets
        that the loss ignores are left out.
        """
        ids = ids[ids != IGNORED]
        if not self.has_text:
            return ' '.join(map(str, ids.tolist()))
        content = self.data.tokenizer.decode_bytes(ids.tolist())
        text = content.decode('utf-8', 'surrogateescape')  # byte 0xE4 becomes U+DCE4
        return repr(re.sub('[\udc80-\udcff]', lambda byte: f'<0x{ord(byte[0]) & 0xFF:X}>', text))


def can_decode(tokenizer) -> bool:
    """Returns False for None (random tokens), and if the vocabulary of GPT-2 is not available."""
    try:
        return tokenizer is not None and bool(tokenizer.decode([0]))
    except UserError:
        return False


if __name__ == '__main__':
    run_script(main)
