"""Trains a GPT: prepares model and data, then repeats one training step until max_iters.

    python train.py config/train_shakespeare_char.py    one process, on the best device found
    python train.py config/train_shakespeare_char.py --max_iters=500 --learning_rate=3e-4
    torchrun --standalone --nproc_per_node=8 train.py config/...    on eight GPUs, or on a CPU

Read it from top to bottom: the config, the learning rate, the evaluation, one training step, what a
step needs, main, the loop, and what they call.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch

import configurator
from model import GPT
from nib.checkpoint import store
from nib.checkpoint.start import new_model, read_start
from nib.errors import EXIT_FINDING, EXIT_NONFINITE, NotFinite, Stopped, UserError, run_script
from nib.guard import MAX_REWINDS, BadSteps, describe, nonfinite_parameters, watch_outputs
from nib.machine.compiling import compile_model, pick_compile
from nib.machine.device import (
    autocast,
    has_bfloat16,
    keep_freed_memory,
    peak_flops,
    pick_device,
    pick_dtype,
    seed_everything,
)
from nib.machine.ranks import Ranks, distribute, start_ranks
from nib.machine.signals import FINDING, StopSignal
from nib.optim import Optimizer
from nib.run.checks import check_config, settle_schedule
from nib.run.logbook import Logbook
from nib.tokens.batches import BatchLoader, eval_batches
from nib.tokens.find import open_or_prepare

# The defaults train GPT-2 (124M) on OpenWebText.
# run
out_dir: str = 'out'  # where checkpoints, metrics and config.json go
init_from: str = 'scratch'  # or 'resume', another run's out_dir, 'gpt2' (-medium, -large, -xl)
overwrite: bool = False  # let a new run replace the one in out_dir
eval_only: bool = False  # evaluate the whole validation split once and end
seed: int = 1337  # of the weights, the order of the data and dropout
# evaluation and checkpoints
eval_interval: int = 2000  # steps between evaluations; each one saves a checkpoint
eval_iters: int = 200  # batches of each split in an evaluation; the last one takes all of val
keep_last: int = 1  # newest checkpoints to keep, beside the best
keep_every: int = 0  # also keep every checkpoint whose step is a multiple of this; 0: none
# watching
log_interval: int = 10  # steps between lines; only these steps wait for the device
stop_on: Literal['never', 'critical', 'warning'] = 'never'  # findings that end the run
sample_tokens: int = 0  # tokens that the model writes at each evaluation, for you to read
tensorboard: bool = False  # also write OUT_DIR/tensorboard
wandb_log: bool = False  # also log to Weights & Biases (WANDB_MODE=offline needs no account)
wandb_project: str = 'nibgpt'  # project there
wandb_run_name: str = ''  # name of the run there; empty lets wandb choose
report: bool = True  # also write OUT_DIR/report.html at the end
# data
dataset: str = 'openwebtext'  # folder in data_dir that holds train.bin, val.bin and meta.json
data_dir: str = ''  # folder of the datasets; empty: data/ beside this script
prepare_dataset: bool = False  # make missing bins with data/DATASET/prepare.py
fallback_dataset: str = ''  # used if the dataset cannot be prepared; empty: the run ends instead
batch_size: int = 12  # sequences per micro step and process
block_size: int = 1024  # tokens in a sequence
gradient_accumulation_steps: int = 40  # micro steps per step, over all processes together
# model
n_layer: int = 12  # blocks
n_head: int = 12  # attention heads in a block
n_kv_head: int = 0  # key and value heads, each shared by n_head / n_kv_head query heads; 0: n_head
n_embd: int = 768  # width
dropout: float = 0.0  # share of activations set to 0; 0.1 and more for small data
bias: bool = False  # biases in linear layers and LayerNorms, as in GPT-2; slightly better without
position: Literal['learned', 'rotary'] = 'learned'  # how the model knows the position of a token
rotary_base: float = 10000.0  # of rotary positions; a larger one tells larger distances apart
norm: Literal['layer', 'rms'] = 'layer'  # LayerNorm, or the simpler RMSNorm
qk_norm: bool = False  # normalize queries and keys: attention stays calm at high learning rates
mlp: Literal['gelu', 'relu2', 'swiglu'] = 'gelu'  # relu2 is squared ReLU
tied_head: bool = True  # the output head is the token embedding itself
logit_cap: float = 0.0  # logits are bent to stay between minus and plus this; 0: no cap
zero_init: bool = False  # residual projections begin at 0: every block begins as the identity
recompute: bool = False  # recompute activations in the backward pass: 25 % slower, little memory
# optimizer
max_iters: int = 600000  # steps in the run
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon is for the blocks' matrices only
learning_rate: float = 6e-4  # the highest one, reached after the warm-up
weight_decay: float = 0.1  # on matrices and embeddings only
beta1: float = 0.9  # AdamW's memory of the mean gradient
beta2: float = 0.95  # AdamW's memory of the squared gradient
muon_lr_ratio: float = 1.0  # learning rate of Muon's matrices, as a multiple of learning_rate
muon_momentum: float = 0.95  # Muon's memory of the mean gradient
muon_iterations: int = 5  # of Newton-Schulz, which makes Muon's updates orthogonal
grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
max_bad_steps: int = 3  # consecutive non-finite steps, none of them applied, until on_nonfinite
on_nonfinite: Literal['stop', 'skip', 'rewind'] = 'stop'  # rewind: to the last checkpoint
# learning rate schedule
lr_schedule: Literal['cosine', 'linear', 'wsd', 'constant'] = 'cosine'  # wsd is warmup-stable-decay
warmup_iters: int = 2000  # steps of linear warm-up
cooldown_iters: int = 0  # wsd only: the last steps before lr_decay_iters, in which the rate falls
lr_decay_iters: int | Literal['auto'] = 'auto'  # steps until min_lr is reached; auto: max_iters
min_lr: float | Literal['auto'] = 'auto'  # the lowest one; auto: learning_rate / 10
# machine
device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of products, not weights
compile: bool | Literal['auto'] = 'auto'  # torch.compile


def get_lr(step: int) -> float:
    """Returns the learning rate of a step: linear warm-up, then constant, or a fall to min_lr.

    The fall ends at lr_decay_iters and follows a cosine (Loshchilov and Hutter 2017) or a line; wsd
    is constant first and falls over the cooldown only (Hu et al. 2024).
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)  # never 0: the first step moves too
    if lr_schedule == 'constant':
        return learning_rate
    if step >= lr_decay_iters:
        return min_lr
    fall_starts = lr_decay_iters - cooldown_iters if lr_schedule == 'wsd' else warmup_iters
    progress = max(0.0, (step - fall_starts) / (lr_decay_iters - fall_starts))  # 0 to 1
    height = 1.0 - progress  # 1 to 0
    if lr_schedule == 'cosine':
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + height * (learning_rate - min_lr)


@torch.no_grad()
def evaluate(model, batches, precision, ranks, stop) -> float:
    """Returns the mean loss, in nats per token, over batches (x, y) of all ranks, without dropout.

    If the run is asked to stop meanwhile, the remaining batches are left out: look at `stop` before
    using the result.
    """
    model.eval()
    total = torch.zeros(2, device=next(model.parameters()).device)  # there, so that no batch waits
    for x, y in batches:
        if stop.number and total[1]:
            break
        with precision:
            loss = model(x, y)
        total[0] += loss * y.numel()
        total[1] += y.numel()
    model.train()
    summed, tokens = ranks.sum(total).tolist()
    return summed / tokens


# -- one training step -----------------------------------------------------------------------------


def accumulate_gradients(t, micro_batches, step: int) -> torch.Tensor:
    """Adds up the gradients of a step's micro batches; returns the mean of their losses.

    t: the Training below. micro_batches: t.micro_steps pairs (x, y) of token ids, each
    (batch_size, block_size). step: seeds dropout.
    """
    mean_loss = 0.0
    for micro_step, (x, y) in enumerate(micro_batches):
        seed_everything(t.seed, step, t.ranks.rank, micro_step)
        last = micro_step == t.micro_steps - 1
        # Ranks exchange the sum of their gradients, once, on the last micro step.
        with nullcontext() if last or not hasattr(t.model, 'no_sync') else t.model.no_sync():
            with t.precision:
                loss = t.model(x, y) / t.micro_steps
            t.scaler.scale(loss).backward()
        mean_loss += loss.detach()
    return mean_loss


def train_step(t, micro_batches, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of training: gradients of every micro batch, clipped, applied if they are finite.

    Returns the mean loss over all micro steps and ranks and the norm of the gradients before
    clipping, both as tensors, so that nothing waits for the device.
    """
    mean_loss = accumulate_gradients(t, micro_batches, step)
    t.scaler.unscale_(t.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), t.grad_clip or math.inf)
    # The norm is the same on all ranks, or else something is wrong with one: then no rank may step.
    mean_loss, grad_norm = t.ranks.sum(torch.stack((mean_loss, grad_norm))) / t.ranks.world_size
    t.optimizer.step(t.bad_steps.usable(mean_loss, grad_norm))
    t.scaler.update()
    t.optimizer.zero_grad()
    return mean_loss, grad_norm


@dataclass
class Training:
    """What a training step needs. bench.py and debug_training.py set up theirs here too."""

    raw_model: GPT  # what is evaluated and saved
    model: torch.nn.Module  # what is trained: raw_model, perhaps compiled and distributed
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # scales the loss in float16, so that small gradients are not 0
    batches: BatchLoader
    bad_steps: BadSteps  # keeps steps that are not finite from the weights
    precision: AbstractContextManager  # of forward passes: autocast, or nothing
    ranks: Ranks
    device: str
    micro_steps: int  # of this rank
    grad_clip: float
    seed: int
    dtype: str = 'float32'  # of matrix products

    @classmethod
    def set_up(cls, config, data, start=None, ranks=Ranks()) -> 'Training':
        """Sets up a fresh model, or that of `start`. Raises UserError for a model that cannot be.

        config: the values of this file's keys, with the device and dtype to use.
        """
        device, float16 = config['device'], config['dtype'] == 'float16'
        keep_freed_memory(device)
        model = new_model(config, data, start).to(device).train()
        micro_steps = config['gradient_accumulation_steps'] // ranks.world_size
        batches = BatchLoader(
            data.train,
            config['block_size'],
            config['batch_size'],
            config['seed'],
            'train',
            micro_steps,
            ranks.rank,
            ranks.world_size,
            device,
            data.vocab_size,
        )
        limit = None if config['on_nonfinite'] == 'skip' else config['max_bad_steps']
        return cls(
            model,
            model,
            Optimizer.pick(config, model, has_bfloat16(device)),
            torch.amp.GradScaler(torch.device(device).type, enabled=float16),
            batches,
            BadSteps(limit, device, float16),
            autocast(config['dtype'], device),
            ranks,
            device,
            micro_steps,
            config['grad_clip'],
            config['seed'],
            config['dtype'],
        )

    @property
    def flops_per_token(self) -> float:
        """Of a forward and a backward pass, which takes twice the operations."""
        return 3 * sum(self.raw_model.flops_per_token().values())

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks together."""
        tokens = self.batches.batch_size * self.batches.block_size
        return tokens * self.micro_steps * self.ranks.world_size

    @property
    def peak_flops(self) -> float | None:
        """The peak rate of all ranks together, in FLOP/s; None if it is not known."""
        peak = peak_flops(self.device, self.dtype)
        return peak * self.ranks.world_size if peak else None

    def peak_seconds(self, steps: int) -> float | None:
        """What so many steps would take at the peak rate."""
        flops = self.flops_per_token * self.tokens_per_step * steps
        return flops / self.peak_flops if self.peak_flops else None

    def compile_and_distribute(self, compiled: bool, say):
        """Wraps the model by torch.compile, if asked, and on several ranks by their own wrapper."""
        if compiled:
            self.model = compile_model(self.model, self.batches.batch(0, 0), self.precision, say)
        if self.ranks.world_size > 1:
            self.model = distribute(
                self.model,
                self.ranks.local_rank,
                self.device,
                self.batches.batch(0, 0),
                self.precision,
            )


@dataclass
class TrainState:
    """All that a resumed run needs beside the weights, the optimizer and the config."""

    step: int = 0  # steps done
    passed_over: int = 0  # batches left out by rewinding: step s trains on those of s + passed_over
    bad_steps: int = 0  # number of consecutive non-finite steps up to this one
    evaluated: int = -1  # the last step that was evaluated
    best_val_loss: float | None = None
    scaler: dict | None = None  # the loss scale of float16

    def restore(self, t: Training, found: store.Checkpoint, tensors):
        """Puts back what a checkpoint holds. Raises UserError if ranks have read different ones."""
        if len(set(steps := t.ranks.gather(found.step))) > 1:
            raise UserError(
                f'the processes have read checkpoints of different steps, {steps} by '
                f'rank: make sure that all can read {found.path.parent}'
            )
        t.raw_model.load_state_dict(tensors['model'])
        t.optimizer.load_named_state(t.raw_model, tensors['optimizer'])
        vars(self).update(vars(TrainState(**found.state['train'])))
        if self.scaler and t.scaler.is_enabled():
            t.scaler.load_state_dict(self.scaler)
        t.bad_steps.reset(self.bad_steps)


# -- the run ---------------------------------------------------------------------------------------


def main(argv):
    # The config: from here on the names at the top of this file have the values of this run.
    values, origins = configurator.configure(__file__, argv, settle={'device': pick_device})
    globals().update(values)
    dtype_used, reason = pick_dtype(dtype, device)
    ranks = start_ranks(device)  # rank 0 of 1 without torchrun
    check_config(values, ranks.world_size)
    stop = StopSignal(announced=ranks.is_first)
    book = Logbook(out_dir, ranks, stop)  # all that the run says and writes
    used = {'device': ranks.own_device(device), 'dtype': dtype_used, 'ranks': ranks.world_size}
    book.say_machine(**used, reason=reason)

    # The start: fresh weights, another model's, or this run's newest checkpoint.
    start, values = find_start(values, origins, book)
    globals().update(values)
    data = find_data(ranks, book)
    config = values | used | {'dataset': data.name}
    t = Training.set_up(config, data, start, ranks)
    state, changes = TrainState(), {}
    if start and start.resumed:
        changes = resume(t, state, start, config, book)
    del start  # it holds a copy of all weights
    compiled, reason = pick_compile(compile, t.device, t.peak_seconds(max_iters))
    book.say_model(t, compiled, reason)
    if not eval_only:
        if not state.step:
            book.lock_new(overwrite)
        t.compile_and_distribute(compiled, book.say)
        book.open(t, data, config, origins, changes, state.step)

    stop.listen()
    try:
        if not eval_only:
            loop(t, data, state, book, stop)
        exit_code = finish(t, data, state, book, stop)
    except NotFinite as error:  # in steps, weights or the validation loss
        exit_code = book.end_nonfinite(state.step, error)
    except Stopped as stopped:  # by a signal or the doctor; saved by then
        exit_code = book.end_stopped(state.step, stopped, argv)
    book.close(state.step, exit_code, configurator.read_block(__file__).defaults)
    stop.ignore()
    ranks.close()
    return exit_code


def loop(t, data, state, book, stop):
    """Between two steps: look back, save, stop, evaluate, if due. Then one step, and its line."""
    while True:
        t.optimizer.lr = get_lr(state.step)
        at_end = state.step >= max_iters
        evaluation_due = at_end or state.step % eval_interval == 0
        evaluation_due = evaluation_due and state.evaluated < state.step
        stopping = t.ranks.largest(stop.number)  # a signal to any rank counts for all

        if evaluation_due or stopping or state.step % log_interval == 0:
            if look_back(t, state, book):
                continue  # from the last checkpoint
        if evaluation_due or stopping:
            book.save(state)  # before the evaluation, which may take long
        if stopping:
            raise Stopped(stopping)
        if evaluation_due and not check_up(t, data, state, book, stop):
            continue  # cut short: the next turn saves and stops, and a resumed run makes up for it
        if at_end:
            return

        line_due = (state.step + 1) % log_interval == 0 or state.step == 0
        data_step = state.step + state.passed_over
        micro_batches = t.batches.micro_batches(data_step)
        if line_due:
            micro_batches = book.watch(micro_batches)  # for the doctor
        mean_loss, grad_norm = train_step(t, micro_batches, data_step)
        state.step += 1
        book.note(state.step, mean_loss, grad_norm)
        if line_due:
            book.log(state.step, mean_loss, grad_norm)  # waits for the device


# -- what the loop calls ---------------------------------------------------------------------------


def look_back(t, state, book) -> bool:
    """Looks for non-finite steps, none of which was applied; returns whether it has gone back.

    Raises NotFinite if there were too many and the run may not go back to its last checkpoint.
    """
    seen = t.bad_steps.look(state.step, t.scaler)
    state.bad_steps = seen.in_a_row
    book.see_bad_steps(state.step, seen)
    if not seen.ending:
        if seen.new:
            book.warn(f'{seen.sentence}: not applied')
        return False
    if on_nonfinite == 'stop' or not book.saved or book.rewinds == MAX_REWINDS:
        why = explain_nonfinite(t, seen.last - 1 + state.passed_over)
        raise NotFinite(f'{seen.sentence}; {why}')
    book.warn(f'{seen.sentence}: going back to the last checkpoint, past the batches that led here')
    data_step = seen.last + state.passed_over
    book.wait_for_checkpoint()
    state.restore(t, *store.load(out_dir, warn=book.warn))
    state.passed_over, state.bad_steps = data_step - state.step, 0
    t.bad_steps.reset()
    book.rewind(state.step)
    return True


def explain_nonfinite(t, data_step: int) -> str:
    """Computes a step that was not finite again, and says where it went wrong on any rank."""
    alone = replace(t, model=t.raw_model)  # without an exchange of gradients
    with watch_outputs(t.raw_model) as outputs:
        accumulate_gradients(alone, t.batches.micro_batches(data_step), data_step)
    found = t.ranks.gather((outputs, nonfinite_parameters(t.raw_model)))
    t.optimizer.zero_grad()
    return describe(*max(found, key=lambda names: len(names[1])))


def split_loss(t, data, split: str, max_batches: int | None, stop) -> float:
    """The loss on max_batches batches, spread evenly over a split, or on all of it."""
    batches = eval_batches(
        data.split(split),
        block_size,
        batch_size,
        max_batches,
        t.ranks.rank,
        t.ranks.world_size,
        t.device,
        data.vocab_size,
    )
    return evaluate(t.raw_model, batches, t.precision, t.ranks, stop)


def check_up(t, data, state, book, stop) -> bool:
    """Evaluates both splits; returns False if a stop has cut it short."""
    started = time.perf_counter()
    train_loss = split_loss(t, data, 'train', eval_iters, stop)
    val_loss = split_loss(t, data, 'val', eval_iters, stop)
    if t.ranks.largest(stop.number):
        return False
    if not math.isfinite(val_loss):
        raise NotFinite(f'step {state.step}: validation loss {val_loss}')
    best = state.best_val_loss is None or val_loss < state.best_val_loss
    state.evaluated, state.best_val_loss = state.step, val_loss if best else state.best_val_loss
    book.record_evaluation(state, train_loss, val_loss, best, started)
    return True


def finish(t, data, state, book, stop) -> int:
    """Checks how the model generates, and evaluates the whole validation split; returns the exit code."""
    book.check_generation(state.step)
    if by_doctor := t.ranks.largest(stop.number) == FINDING:
        stop.number = 0  # nothing is left to stop
    loss = split_loss(t, data, 'val', None, stop)
    if number := t.ranks.largest(stop.number):
        raise Stopped(number, at_end=True)
    book.record_whole_validation(state.step, loss, data)
    return EXIT_NONFINITE if not math.isfinite(loss) else EXIT_FINDING if by_doctor else 0


# -- what main calls -------------------------------------------------------------------------------


def find_start(values, origins, book):
    """Returns the weights to start from, None for fresh ones, and values with their model's shape.

    Raises UserError if init_from names nothing usable, or a key contradicts the weights.
    """
    if book.restarted_by_torchrun():  # the command line was typed for the first start
        values = values | {'init_from': 'resume'}
    if values['init_from'] == 'resume' and not eval_only:
        book.lock_existing()  # before the checkpoint is read: another run might save one meanwhile
    start = read_start(values['init_from'], out_dir, book.warn)
    if start:
        book.say(f'{"resuming" if start.resumed else "starting"} from {start.name}')
        values = start.adopt(values, origins)
    return start, settle_schedule(values)


def find_data(ranks, book):
    """Returns the dataset, prepared first if need be. Raises UserError if none is available."""
    data = open_or_prepare(
        dataset, fallback_dataset, data_dir, prepare_dataset, block_size, ranks, book.say
    )
    if sample_tokens:
        data.tokenizer.decode([0])  # if its files are missing, raise UserError now
    book.say_data(data, gradient_accumulation_steps * batch_size * block_size)
    return data


def resume(t, state, start, config, book) -> dict:
    """Restores the checkpoint of `start`; returns the keys changed since, with both values."""
    state.restore(t, start.resumed, start.tensors)
    config['init_from'] = start.resumed.state['config']['init_from']  # how the run began
    changes = start.changes(config)
    if changes:
        pairs = (f'{key} {before!r} -> {now!r}' for key, (before, now) in changes.items())
        book.say(f'changed since the checkpoint: {", ".join(pairs)}')
    if state.step >= max_iters and not eval_only:
        book.say(f'all {max_iters} steps are done; to train on, raise --max_iters')
    return changes


if __name__ == '__main__':
    run_script(main)
