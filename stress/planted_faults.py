"""Trains models with the faults of config/lab/ and healthy ones; counts what the doctor finds.

    python stress/planted_faults.py --text=data/shakespeare_char/input.txt

The runs use two texts at the character level: the given one and the source of Python's standard
library. docs/doctor.md has the results, and says which runs the thresholds were set on.
"""

import json
import multiprocessing
import os
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
import train
from benchmarks import measure
from nib.doctor.problems import PROBLEMS
from nib.errors import UserError, call, run_script, warn
from nib.schema import check_range
from nib.tokens.write import write_char_dataset

text: str = ''  # path of a text of a million characters
seeds: int = 3  # runs of each fault, model and text
faults: str = ''  # names in config/lab, separated by commas; empty: all
healthy: bool = True  # also run healthy configs
processes: int = 1  # runs at a time, each on one core
result: str = ''  # also write the tables to this file

CHARACTERS = 1_100_000  # taken from each text
MODELS = {  # the flags that turn the lab's model into it
    'gpt2': '',
    'modern': '--position=rotary --norm=rms --qk_norm --mlp=swiglu --no-tied_head',
    'relu2': '--mlp=relu2 --bias --n_embd=96 --n_head=3',
}
OWN_SIZE = ('underfitting',)  # faults that depend on the size of the model
# The share of the run after which a fault shows; others show at the start or after a tenth.
SHOWS = {'underfitting': 0.5, 'generation_differs': 1.0}
HEALTHY = {  # config/lab/healthy.py with flags, each on both texts
    'gpt2': '',
    'modern': MODELS['modern'],
    'relu2': MODELS['relu2'],
    'deep': '--n_layer=6 --n_embd=96 --learning_rate=1e-3',
    'wide': '--n_embd=192 --n_head=6 --max_iters=200',
    'muon': '--optimizer=muon --learning_rate=0.006 --qk_norm --norm=rms --zero_init',
    'warmup-stable-decay': '--lr_schedule=wsd --cooldown_iters=150',
    'accumulation': '--gradient_accumulation_steps=4 --max_iters=150 --lr_decay_iters=150',
    'small batch': '--batch_size=4 --max_iters=600 --lr_decay_iters=600',
    'dropout': '--dropout=0.2',
    'a line each step': '--log_interval=1',
    'few lines': '--log_interval=50',
    'no clipping': '--grad_clip=0',
    'bfloat16': '--dtype=bfloat16',
    'low rate': '--learning_rate=3e-4 --min_lr=3e-5',
    'soft cap': '--logit_cap=15 --mlp=swiglu',
    'no weight decay': '--weight_decay=0',
    'long': '--max_iters=1500 --lr_decay_iters=1500 --eval_interval=150',
}
CONFIGS = {  # the project's own, made smaller where they are too large for this
    'train_shakespeare_char.py': '',
    'fast_shakespeare_char.py': '',
    'modern_shakespeare_char.py': '',
    'train_text.py': '--max_iters=600 --lr_decay_iters=600',
    'train_gpt2.py': '--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 '
    '--gradient_accumulation_steps=8 --eval_interval=100 --eval_iters=8 '
    '--max_iters=200 --lr_decay_iters=200 --warmup_iters=20',
    'fast_gpt2.py': '--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=8 '
    '--gradient_accumulation_steps=4 --eval_interval=100 --eval_iters=8 --max_iters=200 '
    '--lr_decay_iters=200 --warmup_iters=10 --cooldown_iters=100',
}


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    planted = faults.split(',') if faults else list(PROBLEMS)
    if unknown := set(planted) - set(PROBLEMS):
        raise UserError(
            f'--faults: {", ".join(sorted(unknown))}: no such fault; '
            f'choose from {", ".join(PROBLEMS)}'
        )
    check_range(values, 'seeds', 'processes', least=1)
    torch.set_num_threads(1)  # before this process forks
    with tempfile.TemporaryDirectory() as scratch:
        make_datasets(Path(scratch))
        jobs = [
            (
                scratch,
                fault,
                f'config/lab/{fault}.py',
                name,
                dataset,
                seed + 1,
                '' if fault in OWN_SIZE else flags,
            )
            for fault in planted
            for name, flags in MODELS.items()
            for dataset in ('text', 'code')
            for seed in range(seeds)
        ]
        if healthy:
            jobs += [
                (scratch, 'healthy', 'config/lab/healthy.py', name, dataset, 1, flags)
                for name, flags in HEALTHY.items()
                for dataset in ('text', 'code')
            ]
            jobs += [
                (scratch, 'healthy', f'config/{name}', name, 'text', 1, flags)
                for name, flags in CONFIGS.items()
            ]
        # Each run gets a fresh process, because configs of the lab break the code in theirs.
        with multiprocessing.get_context('fork').Pool(processes, maxtasksperchild=1) as pool:
            runs = []
            for run in pool.imap(run_job, jobs, chunksize=1):
                runs.append(run)
                warn(
                    f'{len(runs)} of {len(jobs)}: {run["fault"]}, {run["model"]}, '
                    f'{run["dataset"]}, seed {run["seed"]}: '
                    f'{run["findings"] or "nothing found"}'
                )
    report = '\n\n'.join(
        filter(
            None,
            (
                (
                    f'{measure.describe_machine()}; each fault in {len(MODELS)} models '
                    f'({", ".join(MODELS)}), {seeds} seeds, 2 texts'
                ),
                table_of_faults(runs),
                table_of_healthy([run for run in runs if run['fault'] == 'healthy']),
            ),
        )
    )
    measure.publish(report + '\n', result)


def make_datasets(folder: Path):
    try:
        given = Path(text).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'--text={text}: cannot be read as UTF-8 ({error}); expected the path of a text'
        ) from error
    library = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    code = ''.join(
        source
        for path in library
        if (source := path.read_text(encoding='utf-8', errors='replace')).isascii()
    )
    for name, content in (('text', given), ('code', code)):
        write_char_dataset(folder / name, content[:CHARACTERS], {'text': name})


def run_job(job) -> dict:
    """Trains, and returns what the doctor has found: name -> step."""
    scratch, fault, config, model, dataset, seed, flags = job
    out_dir = Path(scratch) / f'out-{os.getpid()}'
    argv = [
        config,
        *flags.split(),
        f'--data_dir={scratch}',
        f'--dataset={dataset}',
        '--no-prepare_dataset',
        '--fallback_dataset=',
        '--device=cpu',
        f'--seed={seed}',
        f'--out_dir={out_dir}',
        '--sample_tokens=0',
    ]
    os.chdir(ROOT)
    with open(os.devnull, 'w') as nowhere:
        stdout, stderr, sys.stdout, sys.stderr = sys.stdout, sys.stderr, nowhere, nowhere
        try:
            status = call(train.main, argv)
        finally:
            sys.stdout, sys.stderr = stdout, stderr
    records = (
        [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
        if out_dir.exists()
        else []
    )
    if not any('verdict' in record for record in records):
        raise RuntimeError(f'{" ".join(argv)} did not end as it should: exit code {status}')
    found = {
        key.removeprefix('finding/'): record['step']
        for record in records
        for key in record
        if key.startswith('finding/')
    }
    return {
        'fault': fault,
        'model': model,
        'dataset': dataset,
        'seed': seed,
        'findings': found,
        'steps': json.loads((out_dir / 'config.json').read_text())['config']['max_iters'],
    }


def table_of_faults(runs) -> str:
    rows, named_all, in_time_all, n_all = [], 0, 0, 0
    for fault in PROBLEMS:
        mine = [run for run in runs if run['fault'] == fault]
        if not mine:
            continue
        at = [run['findings'][fault] / run['steps'] for run in mine if fault in run['findings']]
        in_time = sum(share <= SHOWS.get(fault, 0.2) for share in at)
        others = [name for run in mine for name in run['findings'] if name != fault]
        also = ', '.join(
            f'{name} {others.count(name)}'
            for name in sorted(set(others), key=others.count, reverse=True)[:4]
        )
        rows.append(
            f'{fault:25}{len(mine):5}{len(at):7}{in_time:9}'
            f'{statistics.median(at) if at else float("nan"):8.0%}'
            f'{max(at, default=float("nan")):8.0%}  {also}'
        )
        n_all, named_all, in_time_all = (
            n_all + len(mine),
            named_all + len(at),
            in_time_all + in_time,
        )
    if not rows:
        return ''
    late = ', '.join(f'{fault} by {share:.0%}' for fault, share in SHOWS.items())
    return '\n'.join(
        [
            f'named at: share of the run, median and latest; in time: by 20% ({late})',
            (
                f'{"fault":25}{"runs":>5}{"named":>7}{"in time":>9}{"median":>8}{"latest":>8}'
                '  also named, in how many of the runs'
            ),
            *rows,
            (
                f'{"all":25}{n_all:5}{named_all:7}{in_time_all:9}'
                f'   named in time: {in_time_all / n_all:.1%}'
            ),
        ]
    )


def table_of_healthy(runs) -> str:
    if not runs:
        return ''
    by_severity = {
        severity: sum(
            PROBLEMS[name].severity == severity for run in runs for name in run['findings']
        )
        for severity in ('critical', 'warning', 'note')
    }
    alarms = [
        f'  {run["model"]}, {run["dataset"]}: '
        + ', '.join(f'{name} at step {step}' for name, step in run['findings'].items())
        for run in runs
        if run['findings']
    ]
    counts = ', '.join(f'{number} {severity}' for severity, number in by_severity.items())
    return '\n'.join([f'{len(runs)} healthy runs: {counts} findings'] + alarms)


if __name__ == '__main__':
    run_script(main)
