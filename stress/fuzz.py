"""Runs the scripts on random command lines and damaged files, and counts how they end.

    python stress/fuzz.py
    python stress/fuzz.py --case=1234        one case again, with its full output

A case passes if it exits with 0, with 2 and one line that begins with 'error: ', or with 3, which
means non-finite values. It fails with a traceback, any other code, or after a minute. Each case is
a fork of this process, which has imported torch once, with 2 GiB of memory to test excessive
sizes.
"""

import json
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {
    'OMP_NUM_THREADS': '1',
    'HF_HUB_OFFLINE': '1',
    'WANDB_MODE': 'disabled',
    'ARROW_DEFAULT_MEMORY_POOL': 'system',
}  # the default pool reserves memory that may never be used
# A proxy that refuses every connection at once.
os.environ |= dict.fromkeys(
    ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9'
)
import safetensors.torch
import tiktoken
import torch
import torch._dynamo  # optimizers import it, which takes a second; here once for all

import bench
import configurator
import report
import sample
import train
from benchmarks import measure
from model import GPT, GPTConfig
from nib.errors import UserError, run_script
from nib.schema import check_range
from nib.text import gpt2
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.tokenizer import END_OF_TEXT
from nib.tokens import dataset, unfinished
from nib.tokens.write import write_char_dataset

cases: int = 10000  # number of cases to run
seed: int = 1  # determines the cases
case: int = -1  # the number of a case to run alone; -1 for all
result: str = ''  # also write the table to this file

MEMORY, SECONDS = 2 << 30, 60  # limits for a case: bytes and seconds
PREPARE = {
    name: f'data/{name}/prepare.py'
    for name in ('text', 'shakespeare_char', 'shakespeare', 'stdlib_char', 'openwebtext')
}
MAINS = {
    'train.py': train.main,
    'sample.py': sample.main,
    'bench.py': bench.main,
    'report.py': report.main,
}
TINY = (
    '--device=cpu --data_dir=data --dataset=tiny --n_layer=1 --n_head=2 --n_embd=8 --block_size=8 '
    '--batch_size=2 --gradient_accumulation_steps=1 --lr_decay_iters=2 --warmup_iters=1 '
    '--learning_rate=1e-2'
).split()
RESUME = ['--init_from=resume', '--out_dir=run', '--max_iters=3']
PUBLISHED = (
    '--device=cpu --data_dir=data --dataset=gpt2 --batch_size=2 --gradient_accumulation_steps=1 '
    '--out_dir=new --init_from=published --max_iters=1 --eval_iters=1 --warmup_iters=1'
).split()
TRAIN = [*TINY, '--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--log_interval=1']
BASE = {
    'train.py': [*TRAIN, '--out_dir=new'],
    'sample.py': ['--device=cpu', '--out_dir=run', '--max_new_tokens=3'],
    'bench.py': [
        *TINY,
        *'--rounds=1 --steps=1 --new_tokens=2 --prompt_tokens=2 --no-startup'.split(),
    ],
    'report.py': ['--out_dir=run', '--no-png'],
    PREPARE['text']: ['--input=texts'],
    PREPARE['shakespeare_char']: ['--input=texts/a.txt'],
    PREPARE['shakespeare']: ['--input=texts/a.txt'],
    PREPARE['stdlib_char']: [],
    PREPARE['openwebtext']: ['--input=texts'],
}
TYPES = {script: configurator.read_block(str(ROOT / script)).types for script in BASE}
TYPES['report.py'].pop('watch')  # it serves until Ctrl-C
# Larger values of these keys only make a run longer, so they get small or invalid values.
WORK = {
    *'max_iters eval_iters sample_tokens gradient_accumulation_steps num_samples'.split(),
    *'max_new_tokens rounds steps new_tokens'.split(),
}
NUMBERS = '0 1 2 3 -0 -1 1.5 1e-400 nan inf -inf 1e400 -1e400 None True'.split() + ['', 'abc']
LARGE = '7 8 17 64 1000 1e3 100000 2147483647 1e9 1e18 1e308'.split()
LARGE += ['9' * 400, '-' + '9' * 50, '0x10']
TEXTS = [
    *('', 'x', '-', '--', '.'),
    *'run new data texts texts/a.txt published data/tiny run/latest best 2'.split(),
    *'/dev/null /dev/full /proc/self/mem ~ ~nobody'.split(),
    *('x' * 300, 'x' * 5000, 'x/' * 2000),
    *('é€🙂', '\udcff', '\ud800', 'a\nb', '\t'),
    *('"', "'", "'a'", '[]', '()', '{}', '%s', '{0}'),
    *('$(touch canary)', "__import__('os').mkdir('canary')"),
    *'FILE: FILE:. FILE:texts/a.txt FILE:nowhere'.split(),
    *('The ', '<|endoftext|>'),
    *'auto cpu cuda cuda:7 cpu:1 meta resume scratch gpt2'.split(),
    *('9' * 5000, 'none', 'tiny', 'shakespeare_char', 'text', 'stdlib', ',', 'texts,nowhere'),
]
CONFIGS = [
    '',
    'seed = 2',
    'seed = = 2',
    'sed = 2',
    "seed = 'a'",
    'seed = 1e400',
    'raise ValueError',
    'import sys; sys.exit(0)',
    'seed = 1/0',
    'include("config.py")',
    'include("nowhere.py")',
    'global seed',
    'def _f(): return _f()\n_f()',
    'x' * 9999,
    '(' * 9999,
    "out_dir = 'a\\0b'",
    "start = '\\ud800'",
    "device = 'abacus'",
    'def f(): pass',
    '\0',
    '\ufeffseed = 1',
    'seed: int = 3',
    'del seed',
]
JSON = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    1e308,
    '',
    'x',
    'é',
    '../x',
    'x' * 5000,
    [],
    {},
    [[]],
    {'': None},
    float('nan'),
    float('inf'),
]


@dataclass(frozen=True)
class Case:
    kind: str
    script: str
    argv: list[str]
    damage: Callable[[], None]  # called in the case's own folder


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'cases', least=1)
    torch.set_num_threads(1)  # threads would not survive a fork
    MAINS.update(
        {script: runpy.run_path(str(ROOT / script))['main'] for script in PREPARE.values()}
    )
    # A vocabulary of bytes instead of GPT-2's, whose files may be missing.
    small = tiktoken.Encoding(
        'bytes',
        pat_str='.|\n',
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={END_OF_TEXT: Gpt2Tokenizer.end_of_text},
    )
    gpt2.load_gpt2 = lambda: small
    with tempfile.TemporaryDirectory() as scratch:
        ground = Path(scratch) / 'ground'
        if wait(fork(make_ground, ground, Path(scratch) / 'ground said')):
            raise UserError(
                'the files to damage could not be made: '
                + (Path(scratch) / 'ground said').read_text()[-500:]
            )
        started = time.monotonic()
        numbers = [case] if case >= 0 else range(cases)
        ended = run_all(numbers, ground, Path(scratch))
    table = make_table(ended, time.monotonic() - started)
    measure.publish(table, result)
    return int(any(bad for _, _, bad in ended))


def run_all(numbers, ground: Path, scratch: Path) -> list[tuple[str, int, str]]:
    """Runs the cases on all cores; returns the kind, exit code and problem of each."""
    running, ended = {}, []
    for number in [*numbers, None]:
        while running and (number is None or len(running) >= (os.cpu_count() or 1)):
            process, status = os.wait()
            number_ended, made, folder = running.pop(process)
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # its child processes may still run
            code = os.waitstatus_to_exitcode(status)
            said = folder.with_suffix('.said').read_text(errors='replace')
            bad = judge(code, said)
            if not bad and (folder / 'canary').exists():
                bad = 'code of an argument ran'
            ended.append((made.kind, code, bad))
            if bad or case >= 0:
                print(f'case {number_ended}: {made.script} {made.argv!a}')
                print(f'    exit code {code}, {bad or "well"}: {said[-3000:]}', flush=True)
            shutil.rmtree(folder)
            folder.with_suffix('.said').unlink()
        if number is not None:
            folder = scratch / str(number)
            made = make_case(random.Random(f'{seed}/{number}'))
            shutil.copytree(ground, folder, symlinks=True)
            process = fork(lambda _: play(made), folder, folder.with_suffix('.said'))
            running[process] = number, made, folder
    return ended


def judge(code: int, said: str) -> str:
    """Returns what is wrong with how a case ended, or ''."""
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    if 'Traceback (most recent call last)' in said:
        return 'traceback'
    if code == 2 and (len(errors) != 1 or not said.endswith(errors[0] + '\n')):
        return 'not one line'
    if code == -signal.SIGALRM:
        return 'too long'
    return '' if code in (0, 2, 3) else 'another exit code'


def make_table(ended, seconds: float) -> str:
    kinds = sorted({kind for kind, _, _ in ended})
    counts = {kind: Counter(code for other, code, _ in ended if other == kind) for kind in kinds}
    codes = sorted({code for _, code, _ in ended})
    lines = [
        (
            f'{len(ended):,} cases, seed {seed}, in {seconds / 60:.1f} minutes; '
            f'{measure.describe_machine()}'
        ),
        '',
        f'{"exit code":40}' + ''.join(f'{code:>8}' for code in codes) + f'{"bad":>8}',
    ]
    for kind, count in [*counts.items(), ('all', sum(counts.values(), Counter()))]:
        bad = sum(bool(reason) for other, _, reason in ended if kind in (other, 'all'))
        lines.append(f'{kind:40}' + ''.join(f'{count[code]:>8,}' for code in codes) + f'{bad:>8}')
    reasons = Counter(reason for _, _, reason in ended if reason)
    lines += ['', f'tracebacks {reasons.pop("traceback", 0)}'] + [
        f'{reason} {count}' for reason, count in reasons.items()
    ]
    return '\n'.join(lines) + '\n'


# -- one case --------------------------------------------------------------------------------------


def fork(work: Callable[[Path], None], folder: Path, said: Path) -> int:
    """Forks a process that runs work(folder) like run_script, with its output in a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        os.environ |= {'HOME': str(folder), 'PATH': ''}  # so no compiler, which would be slow
        os.environ.pop('CXX', None)
        for descriptor, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, said, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ):
            os.dup2(os.open(path, flags, 0o600), descriptor)
        os.dup2(1, 2)
        signal.alarm(SECONDS)
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        work(folder)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 1)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def play(made: Case):
    made.damage()
    sys.argv = [made.script, *made.argv]
    run_script(MAINS[made.script])


def make_case(draw: random.Random) -> Case:
    kinds = {
        case_of_flags: 10,
        case_of_dataset: 3,
        case_of_run: 4,
        case_of_report: 2,
        case_of_published: 2,
        case_of_text: 4,
    }
    return draw.choices(list(kinds), list(kinds.values()))[0](draw)


def case_of_flags(draw) -> Case:
    script = draw.choices(list(BASE), [8, 5, 3, 2, 4, 1, 1, 0.1, 0.1])[0]
    types = TYPES[script] if script != 'bench.py' else TYPES['train.py'] | TYPES['bench.py']
    flags = []
    for _ in range(draw.randint(1, 3)):
        flags += random_flag(draw, types)
    if draw.random() < 0.8:
        config = draw.choice(CONFIGS).encode('utf-8', 'surrogatepass')
    else:
        config = draw.randbytes(50)
    if draw.random() < 0.2:
        files = 'config.py config.py nowhere.py texts texts/a.txt'.split()
        files.append(str(ROOT / 'config/train_shakespeare_char.py'))
        flags.insert(draw.randint(0, len(flags)), draw.choice(files))
    if script.startswith('data'):  # never write into the project's own folder
        folders = ['new', 'new', 'data/tiny', 'texts/a.txt', '/dev/null', 'é', 'x' * 300]
        flags.append(f'--out_dir={draw.choice(folders)}')

    def write_config():
        Path('config.py').write_bytes(config)

    return Case(f'flags of {script}', script, BASE[script] + flags, write_config)


def random_flag(draw, types: dict) -> list[str]:
    key = draw.choice(list(types))
    values = NUMBERS if key in WORK else NUMBERS + LARGE + TEXTS
    fitting = [value for value in values if configurator.is_value(value, types[key])]
    value = draw.choice(fitting if fitting and draw.random() < 0.7 else values)
    if draw.random() < 0.1 and key not in WORK:
        value = ''.join(draw.choices('0123456789.-+eE_xjaé \'"[](){},:;\\', k=draw.randint(1, 12)))
    if key == 'data_dir' and value.strip('.\'"') == '':
        value = 'nowhere'  # an empty value means the project's own folder
    if draw.random() < 0.1:  # a misspelled key
        at = draw.randrange(len(key))
        key = key[:at] + draw.choice(['', 'x', '-', 'é', key[at] * 2]) + key[at + 1 :]
    forms = {
        '--{key}={value}': 10,
        '--{key} {value}': 3,
        '--{key}': 1,
        '--no-{key}': 1,
        '{key}={value}': 1,
        '-{key}={value}': 1,
    }
    form = draw.choices(list(forms), list(forms.values()))[0]
    return [part.format(key=key, value=value) for part in form.split(' ')]


def case_of_dataset(draw) -> Case:
    name, meta = draw.choice([('tiny', 'meta.json'), ('nano', 'meta.pkl')])
    files = ('train.bin', 'val.bin', meta)
    damage = random_damage(draw, [f'data/{name}/{file}' for file in files])
    large = draw.choice([100, 1 << 26])  # bins of this many bytes or more are not read completely

    def prepare():
        dataset.LARGE = large
        damage()

    argv = [*TRAIN, '--out_dir=new', f'--dataset={name}']
    if name == 'tiny' and draw.random() < 0.3:
        argv += RESUME
    return Case('damaged dataset', 'train.py', argv, prepare)


def case_of_run(draw) -> Case:
    files = 'latest best config.json metrics.jsonl wandb_id step-00000002/state.json'.split()
    files += ['step-00000002/model.safetensors', 'step-00000002/optimizer.safetensors']
    files += ['step-00000001/state.json', 'step-00000001', 'step-00000002/']
    damage = random_damage(draw, [f'run/{file}' for file in files])
    sample_flags = [
        *BASE['sample.py'],
        draw.choice(['--which=best', '--which=latest', '--which=2']),
    ]
    resume_flags = [*TRAIN, *RESUME, *draw.choice([[], ['--wandb_log']])]
    script, argv = draw.choice(
        [
            ('sample.py', sample_flags),
            ('train.py', resume_flags),
            ('train.py', [*TRAIN, '--out_dir=new', '--init_from=run']),
            ('train.py', [*TRAIN, '--out_dir=run', '--overwrite']),
        ]
    )
    return Case('damaged run', script, argv, damage)


def case_of_report(draw) -> Case:
    files = [
        f'{run}/{file}' for run in ('run', 'other') for file in ('config.json', 'metrics.jsonl')
    ]
    damage = random_damage(draw, [*files, 'run/report.html'])
    flags = draw.choice([[], [], ['--out_dir=run,other'], ['--png']])
    return Case('damaged run, its report', 'report.py', [*BASE['report.py'], *flags], damage)


def case_of_published(draw) -> Case:
    damage = random_damage(draw, ['published/config.json', 'published/model.safetensors'])
    return Case('damaged published weights', 'train.py', PUBLISHED, damage)


def case_of_text(draw) -> Case:
    what = draw.choice(['texts', 'texts', 'texts', 'journal', 'prompt', 'shakespeare'])
    if what == 'prompt':
        argv = [*BASE['sample.py'], '--start=FILE:texts/prompt.txt']
        return Case('damaged prompt', 'sample.py', argv, random_damage(draw, ['texts/prompt.txt']))
    if what == 'shakespeare':
        script = PREPARE[draw.choice(['shakespeare_char', 'shakespeare'])]
        argv = ['--input=texts/a.txt', '--out_dir=new']
        return Case('damaged text', script, argv, random_damage(draw, ['texts/a.txt']))
    if what == 'journal':
        files = ('.journal.json', '.train.bin.unfinished', '.val.bin.unfinished')
        damage = random_damage(draw, [f'stopped/{file}' for file in files])
        argv = ['--input=texts', '--out_dir=stopped']
        return Case('damaged journal', PREPARE['text'], argv, damage)
    file = draw.choice(['a.txt', 'b.md', 'rows.jsonl', 'rows.parquet', 'rows.parquet'])
    argv = [
        f'--input=texts/{file}',
        f'--tokenizer={draw.choice(["char", "byte", "gpt2"])}',
        f'--out_dir={draw.choice(["new", "data/tiny"])}',
    ]
    return Case('damaged text', PREPARE['text'], argv, random_damage(draw, [f'texts/{file}']))


def random_damage(draw, paths: list[str]) -> Callable[[], None]:
    def damage():
        files = sorted(set(paths))
        for path in map(Path, draw.sample(files, draw.randint(1, min(2, len(files))))):
            if path.is_dir() or not path.exists():
                shutil.rmtree(path, ignore_errors=True)
                continue
            if path.suffix == '.json' and draw.random() < 0.5:
                path.write_text(json.dumps(change_json(draw, json.loads(path.read_text()))))
            elif path.suffix == '.jsonl' and draw.random() < 0.5:
                lines = path.read_text().splitlines()
                place = draw.randrange(len(lines))
                lines[place] = json.dumps(change_json(draw, json.loads(lines[place])))
                path.write_text('\n'.join(lines) + '\n')
            else:
                change_bytes(draw, path)

    return damage


def change_json(draw, data):
    """Returns the data with one value changed or left out."""
    if not isinstance(data, dict | list) or not data or draw.random() < 0.1:
        return draw.choice(JSON)
    key = draw.choice(list(data)) if isinstance(data, dict) else draw.randrange(len(data))
    if draw.random() < 0.2:
        del data[key]
    else:
        data[key] = change_json(draw, data[key])
    return data


def change_bytes(draw, path: Path):
    content = path.read_bytes()
    start, stop = sorted(draw.choices(range(len(content) + 1), k=2))
    how = draw.choice(
        'cut flip flip insert take_out repeat empty noise nest remove folder link null'.split()
    )
    if how in ('remove', 'folder', 'link'):
        path.unlink()
        if how == 'folder':
            path.mkdir()
        elif how == 'link':
            path.symlink_to(path.name)
        return
    flipped = bytearray(content)
    for _ in range(draw.randint(1, 4) if content else 0):
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(
        {
            'cut': content[:stop],
            'flip': flipped,
            'insert': content[:start] + draw.randbytes(draw.randint(1, 9)) + content[start:],
            'take_out': content[:start] + content[stop:],
            'repeat': content + content[start:stop],
            'empty': b'',
            'noise': draw.randbytes(draw.randint(1, 200)),
            'nest': b'[' * 100_000,
            'null': b'null',
        }[how]
    )


# -- the files to damage ---------------------------------------------------------------------------


def make_ground(folder: Path):
    """Creates datasets, a run with two checkpoints, GPT-2 weights, texts and incomplete bins."""
    text = 'The cat sees a dog, and then it sleeps.\n' * 50
    dataset.LARGE = 100
    write_char_dataset('data/tiny', text, {})
    Path('data/nano').mkdir()
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    for split in ('train', 'val'):
        Path(f'data/nano/{split}.bin').write_bytes(
            b''.join(numbers[character].to_bytes(2, 'little') for character in text)
        )
    meta = {'vocab_size': len(numbers), 'stoi': numbers, 'itos': dict(enumerate(characters))}
    Path('data/nano/meta.pkl').write_bytes(pickle.dumps(meta))
    Path('data/gpt2').mkdir()
    for split in ('train', 'val'):
        Path(f'data/gpt2/{split}.bin').write_bytes(
            random.Random(0).randbytes(2000).translate(bytes(range(128)) * 2)
        )
    train.main([*TRAIN, '--out_dir=run', '--eval_interval=1', '--keep_last=2'])
    shutil.copytree('run', 'other')
    Path('run/wandb_id').write_text('0123abcd\n')
    Path('published').mkdir()
    model = GPT(GPTConfig(vocab_size=50257, block_size=8, n_layer=1, n_head=2, n_embd=4))
    tensors = model.state_dict()
    for key in tensors:
        if key.endswith(('attn.weight', 'proj.weight', 'fc.weight')):
            tensors[key] = tensors[key].t().contiguous()
    safetensors.torch.save_file(tensors, 'published/model.safetensors')
    sizes = {'vocab_size': 50257, 'n_positions': 8, 'n_embd': 4, 'n_layer': 1, 'n_head': 2}
    Path('published/config.json').write_text(json.dumps({'model_type': 'gpt2', **sizes}))
    Path('texts').mkdir()
    for name in ('a.txt', 'b.md'):
        Path('texts', name).write_text(text + 'é€🙂')
    rows = [{'text': f'Row {number}: {text[:60]}'} for number in range(30)]
    Path('texts/rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    Path('texts/prompt.txt').write_text('The')
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({'text': [f'Row {number}: é' for number in range(30)]}), 'texts/rows.parquet'
    )
    finish = unfinished.UnfinishedBins.finish
    unfinished.UnfinishedBins.finish = lambda *_: sys.exit(0)  # as if stopped just before
    try:
        MAINS[PREPARE['text']](['--input=texts', '--out_dir=stopped'])
    except SystemExit:
        unfinished.UnfinishedBins.finish = finish


if __name__ == '__main__':
    run_script(main)
