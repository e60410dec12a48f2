"""Measures what 8-bit weights cost: the loss of a run, and how much its predictions change.

    python benchmarks/int8_loss.py --run=out-shakespeare-char

The text is the beginning of the run's validation split, in whole contexts. The same is measured
with random weights in GPT-2's shape and random tokens, where the loss means nothing. KL is the
divergence of the predictions from those of float32, the mean over all positions.
"""

import copy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
from torch.nn import functional as F

import configurator
from benchmarks import measure
from model import GPT, GPTConfig
from nib.checkpoint.start import read_model
from nib.errors import UserError, run_script
from nib.generation.int8 import quantize
from nib.schema import check_range
from nib.tokens.dataset import open_dataset

run: str = ''  # folder of a run
contexts: int = 100  # contexts of the run's validation split
result: str = ''  # also write the table to this file

BATCH, RANDOM_TOKENS = 4, 256  # contexts in a pass, tokens in a context of random weights


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if not run:
        raise UserError('run is empty: name the folder of a run')
    check_range(values, 'contexts', least=1)
    weights = read_model('', run)
    config, T = weights.resumed.state['config'], weights.model.block_size
    val = open_dataset(Path(config['data_dir'], config['dataset']), T).val
    n = min(contexts, (len(val) - 1) // T)
    text = torch.from_numpy(val[: n * T + 1].astype(np.int64))
    table = f'{measure.describe_machine()}\n\n' + compare(
        f'a trained run, {config["dataset"]}', weights.build().float().eval(), text
    )
    torch.manual_seed(0)
    random = GPT(GPTConfig(block_size=RANDOM_TOKENS)).eval()
    tokens = torch.randint(random.config.vocab_size, (BATCH * RANDOM_TOKENS + 1,))
    table += compare("random weights in GPT-2's shape", random, tokens)
    measure.publish(table, result)


@torch.no_grad()
def compare(title: str, model: GPT, text) -> str:
    """Returns a table with a row for each precision. text (n * block_size + 1): token ids."""
    T = model.config.block_size
    inputs, targets = text[:-1].view(-1, T), text[1:].view(-1, T)
    models = {'float32': model, 'bfloat16': copy.deepcopy(model).bfloat16()}
    models['int8'] = quantize(model)
    totals = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    for x, y in zip(inputs.split(BATCH), targets.split(BATCH)):
        expected = model(x).log_softmax(-1)  # (BATCH, T, V)
        for name, other in models.items():
            actual = other(x).float().log_softmax(-1)
            loss = F.nll_loss(actual.flatten(0, 1), y.flatten(), reduction='sum')
            kl = F.kl_div(actual, expected, log_target=True, reduction='sum')
            same_top = (actual.argmax(-1) == expected.argmax(-1)).sum()
            totals[name] += torch.stack((loss, kl, same_top))
    lines = [
        f'{title}: {model.num_params():,} parameters, {targets.numel():,} tokens',
        f'{"weights":10}{"loss":>10}{"change":>11}{"KL, nats":>12}{"same top token":>16}',
    ]
    plain = totals['float32'][0]
    for name, total in totals.items():
        loss, kl, same_top = (total / targets.numel()).tolist()
        change = float(total[0] / plain) - 1
        lines.append(f'{name:10}{loss:10.4f}{change:+11.3%}{kl:12.1e}{same_top:16.2%}')
    return '\n'.join(lines) + '\n\n'


if __name__ == '__main__':
    run_script(main)
