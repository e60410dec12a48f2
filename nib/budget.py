"""Plans the best run for a given time, on this machine and this text.

--budget=10m: the largest model is not the best one, because a smaller one reads more text in the
same time. A scaling law predicts the loss of each size with the tokens that it would read, from its
measured speed. --params=10M: the size is given, and the law determines the number of tokens.
nib/scaling_law.py has the law, and docs/scaling_laws.md explains the rules below.
"""

import math
import re
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from model import GPTConfig
from nib import startup
from nib.errors import UserError
from nib.machine.memory import USABLE, available_memory, batch_sizes, needed_memory
from nib.machine.memory_plan import parameter_shapes
from nib.machine.stopwatch import Speed, Stopwatch
from nib.run.checks import check_accumulation, pick_model
from nib.scaling_law import LAW
from nib.tokens.dataset import TokenDataset

SECONDS = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}
COUNTS = {'': 1, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'B': 1e9}

WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
# Of --params, with steps of at most 2.4 times the parameters.
FINE_WIDTHS = sorted({*WIDTHS, 48, 160, 224, 320, 448, 640, 896, 1792})
EVALUATIONS = 4  # besides that of step 0
ENDING = 2.0  # seconds of the last checkpoint, the doctor's verdict and the report
CHECKS = 12  # cost of the doctor's measurements of gradient noise, in steps
SAMPLING = 0.0006  # seconds per layer and token of a printed sample
MIN_STEPS = 20
MOST_PARAMS = 10  # per token of the training text
RATE = 0.015  # learning rate up to width 128
BATCH = 1536  # tokens of a step, up to a million tokens

# The ideas of config/fast_shakespeare_char.py.
RECIPE = {
    'optimizer': 'muon',
    'muon_lr_ratio': 0.5,
    'beta2': 0.99,
    'position': 'rotary',
    'qk_norm': True,
    'mlp': 'swiglu',
    'tied_head': False,
    'zero_init': True,
    'smear': 2,
    'n_kv_head': 0,
    'head_dim': 0,
    'mlp_width': 0,
    'lr_schedule': 'wsd',
    'min_lr': 0.0,
}


def parse_duration(text: str) -> float:
    """Returns the seconds of '90s', '10m', '1.5h' or '2d'. Raises UserError for another text."""
    return _parse(text, SECONDS, '--budget', 'a time such as 90s, 10m or 2h')


def parse_count(text: str) -> float:
    """Returns the number of '300k', '10M', '1.5B' or '5000'. Raises UserError for another text."""
    return _parse(text, COUNTS, '--params', 'a number of parameters such as 300k, 10M or 1.5B')


def _parse(text: str, units: Mapping[str, float], flag: str, expected: str) -> float:
    found = re.fullmatch(r'(\d+\.?\d*)([a-zA-Z]?)', text)
    if not found or found[2] not in units or not float(found[1]):
        raise UserError(f'{flag}={text}: expected {expected}')
    return float(found[1]) * units[found[2]]


# -- the plan --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planner:
    """Plans runs on a dataset.

    config: train.py's values with the device, dtype and ranks to use. fixed: the keys that the user
    has set on the command line. room: bytes of memory for each rank.
    """

    config: Mapping
    fixed: dict
    data: TokenDataset
    room: float = math.inf

    def shape(self, width: int, tokens: float) -> dict:
        """Returns the keys of a model of this width and of its batches, for about `tokens`."""
        n_train = len(self.data.train)
        # Longer runs can use a longer context, and larger batches with less noisy gradients.
        context = 2 ** round(math.log2(128 * (tokens / 6e5) ** (1 / 3)))
        context = min(max(64, context), 1024, len(self.data.val) - 1, n_train // 2)
        keys: dict = RECIPE | {
            'n_layer': max(2, width // 64),  # few and large operations are fast
            'n_embd': width,
            'n_head': self.heads(width),
            'dropout': 0.0 if tokens < 5 * n_train else 0.1,
            'block_size': max(1, context),
            'gradient_accumulation_steps': self.config.get('ranks', 1),
        }
        keys = keys | self.fixed
        sequences = BATCH * max(1.0, (tokens / 1e6) ** 0.5) / keys['block_size']
        more = {
            'batch_size': max(1, round(sequences / keys['gradient_accumulation_steps'])),
            'rotary_base': 100.0 * max(1, keys['block_size'] // 64),
            'learning_rate': float(f'{RATE * min(1.0, (128 / max(1, width)) ** 0.75):.2g}'),
        }
        return keys | more | self.fixed

    def heads(self, width: int) -> int:
        """Returns a number of heads that divides the width, with 32 or 64 dimensions in a head."""
        each, shared = 32 if width <= 256 else 64, self.fixed.get('n_kv_head') or 1
        numbers = [n for n in range(shared, width // 2 + 1, shared) if width % (2 * n) == 0]
        return min(numbers, key=lambda n: abs(width / n - each), default=1)

    def possible(self, widths: Sequence[int]) -> list[int]:
        """Returns the widths that the user's keys allow. Raises UserError if they allow none."""
        allowed, rejected = [], None
        for width in [self.fixed['n_embd']] if 'n_embd' in self.fixed else widths:
            try:
                self.model(self.shape(width, 1e6))
                allowed.append(width)
            except UserError as error:
                rejected = rejected or error
        if rejected and not allowed:
            raise rejected
        return allowed

    def fit_memory(self, keys: dict) -> dict:
        """Returns the keys with the largest batch_size for which the estimate fits the memory.

        Raises UserError if none does.
        """
        values = {**self.config, **keys}
        for sizes in batch_sizes(values):
            agrees = all(self.fixed.get(key, size) == size for key, size in sizes.items())
            if agrees and needed_memory(self.model(keys), values | sizes) <= USABLE * self.room:
                return keys | sizes
        raise UserError(
            f'the memory of {values["device"]} is too small for n_embd {keys["n_embd"]} and '
            f'block_size {keys["block_size"]}: use a smaller --block_size, or --recompute'
        )

    def schedule(self, keys: dict, steps: int) -> dict:
        """Returns the keys with those that depend on the number of steps."""
        steps = self.fixed.get('max_iters', steps)
        decay = self.fixed.get('lr_decay_iters', steps)
        warmup = self.fixed.get('warmup_iters', min(decay // 10, max(10, decay // 50)))
        chosen = {
            'max_iters': steps,
            'lr_decay_iters': decay,
            'warmup_iters': warmup,
            'cooldown_iters': max(0, min(decay - warmup, max(1, decay * 2 // 3))),
            'muon_momentum': 0.85 if steps < 1000 else 0.95,  # a short memory for a short run
            'eval_interval': max(1, math.ceil(steps / EVALUATIONS)),
            'eval_iters': max(1, steps // 100),
        }
        return keys | chosen | self.fixed

    def model(self, keys: Mapping) -> GPTConfig:
        """Returns the model of the keys. Raises UserError if keys of the user contradict it."""
        return pick_model({**self.config, **keys}, self.data.vocab_size)

    def count(self, keys: Mapping, embeddings: bool) -> int:
        """Returns the number of parameters, with or without embeddings and output head."""
        shapes = parameter_shapes(self.model(keys))
        return sum(s.numel() for name, s in shapes.items() if embeddings or '.h.' in name)

    def nearest_width(self, params: float) -> int:
        """Returns the width whose model has the number of parameters most similar to `params`.

        Raises UserError if it differs by more than half.
        """
        widths = self.possible(FINE_WIDTHS)
        sizes = {w: self.count(self.shape(w, 1e6), embeddings=True) for w in widths}
        width = min(widths, key=lambda w: abs(math.log(sizes[w] / params)))
        if not 1 / 1.5 <= sizes[width] / params <= 1.5:
            raise UserError(
                f'--params={self.config["params"]}: the nearest model for this vocabulary has '
                f'{sizes[width]:,} parameters; possible sizes are '
                + ', '.join(f'{n / 1e6:,.2f}M' for n in sizes.values())
            )
        return width

    def for_size(self, params: float) -> dict:
        """Returns the keys for a number of parameters, with the number of tokens for it."""
        width = self.nearest_width(params)
        n = self.count(self.shape(width, 1e6), embeddings=False)
        # More than 16 epochs teach little more: Muennighoff et al. 2023, figure 1.
        tokens = min(LAW.best_tokens(n), 16 * len(self.data.train))
        keys = self.fit_memory(self.shape(width, tokens))
        return self.schedule(keys, max(MIN_STEPS, round(tokens / tokens_per_step(keys))))

    def for_time(self, ends: float, widths: Sequence[int], watch: Stopwatch) -> dict:
        """Returns the keys of the run that ends in time and has the lowest predicted loss.

        ends: on the clock of time.perf_counter(). The loss falls with the width and then rises,
        because wide models read less.
        """
        budget = ends - time.perf_counter()
        tokens, best, lowest = 3e5, 0, math.inf
        for width in self.possible(widths):
            try:
                keys = self.fit_memory(self.shape(width, tokens))
            except UserError:
                if not best:
                    raise
                break  # wider models need more memory
            n_params = self.count(keys, embeddings=False)
            if best and n_params > MOST_PARAMS * len(self.data.train):
                break  # wider models would memorize the text
            speed = watch.measure({**self.config, **keys}, self.data, min(0.5, budget / 100))
            steps = self.steps_until(ends, keys, speed)
            read = max(1, steps) * tokens_per_step(keys)
            loss = LAW.loss(n_params, read, len(self.data.train))
            if loss >= lowest:
                break
            tokens, best, lowest = read, width, loss
            if steps < MIN_STEPS:
                break  # wider models are slower
        # Once more, for longer, with the context and the batch for that many tokens.
        keys = self.fit_memory(self.shape(best, tokens))
        steps = max(1, round(tokens / tokens_per_step(keys)))
        speed = watch.measure({**self.config, **keys}, self.data, min(3.0, budget / 40), steps)
        steps = self.steps_until(ends, keys, speed)
        if steps < MIN_STEPS:
            needed = 1.2 * (startup.seconds() + self.seconds(keys, MIN_STEPS, speed))
            raise UserError(
                f'the budget is too short for {MIN_STEPS} steps and the evaluation of '
                f'{len(self.data.val):,} validation tokens on this machine: use at least '
                f'--budget={math.ceil(needed)}s'
            )
        return self.schedule(keys, steps)

    def steps_until(self, ends: float, keys: dict, speed: Speed) -> int:
        """Returns the number of steps after which a run that begins now ends in time."""
        left = ends - time.perf_counter()
        more = bisect_right(range(1 << 40), left, key=lambda n: self.seconds(keys, n, speed))
        return more - 1

    def seconds(self, keys: dict, steps: int, speed: Speed) -> float:
        """Returns how long a run takes after its plan."""
        keys = self.schedule(keys, steps)
        evaluations = 1 + math.ceil(steps / keys['eval_interval'])
        train, val = (
            math.ceil((len(tokens) - 1) // keys['block_size'] / keys['batch_size'])
            for tokens in (self.data.train, self.data.val)
        )
        some = min(train, keys['eval_iters']) + min(val, keys['eval_iters'])
        batches = (evaluations * some + val) / self.config.get('ranks', 1)  # at the end, all of val
        samples = self.config['sample_tokens'] * evaluations * keys['n_layer'] * SAMPLING
        training = speed.compiling + (steps + CHECKS) * speed.step
        return training + batches * speed.batch + samples + ENDING


def tokens_per_step(keys: Mapping) -> int:
    return keys['batch_size'] * keys['gradient_accumulation_steps'] * keys['block_size']


def plan(
    config: Mapping, origins: Mapping, data: TokenDataset, watch: Stopwatch
) -> tuple[dict, str]:
    """Returns the keys that --budget or --params chooses, and a line about them.

    config: train.py's values with the device, dtype and ranks to use. origins: where they come
    from; those of the command line are kept. Raises UserError if the run is impossible.
    """
    ends = startup.started() + parse_duration(config['budget']) if config['budget'] else None
    params = parse_count(config['params']) if config['params'] else None
    check_plan(config, origins)
    fixed = fixed_keys(config, origins)
    room = math.inf
    with suppress(UserError):  # unknown
        room = available_memory(config['device'], config.get('ranks', 1))
    planner = Planner(config, fixed, data, room)
    if ends:
        widths = [planner.nearest_width(params)] if params else WIDTHS
        keys = planner.for_time(ends, widths, watch)
    else:
        keys = planner.for_size(params)
    tokens = tokens_per_step(keys) * keys['max_iters']
    asked = ' and '.join(f'{key} {config[key]}' for key in ('budget', 'params') if config[key])
    line = (
        f'plan for {asked}: {planner.count(keys, embeddings=True):,} parameters, n_layer '
        f'{keys["n_layer"]}, n_embd {keys["n_embd"]}, n_head {keys["n_head"]}, block_size '
        f'{keys["block_size"]}, batch_size {keys["batch_size"]}, learning_rate '
        f'{keys["learning_rate"]:g}, dropout {keys["dropout"]:g}, max_iters {keys["max_iters"]}: '
        f'{tokens:,} tokens, {tokens / len(data.train):.2g} epochs'
    )
    return {key: value for key, value in keys.items() if key not in fixed}, line


def fixed_keys(config: Mapping, origins: Mapping) -> dict:
    return {key: config[key] for key in origins if origins[key] == 'command line'}


def check_plan(config: Mapping, origins: Mapping):
    """Raises UserError if the user's own keys leave no room for a plan."""
    fixed = fixed_keys(config, origins)
    if config['init_from'] != 'scratch':
        raise UserError(
            f'--budget and --params plan a new model, but init_from is {config["init_from"]!r}: '
            f'leave one of them out'
        )
    if config['budget'] and (steps := {'max_iters', 'lr_decay_iters'} & fixed.keys()):
        raise UserError(f'--budget sets the number of steps: leave out --{min(steps)}, or --budget')
    if 'gradient_accumulation_steps' in fixed:
        check_accumulation(config, config.get('ranks', 1))
    if origins['batch_size'] == 'command line (auto)':
        raise UserError('--budget and --params choose the batch_size: leave out --batch_size=auto')
    if fixed.get('optimizer', 'muon') != 'muon' and 'learning_rate' not in fixed:
        raise UserError(
            f'--budget and --params choose a learning rate for Muon: add --learning_rate for '
            f'{fixed["optimizer"]}, or leave out --optimizer'
        )
