"""Trains a GPT: sets up the data and the model, then repeats one training step until max_iters.

    python train.py config/train_shakespeare_char.py    one process, on the best available device
    python train.py config/train_shakespeare_char.py --max_iters=500 --learning_rate=3e-4
    torchrun --standalone --nproc_per_node=8 train.py config/...    eight GPUs, or CPU processes

Read this file from top to bottom: the config, the learning rate, the evaluation, one training step,
what a step needs, main, the run, the loop, and the functions that they call.
"""

import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch

import configurator
from model import GPT
from nib.checkpoint import store
from nib.checkpoint.start import new_model
from nib.errors import EXIT_FINDING, EXIT_NONFINITE, NotFinite, Stopped, run_script
from nib.guard import MAX_REWINDS, BadSteps, describe, nonfinite_parameters, watch_outputs
from nib.machine.compiling import compile_model, pick_compile
from nib.machine.device import autocast, has_bfloat16, pick_device, prepare_device, seed_everything
from nib.machine.graphs import capture_model, has_small_passes
from nib.machine.memory import explain_full_memory, fit_batch_size
from nib.machine.ranks import Ranks, start_ranks
from nib.machine.signals import FINDING, StepCut, StopSignal
from nib.machine.stopwatch import Stopwatch
from nib.optim import Optimizer
from nib.run.begin import begin, picks_batch_size, resume
from nib.run.folder import recall_config
from nib.run.logbook import Logbook
from nib.tokens.batches import BatchLoader

# The defaults train GPT-2 (124M) on OpenWebText.
# run
out_dir: str = 'out'  # folder for checkpoints, metrics and config.json
init_from: str = 'scratch'  # or 'resume', another run's out_dir, 'gpt2', an open model, a ckpt.pt
overwrite: bool = False  # let a new run replace the one in out_dir
eval_only: bool = False  # only evaluate the model on the whole validation split
budget: str = ''  # time for the run (90s, 10m, 2h); chooses model, batch, rate and steps
params: str = ''  # size of the model (300k, 10M); chooses the rest
seed: int = 1337  # for weights, data order and dropout
# evaluation and checkpoints
eval_interval: int = 2000  # steps between evaluations; each one saves a checkpoint
eval_iters: int = 200  # batches per split in an evaluation; the final one uses all of val
keep_last: int = 1  # number of newest checkpoints to keep, besides the best one
keep_every: int = 0  # also keep checkpoints whose step is a multiple of this; 0: none
# watching
log_interval: int = 10  # steps between log lines; only logged steps wait for the device
stop_on: Literal['never', 'critical', 'warning'] = 'never'  # severity of findings that stop the run
sample_tokens: int = 0  # tokens of sample text to print at each evaluation; 0: none
tensorboard: bool = False  # also log to OUT_DIR/tensorboard
wandb_log: bool = False  # also log to Weights & Biases (WANDB_MODE=offline needs no account)
wandb_project: str = 'nibgpt'  # project on Weights & Biases
wandb_run_name: str = ''  # name of the run; empty: chosen by wandb
report: bool = True  # write OUT_DIR/report.html at the end
# data
dataset: str = 'openwebtext'  # folder in data_dir with train.bin, val.bin and meta.json
data_dir: str = ''  # folder that holds the datasets; empty: data/ next to this script
vocab_size: int = 0  # number of tokens, if no meta.json or meta.pkl has it; 0: GPT-2's
prepare_dataset: bool = False  # if the bins are missing, run data/DATASET/prepare.py
fallback_dataset: str = ''  # used if the dataset cannot be downloaded; empty: stop with an error
batch_size: int | Literal['auto'] = 12  # sequences per micro step and process; auto: all that fit
block_size: int = 1024  # context length in tokens
gradient_accumulation_steps: int = 40  # micro steps per step, summed over all processes
# model
n_layer: int = 12  # transformer blocks
n_head: int = 12  # attention heads per block
n_kv_head: int = 0  # key/value heads, each shared by n_head / n_kv_head query heads; 0: n_head
head_dim: int = 0  # width of a head; 0: n_embd / n_head
n_embd: int = 768  # embedding dimension
dropout: float = 0.0  # dropout probability; 0.1 or more for small datasets
bias: bool = False  # biases in linear layers and LayerNorms, as in GPT-2; False is slightly better
position: Literal['learned', 'rotary'] = 'learned'  # position encoding
rotary_base: float = 10000.0  # base of the rotary frequencies; larger for longer contexts
norm: Literal['layer', 'rms'] = 'layer'  # LayerNorm, or the simpler RMSNorm
smear: int = 0  # number of previous tokens whose embeddings are mixed into each position
qk_norm: bool = False  # normalize queries and keys; more stable at high learning rates
mlp: Literal['gelu', 'gelu_erf', 'relu', 'relu2', 'swiglu'] = 'gelu'  # relu2 is squared ReLU
mlp_width: int = 0  # hidden units of the MLP; 0: 4 * n_embd, and for swiglu two thirds of that
tied_head: bool = True  # the output head shares the weights of the token embedding
logit_cap: float = 0.0  # soft cap: logits stay between -logit_cap and logit_cap; 0: no cap
zero_init: bool = False  # initialize residual projections to 0; each block starts as the identity
recompute: bool = False  # recompute activations in the backward pass: less memory, 25% slower
# optimizer
max_iters: int = 600000  # training steps, not epochs
optimizer: Literal['adamw', 'muon', 'sgd'] = 'adamw'  # muon: for the blocks' matrices only
learning_rate: float = 6e-4  # peak learning rate, reached after the warm-up
weight_decay: float = 0.1  # applied to matrices and embeddings only
beta1: float = 0.9  # AdamW: decay rate of the mean gradient
beta2: float = 0.95  # AdamW: decay rate of the mean squared gradient
muon_lr_ratio: float = 1.0  # Muon: learning rate as a multiple of learning_rate
muon_momentum: float = 0.95  # Muon: decay rate of the mean gradient
muon_iterations: int = 5  # Muon: Newton-Schulz iterations, which orthogonalize the update
sgd_momentum: float = 0.9  # SGD: fraction of the momentum that each step keeps; 0: none
shard_optimizer: bool = False  # each of several processes keeps a share of the optimizer state
grad_clip: float = 1.0  # maximum gradient norm; 0: no clipping
max_bad_steps: int = 3  # consecutive non-finite steps, none applied, before on_nonfinite decides
on_nonfinite: Literal['stop', 'skip', 'rewind'] = 'stop'  # rewind: return to the last checkpoint
# learning rate schedule
lr_schedule: Literal['cosine', 'linear', 'wsd', 'constant'] = 'cosine'  # wsd: warmup-stable-decay
warmup_iters: int = 2000  # steps of linear warm-up
cooldown_iters: int = 0  # wsd only: steps of decay, ending at lr_decay_iters
lr_decay_iters: int | Literal['auto'] = 'auto'  # step at which min_lr is reached; auto: max_iters
min_lr: float | Literal['auto'] = 'auto'  # final learning rate; auto: learning_rate / 10
# machine
device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # float32 is TF32 on a GPU
compile: bool | Literal['auto'] = 'auto'  # use torch.compile
cuda_graph: bool = True  # on one GPU, launch all kernels of a small model's pass at once
deterministic: bool = False  # on a GPU, use only operations that repeat bit for bit (slower)


def get_lr(step: int) -> float:
    """Returns the learning rate of a step: linear warm-up, then constant or decaying to min_lr.

    The decay ends at lr_decay_iters and follows a cosine (Loshchilov and Hutter 2017) or a line.
    With wsd, the rate stays constant and decays during the cooldown only (Hu et al. 2024).
    """
    assert lr_decay_iters != 'auto' and min_lr != 'auto'  # settle_schedule has replaced them
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)  # never 0: the first step moves too
    if lr_schedule == 'constant':
        return learning_rate
    if step >= lr_decay_iters:
        return min_lr
    decay_start = lr_decay_iters - cooldown_iters if lr_schedule == 'wsd' else warmup_iters
    progress = max(0.0, (step - decay_start) / (lr_decay_iters - decay_start))  # 0 to 1
    factor = 1.0 - progress  # 1 to 0
    if lr_schedule == 'cosine':
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + factor * (learning_rate - min_lr)


@torch.no_grad()
def evaluate(model, batches, precision, ranks) -> float:
    """Returns the mean loss over the batches (x, y) of all ranks, in nats per token; NaN if none.

    Dropout is off.
    """
    model.eval()
    total = torch.zeros(2, device=next(model.parameters()).device)  # no device sync per batch
    for x, y in batches:
        with precision:
            loss = model(x, y)
        counted = (y != -1).sum()  # the loss ignores targets of -1
        total += torch.stack((loss * counted, counted))
    model.train()
    summed, tokens = ranks.sum(total).tolist()
    return summed / tokens if tokens else math.nan


# -- one training step -----------------------------------------------------------------------------


def accumulate_gradients(t, micro_batches, step: int) -> torch.Tensor:
    """Accumulates the gradients of a step's micro batches and returns the mean of their losses.

    t: a Training (defined below). micro_batches: t.micro_steps pairs (x, y) of token ids, each
    (batch_size, block_size). step: seeds dropout.
    """
    mean_loss = torch.zeros((), device=t.device)
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
    """Performs one training step: computes the gradients, clips them, and applies them if finite.

    Returns the mean loss over all micro steps and ranks, and the gradient norm before clipping.
    Both are tensors, so no step waits for the device.
    """
    mean_loss = accumulate_gradients(t, micro_batches, step)
    t.scaler.unscale_(t.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), t.grad_clip or math.inf)
    # The norm is the same on all ranks. If it is not finite on one of them, no rank may step.
    mean_loss, grad_norm = t.ranks.sum(torch.stack((mean_loss, grad_norm))) / t.ranks.world_size
    t.optimizer.step(t.bad_steps.usable(mean_loss, grad_norm))
    t.scaler.update()
    t.optimizer.zero_grad()
    return mean_loss, grad_norm


# -- what a step needs -----------------------------------------------------------------------------


@dataclass
class Training:
    """What a training step needs. bench.py and debug_training.py use it too."""

    raw_model: GPT  # evaluated and saved
    model: torch.nn.Module  # trained: raw_model, or its compiled or distributed version
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # scales the loss in float16, so small gradients do not become 0
    batches: BatchLoader
    bad_steps: BadSteps  # keeps non-finite steps out of the weights
    precision: AbstractContextManager  # of forward passes: autocast, or nothing
    ranks: Ranks
    device: str
    micro_steps: int  # per step, on this rank
    grad_clip: float
    seed: int
    cuda_graph: bool = False  # whether passes of a small model may be captured

    @classmethod
    def set_up(cls, config, data, start=None, ranks=Ranks()) -> 'Training':
        """Sets up a new model, or the one in `start`. Raises UserError if the model is impossible.

        config: the values of this file's keys, with the device and dtype to use.
        """
        device, float16 = config['device'], config['dtype'] == 'float16'
        prepare_device(device, config['deterministic'])
        model = new_model(config, data, start).to(device).train()
        max_bad_steps = None if config['on_nonfinite'] == 'skip' else config['max_bad_steps']
        return cls(
            raw_model=model,
            model=model,
            optimizer=Optimizer.pick(config, model, has_bfloat16(device), ranks),
            scaler=torch.amp.GradScaler(torch.device(device).type, enabled=float16),
            batches=BatchLoader.from_config(config, data, ranks, device),
            bad_steps=BadSteps(max_bad_steps, device, float16),
            precision=autocast(config['dtype'], device),
            ranks=ranks,
            device=device,
            micro_steps=config['gradient_accumulation_steps'] // ranks.world_size,
            grad_clip=config['grad_clip'],
            seed=config['seed'],
            cuda_graph=config['cuda_graph'],
        )

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a forward and a backward pass, which takes twice as many."""
        return 3 * sum(self.raw_model.flops_per_token().values())

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step, over all ranks."""
        tokens = self.batches.batch_size * self.batches.block_size
        return tokens * self.micro_steps * self.ranks.world_size

    def compile_and_distribute(self, compiled: bool, say):
        """Compiles the model if requested, and prepares it for a GPU or several ranks."""
        batch = self.batches.batch(0, 0)
        if compiled:
            self.model = compile_model(self.model, batch, self.precision, say)
        if self.cuda_graph and has_small_passes(self):
            self.model = capture_model(self.model, batch, self.precision, say)
        self.model = self.ranks.distribute(self.model, self.device, batch, self.precision)


@dataclass
class TrainState:
    """All that a resumed run needs besides the weights, the optimizer and the config."""

    step: int = 0  # steps done
    passed_over: int = 0  # batches skipped by rewinding: step s trains on those of s + passed_over
    bad_steps: int = 0  # number of consecutive non-finite steps up to this one
    evaluated: int = -1  # the last step that was evaluated
    best_val_loss: float | None = None
    scaler: dict | None = None  # the loss scale of float16

    def restore(self, t: Training, found: store.Checkpoint, tensors):
        """Restores a checkpoint. Raises UserError if the ranks have read different ones."""
        found.check_ranks(t.ranks)
        t.raw_model.load_state_dict(tensors['model'])
        t.optimizer.load_named_state(t.raw_model, tensors['optimizer'])
        vars(self).update(found.state['train'])
        if self.scaler and t.scaler.is_enabled():
            t.scaler.load_state_dict(self.scaler)
        t.bad_steps.reset(self.bad_steps)


# -- the run ---------------------------------------------------------------------------------------


def main(argv):
    defaults = configurator.read_block(__file__).defaults  # the file may be edited later
    values, origins = configurator.configure(
        __file__, argv, settle={'device': pick_device}, recall=recall_config
    )
    ranks = start_ranks(values['device'])  # rank 0 of 1 without torchrun
    stop = StopSignal(ranks)
    with Logbook(values['out_dir'], defaults, ranks, stop) as book:  # all that a run writes
        exit_code = run(values, origins, book, stop)
    ranks.close()
    return exit_code


def run(values, origins, book, stop) -> int:
    """Sets up what a step needs, trains and evaluates; returns the exit code."""
    # The dataset, and the start: new weights, another model's, or this run's latest checkpoint.
    stopwatch = Stopwatch(Training.set_up, train_step, evaluate)  # for --budget
    config, origins, data, start = begin(values, origins, book, stopwatch)
    # From now on, the variables at the top of this file hold this run's values.
    globals().update({key: config[key] for key in values})

    t = Training.set_up(config, data, start, book.ranks)
    if picks_batch_size(config, origins, start):
        config |= fit_batch_size(t, config, book.say)  # the tokens per step stay
        batches = BatchLoader.from_config(config, data, book.ranks, t.device)
        t = replace(t, batches=batches, micro_steps=batches.micro_steps)
    state = TrainState()
    changes = resume(t, state, start, config, origins, book)
    del start  # free its copy of the weights
    compiled, reason = pick_compile(config, t.raw_model)
    book.say_model(t, compiled, reason)
    if not eval_only:
        if init_from != 'resume':
            book.lock_new(overwrite)
        t.compile_and_distribute(compiled, book.say)
        book.open(t, data, config, origins, changes, state.step)

    with stop:  # from here on, a signal is a request to stop, and the run saves first
        try:
            if not eval_only:
                loop(t, data, state, book, stop)
            exit_code = finish(t, data, state, book, stop)
        except NotFinite as error:  # in steps, weights or the validation loss
            exit_code = book.end_nonfinite(state.step, error)
        except Stopped as stopped:  # by a signal or the doctor; already saved
            exit_code = book.end_stopped(state.step, stopped)
        except (MemoryError, RuntimeError) as error:
            explain_full_memory(error, t, config)
            raise
        book.close(state.step, exit_code)
    return exit_code


def loop(t, data, state, book, stop):
    """Repeats: handle bad steps, save, stop and evaluate if due, then train one step and log it."""
    while True:
        t.optimizer.lr = get_lr(state.step)
        at_end = state.step >= max_iters
        evaluation_due = at_end or state.step % eval_interval == 0
        evaluation_due = evaluation_due and state.evaluated < state.step  # not twice
        stopping = stop.agreed()  # a signal to one rank stops all

        check_due = evaluation_due or stopping or state.step % log_interval == 0
        if check_due and handle_bad_steps(t, state, book):
            continue  # from the last checkpoint
        if evaluation_due or stopping:
            book.save(state)  # before the evaluation, which may take long
        if stopping:
            raise Stopped(stopping)
        if evaluation_due and not run_evaluation(t, data, state, book, stop):
            continue  # interrupted: the next iteration stops; a resumed run evaluates again
        if at_end:
            return

        line_due = (state.step + 1) % log_interval == 0 or state.step == 0
        data_step = state.step + state.passed_over
        micro_batches = t.batches.micro_batches(data_step)
        if line_due:
            micro_batches = book.watch(micro_batches)  # for the doctor
        try:
            mean_loss, grad_norm = train_step(t, stop.cut(micro_batches), data_step)
        except StepCut:
            t.optimizer.zero_grad()  # saving needs the memory
            continue  # the next iteration saves and stops; a resumed run repeats this step
        state.step += 1
        book.note(state.step, mean_loss, grad_norm)
        if line_due:
            book.log(state.step, mean_loss, grad_norm)  # waits for the device


# -- what the loop calls ---------------------------------------------------------------------------


def handle_bad_steps(t, state, book) -> bool:
    """Reports new non-finite steps, none of which was applied; returns whether the run rewound.

    Raises NotFinite if there were too many and the run may not return to its last checkpoint.
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
    book.warn(f'{seen.sentence}: returning to the last checkpoint and skipping these batches')
    data_step = seen.last + state.passed_over
    book.wait_for_checkpoint()
    state.restore(t, *store.load(out_dir, warn=book.warn))
    state.passed_over, state.bad_steps = data_step - state.step, 0
    t.bad_steps.reset()
    book.rewind(state.step)
    return True


def explain_nonfinite(t, data_step: int) -> str:
    """Repeats a non-finite step and returns a sentence about where it went wrong, on any rank."""
    alone = replace(t, model=t.raw_model)  # no gradient exchange
    with watch_outputs(t.raw_model) as outputs:
        accumulate_gradients(alone, t.batches.micro_batches(data_step), data_step)
    found = t.ranks.gather((outputs, nonfinite_parameters(t.raw_model)))
    t.optimizer.zero_grad()
    return describe(*max(found, key=lambda names: len(names[1])))


def run_evaluation(t, data, state, book, stop) -> bool:
    """Evaluates both splits and records the losses; returns False if interrupted by a stop."""
    started = time.perf_counter()
    train_loss = split_loss(t, data, 'train', eval_iters, stop)
    val_loss = split_loss(t, data, 'val', eval_iters, stop)
    if stop.agreed():
        return False
    if not math.isfinite(val_loss):
        raise NotFinite(f'step {state.step}: validation loss {val_loss}')
    best = state.best_val_loss is None or val_loss < state.best_val_loss
    state.evaluated, state.best_val_loss = state.step, val_loss if best else state.best_val_loss
    book.record_evaluation(state, train_loss, val_loss, best, started)
    return True


def split_loss(t, data, split: str, max_batches: int | None, stop) -> float:
    """Returns the loss on max_batches batches, spread evenly over a split, or on all of it.

    If the run must stop, the remaining batches are skipped: check `stop` before using the result.
    """
    batches = stop.cut_short(t.batches.eval_batches(data.split(split), max_batches))
    return evaluate(t.raw_model, batches, t.precision, t.ranks)


def finish(t, data, state, book, stop) -> int:
    """Checks generation and evaluates the whole validation split; returns the exit code."""
    book.check_generation(state.step)
    stopped_by_doctor = stop.agreed() == FINDING
    if stopped_by_doctor:
        stop.number = 0  # nothing is left to stop
    loss = split_loss(t, data, 'val', None, stop)
    if number := stop.agreed():
        raise Stopped(number)
    book.record_whole_validation(state.step, loss, data, block_size)
    if not math.isfinite(loss):
        return EXIT_NONFINITE
    return EXIT_FINDING if stopped_by_doctor else 0


if __name__ == '__main__':
    run_script(main, on_ranks=True)
