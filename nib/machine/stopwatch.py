"""The speed of a model on this machine: of training steps, of evaluations, and of compilation."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from nib.machine.compiling import pick_compile
from nib.machine.device import synchronize
from nib.tokens.dataset import TokenDataset


class Speed(NamedTuple):
    """Seconds of a training step, of an evaluation batch, and of compiling the model."""

    step: float
    batch: float
    compiling: float = 0.0


@dataclass(frozen=True)
class Stopwatch:
    """Measures models that are thrown away, with three functions of train.py."""

    set_up: Callable  # Training.set_up
    train_step: Callable
    evaluate: Callable

    def measure(
        self, config: Mapping, data: TokenDataset, seconds: float, run_steps: int = 0
    ) -> Speed:
        """Measures the share of one rank in training steps and in an evaluation.

        seconds: how long to measure steps; at least two are measured. run_steps: those of the run,
        on which it depends whether the model is compiled; 0: it is not.
        """
        ranks = config.get('ranks', 1)
        share = {
            'gradient_accumulation_steps': config['gradient_accumulation_steps'] // ranks,
            'cuda_graph': config['cuda_graph'] and ranks == 1,  # the run will not use them either
        }
        t = self.set_up({**config, **share, 'on_nonfinite': 'skip'}, data)
        t.optimizer.lr = config['learning_rate'] / 10
        started = time.perf_counter()
        config = {**config, 'max_iters': run_steps}
        compiled = run_steps > 0 and pick_compile(config, t.raw_model)[0]
        t.compile_and_distribute(compiled, lambda line: None)
        compiling = time.perf_counter() - started
        n_warm, step = 2, 0  # the first steps are slower
        started = time.perf_counter()
        while step < n_warm + 2 or time.perf_counter() - started < seconds:
            self.train_step(t, t.batches.micro_batches(step), step)
            synchronize(t.device)
            step += 1
            if step == n_warm:
                started = time.perf_counter()
        per_step = (time.perf_counter() - started) / (step - n_warm)
        for _ in range(2):  # the second one is warm
            started = time.perf_counter()
            batches = list(t.batches.eval_batches(data.val, 4))  # a short split has fewer
            self.evaluate(t.raw_model, batches, t.precision, t.ranks)
        return Speed(per_step, (time.perf_counter() - started) / len(batches), compiling)
