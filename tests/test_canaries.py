"""Nothing that is loaded can run code: the tests put code into every file and every flag.

The canaries are pickles and Python code that would create a folder named 'canary'. A run may reject
such a file or treat it as text, but the folder must not appear.
"""

import ast
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SMALL_RUN, train_once

from nib.checkpoint import store
from nib.tokens import unfinished

CODE = "__import__('os').mkdir('canary')"


class Reduce:
    def __reduce__(self):
        return os.mkdir, ('canary',)


class Evaluate:
    def __reduce__(self):
        return eval, (CODE,)


class State:
    """Code in __setstate__'s place: BUILD calls what the object has under that name."""

    def __reduce__(self):
        return Reduce, (), {'__setstate__': Reduce()}


META = {'vocab_size': 2, 'itos': {0: 'a', 1: 'b'}, 'stoi': {'a': 0, 'b': 1}}
# Opcodes by hand: pickle.dumps writes none of these for such objects.
HAND_MADE = {
    'GLOBAL and REDUCE': b"cposix\nmkdir\n(S'canary'\ntR.",
    'INST': b"(S'canary'\niposix\nmkdir\n.",
    'OBJ': b"(cposix\nmkdir\nS'canary'\no.",
    'STACK_GLOBAL': b'\x80\x04\x8c\x05posix\x8c\x05mkdir\x93\x8c\x06canary\x85R.',
    'a dotted name': b'\x80\x04\x8c\x08builtins\x8c\x09eval.eval\x93\x8c\x06canary\x85R.',
    'NEWOBJ': b"\x80\x02cposix\nmkdir\n(S'canary'\nt\x81.",
    'NEWOBJ_EX': b"\x80\x04cposix\nmkdir\n(S'canary'\nt}\x92.",
    'BUILD': b"}(S'__setstate__'\ncposix\nmkdir\nuS'canary'\nb.",
    'BUILD of a dict': b"}(S'a'\nS'b'\nuS'canary'\nb.",
    'an extension code': b'\x80\x02\x82\x01.',
    'a persistent id': b'Pcanary\n.',
    'after a good one': pickle.dumps(META)[:-1] + b"0cposix\nmkdir\n(S'canary'\ntR.",
}
PICKLES = HAND_MADE | {
    'reduce': pickle.dumps(Reduce()),
    'reduce in text': pickle.dumps(Reduce(), protocol=0),
    'evaluate': pickle.dumps(Evaluate()),
    'state': pickle.dumps(State()),
    'nested': pickle.dumps(META | {'itos': {0: 'a', 1: [{'deep': (Reduce(),)}]}}),
    'as a key': pickle.dumps({(Evaluate(),): 1} | META),
    'twice': pickle.dumps(META) + pickle.dumps(Reduce()),
}


def test_the_canaries_run_without_protection(tmp_path, monkeypatch):
    """Without protection, they run. Otherwise the other tests would show nothing."""
    for name in (
        'reduce',
        'evaluate',
        'nested',
        'GLOBAL and REDUCE',
        'INST',
        'STACK_GLOBAL',
        'after a good one',
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        pickle.loads(PICKLES[name])
        assert Path('canary').is_dir(), name


@pytest.fixture(scope='module')
def made(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp('made')
    shutil.copytree(data_dir, folder / 'data')
    train_once(data_dir, folder / 'run', '--max_iters=10')
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of a dataset and a run, which is the working folder too."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / 'place'))
    return tmp_path / 'place'


def assert_nothing_ran(place, ended):
    assert ended.returncode in (0, 2), ended.stderr
    assert 'Traceback' not in ended.stderr
    assert not list(place.rglob('canary')), ended


def run_train(run_main, place, *flags):
    return run_main(
        'train.py',
        *SMALL_RUN,
        f'--data_dir={place / "data"}',
        f'--out_dir={place / "run"}',
        '--max_iters=11',
        '--eval_iters=1',
        *flags,
    )


@pytest.mark.parametrize('content', PICKLES.values(), ids=PICKLES)
def test_a_meta_pkl_runs_nothing(run_main, place, content):
    (place / 'data/tiny/meta.json').unlink()
    (place / 'data/tiny/meta.pkl').write_bytes(content)
    assert_nothing_ran(place, run_train(run_main, place, '--init_from=resume'))


def poison(data):
    """JSON in which every text is code and every number is unchanged."""
    if isinstance(data, dict):
        return {key: poison(value) for key, value in data.items()}
    if isinstance(data, list):
        return [poison(value) for value in data]
    return CODE if isinstance(data, str) else data


def poison_bytes(content: bytes) -> bytes:
    try:
        return json.dumps(poison(json.loads(content))).encode()
    except ValueError:  # no JSON: all of it
        return CODE.encode()


PAYLOADS = {
    'a pickle': lambda content: PICKLES['reduce'],
    'a pickle in text': lambda content: PICKLES['reduce in text'],
    'Python': lambda content: CODE.encode(),
    'texts that are code': poison_bytes,
}


FILES = [
    'data/tiny/train.bin',
    'data/tiny/val.bin',
    'data/tiny/meta.json',
    'run/latest',
    'run/best',
    'run/config.json',
    'run/metrics.jsonl',
    'run/wandb_id',
    'run/step-00000010/state.json',
    'run/step-00000010/model.safetensors',
    'run/step-00000010/optimizer.safetensors',
]


@pytest.mark.parametrize('payload', PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize('file', FILES)
def test_a_file_of_a_dataset_or_a_run_runs_nothing(run_main, place, monkeypatch, file, payload):
    path = place / file
    path.write_bytes(payload(path.read_bytes() if path.exists() else b''))
    wandb = ['--wandb_log'] if file.endswith('wandb_id') else []
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    assert_nothing_ran(place, run_train(run_main, place, '--init_from=resume', *wandb))
    assert_nothing_ran(
        place,
        run_main('sample.py', f'--out_dir={place / "run"}', '--max_new_tokens=2', '--device=cpu'),
    )


def test_a_state_whose_digest_is_right_runs_nothing(run_main, place):
    """Every text in it, those of its tokenizer and of the config that was typed included."""
    state = store._read_state(place / 'run/step-00000010')

    def try_with(changed):
        (place / 'run/step-00000010/state.json').write_bytes(store._encode(changed))
        assert_nothing_ran(
            place,
            run_main(
                'sample.py', f'--out_dir={place / "run"}', '--max_new_tokens=2', '--device=cpu'
            ),
        )
        shutil.copytree(place / 'run', place / 'kept')
        assert_nothing_ran(place, run_train(run_main, place, '--init_from=resume'))
        shutil.rmtree(place / 'run')
        (place / 'kept').rename(place / 'run')

    for key in ('dataset', 'dataset_fingerprint', 'versions', 'config'):
        try_with(state | {key: poison(state[key])})
    try_with(state | {'tokenizer': poison(state['tokenizer'])})
    try_with(state | {'tokenizer': {'kind': 'char', 'characters': CODE}})


@pytest.mark.slow
def test_published_weights_run_nothing(run_main, place):
    """A pytorch_model.bin, which is a pickle, is not read, with or without model.safetensors."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = place / 'published'
    GPT2LMHeadModel(
        GPT2Config(vocab_size=50257, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    (place / 'data/gpt2').mkdir()
    for split in ('train', 'val'):
        np.linspace(0, 50256, 2000).astype('<u2').tofile(place / f'data/gpt2/{split}.bin')
    for name in (
        'pytorch_model.bin',
        'model.bin',
        'training_args.bin',
        'generation_config.json',
        'modeling_gpt2.py',
    ):
        (folder / name).write_bytes(PICKLES['reduce'] if name.endswith('bin') else CODE.encode())
    config, weights = (
        (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')
    )

    def start():
        ended = run_main(
            'train.py',
            f'--init_from={folder}',
            '--dataset=gpt2',
            f'--data_dir={place / "data"}',
            '--device=cpu',
            '--eval_only',
            '--batch_size=4',
            f'--out_dir={place / "new"}',
        )
        assert_nothing_ran(place, ended)
        return ended

    assert start().returncode == 0
    remote = {'auto_map': {'AutoConfig': f'modeling_gpt2.{CODE}'}, 'trust_remote_code': True}
    (folder / 'config.json').write_text(json.dumps(json.loads(config) | remote))
    assert start().returncode == 2  # its code may be another model
    for content in (poison_bytes(config), PICKLES['reduce'], CODE.encode()):
        (folder / 'config.json').write_bytes(content)
        assert start().returncode == 2
    (folder / 'config.json').write_bytes(config)
    tensor = {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}
    header = json.dumps({CODE: tensor, '__metadata__': {'format': CODE}}).encode()
    for content in (PICKLES['reduce'], struct.pack('<Q', len(header)) + header + bytes(4)):
        (folder / 'model.safetensors').write_bytes(content)
        assert start().returncode == 2
    (folder / 'model.safetensors').unlink()
    assert start().returncode == 2
    (folder / 'model.safetensors').write_bytes(weights)


def write_parquet(path, **metadata):
    """A table of texts that are code, whose column says that a pickled type must be made of it."""
    field = pyarrow.field('text', pyarrow.string(), metadata=metadata)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array([CODE] * 20)], schema=pyarrow.schema([field])),
        path,
    )


def test_texts_run_nothing(run_main, place):
    texts = place / 'texts'
    texts.mkdir()
    contents = {
        'a.txt': CODE.encode() * 20,
        'b.md': PICKLES['reduce in text'],
        'c.jsonl': json.dumps({'text': CODE}).encode(),
        'd.jsonl': CODE.encode(),
        'e.jsonl': PICKLES['reduce'],
        'f.parquet': PICKLES['reduce'],
        'g.txt': PICKLES['reduce'],
    }
    for name, content in contents.items():
        (texts / name).write_bytes(content)
    write_parquet(
        texts / 'h.parquet',
        **{
            'ARROW:extension:name': 'arrow.py_extension_type',
            'ARROW:extension:metadata': PICKLES['reduce'],
        },
    )
    for file in sorted(texts.iterdir()):
        for tokenizer in ('char', 'byte'):
            flags = [f'--input={file}', f'--tokenizer={tokenizer}', f'--out_dir={place / "new"}']
            assert_nothing_ran(place, run_main('data/text/prepare.py', *flags))
        assert_nothing_ran(
            place,
            run_main(
                'data/shakespeare_char/prepare.py', f'--input={file}', f'--out_dir={place / "new"}'
            ),
        )
        assert_nothing_ran(
            place,
            run_main(
                'sample.py', f'--out_dir={place / "run"}', '--device=cpu', f'--start=FILE:{file}'
            ),
        )


@pytest.mark.parametrize('payload', PAYLOADS.values(), ids=PAYLOADS)
def test_the_journal_of_a_dataset_in_the_making_runs_nothing(run_main, place, monkeypatch, payload):
    (place / 'a.txt').write_text(CODE * 20)
    flags = [f'--input={place / "a.txt"}', f'--out_dir={place / "new"}']
    with monkeypatch.context() as patch:  # stopped before the end
        patch.setattr(
            unfinished.UnfinishedBins,
            'finish',
            lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert run_main('data/text/prepare.py', *flags).returncode == 130
    journal = place / 'new/.journal.json'
    journal.write_bytes(payload(journal.read_bytes()))
    assert_nothing_ran(place, run_main('data/text/prepare.py', *flags))
    assert (place / 'new/train.bin').stat().st_size == 2 * int(0.9 * 20 * len(CODE))


@pytest.mark.slow
@pytest.mark.parametrize(
    'value',
    [
        CODE,
        "__import__('os').system('mkdir canary')",
        '$(mkdir canary)',
        '`mkdir canary`',
        '; mkdir canary',
        '| mkdir canary',
        "f'{" + CODE + "}'",
        '{0.__class__}',
        '!mkdir canary',
    ],
)
def test_a_flag_runs_nothing(run_main, place, value):
    """A key of type text accepts it, and the run goes to its end; other keys reject it."""
    for key in (
        'out_dir',
        'init_from',
        'seed',
        'learning_rate',
        'compile',
        'dataset',
        'data_dir',
        'device',
        'dtype',
        'position',
        'wandb_run_name',
    ):
        assert_nothing_ran(
            place,
            run_train(run_main, place, '--init_from=resume', '--max_iters=10', f'--{key}={value}'),
        )
    for key in ('out_dir', 'which', 'start', 'stop', 'top_k', 'temperature'):
        assert_nothing_ran(
            place,
            run_main(
                'sample.py',
                f'--out_dir={place / "run"}',
                '--max_new_tokens=2',
                '--device=cpu',
                f'--{key}={value}',
            ),
        )
    for key in ('input', 'field', 'tokenizer', 'name'):
        assert_nothing_ran(
            place,
            run_main('data/text/prepare.py', f'--out_dir={place / "new"}', f'--{key}={value}'),
        )
    for key in ('vs_nanogpt', 'steps', 'mlp'):
        assert_nothing_ran(
            place,
            run_main(
                'bench.py',
                *SMALL_RUN,
                f'--data_dir={place / "data"}',
                '--rounds=0',
                f'--{key}={value}',
            ),
        )


def test_only_a_dataset_of_the_project_is_prepared(run_main, place):
    """Whatever path its name contains: a prepare.py in another folder does not run."""
    (place / 'other').mkdir()
    (place / 'other/prepare.py').write_text(f'def main(argv):\n    {CODE}\n')
    for name in (place / 'other', os.path.relpath(place / 'other', ROOT / 'data')):
        ended = run_train(
            run_main,
            place,
            '--overwrite',
            '--prepare_dataset',
            f'--dataset={name}',
            f'--fallback_dataset={name}',
        )
        assert ended.returncode == 2
        assert_nothing_ran(place, ended)


def called(tree) -> set[str]:
    """The dotted names of all that a file's code calls."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_the_code_has_no_other_way_to_run_what_it_loads():
    """exec, for the user's config files, and the restricted unpickler are in one place each; no
    archive is unpacked, so no path in one can lead elsewhere; no shell is started."""
    ways = {
        'eval',
        'exec',
        'compile',
        'pickle.load',
        'pickle.loads',
        'torch.load',
        'np.load',
        'numpy.load',
        'os.system',
        'os.popen',
        '__import__',
        'runpy.run_path',
        'importlib.import_module',
        'pickle.Unpickler',
        'marshal.loads',
        'yaml.load',
    }
    found, imported, texts = {}, set(), ''
    for path in [*ROOT.glob('*.py'), *ROOT.glob('nib/**/*.py'), *ROOT.glob('data/*/prepare.py')]:
        tree = ast.parse(path.read_text())
        for name in called(tree) & ways:
            found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
        imported |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        texts += path.read_text()
    assert found == {
        'exec': {'configurator.py'},
        'compile': {'configurator.py'},
        'runpy.run_path': {'nib/tokens/find.py'},
        'torch.load': {'nib/hub/nanogpt.py'},  # tensors and plain values only
    }
    assert texts.count('torch.load(') == texts.count('weights_only=True') == 1
    assert not imported & {
        'tarfile',
        'zipfile',
        'shelve',
        'dill',
        'joblib',
        'marshal',
        'cloudpickle',
    }
    assert (
        'shell=True' not in texts
        and 'trust_remote_code' not in texts
        and 'allow_pickle' not in texts
    )
