"""Everything that a run prints and writes: console, metrics, checkpoints, findings, report."""

import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch

from nib import guard
from nib.checkpoint import store
from nib.checkpoint.replacing import is_interrupted, set_aside
from nib.checkpoint.start import check_readable
from nib.checkpoint.writer import CheckpointWriter
from nib.doctor import vitals
from nib.doctor.doctor import Doctor
from nib.doctor.finding import Finding
from nib.doctor.texts import examine_data
from nib.errors import EXIT_FINDING, EXIT_NONFINITE, NotFinite, Stopped
from nib.files import command
from nib.generation.check import check_generation
from nib.hub import huggingface
from nib.machine.device import describe_device, peak_memory
from nib.machine.ranks import Ranks
from nib.machine.rates import measure_flops, peak_flops
from nib.machine.signals import FINDING, StopSignal, describe_stop, resume_command
from nib.report.page import write_after_run
from nib.run.console import Console
from nib.run.folder import RunLock, restarted_by_torchrun, write_config
from nib.run.metrics import Metrics
from nib.run.provenance import describe_start, describe_subject
from nib.tokens.dataset import TokenDataset

# stop_on -> severities of findings that stop the run
STOPS_AT = {'never': (), 'critical': ('critical',), 'warning': ('critical', 'warning')}


class Logbook:
    """The output of one run. All ranks call the same methods; only rank 0 prints and writes.

    Call open() before the first step, note() after every step, log() if a log line is due, save(),
    record_evaluation() and see_bad_steps() as they occur, and close() at the end. As a context
    manager, it releases out_dir.
    """

    def __init__(self, out_dir: str, defaults: Mapping, ranks: Ranks, stop: StopSignal):
        """defaults: the default values of train.py's keys, for the report."""
        self.out_dir, self.defaults, self.ranks, self.stop = out_dir, defaults, ranks, stop
        self.console = Console(shown=ranks.is_first)
        self.say, self.warn = self.console.say, self.console.warn
        self.saved = 0  # step of the last checkpoint; step 0 is never saved
        self.rewinds = 0  # since the last checkpoint
        self.metrics: Metrics | None = None  # set by open(), on rank 0 only, and so is the writer
        self.writer: CheckpointWriter | None = None
        self._lock = RunLock(out_dir)
        self._is_new = False  # whether this run replaces what out_dir contains
        self._first_step = 0  # that of the checkpoint in out_dir from which this run continues
        # Speed is measured from this time and step on.
        self._clock, self._clock_step = 0.0, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Releases the folder, however the run ends: in a notebook, the process goes on."""
        try:
            try:
                if self.writer:
                    self.writer.close()  # completes the last checkpoint if the run has failed
            finally:
                if self.metrics:
                    self.metrics.close(exit_code=1)  # no effect after close()
                self._say_set_aside()
        except Exception as failure:
            self.warn(f'error: {failure}')
        finally:
            self.console.close()
            self._lock.release()

    def _say_set_aside(self):
        """Says where the previous run is, if this one was to replace it and has saved nothing."""
        aside = Path(self.out_dir) / store.ASIDE
        is_kept = store.exists(aside) and not store.exists(self.out_dir)
        if self._is_new and self.metrics and is_kept:
            self.say(
                f'the previous run is kept in {aside}; the next start with this --out_dir puts it '
                f'back'
            )

    # -- before the first step --------------------------------------------------------------------

    def say_model(self, training, compiled: bool, reason: str):
        """Prints a line about the model. reason: why it is compiled or not."""
        n_params = training.raw_model.num_params()
        without_positions = training.raw_model.num_params(positions=False)
        self.say(
            f'model: {n_params / 1e6:.2f}M parameters ({without_positions / 1e6:.2f}M without '
            f'position embeddings), {training.flops_per_token / 1e6:.1f} MFLOP per token (forward '
            f'and backward), {"compiled" if compiled else "not compiled"} ({reason})'
        )
        if why := huggingface.why_not(training.raw_model.config):
            self.say(f'convert.py cannot write this model for transformers: {why}')

    def restarted_by_torchrun(self) -> bool:
        """Returns whether torchrun has restarted this run, and it has a checkpoint."""
        return self.ranks.on_first(lambda: restarted_by_torchrun(self.out_dir))

    def lock_existing(self):
        """Locks out_dir if it contains a run. Raises UserError if another process has the lock."""
        self.ranks.on_first(
            lambda: (
                (store.exists(self.out_dir) or is_interrupted(self.out_dir))
                and self._lock.take(new_run=False)
            )
        )

    def check_new(self):
        """Raises UserError if a new run cannot use out_dir: before anything takes time."""
        self.ranks.on_first(self._lock.check_new)

    def lock_new(self, overwrite: bool):
        """Locks out_dir for a new run.

        Raises UserError if another process has the lock, or if out_dir contains a run and overwrite
        is False.
        """
        self._is_new = True
        self.ranks.on_first(lambda: self._lock.take(new_run=not overwrite))

    def open(
        self,
        training,
        data: TokenDataset,
        config: Mapping,
        origins: Mapping,
        changes: Mapping,
        step: int,
    ):
        """Starts recording a run that continues from `step`; clears the folder if the run is new.

        training: train.py's Training. config: the values that the run uses. origins: where they
        come from. changes: changes of the config since the checkpoint. Raises UserError if the
        model's checkpoints could not be loaded.
        """
        check_readable(training.raw_model)
        self.training, self.data = training, data
        self.config, self.origins = config, origins
        # A run that continues nanoGPT's has no checkpoint of its own yet.
        self.saved = self._first_step = 0 if self._is_new else step
        self.ranks.on_first(lambda: self._open(changes, step))
        self.start_clock(step)

    def _open(self, changes, step):
        config, t = self.config, self.training
        self.metrics = Metrics(self.out_dir, step, config, self.warn)
        if self._is_new:  # only now is it certain that this run can start
            set_aside(self.out_dir)
        self.metrics.rewind(step)
        provenance = describe_subject(t.raw_model, self.data)
        provenance['starts'] = [describe_start(step, describe_device(t.device))]
        self._write_config = partial(
            write_config, self.out_dir, config, self.origins, step, changes, provenance
        )
        self._write_config()
        self.writer = CheckpointWriter(
            self.out_dir, config['keep_last'], config['keep_every'], step
        )
        # Without DistributedDataParallel, because only this rank inspects the model.
        local_model = getattr(t.model, 'module', t.model)
        self.vitals = vitals.Vitals(local_model, t.optimizer, t.scaler, t.batches, t.precision)
        vital_signs = examine_data(self.data.train, self.data.val, self.data.vocab_size)
        self.doctor = Doctor(
            config,
            vital_signs,
            t.raw_model.num_params(),
            len(self.data.train),
            trained=config['init_from'] != 'scratch',
        )
        self.doctor.recall(self.metrics.records)
        self._tell(self.doctor.see_data())
        peak = peak_flops(t.device, config['dtype'])
        self.rate = (peak or measure_flops(t.device, config['dtype'])) * t.ranks.world_size
        self.rate_name = '' if peak else ' of the measured rate'

    def start_clock(self, step: int):
        """Measures speed from now on."""
        self._clock, self._clock_step = time.perf_counter(), step

    # -- steps ------------------------------------------------------------------------------------

    def watch(self, micro_batches: Iterator) -> Iterator:
        """Returns the same micro batches and lets the doctor see the first one.

        Call it before a step that log() follows.
        """
        return self.vitals.begin(micro_batches) if self.metrics else micro_batches

    def note(self, step: int, mean_loss: torch.Tensor, grad_norm: torch.Tensor):
        """Keeps a step's loss and gradient norm on the device, without waiting for them."""
        if self.metrics:
            self.vitals.note(mean_loss, grad_norm)
            self.console.advance(step, self.config['max_iters'])

    def log(self, step: int, mean_loss: torch.Tensor, grad_norm: torch.Tensor):
        """Logs the last step and the speed since the last line. Waits for the device."""
        if not self.metrics:
            return
        loss, norm, lr = float(mean_loss), float(grad_norm), self.training.optimizer.lr
        seconds = (time.perf_counter() - self._clock) / (step - self._clock_step)
        self.start_clock(step)
        t = self.training
        tokens_per_second = t.tokens_per_step / seconds
        mfu = t.flops_per_token * tokens_per_second / self.rate
        self.console.progress(
            step,
            {
                'loss': f'{loss:.4f}',
                'tokens/s': f'{tokens_per_second:,.0f}',
                'ms/step': f'{1000 * seconds:.1f}',
                'grad norm': f'{norm:.2f}',
                'lr': f'{lr:.2e}',
                'MFU': f'{mfu:.1%}{self.rate_name}',
            },
        )
        vital_signs = self.vitals.read(step, lr, tokens_per_second)
        self._tell(self.doctor.see_step(vital_signs))
        self.metrics.log(
            step,
            {
                'loss/step': loss,
                'grad_norm': norm,
                'learning_rate': lr,
                'mfu': mfu,
                'tokens_per_second': tokens_per_second,
                'peak_memory': peak_memory(self.training.device),
            }
            | vital_signs.metrics(self.config['grad_clip']),
        )

    def see_bad_steps(self, step: int, seen: guard.Seen):
        """Tells the doctor about non-finite steps."""
        if self.metrics:
            self._tell(self.doctor.see_bad_steps(step, seen))

    # -- checkpoints and evaluations --------------------------------------------------------------

    def save(self, state):
        """Saves a checkpoint in the background, unless this step is already saved.

        state: train.py's TrainState. Raises NotFinite on all ranks if any weight is not finite.
        """
        if self.saved == state.step:
            return
        model = self.training.raw_model
        broken = [
            name for name, parameter in model.named_parameters() if not parameter.isfinite().all()
        ]
        if self.ranks.largest(len(broken)):
            raise NotFinite(f'step {state.step}: weights not finite; {guard.describe([], broken)}')
        self.wait_for_checkpoint()  # so that there is only one copy at a time
        optimizer = self.training.optimizer
        optimizer_state = optimizer.shares.collect(optimizer.named_state(model))
        self.ranks.on_first(lambda: self._save(state, optimizer_state))
        self.saved = state.step
        if not state.bad_steps:
            self.rewinds = 0

    def _save(self, state, optimizer_state):
        t, data = self.training, self.data
        if self._lock.is_lost():
            self._begin_again()
        state.scaler = t.scaler.state_dict() or None
        self.writer.save(
            state.step,
            t.raw_model.state_dict(),
            optimizer_state,
            {
                'train': asdict(state),
                'model': asdict(t.raw_model.config),
                'config': self.config,
                'origins': self.origins,
                'dataset': data.name,
                'dataset_fingerprint': data.fingerprint,
                'tokenizer': data.tokenizer.to_json(),
                'versions': {'python': platform.python_version(), 'torch': torch.__version__},
            },
        )

    def _begin_again(self):
        self.warn(
            f'warning: {self.out_dir} has been removed or renamed; the run continues in a new '
            f'folder of this name, without its earlier records and checkpoints'
        )
        self._lock.release()
        self._lock.take(new_run=True)  # raises UserError if another run has used it since
        self._write_config()
        self.metrics.reopen()

    def wait_for_checkpoint(self):
        """Waits, on all ranks, until the last checkpoint is on the disk."""
        # A lambda, because only rank 0 has a writer.
        self.ranks.on_first(lambda: self.writer.wait())  # noqa: PLW0108

    def rewind(self, step: int):
        """Drops what was recorded after `step`, the checkpoint that the run returns to."""
        self.saved, self.rewinds = step, self.rewinds + 1
        if self.metrics:
            self.metrics.rewind(step)
            for finding in self.doctor.rewind(step):
                self.metrics.log_finding(finding)  # it has been printed
        self.start_clock(step)

    def record_evaluation(
        self, state, train_loss: float, val_loss: float, best: bool, started: float
    ):
        """Records an evaluation.

        best: whether val_loss is the lowest so far. started: time.perf_counter() at the beginning.
        """
        if self.metrics:
            self._record_evaluation(state.step, train_loss, val_loss, best, started)
        if self.saved:
            self.ranks.on_first(
                lambda: (
                    self._lock.is_lost()  # the next save begins a new folder
                    or self.writer.record_evaluation(state.step, asdict(state), best)
                )
            )
        self._clock += time.perf_counter() - started  # does not count as training time

    def _record_evaluation(self, step, train_loss, val_loss, best, started):
        config, data = self.config, self.data
        val_batch = next(self.training.batches.eval_batches(data.val, max_batches=1))
        number = step // config['eval_interval'] if step < config['max_iters'] else 0
        vital_signs = self.vitals.evaluate(step, number, train_loss, val_loss, val_batch)
        seconds = time.perf_counter() - started
        self.say(
            f'step {step}: train loss {train_loss:.4f}, val loss {data.describe_loss(val_loss)}'
            f'{", best so far" if best and self.saved else ""}; {seconds:.1f} s'
        )
        self._tell(self.doctor.see_evaluation(vital_signs))
        self.metrics.log(
            step,
            {
                'seconds/evaluation': seconds,
                'loss/train': train_loss,
                'loss/val': val_loss,
                'bits_per_byte/train': data.bits_per_byte(train_loss, 'train'),
                'bits_per_byte/val': data.bits_per_byte(val_loss),
                'sample': self._write_sample() if config['sample_tokens'] else None,
            }
            | vital_signs.metrics(),
        )

    def _write_sample(self) -> str:
        """Prints and returns a sample: the model continues the start of the validation split."""
        prompt = self.data.val[: min(8, self.config['block_size'])].tolist()
        tokens = self.training.raw_model.generate(
            [prompt],
            self.config['sample_tokens'],
            temperature=0.8,
            top_k=200,
            seed=self.config['seed'],
        )
        tokens = takewhile(lambda token: not self.stop.number, tokens)
        ids = prompt + [int(token) for token in tokens]
        # An open model may have more embeddings than its tokenizer has tokens.
        text = self.data.tokenizer.decode([id for id in ids if id < self.data.vocab_size])
        self.say(f'--- sample\n{text}\n---')
        return text

    # -- the end ----------------------------------------------------------------------------------

    def check_generation(self, step: int):
        """Lets the doctor compare generation, which uses caches, with full forward passes."""
        if self.metrics:
            t = self.training
            prompt = self.data.val[: self.config['block_size']].tolist()
            result = check_generation(t.raw_model, prompt, precision=t.precision)
            self._tell(self.doctor.see_generation(step, result))

    def record_whole_validation(self, step: int, loss: float, data: TokenDataset, block_size: int):
        """Records the loss on the whole validation split, in windows of block_size tokens."""
        evaluated = f'step {step}: val loss {data.describe_loss(loss, block_size)}'
        if not self.metrics:  # --eval_only
            evaluated += f', perplexity {torch.tensor(loss).exp():.5g}'
        self.say(f'{evaluated} on the whole validation split')
        if self.metrics:
            bits = data.bits_per_byte(loss, block_size=block_size)
            self.metrics.log(step, {'loss/val_whole': loss, 'bits_per_byte/val_whole': bits})

    def end_nonfinite(self, step: int, error: NotFinite) -> int:
        """Reports that the run ends because of a non-finite value; returns the exit code."""
        if self.metrics:
            self._tell(self.doctor.see_nonfinite(step, str(error)))
        kept = 'there is no checkpoint yet'
        if self.saved:
            kept = f'the checkpoint of step {self.saved} in {self.out_dir} is intact'
        self._say_end(step, f'The run ends. Nothing is saved; {kept}.', self.warn)
        return EXIT_NONFINITE

    def end_stopped(self, step: int, stopped: Stopped) -> int:
        """Waits for the checkpoint and reports what stopped the run; returns the exit code."""
        if self.saved:
            self.wait_for_checkpoint()
        # Without a new checkpoint, only this command knows the flags that were changed.
        is_new = self.saved > self._first_step
        resume = resume_command(self.out_dir, self.ranks.world_size) if is_new else ''
        self._say_end(step, describe_stop(stopped.number, step, resume), self.say)
        return EXIT_FINDING if stopped.number == FINDING else 128 + stopped.number

    def _say_end(self, step: int, line: str, say: Callable[[str], None]):
        """Records how the run ends, and then prints it, as there may be no console any more."""
        if self.metrics:
            self.metrics.log(step, {'end': line})
        say(line)

    def close(self, step: int, exit_code: int):
        """Waits for the last checkpoint, prints the doctor's verdict and writes the report."""
        self.ranks.on_first(lambda: self._close(step, exit_code))

    def _close(self, step, exit_code):
        if not self.metrics:
            return
        self.writer.close()
        if exit_code < 128:  # not stopped by a signal
            verdict = self.doctor.verdict(step)
            self.say(f"doctor's verdict: {verdict}")
            self.metrics.log(step, {'verdict': verdict})
        self.metrics.close(exit_code)
        if self.config['report']:
            write_after_run(self.out_dir, self.defaults, self.say, self.warn)
        if self.saved and not exit_code:
            self.say(f'samples: {command("sample.py")} --out_dir={shlex.quote(self.out_dir)}')

    def _tell(self, findings: list[Finding]):
        """Prints and records findings of the doctor, and stops the run if stop_on says so."""
        for finding in findings:
            self.warn(f'step {finding.step}: {finding.name}, {finding}')
            self.metrics.log_finding(finding)
            if finding.severity in STOPS_AT[self.config['stop_on']]:
                self.stop.number = self.stop.number or FINDING
