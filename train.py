"""Trains a GPT: prepares the model and the data, then repeats one training step until max_iters.

    python train.py config/train_shakespeare_char.py            one process, on whatever device is here
    python train.py config/train_shakespeare_char.py --max_iters=500 --learning_rate=3e-4
    torchrun --standalone --nproc_per_node=8 train.py config/...   eight processes, on eight GPUs or on the CPU

Read it from top to bottom: the config, the learning rate, the evaluation, one training step, the loop.
"""
import math
import platform
import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

import torch

import configurator
from nib import guard, optim
from nib.checkpoint import store
from nib.checkpoint.start import new_model, read_start
from nib.checkpoint.writer import CheckpointWriter
from nib.doctor import vitals
from nib.doctor.rules import Doctor
from nib.errors import EXIT_FINDING, EXIT_NONFINITE, UserError, run_script
from nib.generation import check_generation
from nib.machine.compiling import compile_model, pick_compile
from nib.machine.device import (
    autocast,
    describe_device,
    has_bfloat16,
    keep_freed_memory,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
    seed_everything,
)
from nib.machine.ranks import distribute, start_ranks
from nib.machine.signals import FINDING, StopSignal, describe_stop
from nib.report.page import write_after_run
from nib.run.checks import check_config
from nib.run.console import Console
from nib.run.folder import RunLock, restarted_by_torchrun, write_config
from nib.run.metrics import Metrics
from nib.tokens.batches import BatchLoader, eval_batches
from nib.tokens.find import open_or_prepare

# The defaults train GPT-2 (124M) on OpenWebText.
# run
out_dir: str = 'out'  # where checkpoints, metrics and config.json go
init_from: str = 'scratch'  # 'resume' goes on from the newest checkpoint in out_dir; or weights to start from: the out_dir of another run, 'gpt2' (-medium, -large, -xl), or a folder with Hugging Face's GPT-2
overwrite: bool = False  # let a new run replace the one in out_dir
eval_only: bool = False  # evaluate the whole validation split once and end
seed: int = 1337  # of the weights, the order of the data and dropout
# evaluation and checkpoints
eval_interval: int = 2000  # steps between evaluations; each one saves a checkpoint
eval_iters: int = 200  # batches of each split in an evaluation; the last one takes the whole validation split
keep_last: int = 1  # newest checkpoints to keep, beside the best
keep_every: int = 0  # also keep the checkpoint of every so many steps for good; 0 keeps none of them
# watching
log_interval: int = 10  # steps between lines; the device is waited for on these steps only
on_critical: Literal['warn', 'stop'] = 'warn'  # when the doctor finds that the run is worthless as it is: say so, or also save and end
on_warning: Literal['warn', 'stop'] = 'warn'  # when it finds what could be much better
sample_tokens: int = 0  # tokens that the model writes at each evaluation, for you to read
tensorboard: bool = False  # also write OUT_DIR/tensorboard
wandb_log: bool = False  # also log to Weights & Biases (WANDB_MODE=offline needs no account)
wandb_project: str = 'nibgpt'  # project there
wandb_run_name: str = ''  # name of the run there; empty lets wandb choose
report: bool = True  # also write OUT_DIR/report.html at the end
# data
dataset: str = 'openwebtext'  # folder in data_dir that holds train.bin, val.bin and meta.json
data_dir: str = ''  # folder of the datasets; empty: data/ beside this script
prepare_dataset: bool = False  # make the bins with data/DATASET/prepare.py when they are missing
fallback_dataset: str = ''  # trained on when the dataset cannot be prepared; empty: the run ends instead
batch_size: int = 12  # sequences per micro step and process
block_size: int = 1024  # tokens in a sequence
gradient_accumulation_steps: int = 40  # micro steps per step over all processes: batch = this * batch_size * block_size
# model
n_layer: int = 12  # blocks
n_head: int = 12  # attention heads in a block
n_kv_head: int = 0  # key and value heads, each shared by n_head / n_kv_head query heads; 0 is n_head
n_embd: int = 768  # width
dropout: float = 0.0  # share of activations set to zero; 0 for pretraining, 0.1 and more for small data
bias: bool = False  # biases in linear layers and LayerNorms; GPT-2 has them, without is a bit better and faster
position: Literal['learned', 'rotary'] = 'learned'  # how the model knows where a token stands
rotary_base: float = 10000.0  # of rotary positions: the larger, the farther they tell distances apart
norm: Literal['layer', 'rms'] = 'layer'  # LayerNorm, or the simpler RMSNorm
qk_norm: bool = False  # normalise queries and keys: attention stays calm at high learning rates
mlp: Literal['gelu', 'relu2', 'swiglu'] = 'gelu'  # non-linearity between the MLP's layers: GELU, squared ReLU or SwiGLU
tied_head: bool = True  # the output head is the token embedding itself
logit_cap: float = 0.0  # bends logits into plus and minus this; 0 does not
zero_init: bool = False  # residual projections begin at 0: every block begins as the identity
recompute: bool = False  # keep each block's input alone and compute the rest again in the backward pass: a quarter more time, little memory
# optimizer
max_iters: int = 600000  # steps in the run
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: the blocks' matrices by Muon, the rest by AdamW; a lower loss after as many steps
learning_rate: float = 6e-4  # the highest one, reached after the warm-up
weight_decay: float = 0.1  # on matrices and embeddings only
beta1: float = 0.9  # AdamW's memory of the mean gradient
beta2: float = 0.95  # AdamW's memory of the squared gradient
muon_lr_ratio: float = 1.0  # learning rate of Muon's matrices, as a multiple of learning_rate
muon_momentum: float = 0.95  # Muon's memory of the mean gradient
muon_iterations: int = 5  # of Newton-Schulz, which makes Muon's updates orthogonal
grad_clip: float = 1.0  # largest norm of the gradient; 0 clips nothing
max_bad_steps: int = 3  # steps in a row whose loss or gradients are not finite: none is applied, and after so many on_nonfinite is done
on_nonfinite: Literal['stop', 'skip', 'rewind'] = 'stop'  # 'skip' goes on; 'rewind' goes back to the last checkpoint and passes over the batches that led here
# learning rate schedule
lr_schedule: Literal['cosine', 'linear', 'wsd', 'constant'] = 'cosine'  # after the warm-up; wsd is warmup-stable-decay
warmup_iters: int = 2000  # steps of linear warm-up
cooldown_iters: int = 0  # wsd only: the last steps before lr_decay_iters, in which the rate falls
lr_decay_iters: int = 600000  # steps until min_lr is reached; usually max_iters
min_lr: float = 6e-5  # the lowest one; usually learning_rate / 10
# machine
device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the matrix products; weights stay float32
compile: bool | Literal['auto'] = 'auto'  # torch.compile


def get_lr(step: int) -> float:
    """The learning rate of a step: linear warm-up, then constant, or a fall to min_lr at lr_decay_iters, along a cosine
    (Loshchilov and Hutter 2017) or a line; wsd is constant first and falls over the cooldown only (Hu et al. 2024)."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)  # never 0: the first step should move the weights
    if lr_schedule == 'constant':
        return learning_rate
    if step >= lr_decay_iters:
        return min_lr
    fall_starts = lr_decay_iters - cooldown_iters if lr_schedule == 'wsd' else warmup_iters
    progress = max(0.0, (step - fall_starts) / (lr_decay_iters - fall_starts))  # 0 to 1
    height = 0.5 * (1.0 + math.cos(math.pi * progress)) if lr_schedule == 'cosine' else 1.0 - progress  # 1 to 0
    return min_lr + height * (learning_rate - min_lr)


@torch.no_grad()
def evaluate(model, batches, precision, ranks, stop) -> float:
    """The mean loss, in nats per token, over the batches (x, y) of all ranks. Dropout is off meanwhile. When the run is
    asked to stop, the rest of the batches is left out: the caller looks at `stop` before it uses the result."""
    model.eval()
    total = torch.zeros(2, device=next(model.parameters()).device)  # on the device, so that no batch waits for it
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


def accumulate_gradients(model, scaler, micro_batches, micro_steps, precision, seeds):
    """Adds up the gradients of a step's micro batches; returns the mean of their losses, a tensor.

    micro_batches: yields micro_steps pairs (x, y) of token ids (batch_size, block_size). seeds: what dropout's
    randomness is drawn from, beside the micro step.
    """
    mean_loss = 0.0
    for micro_step, (x, y) in enumerate(micro_batches):
        seed_everything(*seeds, micro_step)
        last = micro_step == micro_steps - 1
        # Ranks exchange the sum of their gradients, once, on the last micro step.
        with nullcontext() if last or not hasattr(model, 'no_sync') else model.no_sync():
            with precision:
                loss = model(x, y) / micro_steps
            scaler.scale(loss).backward()
        mean_loss += loss.detach()
    return mean_loss


def train_step(model, optimizer, scaler, micro_batches, micro_steps, precision, grad_clip, seeds, ranks, bad_steps):
    """One step of training: gradients from every micro batch, clipped, given to the optimizer if they are finite.

    Returns the mean loss over all micro steps and ranks and the norm of the gradients before clipping, both as tensors,
    so that nothing waits for the device.
    """
    mean_loss = accumulate_gradients(model, scaler, micro_batches, micro_steps, precision, seeds)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # The norm is the same on all ranks, or else something is wrong with one, which then no rank may learn from.
    mean_loss, grad_norm = ranks.sum(torch.stack((mean_loss, grad_norm))) / ranks.world_size
    optimizer.step(bad_steps.usable(mean_loss, grad_norm))
    scaler.update()
    optimizer.zero_grad()
    return mean_loss, grad_norm


@dataclass
class TrainState:
    """All that a resumed run needs beside the weights, the optimizer and the config."""
    step: int = 0  # steps done
    passed_over: int = 0  # steps whose batches rewinding left out: step s trains on the batches of step s + passed_over
    bad_steps: int = 0  # so many steps before this one were not finite
    evaluated: int = -1  # the last step that was evaluated
    best_val_loss: float | None = None
    scaler: dict | None = None  # the loss scale of float16


def main(argv):
    values, origins = configurator.configure(__file__, argv, settle={'device': pick_device})
    globals().update(values)  # from here on the names at the top of this file have the values of this run
    dtype_used, dtype_reason = pick_dtype(dtype, device)
    ranks = start_ranks(device)
    device_used = f'cuda:{ranks.local_rank}' if device == 'cuda' else device
    check_config(values, ranks.world_size)
    micro_steps = gradient_accumulation_steps // ranks.world_size
    precision = autocast(dtype_used, device_used)
    console = Console(shown=ranks.is_first)
    console.say(f'device {describe_device(device_used)}, ranks {ranks.world_size}, dtype {dtype_used} '
                f'({dtype_reason})')

    if ranks.on_first(lambda: restarted_by_torchrun(out_dir)):
        values['init_from'] = 'resume'  # the command says something else, and was typed for the first start
        globals().update(values)
    lock = RunLock(out_dir)
    if init_from == 'resume' and not eval_only:  # before the checkpoint is read: another run might save one meanwhile
        ranks.on_first(lambda: store.exists(out_dir) and lock.take(new_run=False))
    start = read_start(init_from, out_dir, console.warn)  # None from scratch
    if start:
        console.say(f'{"resuming" if start.resumed else "starting"} from {start.name}')
        values = start.adopt(values, origins)
        globals().update(values)
    data = open_or_prepare(dataset, fallback_dataset, data_dir, prepare_dataset, block_size, ranks, console.say)
    if sample_tokens:
        data.tokenizer.decode([0])  # GPT-2's vocabulary may be missing: said now, not after the first evaluation
    tokens_per_step = gradient_accumulation_steps * batch_size * block_size
    console.say(f'dataset {data.name}: {len(data.train):,} training and {len(data.val):,} validation tokens, '
                f'vocabulary {data.vocab_size}; a step is {tokens_per_step:,} tokens')

    config = values | {'dataset': data.name, 'device': device_used, 'dtype': dtype_used, 'ranks': ranks.world_size}
    keep_freed_memory(device_used)
    raw_model = new_model(config, data, start).to(device_used).train()
    optimizer = optim.Optimizer.pick(config, raw_model, has_bfloat16(device_used))
    # Scales the loss up, so that small gradients are not 0 in float16; without float16 it does nothing.
    scaler = torch.amp.GradScaler(torch.device(device_used).type, enabled=dtype_used == 'float16')
    state, changes = TrainState(), {}
    if init_from == 'resume':
        state = put_back(start.resumed, start.tensors, raw_model, optimizer, scaler, ranks)
        config['init_from'] = start.resumed.state['config']['init_from']  # the records say how the run began
        if changes := start.changes(config):
            console.say('changed since the checkpoint: '
                        + ', '.join(f'{key} {before!r} -> {now!r}' for key, (before, now) in changes.items()))
        if state.step >= max_iters and not eval_only:
            console.say(f'all {max_iters} steps are done; to train on, raise --max_iters and --lr_decay_iters')
    elif not eval_only:
        ranks.on_first(lambda: lock.take(new_run=not overwrite))
    del start  # it holds a copy of all weights
    flops_per_token = 3 * sum(raw_model.flops_per_token().values())
    peak = peak_flops(device_used, dtype_used)
    peak_seconds = flops_per_token * tokens_per_step * max_iters / (peak * ranks.world_size) if peak else None
    compile_used, compile_reason = pick_compile(compile, device_used, peak_seconds)
    console.say(f'model: {raw_model.num_params() / 1e6:.2f}M parameters ({raw_model.num_params(positions=False) / 1e6:.2f}M '
                f'without positions), {flops_per_token / 1e6:.1f} MFLOP per token and step, '
                f'compile {"on" if compile_used else "off"} ({compile_reason})')

    batches = BatchLoader(data.train, block_size, batch_size, seed, 'train', micro_steps, ranks.rank,
                                 ranks.world_size, device_used, data.vocab_size)
    model = own_model = raw_model
    if compile_used and not eval_only:
        model = own_model = compile_model(raw_model, batches.batch(step=0, micro_step=0), precision, console.say)
    if ranks.world_size > 1 and not eval_only:
        model = distribute(model, ranks.local_rank, device_used, batches.batch(step=0, micro_step=0), precision)

    def split_loss(split, max_batches):
        return evaluate(raw_model, eval_batches(data.split(split), block_size, batch_size, max_batches, ranks.rank,
                                                       ranks.world_size, device_used, data.vocab_size), precision, ranks, stop)

    def save():
        state.scaler = scaler.state_dict() or None
        writer.save(state.step, raw_model.state_dict(), optimizer.named_state(raw_model), {
            'train': asdict(state), 'model': asdict(raw_model.config), 'config': config, 'dataset': data.name,
            'dataset_fingerprint': data.fingerprint, 'tokenizer': data.tokenizer.to_json(),
            'versions': {'python': platform.python_version(), 'torch': torch.__version__}})

    def find_nonfinite(step) -> str:
        """Computes a step that was not finite again, and says where it went wrong on any rank."""
        with guard.watch_outputs(raw_model) as outputs:
            accumulate_gradients(raw_model, scaler, batches.micro_batches(step), micro_steps, precision, (seed, step, ranks.rank))
        found = ranks.gather((outputs, guard.nonfinite_parameters(raw_model)))
        optimizer.zero_grad()
        return guard.describe(*max(found, key=lambda names: len(names[1])))

    def rewind(data_step) -> TrainState:
        """Back to the last checkpoint, from where the run goes on with the batches of data_step."""
        ranks.on_first(lambda: writer.wait())
        found, tensors = store.load(out_dir, warn=console.warn)
        back = put_back(found, tensors, raw_model, optimizer, scaler, ranks)
        back.passed_over, back.bad_steps = data_step - back.step, 0
        if metrics:
            metrics.rewind(back.step)
            doctor.rewind(back.step)
        return back

    metrics = writer = doctor = None

    def open_out_dir():
        nonlocal metrics, writer, doctor
        metrics = Metrics(out_dir, state.step, config, tensorboard, wandb_project if wandb_log else '', wandb_run_name)
        if init_from != 'resume':  # only now, as this run can start; those set aside are deleted when it has saved
            store.set_aside(out_dir)
        write_config(out_dir, config, origins, state.step, changes)
        writer = CheckpointWriter(out_dir, keep_last, keep_every, state.step)
        doctor = Doctor(config, vitals.examine_data(data.train, data.val, data.vocab_size), raw_model.num_params(), len(data.train),
                        trained=config['init_from'] != 'scratch')
        doctor.recall(metrics.records)
        tell(doctor.see_data())

    def tell(findings):
        """Shows and records what the doctor has found, and stops the run where the config says so."""
        for finding in findings:
            console.warn(f'step {finding.step}: {finding.name}, {finding}')
            metrics.log(finding.step, {f'finding/{finding.name}': str(finding)})
            if {'critical': on_critical, 'warning': on_warning}.get(finding.severity) == 'stop':
                stop.number = stop.number or FINDING

    def end_nonfinite(what) -> int:
        """Says that the run ends, as its numbers are not finite; returns its exit code."""
        if doctor:
            tell(doctor.see_nonfinite(state.step, what))
        kept = f'the checkpoint of step {saved} in {out_dir} is good' if saved else 'no checkpoint was there yet'
        console.warn(f'The run ends. Nothing is saved; {kept}.')
        return EXIT_NONFINITE

    def close_out_dir():
        writer.close()
        if exit_code < 128:  # not stopped halfway
            console.say(f'verdict of the doctor: {doctor.verdict(state.step)}')
            metrics.log(state.step, {'verdict': doctor.verdict(state.step)})
        metrics.close()
        if report:
            write_after_run(out_dir, configurator.read_block(__file__).defaults, console.say, console.warn)

    stop = StopSignal(announced=ranks.is_first)
    if not eval_only:
        ranks.on_first(open_out_dir)
    signs = vitals.Vitals(own_model, optimizer, scaler, batches, precision)
    saved = state.step if init_from == 'resume' else 0  # the last step that a checkpoint holds; nobody needs one of step 0
    limit = None if on_nonfinite == 'skip' else max_bad_steps
    bad_steps = guard.BadSteps(limit, device_used, scaler.is_enabled(), state.bad_steps)
    rewinds = 0  # since the last checkpoint
    exit_code = 0
    stop.listen()
    clock, clock_step = time.perf_counter(), state.step
    # Between two steps: look, save, stop, evaluate, whatever of these is due. Then one step, and a line about it.
    while not eval_only:
        optimizer.lr = lr = get_lr(state.step)
        evaluation_due = (state.step % eval_interval == 0 or state.step >= max_iters) and state.evaluated < state.step
        stopping = ranks.largest(stop.number)

        # -- look for steps that were not finite; none of them has touched the weights
        if state.step % log_interval == 0 or evaluation_due or stopping:
            seen = bad_steps.look(state.step, scaler)
            state.bad_steps = seen.in_a_row
            if doctor:
                tell(doctor.see_bad_steps(state.step, seen))
            if seen.ending:
                if on_nonfinite == 'stop' or not saved or rewinds == guard.MAX_REWINDS:
                    why = find_nonfinite(seen.last - 1 + state.passed_over)
                    exit_code = end_nonfinite(f'{seen.sentence}; {why}')
                    break
                console.warn(f'{seen.sentence}: going back to the last checkpoint, past the batches that led here')
                state = rewind(seen.last + state.passed_over)
                bad_steps, rewinds, saved = guard.BadSteps(limit, device_used, scaler.is_enabled()), rewinds + 1, state.step
                clock, clock_step = time.perf_counter(), state.step
                continue
            if seen.new:
                console.warn(f'{seen.sentence}: not applied')

        # -- save when due; before the evaluation, which may take long
        if (evaluation_due or stopping) and saved < state.step:
            broken = [name for name, parameter in raw_model.named_parameters() if not parameter.isfinite().all()]
            if ranks.largest(len(broken)):
                exit_code = end_nonfinite(f'step {state.step}: weights not finite; {guard.describe([], broken)}')
                break
            ranks.on_first(save)
            saved, rewinds = state.step, rewinds if state.bad_steps else 0
        if stopping:
            ranks.on_first(lambda: writer.wait())
            console.say(describe_stop(stopping, state.step, saved > 0, argv))
            exit_code = EXIT_FINDING if stopping == FINDING else 128 + stopping
            break

        # -- evaluate when due
        if evaluation_due:
            started = time.perf_counter()
            train_loss, val_loss = split_loss('train', eval_iters), split_loss('val', eval_iters)
            if ranks.largest(stop.number):
                continue  # it was cut short; a resumed run makes up for it
            if not math.isfinite(val_loss):
                exit_code = end_nonfinite(f'step {state.step}: validation loss {val_loss}')
                break
            best = state.best_val_loss is None or val_loss < state.best_val_loss
            state.evaluated, state.best_val_loss = state.step, val_loss if best else state.best_val_loss
            if metrics:
                val_batch = next(eval_batches(data.val, block_size, batch_size, 1, device=device_used))
                number = state.step // eval_interval if state.step < max_iters else 0
                shown = signs.evaluate(state.step, number, train_loss, val_loss, val_batch)
            seconds = time.perf_counter() - started
            console.say(f'step {state.step}: train loss {train_loss:.4f}, val loss {data.describe_loss(val_loss)}'
                        f'{", the best so far" if best and saved else ""}; {seconds:.1f} s')
            if metrics:
                tell(doctor.see_evaluation(shown))
                metrics.log(state.step, {
                    'seconds/evaluation': seconds,
                    'loss/train': train_loss, 'loss/val': val_loss, 'bits_per_byte/train': data.bits_per_byte(train_loss, 'train'),
                    'bits_per_byte/val': data.bits_per_byte(val_loss),
                    'sample': write_sample(raw_model, data, console) if sample_tokens else None} | shown.metrics())
            if saved:
                ranks.on_first(lambda: writer.record_evaluation(state.step, asdict(state), best))
            clock += time.perf_counter() - started  # not the training's time
        if state.step >= max_iters:
            break

        # -- one training step
        data_step = state.step + state.passed_over
        line_due = (state.step + 1) % log_interval == 0 or state.step == 0
        micro_batches = batches.micro_batches(data_step)
        if line_due and metrics:
            micro_batches = signs.begin(micro_batches)  # looks at the weights before the step, and at the batch
        mean_loss, grad_norm = train_step(model, optimizer, scaler, micro_batches, micro_steps, precision, grad_clip,
                                          (seed, data_step, ranks.rank), ranks, bad_steps)
        state.step += 1
        signs.note(mean_loss, grad_norm)
        console.advance(state.step, max_iters)

        # -- log; only here and where it looks, saves or evaluates does the host wait for the device
        if line_due:
            loss = float(mean_loss)
            seconds = (time.perf_counter() - clock) / (state.step - clock_step)
            clock, clock_step = time.perf_counter(), state.step
            tokens_per_second = tokens_per_step / seconds
            mfu = flops_per_token * tokens_per_second / (peak * ranks.world_size) if peak else None
            console.progress(state.step, {
                'loss': f'{loss:.4f}', 'tokens/s': f'{tokens_per_second:,.0f}', 'ms/step': f'{1000 * seconds:.1f}',
                'grad norm': f'{grad_norm:.2f}', 'lr': f'{lr:.2e}', 'MFU': f'{mfu:.1%}' if mfu else 'unknown'})
            if metrics:
                shown = signs.read(state.step, lr, tokens_per_second)
                tell(doctor.see_step(shown))
                metrics.log(state.step, {'loss/step': loss, 'grad_norm': float(grad_norm), 'learning_rate': lr, 'mfu': mfu,
                                         'tokens_per_second': tokens_per_second,
                                         'peak_memory': peak_memory(device_used)} | shown.metrics(grad_clip))

    if not exit_code:
        if metrics:
            prompt = data.val[:block_size].tolist()
            tell(doctor.see_generation(state.step, check_generation(raw_model, prompt, precision=precision)))
        if by_doctor := ranks.largest(stop.number) == FINDING:
            stop.number = 0  # nothing is left to stop
        loss = split_loss('val', None)
        if number := ranks.largest(stop.number):
            console.say(f'stopped by signal {number} in the last evaluation')
            exit_code = 128 + number
        else:
            console.say(f'step {state.step}: val loss {data.describe_loss(loss)} over the whole validation split')
            if metrics:
                metrics.log(state.step, {'loss/val_whole': loss, 'bits_per_byte/val_whole': data.bits_per_byte(loss)})
            exit_code = EXIT_NONFINITE if not math.isfinite(loss) else EXIT_FINDING if by_doctor else 0
    if not eval_only:
        ranks.on_first(close_out_dir)
    stop.ignore()
    if saved and not exit_code and not eval_only:
        console.say(f'samples: python sample.py --out_dir={shlex.quote(out_dir)}')
    console.close()
    lock.release()
    ranks.close()
    return exit_code


# -- what main calls -------------------------------------------------------------------------------------------------

def put_back(found, tensors, model, optimizer, scaler, ranks) -> TrainState:
    """Puts back all that a checkpoint holds. UserError where the ranks have read different ones."""
    if len(set(steps := ranks.gather(found.step))) > 1:
        raise UserError(f'the processes have read checkpoints of different steps, {steps} by rank: see that all can read '
                        f'{found.path.parent}, then start again')
    model.load_state_dict(tensors['model'])
    optimizer.load_named_state(model, tensors['optimizer'])
    state = TrainState(**found.state['train'])
    if state.scaler and scaler.is_enabled():
        scaler.load_state_dict(state.scaler)
    return state


def write_sample(model, data, console) -> str:
    """What the model writes after the validation split's first tokens; the same randomness each time."""
    prompt = data.val[:min(8, block_size)].tolist()
    written = [int(tokens) for tokens in model.generate([prompt], sample_tokens, temperature=0.8, top_k=200, seed=seed)]
    text = data.tokenizer.decode(prompt + written)
    console.say(f'--- sample\n{text}\n---')
    return text


if __name__ == '__main__':
    run_script(main)
