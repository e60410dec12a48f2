"""Shared by the tests: a small dataset, and the scripts as a user runs them."""

import functools
import gc
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import processes
import pytest
import torch

import configurator
from nib import errors
from nib.doctor import rules
from nib.machine import ranks
from nib.run import provenance
from nib.schema import Block
from nib.tokens.write import write_char_dataset

pytest_plugins = ['bad_server', 'gpt2', 'microscope']  # their fixtures
gc.disable()  # until the tests are collected: seconds of looking at what nobody frees
torch.set_num_threads(1)  # the models of the tests are too small for more
os.fsync = os.fstat  # never waits for the disk; `disk` and test_writer.py check what is synced

ROOT = Path(__file__).resolve().parent.parent
# A model and a run that take a second, exact enough to compare with formulas.
SMALL_RUN = [
    '--dataset=tiny',
    '--device=cpu',
    '--dtype=float32',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=2',
    '--max_iters=20',
    '--lr_decay_iters=20',
    '--warmup_iters=4',
    '--eval_interval=10',
    '--eval_iters=3',
    '--log_interval=1',
    '--learning_rate=1e-2',
]


def pytest_configure(config):
    """Makes the tests independent of the shell that starts them, and repeats random examples."""
    # nohup, and a shell that starts a command in the background, let it ignore these.
    for name, handler in (('SIGHUP', signal.SIG_DFL), ('SIGINT', signal.default_int_handler)):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    for name in (*ranks.VARIABLES, 'LOCAL_WORLD_SIZE', 'TORCHELASTIC_RUN_ID', 'COLUMNS'):
        os.environ.pop(name, None)
    if not hasattr(config, 'workerinput'):  # the processes of pytest-xdist share it
        compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        config.add_cleanup(compiled.cleanup)
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = compiled.name  # not what other versions left
    with suppress(ImportError):  # a bare machine with a GPU, for test_gpu.py
        from hypothesis import HealthCheck, settings

        checks = HealthCheck.too_slow, HealthCheck.function_scoped_fixture
        options = {'derandomize': True, 'deadline': None, 'suppress_health_check': checks}
        settings.register_profile('repeatable', **options)
        settings.load_profile('repeatable')


def pytest_collection_modifyitems(items):
    """Runs the slow tests first. The short ones then keep all processes busy to the end."""
    items.sort(key=lambda item: not item.get_closest_marker('slow'))


def pytest_collection_finish():
    """Excludes imported objects from garbage collection: saves a sixth of a second each time."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config):
    """Deals a few tests at a time. By default, one process could get most of the slow ones."""
    if 'not slow' not in config.option.markexpr:
        config.option.maxschedchunk = config.option.maxschedchunk or 4


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Seeds each test alike, whichever tests its process has run before."""
    # torch.manual_seed would format a stack trace, in case CUDA starts later and fails.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def no_process_survives():
    """Kills what a failed test leaves behind."""
    yield
    processes.kill_running()


@pytest.fixture(autouse=True)
def exact_products():
    """Switches off TF32 after each test: training on a GPU enables it for the whole process."""
    yield
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision('highest')


@pytest.fixture
def disk(monkeypatch):
    """A list of what happens on the disk: inodes that are synced, and names that files get.

    After a power failure, a file that was not synced may be empty, and its name missing.
    """
    events = []

    def note(function, what):
        original = getattr(os, function)

        def call(*arguments):
            original(*arguments)
            events.append(what(*arguments))

        monkeypatch.setattr(os, function, call)

    note('fsync', lambda descriptor: os.fstat(descriptor).st_ino)
    for function in ('rename', 'replace'):
        note(function, lambda old, new: Path(new).name)
    return events


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A folder with one dataset, 'tiny': sentences of a few words, 10,000 characters."""
    folder = tmp_path_factory.mktemp('data')
    draw = random.Random(0)
    words = 'the a cat dog bird sees hears chases small big red and then it sleeps'.split()
    text = ''
    while len(text) < 10_000:
        text += ' '.join(draw.choices(words, k=draw.randint(3, 8))).capitalize() + '.\n'
    write_char_dataset(folder / 'tiny', text, {'text': 'made up'})
    return folder


def run_script(*command, folder=ROOT, python=None, **options):
    """Runs `python command...` in the project's folder; returns the finished process.

    python: another one than fast_python(), which has imported torch.
    """
    environment = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'WANDB_MODE': 'offline',
        **options.pop('env', {}),
    }
    return subprocess.run(
        [python or processes.fast_python(), *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=processes.PATIENCE,
        **options,
    )


def train(data_dir, out_dir, *flags, launcher=(), **options):
    """Trains the small model; fails the test if the run fails, unless check=False."""
    check = options.pop('check', True)
    if launcher:  # torchrun is the parent of its processes
        options['python'] = sys.executable
    done = run_script(
        *launcher,
        'train.py',
        *SMALL_RUN,
        f'--data_dir={data_dir}',
        f'--out_dir={out_dir}',
        *flags,
        **options,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def records(out_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines()]


@contextmanager
def process_kept():
    """Undoes what a script changes in its process: the handlers of signals, and the threads."""
    caught = (
        signal.SIGINT,
        signal.SIGTERM,
        getattr(signal, 'SIGUSR1', signal.SIGINT),
    )  # Windows has no SIGUSR1
    handlers = {number: signal.getsignal(number) for number in caught}
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)


@contextmanager
def full_disk(n_bytes: int):
    """Within this context, no file can grow beyond n_bytes."""
    resource = pytest.importorskip('resource')  # Windows has none
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def train_once(data_dir, out_dir, *flags):
    """Trains the small model in this process, for a fixture that several tests share."""
    import train as training

    argv = [*SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={out_dir}', *flags]
    with process_kept():
        assert not errors.call(training.main, argv)


@dataclass
class Ended:
    """How a script called in this process ended: what a shell would see."""

    returncode: int
    stdout: str
    stderr: str


find_commit = functools.cache(provenance.find_commit)  # the tests make no commits here
read_block = configurator.read_block
read_script = functools.cache(read_block)


def read_block_once(path):
    """Parses the repository's own scripts, which no test changes, only once."""
    if ROOT not in Path(path).parents:
        return read_block(path)
    return read_script(path).extended(Block({}, {}, {}, {}, ''))  # a copy


@pytest.fixture
def run_main(monkeypatch, capfd):
    """run_main(script, *argv) calls the main of a script or module in this process.

    This saves the seconds that importing torch takes. Returns how it ended. Changes that a script
    makes to its process are undone.
    """
    monkeypatch.setenv('WANDB_MODE', 'offline')
    # throughput_collapse is true, but no fault of the run, if other programs take the cores.
    others = [rule for rule in rules.STEP_RULES if rule is not rules.throughput_collapse]
    monkeypatch.setattr(rules, 'STEP_RULES', others)
    monkeypatch.setattr(provenance, 'find_commit', find_commit)
    monkeypatch.setattr(configurator, 'read_block', read_block_once)
    monkeypatch.setattr(sys, 'path', list(sys.path))  # to which prepare scripts add
    modules = {}

    def run(script, *argv) -> Ended:
        if not isinstance(script, ModuleType) and script not in modules:
            path = ROOT / script
            spec = importlib.util.spec_from_file_location(f'{path.parent.name}_{path.stem}', path)
            modules[script] = sys.modules[spec.name] = importlib.util.module_from_spec(
                spec
            )  # a fresh one: main sets its globals
            spec.loader.exec_module(modules[script])
        capfd.readouterr()
        try:
            with process_kept():
                status = errors.call(modules.get(script, script).main, list(map(str, argv)))
        except SystemExit as end:  # --help
            status = end.code
        said = capfd.readouterr()
        return Ended(status or 0, said.out, said.err)

    yield run
    for module in modules.values():
        del sys.modules[module.__name__]


@pytest.fixture
def train_here(data_dir, run_main):
    """train_here(out_dir, *flags, status=None) trains the small model in this process.

    Fails the test if the run does not end with this status.
    """
    import train as training

    def train_here(out_dir, *flags, status=None):
        done = run_main(
            training, *SMALL_RUN, f'--data_dir={data_dir}', f'--out_dir={out_dir}', *flags
        )
        assert status in (None, done.returncode), done.stdout + done.stderr
        return done

    return train_here
