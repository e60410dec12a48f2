"""Draws the pictures of docs/training_loop.md and docs/model.md, and measures the experiments.

    python benchmarks/chapter.py
    python benchmarks/chapter.py --text=data/shakespeare_char/input.txt --result=chapter.txt

The first command draws the pictures only. They show real runs, and take a few seconds. The second
one also compares optimizers, and batches with micro batches.
"""

import io
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch

import configurator
import train
from benchmarks import measure
from nib import optim
from nib.errors import UserError, run_script, warn
from nib.machine.device import peak_memory
from nib.report.history import read_run
from nib.tokens.dataset import open_dataset
from nib.tokens.write import write_char_dataset

pictures: str = 'docs'  # folder for the pictures
text: str = ''  # path of a text of a million characters, for the experiments; empty: pictures only
steps: int = 500  # training steps of each run that compares optimizers
result: str = ''  # also write the tables to this file

BLUE, RED, GREEN, GRAY = '#0072b2', '#c3420f', '#00704f', '#6b6b6b'
RATES = {'adamw': ('3e-4', '1e-3', '3e-3', '1e-2'), 'sgd': ('0.03', '0.1', '0.3', '1')}
BATCHES = ((64, 1), (32, 2), (16, 4), (8, 8), (4, 16), (1, 64))  # (batch_size, micro steps)


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    if text and not Path(text).is_file():
        raise UserError(f'--text={text}: no such file')
    try:
        draw_descent()
        draw_landscapes()
        draw_loop()
        draw_model()
        with tempfile.TemporaryDirectory() as folder:
            tables = [measure.describe_machine(), draw_run(Path(folder))]
    except ImportError as error:
        raise UserError('matplotlib is not installed: pip install matplotlib') from error
    if text:
        with tempfile.TemporaryDirectory() as folder:
            measure.run(
                'data/text/prepare.py', f'--input={text}', f'--out_dir={folder}/shakespeare_char'
            )
            tables += [compare_optimizers(folder), compare_batches(folder)]
    measure.publish('\n\n'.join(tables) + '\n', result)


# -- pictures --------------------------------------------------------------------------------------


def new_figure(width: float, height: float, columns: int = 1):
    """Returns a figure on white, which is readable on a dark page too, and its axes."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # pyplot would keep figures and look for a display

    rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'nibgpt', 'font.size': 10})
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure, name: str):
    svg = io.StringIO()
    figure.savefig(svg, format='svg', metadata={'Date': None})
    attributes = re.compile(r'="[^"]*"')  # coordinates, finer than any screen; not the labels
    text = attributes.sub(lambda m: re.sub(r'(\d\.\d\d)\d+', r'\1', m[0]), svg.getvalue())
    text = re.sub(r' +$', '', text, flags=re.MULTILINE)
    (Path(pictures) / name).write_text(text, encoding='utf-8')


def draw_descent():
    """Draws descent on the loss of section 3, y = 2x on three samples, at three learning rates."""
    samples = ((1, 2), (2, 4), (3, 6))
    figure, panels = new_figure(9, 3.2, columns=3)
    grid = [-0.5 + 5 * i / 200 for i in range(201)]

    def loss(w):
        return sum((w * x - y) ** 2 for x, y in samples) / len(samples)

    for panel, rate in zip(panels, (0.03, 0.2, 0.22)):
        path = [0.5]
        for _ in range(5):
            gradient = sum(2 * x * (path[-1] * x - y) for x, y in samples) / len(samples)
            path.append(path[-1] - rate * gradient)
        panel.plot(grid, [loss(w) for w in grid], color=GRAY, lw=1.2)
        panel.plot(path, [loss(w) for w in path], 'o-', color=BLUE, ms=4, lw=1)
        panel.plot(path[0], loss(path[0]), 'o', color=RED, ms=6)
        panel.set(title=f'learning_rate = {rate}', xlabel='w', xlim=(-0.5, 4.5), ylim=(-1, 20))
    panels[0].set_ylabel('loss')
    save(figure, 'descent.svg')


def landscapes():
    """Returns the four loss functions of section 8, by name."""

    def ripples(a, b):
        return 0.1 * (2 - torch.cos(12 * a) - torch.cos(12 * b))

    return {
        'smooth': lambda a, b: (a**2 + b**2) / 2,
        'steep': lambda a, b: (50 * a**2 + b**2) / 2,
        'flat': lambda a, b: 0.01 * (a**2 + b**2) / 2,
        'oscillating': lambda a, b: (a**2 + b**2) / 2 + ripples(a, b),
    }


def draw_landscapes():
    """Draws 100 steps of three optimizers on four landscapes, each at the rate of section 8."""
    figure, panels = new_figure(11, 3.4, columns=4)
    optimizers = {
        'SGD': (lambda p: optim.SGD(p, 0.0, 0.0), 0.03, GRAY),
        'SGD, momentum 0.9': (lambda p: optim.SGD(p, 0.9, 0.0), 0.03, RED),
        'AdamW': (lambda p: optim.AdamW(p, (0.9, 0.95), 0.0), 0.1, BLUE),
    }
    a, b = torch.meshgrid(
        torch.linspace(-2.4, 1.2, 60), torch.linspace(-1.2, 1.9, 60), indexing='xy'
    )
    for panel, (name, loss) in zip(panels, landscapes().items()):
        panel.contour(a, b, loss(a, b), levels=7, colors='0.8', linewidths=0.7)
        for label, (make, rate, color) in optimizers.items():
            weights = torch.nn.Parameter(torch.tensor([-2.0, 1.5]))
            optimizer, path = make([weights]), [weights.tolist()]
            for _ in range(100):
                weights.grad = None
                loss(*weights).backward()
                with torch.no_grad():
                    optimizer.step(rate, torch.tensor(True))
                path.append(weights.tolist())
            panel.plot(*zip(*path), '-', color=color, lw=1.1, label=f'{label}, rate {rate}')
            panel.plot(*path[-1], 'o', color=color, ms=5)
        panel.plot(0, 0, 'k+', ms=9)
        panel.set(title=name, xlabel='a', xlim=(-2.4, 1.2), ylim=(-1.2, 1.9))
    panels[0].set_ylabel('b')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    save(figure, 'landscapes.svg')


def draw_loop():
    """Draws the loop of train.py as a circle of boxes."""
    figure, (axes,) = new_figure(9, 3.5)
    boxes = {  # code: (x, y, what it gives)
        'get_lr': (0, 1, 'lr'),
        'micro_batches': (1, 1, 'x, y'),
        'model(x, y)': (2, 1, 'loss'),
        'backward()': (3, 1, 'p.grad'),
        'clip_grad_norm_': (3, 0, 'grad norm'),
        'optimizer.step': (2, 0, 'p'),
        'zero_grad': (1, 0, 'p.grad = None'),
        'state.step += 1': (0, 0, 'step'),
    }
    frame = {'boxstyle': 'round,pad=0.5', 'fc': '#eef4f9', 'ec': BLUE}
    for code, (x, y, gives) in boxes.items():
        axes.text(x, y, code, ha='center', va='center', family='monospace', bbox=frame)
        axes.text(x, y - 0.25, gives, ha='center', va='center', color=GRAY, fontsize=9)
    places = list(boxes.values())
    for (x, y, _), (to_x, to_y, _) in zip(places, [*places[1:], places[0]]):
        gap_x, gap_y = 0.4 * (to_x - x), 0.35 * (to_y - y)
        start = (x + gap_x, y + gap_y)
        axes.annotate('', (to_x - gap_x, to_y - gap_y), start, arrowprops={'arrowstyle': '->'})
    arc = {'arrowstyle': '->', 'connectionstyle': 'arc3,rad=0.35', 'color': RED}
    axes.annotate('', (1, 1.2), (3, 1.2), arrowprops=arc)
    axes.text(2, 1.78, 'gradient_accumulation_steps', ha='center', color=RED, fontsize=9)
    axes.set(xlim=(-0.6, 3.6), ylim=(-0.45, 1.95))
    axes.axis('off')
    save(figure, 'loop.svg')


def draw_model():
    """Draws the residual stream of a GPT, with one block."""
    figure, (axes,) = new_figure(9, 3)
    frame = {'boxstyle': 'round,pad=0.4', 'fc': '#eef4f9', 'ec': BLUE}
    plus = {'boxstyle': 'circle,pad=0.2', 'fc': 'white', 'ec': GRAY}
    axes.annotate('', (8.6, 0), (0.2, 0), arrowprops={'arrowstyle': '->', 'lw': 2, 'color': GRAY})
    for x, code in ((0, 'wte'), (7.3, 'ln_f'), (8.4, 'head'), (9.7, 'logits')):
        axes.text(x, 0, code, ha='center', va='center', family='monospace', bbox=frame)
    axes.text(-0.95, 0, 'idx', ha='center', va='center', family='monospace')
    axes.annotate('', (-0.35, 0), (-0.75, 0), arrowprops={'arrowstyle': '->'})
    axes.annotate('', (9.25, 0), (8.8, 0), arrowprops={'arrowstyle': '->', 'lw': 2, 'color': GRAY})
    axes.text(1, 1, 'wpe', ha='center', va='center', family='monospace', bbox=frame)
    axes.annotate('', (1, 0.15), (1, 0.8), arrowprops={'arrowstyle': '->'})
    for x, norm, layer in ((2.2, 'ln_1', 'attn'), (4.7, 'ln_2', 'mlp')):
        axes.plot([x, x, x + 1.6], [0, 1, 1], color='black', lw=1)
        axes.annotate('', (x + 1.6, 0.15), (x + 1.6, 1), arrowprops={'arrowstyle': '->'})
        for shift, code in ((0.25, norm), (1.15, layer)):
            axes.text(x + shift, 1, code, ha='center', va='center', family='monospace', bbox=frame)
        axes.text(x + 1.6, 0, '+', ha='center', va='center', bbox=plus)
    axes.text(1, 0, '+', ha='center', va='center', bbox=plus)
    axes.plot([1.7, 6.7, 6.7, 1.7, 1.7], [-0.5, -0.5, 1.5, 1.5, -0.5], color=RED, lw=1, ls='--')
    axes.text(4.2, 1.62, 'Block, n_layer times', ha='center', color=RED, fontsize=9)
    axes.text(4.2, -0.38, 'residual stream, B x T x C', ha='center', color=GRAY, fontsize=9)
    axes.set(xlim=(-1.2, 10.2), ylim=(-0.6, 1.9))
    axes.axis('off')
    save(figure, 'model.svg')


def draw_run(folder: Path) -> str:
    """Draws learning rate schedules, and the path of the weight that the chapter follows.

    Returns a line with the weight at the start, after one step, and at the end.
    """
    zen = subprocess.run([sys.executable, '-c', 'import this'], capture_output=True, text=True)
    write_char_dataset(folder / 'zen', zen.stdout, {'text': 'the Zen of Python'})
    weights, gradients = [], []
    values, _ = configurator.configure(train.__file__, ['config/zen.py', '--device=cpu'])
    values |= {'dtype': 'float32', 'min_lr': 1e-3, 'lr_decay_iters': values['max_iters']}
    vars(train).update(values)
    t = train.Training.set_up(values, open_dataset(folder / 'zen', values['block_size']))
    weight = t.raw_model.transformer.h[0].mlp.c_fc.weight
    zero_grad = t.optimizer.zero_grad

    def keep_gradient():
        gradients.append(weight.grad[17, 14].item())
        zero_grad()

    t.optimizer.zero_grad = keep_gradient
    for step in range(train.max_iters):
        weights.append(weight[17, 14].item())
        t.optimizer.lr = train.get_lr(step)
        train.train_step(t, t.batches.micro_batches(step), step)
    weights.append(weight[17, 14].item())

    figure, panels = new_figure(9, 3, columns=2)
    panels[0].plot(weights, color=BLUE, lw=1)
    panels[0].set(title='h[0].mlp.c_fc.weight[17, 14]', xlabel='step', ylabel='w')
    panels[1].plot(gradients, color=RED, lw=0.7)
    panels[1].set(title='its gradient, clipped', xlabel='step', ylabel='p.grad')
    save(figure, 'weight.svg')

    figure, (axes,) = new_figure(7, 3)
    for schedule, color in (('cosine', BLUE), ('linear', GREEN), ('wsd', RED)):
        vars(train).update(lr_schedule=schedule, cooldown_iters=60 if schedule == 'wsd' else 0)
        rates = [train.get_lr(step) for step in range(train.max_iters + 1)]
        axes.plot(rates, color=color, label=schedule)
    axes.set(xlabel='step', ylabel='lr', ylim=(0, 0.0105))
    axes.axvline(train.warmup_iters, color=GRAY, lw=0.8, ls=':')
    axes.text(train.warmup_iters + 3, 0.0003, 'warmup_iters', color=GRAY, fontsize=9)
    axes.legend(frameon=False)
    save(figure, 'schedule.svg')
    return f'the weight: {weights[0]:.6f}, {weights[1]:.6f}, ..., {weights[-1]:.6f}'


# -- experiments -----------------------------------------------------------------------------------


def compare_optimizers(folder: str) -> str:
    """Trains the model of train_shakespeare_char.py with AdamW and SGD at several rates."""
    lines = [f'{"optimizer":10}{"learning_rate":>15}{"train loss":>11}{"val loss":>11}']
    for method, rates in RATES.items():
        for rate in rates:
            measure.run(
                'train.py',
                'config/train_shakespeare_char.py',
                f'--data_dir={folder}',
                f'--out_dir={folder}/{method}-{rate}',
                f'--optimizer={method}',
                f'--learning_rate={rate}',
                f'--max_iters={steps}',
                f'--eval_interval={steps}',
                '--weight_decay=0',  # which depends on the rate
                '--device=cpu',
                '--no-report',
            )
            numbers = read_run(f'{folder}/{method}-{rate}').numbers
            losses = (list(numbers[f'loss/{split}'].values())[-1] for split in ('train', 'val'))
            lines.append(f'{method:10}{rate:>15}' + ''.join(f'{one:11.3f}' for one in losses))
            warn(lines[-1])
    return '\n'.join(lines)


def compare_batches(folder: str) -> str:
    """Measures a step of 64 sequences, in one batch and in micro batches."""
    lines = [f'{"batch_size":10}{"micro steps":>13}{"ms/step":>10}{"peak memory, MB":>18}']
    for size, micro_steps in BATCHES:
        with multiprocessing.get_context('spawn').Pool(1) as pool:  # memory of its own
            ms, megabytes = pool.apply(measure_steps, (folder, size, micro_steps))
        lines.append(f'{size:<10}{micro_steps:13}{ms:10.0f}{megabytes:18.0f}')
        warn(lines[-1])
    return '\n'.join(lines)


def measure_steps(folder: str, size: int, micro_steps: int) -> tuple[float, float]:
    """Returns the milliseconds of a step, the median of five, and the peak memory in MB."""
    argv = ['config/train_shakespeare_char.py', '--device=cpu', '--block_size=256']
    argv += [f'--batch_size={size}', f'--gradient_accumulation_steps={micro_steps}']
    values, _ = configurator.configure(train.__file__, argv)
    data = open_dataset(f'{folder}/shakespeare_char', 256)
    t = train.Training.set_up(values | {'dtype': 'float32'}, data)
    t.optimizer.lr, seconds = 1e-3, []
    for step in range(6):
        started = time.perf_counter()
        train.train_step(t, t.batches.micro_batches(step), step)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[1:]), peak_memory('cpu') / 1e6


if __name__ == '__main__':
    run_script(main)
