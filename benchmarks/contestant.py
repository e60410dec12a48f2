"""nibGPT as the benchmarks measure it: its training steps, their parts, and its generation."""

import time
from collections.abc import Callable

import train
from benchmarks import measure
from nib.machine.device import peak_memory, synchronize
from nib.machine.rates import measure_flops, peak_flops

WARM_UP = 3  # steps that are not measured


def make_training(values, data, say=print) -> train.Training:
    """Returns a new model with its data, ready to train; compiled if the config says so."""
    training = train.Training.set_up(values | {'on_nonfinite': 'skip'}, data)
    training.compile_and_distribute(values['compile'], say)
    training.optimizer.lr = values['learning_rate']
    return training


def time_steps(training, first: int, n: int) -> float:
    """Returns the seconds that n training steps take, from the step `first` on."""
    synchronize(training.device)
    started = time.perf_counter()
    for step in range(first, first + n):
        train.train_step(training, training.batches.micro_batches(step), step)
    synchronize(training.device)
    return time.perf_counter() - started


class Contestant:
    """nibGPT's train_step and generation, ready to be timed.

    announce: is called with the seconds of the first step.
    """

    def __init__(self, values, data, announce: Callable[[float], None] = lambda seconds: None):
        self.values, self.device = values, values['device']
        self.training = make_training(values, data)
        self.raw_model = self.training.raw_model
        self.prompt = data.val[: values['prompt_tokens']].tolist()
        self.tokens = self.training.tokens_per_step
        self.step = 0
        self.peak = peak_flops(self.device, values['dtype'])
        announce(self.time_steps(1))
        self.time_steps(WARM_UP - 1)
        # Measured now, before generation and other measurements add to it.
        self.memory = peak_memory(self.device)

    def round(self) -> dict[str, float]:
        """Measures `steps` steps, a third more with timed parts, and one generation."""
        seconds = self.time_steps(self.values['steps']) / self.values['steps']
        figures = {
            'tokens/s': self.tokens / seconds,
            'ms/step': 1000 * seconds,
            **self.time_parts(),
        }
        flops_per_second = self.training.flops_per_token * self.tokens / seconds
        figures['TFLOP/s'] = flops_per_second / 1e12
        if self.peak:
            figures['MFU %'] = 100 * flops_per_second / self.peak
        else:
            rate = measure_flops(self.device, self.values['dtype'])
            figures["% of matrix products' rate"] = 100 * flops_per_second / rate
        if self.memory is not None:
            figures['peak memory, MB'] = self.memory / 1e6
        if self.values['new_tokens']:
            figures['generated tokens/s'] = self.values['new_tokens'] / self.time_generation()
        return figures

    def time_steps(self, n: int) -> float:
        """Returns the seconds that the next n steps take."""
        seconds = time_steps(self.training, self.step, n)
        self.step += n
        return seconds

    def time_parts(self) -> dict[str, float]:
        """Returns the milliseconds of the parts of a step.

        train_step itself runs, with objects that read the clock. Each reading waits for the device,
        so the sum is a little more than the time of a step.
        """
        clock = measure.LapClock(self.device)
        n = max(1, self.values['steps'] // 3)
        for _ in range(n):
            clock.lap('')
            measure.timed_step(
                train.train_step,
                self.training,
                self.training.batches.micro_batches(self.step),
                self.step,
                clock,
            )
            self.step += 1
        return {
            f'ms {part}': 1000 * clock.seconds[part] / n
            for part in ('data', 'forward', 'backward', 'optimizer', 'checks')
        }

    def time_generation(self) -> float:
        synchronize(self.device)
        started = time.perf_counter()
        for _ in self.raw_model.generate(
            [self.prompt], self.values['new_tokens'], temperature=0.8, top_k=200, seed=1
        ):
            pass
        synchronize(self.device)
        return time.perf_counter() - started
