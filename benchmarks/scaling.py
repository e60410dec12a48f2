"""Trains small models on two texts, fits the scaling law of nib/scaling_law.py, and draws it.

    python data/stdlib_char/prepare.py
    python benchmarks/scaling.py

Each run has a fixed number of steps, so its loss does not depend on the speed of the machine. The
number is what one thread of an Intel Xeon with AMX manages in about 5, 10, 20 or 40 seconds.
Finished runs are kept in --result, so the same command continues. All runs take 27 minutes.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
import train
from nib.budget import RECIPE
from nib.errors import UserError, run_script
from nib.machine.device import has_bfloat16, prepare_device
from nib.run.checks import settle_schedule
from nib.scaling_law import Law
from nib.tokens.dataset import open_dataset

data_dir: str = 'data'  # folder with shakespeare_char and stdlib_char
result: str = 'benchmarks/results/scaling.json'  # finished runs
picture: str = 'docs/scaling_laws.png'  # empty: none
measure: bool = True  # train what is missing; False: only fit and draw

TEXTS = {'shakespeare_char': 'tiny Shakespeare', 'stdlib_char': "Python's standard library"}
EVALUATED = 111_540  # validation tokens, spread evenly: all of tiny Shakespeare's
# Seconds -> (layers, width, steps) of batches of 24 x 64 tokens at a rate of 0.012: what is fitted.
FITTED = {
    5: [(2, 32, 250), (2, 64, 152), (2, 128, 94), (2, 192, 62)],
    10: [(2, 64, 303), (2, 128, 189), (2, 192, 125)],
    20: [(2, 64, 606), (2, 128, 377), (2, 192, 250)],
}
# The sweep by hand: (layers, width, steps, block_size, batch_size, learning rate).
BY_HAND = {
    10: [
        (2, 128, 189, 128, 12, 0.015),
        (2, 128, 189, 64, 24, 0.018),
        (2, 128, 325, 64, 12, 0.012),
        (3, 192, 80, 64, 24, 0.012),
    ],
    20: [
        (2, 128, 377, 128, 12, 0.015),
        (2, 128, 377, 64, 24, 0.018),
        (2, 128, 377, 64, 24, 0.024),
        (2, 128, 377, 128, 12, 0.012),
        (2, 128, 651, 64, 12, 0.012),
        (3, 192, 160, 64, 24, 0.012),
        (4, 128, 211, 64, 24, 0.012),
        (4, 256, 81, 64, 24, 0.012),
    ],
    40: [
        (2, 96, 980, 128, 12, 0.015),
        (2, 128, 755, 128, 12, 0.012),
        (2, 128, 755, 128, 12, 0.015),
        (2, 128, 755, 128, 12, 0.018),
        (2, 128, 755, 128, 12, 0.024),
        (2, 128, 755, 256, 6, 0.015),
        (2, 128, 1302, 64, 12, 0.015),
        (2, 128, 377, 128, 24, 0.018),
        (2, 192, 500, 128, 12, 0.011),
        (2, 192, 500, 128, 12, 0.0135),
        (3, 128, 540, 128, 12, 0.015),
        (3, 192, 320, 128, 12, 0.011),
    ],
}
# More of them, on tiny Shakespeare only.
SHAKESPEARE = {
    10: [(2, 128, 95, 128, 24, 0.012), (2, 128, 189, 64, 24, 0.006)],
    20: [(2, 128, 378, 64, 24, 0.006)],
}


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    path = Path(result)
    runs = json.loads(path.read_text()) if path.exists() else []
    done = [{key: run[key] for key in run if key not in MEASURED} for run in runs]
    torch.set_num_threads(1)
    for run in all_runs() if measure else []:
        if run not in done:
            runs.append(run | train_one(run))
            path.write_text(
                '[\n' + ',\n'.join(json.dumps(each) for each in sorted(runs, key=order)) + '\n]\n'
            )
            print(runs[-1], flush=True)
    law, floors, factors = fit([run for run in runs if run['fitted']])
    print(describe(runs, law, floors, factors))
    if picture:
        draw(runs, law, floors, factors)


# -- the runs --------------------------------------------------------------------------------------

MEASURED = ('loss', 'parameters', 'tokens')


def all_runs() -> list[dict]:
    """Returns every run, without its results, shortest first."""
    names = ('n_layer', 'n_embd', 'max_iters', 'block_size', 'batch_size', 'learning_rate')
    runs = []
    for seconds in BY_HAND.keys() | FITTED.keys():
        rows = [(True, (*row, 64, 24, 0.012)) for row in FITTED.get(seconds, ())]
        rows += [(False, row) for row in BY_HAND.get(seconds, ())]
        own = [(False, row) for row in SHAKESPEARE.get(seconds, ())]
        for dataset in TEXTS:
            for fitted, row in rows + own * (dataset == 'shakespeare_char'):
                run = {'dataset': dataset, 'seconds': seconds, 'fitted': fitted}
                runs.append(run | dict(zip(names, row)))
    return sorted(runs, key=order)


def order(run: Mapping) -> tuple:
    return run['seconds'], run['dataset'], not run['fitted'], run['n_layer'], run['n_embd']


def train_one(run: Mapping) -> dict[str, float]:
    """Trains a model; returns its loss, its parameters without embeddings, and its tokens."""
    steps = run['max_iters']
    warmup = min(10, steps // 10)
    config = {
        **configurator.read_block(train.__file__).defaults,
        **RECIPE,
        **{key: value for key, value in run.items() if key not in ('seconds', 'fitted')},
        'n_head': max(1, run['n_embd'] // 32),
        'muon_momentum': 0.85,
        'rotary_base': 100.0,
        'warmup_iters': warmup,
        'cooldown_iters': min(steps - warmup, steps * 2 // 3),
        'gradient_accumulation_steps': 1,
        'device': 'cpu',
        'dtype': 'bfloat16' if has_bfloat16('cpu') else 'float32',
    }
    config = settle_schedule(config)
    vars(train).update(config)  # which get_lr reads
    prepare_device('cpu')
    data = open_dataset(Path(data_dir) / run['dataset'], run['block_size'])
    t = train.Training.set_up(config, data)
    started = time.process_time()
    for step in range(steps):
        t.optimizer.lr = train.get_lr(step)
        train.train_step(t, t.batches.micro_batches(step), step)
    print(f'{time.process_time() - started:.1f} s of the processor', end=' ')
    n_batches = EVALUATED // (run['batch_size'] * run['block_size'])
    batches = t.batches.eval_batches(data.val, n_batches)
    loss = train.evaluate(t.raw_model, batches, t.precision, t.ranks)
    if not math.isfinite(loss):
        raise UserError(f'{run}: loss {loss}')
    return {
        'loss': round(loss, 4),
        'parameters': sum(p.numel() for name, p in t.raw_model.named_parameters() if '.h.' in name),
        'tokens': t.tokens_per_step * steps,
    }


# -- the fit ---------------------------------------------------------------------------------------


def fit(runs: list[dict]) -> tuple[Law, dict[str, float], dict[str, float]]:
    """Fits one law to both texts; returns it, and the floor and a factor of each text.

    The loss of a text is floor + factor * law. The factor of the first text is 1. Minimizes the
    Huber loss of the logarithms (Hoffmann et al. 2022, section 3.3), from several starts.
    """
    names = list(TEXTS)
    texts = torch.tensor([names.index(run['dataset']) for run in runs])
    n, tokens, losses = (
        torch.tensor([run[key] for run in runs], dtype=torch.float64)
        for key in ('parameters', 'tokens', 'loss')
    )
    best = (math.inf, torch.empty(0))

    def error(p: torch.Tensor) -> torch.Tensor:
        factors = torch.stack((torch.zeros_like(p[2]), p[2])).exp()[texts]
        size = (p[3] - p[4] * (n / 1e5).log()).exp()
        reading = (p[5] - p[6] * (tokens / 3e5).log()).exp()
        predicted = p[:2].exp()[texts] + factors * (size + reading)
        return 1e4 * torch.nn.functional.huber_loss(predicted.log(), losses.log(), delta=1e-2)

    for alpha, beta in ((0.4, 0.4), (0.2, 0.8), (0.8, 0.2)):
        start = [0.0, -0.3, 0.0, math.log(0.3), alpha, math.log(0.5), beta]
        p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([p], max_iter=500, line_search_fn='strong_wolfe')

        def closure(p=p, solver=solver):
            solver.zero_grad()
            value = error(p)
            value.backward()
            return value

        solver.step(closure)
        best = min(best, (error(p).item(), p.detach()), key=lambda pair: pair[0])
    q = best[1].tolist()
    law = Law(A=math.exp(q[3]) * 1e5 ** q[4], alpha=q[4], B=math.exp(q[5]) * 3e5 ** q[6], beta=q[6])
    floors = {name: math.exp(q[i]) for i, name in enumerate(names)}
    return law, floors, {names[0]: 1.0, names[1]: math.exp(q[2])}


def describe(runs, law: Law, floors, factors) -> str:
    """Returns the law, and a table of the runs with what the law predicts."""
    lines = [
        f'law: {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} / D^{law.beta:.3f}',
        *(f'{name}: {floors[name]:.3f} + {factors[name]:.3f} * law' for name in TEXTS),
        '',
        'seconds  text              fitted  layers x width  batch      rate    steps    loss  law',
    ]
    for run in sorted(runs, key=order):
        name = run['dataset']
        predicted = floors[name] + factors[name] * law.loss(run['parameters'], run['tokens'])
        shape = f'{run["n_layer"]} x {run["n_embd"]}'
        batch = f'{run["batch_size"]} x {run["block_size"]}'
        lines.append(
            f'{run["seconds"]:7}  {name:16}  {"yes" if run["fitted"] else "":6}  {shape:14}  '
            f'{batch:9}  {run["learning_rate"]:<6}  {run["max_iters"]:5}  {run["loss"]:.4f}  '
            f'{predicted:.4f}'
        )
    return '\n'.join(lines)


def draw(runs, law: Law, floors, factors):
    """Draws loss against parameters at equal time: the runs, and the law through them."""
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout='constrained')
    colors = {5: '#7fb3d5', 10: '#2e86c1', 20: '#1b4f72', 40: '#b03a2e'}
    for axis, (name, title) in zip(axes, TEXTS.items()):
        own = [run for run in runs if run['dataset'] == name]
        for seconds, color in colors.items():
            line = sorted(
                (run['parameters'], run['tokens'])
                for run in own
                if run['seconds'] == seconds and run['fitted']
            )
            if line:
                sizes, tokens = np.log(np.array(line)).T
                between = np.linspace(sizes[0], sizes[-1])
                curve = zip(np.exp(between), np.exp(np.interp(between, sizes, tokens)))
                predicted = [floors[name] + factors[name] * law.loss(*point) for point in curve]
                axis.plot(np.exp(between), predicted, '-', color=color, lw=1.2)
            for fitted, marker in ((True, 'o'), (False, 'x')):
                points = [r for r in own if r['seconds'] == seconds and r['fitted'] == fitted]
                label = f'{seconds} s' if fitted == (seconds in FITTED) else None
                axis.scatter(
                    [r['parameters'] for r in points],
                    [r['loss'] for r in points],
                    marker=marker,
                    color=color,
                    s=30,
                    label=label,
                )
        axis.set_xscale('log')
        axis.set_xlabel('parameters without embeddings')
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('validation loss, nats per character')
    title = 'time of one thread\no fitted, line: law\nx by hand'
    figure.legend(*axes[0].get_legend_handles_labels(), title=title, loc='outside right upper')
    figure.savefig(picture, dpi=110)


if __name__ == '__main__':
    run_script(main)
