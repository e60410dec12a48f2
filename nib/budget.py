"""One dial: the model and the run that make the best use of a time, on this machine and text.

--budget=10m: the largest model is not the best one, because a smaller one reads more text in the
same time. A scaling law predicts the loss of each size with the tokens that it would read, from its
measured speed. --params=10M: the size is given, and the law says how many tokens it deserves.
docs/scaling_laws.md explains the law and where its constants and the rules below come from.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from model import GPT, GPTConfig
from nib.checkpoint.start import PLANNED
from nib.errors import UserError
from nib.machine.compiling import pick_compile
from nib.machine.device import synchronize
from nib.machine.memory import USABLE, available_memory, batch_sizes, needed_memory
from nib.startup import process_started
from nib.tokens.dataset import TokenDataset

SECONDS = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}
COUNTS = {'': 1, 'k': 1e3, 'M': 1e6, 'B': 1e9}

WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
EVALUATIONS = 4  # besides that of step 0
ENDING = 2.0  # seconds of the last checkpoint, the doctor's verdict and the report
CHECKS = 12  # steps that the doctor's measurements of the gradient's noise are worth
SAMPLING = 0.0006  # seconds per layer and token of a printed sample
MIN_STEPS = 20

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


# -- the law ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """The loss of N parameters (without embeddings) after D tokens: floor + A/N^alpha + B/D^beta.

    Hoffmann et al. 2022, section 3.3. A text of U tokens that is repeated is worth less than new
    text, and so are more parameters than U deserves: Muennighoff et al. 2023, section 3.1.
    """

    floor: float
    A: float
    alpha: float
    B: float
    beta: float
    repeats: float = 15.4  # Muennighoff et al. 2023: of tokens, until they are worth 1/e less
    excess: float = 5.3  # the same of parameters

    def loss(self, n: float, tokens: float, unique: float = math.inf) -> float:
        """Returns the predicted loss in nats per token, of a text of `unique` tokens."""
        tokens = diminish(tokens, unique, self.repeats)
        n = diminish(n, self.best_size(unique), self.excess)
        return self.floor + self.A / n**self.alpha + self.B / tokens**self.beta

    def best_size(self, tokens: float) -> float:
        """Returns the N for which N * tokens, the compute, is spent best."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return (ratio * tokens**self.beta) ** (1 / self.alpha)

    def best_tokens(self, n: float) -> float:
        """Returns the tokens that N parameters deserve: the inverse of best_size."""
        ratio = self.beta * self.B / (self.alpha * self.A)
        return (ratio * n**self.alpha) ** (1 / self.beta)


def diminish(amount: float, useful: float, scale: float) -> float:
    """Returns what an amount beyond `useful` is worth, at most (1 + scale) * useful."""
    if amount <= useful:
        return amount
    return useful * (1 + scale * (1 - math.exp(-(amount / useful - 1) / scale)))


LAW = Law(floor=0.9, A=60, alpha=0.4, B=600, beta=0.5)
