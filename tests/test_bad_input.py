"""Bad input: one line that says what is wrong, where, and how to fix it; exit code 2.

No file is overwritten. Most scripts are called in this process by run_main, a few by a shell. Each
row of a table is one mistake: the damage to a folder with a dataset and a finished run, the command
line, and words that the line must contain.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_server import CONTENT, LIMITS, PATIENT, SHA256
from conftest import ROOT, SMALL_RUN, run_script, train_once
from processes import PATIENCE, start_on_ranks

from nib.text import download
from nib.tokens import shakespeare
from nib.tokens.write import write_char_dataset

ANEW = 'prepare.py --input=PATH --out_dir='  # how the dataset is made again


@pytest.fixture(scope='module')
def made(data_dir, tmp_path_factory):
    """data/tiny, a run on it, and a Hugging Face GPT-2 with 32 positions and its own dataset."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp('made')
    shutil.copytree(data_dir, folder / 'data')
    train_once(data_dir, folder / 'run', '--max_iters=10')
    GPT2LMHeadModel(
        GPT2Config(vocab_size=50257, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    ).save_pretrained(folder / 'gpt2')
    (folder / 'data/gpt2').mkdir()
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(50257, size=2000).astype('<u2').tofile(
            folder / f'data/gpt2/{split}.bin'
        )
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / 'place')


def contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b''
        for path in sorted(folder.rglob('*'))
        # Python writes the former; the latter says who wrote last.
        if '__pycache__' not in path.parts and path.name != '.lock'
    }


def assert_refused(ended, words):
    assert ended.returncode == 2, ended.stdout + ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: ') and 'Traceback' not in ended.stdout, (
        ended.stderr
    )
    assert all(word in lines[0] for word in words), lines[0]
    assert not re.search(r'^step \d', ended.stdout, re.MULTILINE)  # not even an evaluation


def try_to_train(run_main, place, *flags):
    """Starts a run that would overwrite the existing one if it could begin."""
    return run_main(
        'train.py',
        *SMALL_RUN,
        f'--data_dir={place / "data"}',
        f'--out_dir={place / "run"}',
        '--overwrite',
        *flags,
    )


# -- the data --------------------------------------------------------------------------------------


def bin_of(place, split='train') -> Path:
    return place / f'data/tiny/{split}.bin'


def append(split, content):
    def damage(place):
        with open(bin_of(place, split), 'ab') as file:
            file.write(content)

    return damage


def write_ids(place, split, ids, dtype='<u2'):
    """Other ids, with a meta.json that agrees to them."""
    content = np.asarray(ids, dtype=dtype).tobytes()
    bin_of(place, split).write_bytes(content)
    change_split(
        place, split, tokens=len(ids), bytes=len(ids), sha256=hashlib.sha256(content).hexdigest()
    )


def replace_id(split, offset, id):
    def damage(place):
        ids = np.fromfile(bin_of(place, split), dtype='<u2')
        ids[offset] = id
        write_ids(place, split, ids)

    return damage


def change_meta(place, **changes):
    path = place / 'data/tiny/meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_split(place, split, **changes):
    splits = json.loads((place / 'data/tiny/meta.json').read_text())['splits']
    change_meta(place, splits=splits | {split: splits[split] | changes})


def widen(place, split='train', dtype='<u4'):
    np.fromfile(bin_of(place, split), dtype='<u2').astype(dtype).tofile(bin_of(place, split))


def widen_both(place):
    """A vocabulary of more than 65,536 as a tool for nanoGPT may write it: no meta.json says so."""
    (place / 'data/tiny/meta.json').unlink()
    for split in ('train', 'val'):
        widen(place, split)


def without_meta(place):
    (place / 'data/tiny/meta.json').unlink()


def meta_text(text):
    return lambda place: (place / 'data/tiny/meta.json').write_text(text)


def other_tokenizer(place):
    """As many characters, but others: one takes three bytes."""
    tokenizer = json.loads((place / 'data/tiny/meta.json').read_text())['tokenizer']
    change_meta(place, tokenizer=tokenizer | {'characters': tokenizer['characters'][:-1] + '€'})


DATA = {
    'odd byte count': (
        append('train', b'\1'),
        ['train.bin has', 'expected a positive multiple of 2', ANEW],
    ),
    'empty bin': (
        lambda place: bin_of(place, 'val').write_bytes(b''),
        ['val.bin has 0 bytes', ANEW],
    ),
    'train shorter than a block': (
        lambda place: write_ids(place, 'train', [1] * 16),
        ['train.bin has 16 tokens', 'block_size + 1 = 17', '--block_size='],
    ),
    'val shorter than a block': (
        lambda place: write_ids(place, 'val', [1] * 16),
        ['val.bin has 16 tokens', 'block_size + 1 = 17', '--block_size='],
    ),
    'id too large in train': (
        replace_id('train', 1234, 500),
        ['train.bin: token id 500 at offset 1234', ANEW],
    ),
    'id too large in val': (
        replace_id('val', 321, 65535),
        ['val.bin: token id 65535 at offset 321', ANEW],
    ),
    'uint32 under a meta of uint16': (
        widen,
        ['train.bin contains uint32 ids', 'meta.json says uint16', ANEW],
    ),
    'uint16 under a meta of uint32': (
        lambda place: change_meta(place, dtype='uint32'),
        ['train.bin contains uint16 ids', 'meta.json says uint32', ANEW],
    ),
    'uint32 without a meta': (
        widen_both,
        ['train.bin seems to contain uint32 ids', 'without a meta.json', '--vocab_size=N'],
    ),
    'missing meta': (
        without_meta,
        ['data/tiny has neither meta.json nor meta.pkl', '--vocab_size=N'],
    ),
    'empty meta': (meta_text(''), ['meta.json is not JSON', ANEW]),
    'half a meta': (meta_text('{"format": 1, "dty'), ['meta.json is not JSON', ANEW]),
    'meta without end': (meta_text('[' * 100_000), ['meta.json is not JSON', ANEW]),
    'meta that is not UTF-8': (
        lambda place: (place / 'data/tiny/meta.json').write_bytes(b'"\xff"'),
        ['meta.json is not JSON', ANEW],
    ),
    'meta of no object': (meta_text('[1]'), ['meta.json does not describe', ANEW]),
    'meta without splits': (
        lambda place: change_meta(place, splits={}),
        ['meta.json does not describe', ANEW],
    ),
    'meta without a count': (
        lambda place: change_split(place, 'val', tokens=None),
        ['meta.json does not describe', ANEW],
    ),
    'meta of something else': (
        meta_text('{"name": "tiny"}'),
        ['meta.json does not describe a dataset', ANEW],
    ),
    'meta of a later format': (
        lambda place: change_meta(place, format=2),
        ['meta.json', 'format 1', ANEW],
    ),
    'mistyped meta': (
        lambda place: change_meta(place, vocab_size='many'),
        ['meta.json does not describe', ANEW],
    ),
    'lying dtype': (
        lambda place: change_meta(place, dtype='int64'),
        ['meta.json does not describe', ANEW],
    ),
    'lying token count': (
        lambda place: change_split(place, 'val', tokens=7),
        ['val.bin has', 'meta.json says 7', ANEW],
    ),
    'lying byte count': (
        lambda place: change_split(place, 'val', bytes=7),
        ['val.bin has', 'bytes of text', 'says 7', ANEW],
    ),
    'lying vocab_size': (
        lambda place: change_meta(place, vocab_size=99),
        ['meta.json: vocab_size is 99', ANEW],
    ),
    'lying digest': (
        lambda place: change_split(place, 'train', sha256='0' * 64),
        ['train.bin', 'SHA-256 differs', ANEW],
    ),
    'lying tokenizer': (other_tokenizer, ['train.bin has', 'bytes of text', ANEW]),
    'tokenizer of another size': (
        lambda place: change_meta(place, tokenizer={'kind': 'byte'}),
        ['its tokenizer has 257', ANEW],
    ),
    'unknown tokenizer': (
        lambda place: change_meta(place, tokenizer={'kind': 'runes'}),
        ["'runes'", ANEW],
    ),
    'broken tokenizer': (
        lambda place: change_meta(place, tokenizer={'kind': 'char', 'characters': 'ba'}),
        ['invalid tokenizer', ANEW],
    ),
    'no train.bin': (
        lambda place: bin_of(place).unlink(),
        ['tiny/train.bin is missing', '--input=PATH --out_dir='],
    ),
    'no val.bin': (
        lambda place: bin_of(place, 'val').unlink(),
        ['tiny/val.bin is missing', '--input=PATH --out_dir='],
    ),
    'no folder': (
        lambda place: shutil.rmtree(place / 'data/tiny'),
        ['tiny/train.bin is missing', '--input=PATH --out_dir='],
    ),
    'cut bin': (
        lambda place: bin_of(place).write_bytes(bytes(100)),
        ['train.bin has 50 tokens', 'meta.json says 9,', ANEW],
    ),
    'changed bin': (
        lambda place: bin_of(place, 'val').write_bytes(bytes(bin_of(place, 'val').stat().st_size)),
        ['val.bin is not the file', 'SHA-256 differs', ANEW],
    ),
}


@pytest.mark.parametrize('damage, words', DATA.values(), ids=DATA)
def test_bad_data_is_told_before_the_first_step(run_main, place, damage, words):
    damage(place)
    before = contents(place)
    assert_refused(try_to_train(run_main, place), words)
    assert contents(place) == before


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('canary',)


def pickled(**changes) -> bytes:
    return pickle.dumps(
        {'vocab_size': 2, 'itos': {0: 'a', 1: 'b'}, 'stoi': {'a': 0, 'b': 1}} | changes
    )


PICKLES = {
    'runs code': (pickle.dumps(RunsCode()), ['.mkdir', 'refused']),
    'runs code inside': (pickled(stoi=RunsCode()), ['.mkdir', 'refused']),
    'asks for a type': (pickled(x=np.dtype('u2')), ['numpy', 'refused']),
    'is empty': (b'', ['cannot be read']),
    'is cut': (pickled()[:-5], ['cannot be read']),
    'begins late': (pickled()[5:], ['cannot be read']),
    'is no pickle': (b'garbage', ['cannot be read']),
    'is a list': (pickle.dumps([]), ['found list']),
    'has nothing': (pickle.dumps({}), ['vocab_size is None']),
    'has another number of them': (pickled(vocab_size=1), ['ids 0 to 1, but vocab_size is 1']),
    'has a number without end of them': (pickled(vocab_size=10**15), ['vocab_size is 1000']),
    'has lists of them': (pickled(itos={0: ['a'], 1: 'b'}), ['cannot be read']),
    'disagrees': (pickled(itos={0: 'a', 1: 'c'}), ['itos and stoi disagree about id 1']),
    'has names for ids': (pickled(itos={'a': 0}), ['itos is not a dict of tokens by id']),
}


@pytest.mark.parametrize('content, words', PICKLES.values(), ids=PICKLES)
def test_a_meta_pkl_that_will_not_do_is_told(run_main, place, monkeypatch, content, words):
    monkeypatch.chdir(place)
    without_meta(place)
    (place / 'data/tiny/meta.pkl').write_bytes(content)
    before = contents(place)
    assert_refused(try_to_train(run_main, place), ['data/tiny/meta.pkl', '--vocab_size=N', *words])
    assert contents(place) == before


@pytest.mark.parametrize(
    'name, way',
    [
        (
            'tiny',
            '(--data_dir=PATH, if they are elsewhere), prepare them again from the same text,',
        ),
        ('other', 'resume with the same bins (--dataset=tiny)'),
    ],
)
def test_bins_that_changed_since_the_checkpoint_are_told(run_main, place, name, way):
    write_char_dataset(place / 'data' / name, 'The cat sees a dog, and then it sleeps.\n' * 60, {})
    before = contents(place)
    ended = try_to_train(run_main, place, '--init_from=resume', f'--dataset={name}')
    assert_refused(
        ended,
        [
            'run/step-00000010 was trained on tiny with the fingerprint',
            f'data/{name} has',
            way,
            'another --out_dir',
            '--overwrite',
        ],
    )
    assert contents(place) == before


# -- the config ------------------------------------------------------------------------------------

FLAGS = {
    'unknown key': (
        ['--learing_rate=1'],
        ['--learing_rate: no such key', 'did you mean --learning_rate?'],
    ),
    'wrong type': (['--max_iters=many'], ["--max_iters: found 'many'", 'expected an integer']),
    'not a choice': (['--lr_schedule=step'], ["--lr_schedule: found 'step'", "'cosine', 'linear'"]),
    'no value': (['--seed'], ['--seed: found no value', '--seed=value']),
    'heads do not divide the width': (
        ['--n_embd=33'],
        ['n_embd 33 is not divisible by n_head 2', 'try n_embd 32'],
    ),
    'shared heads do not divide heads': (
        ['--n_kv_head=3'],
        ['n_head 2 is not divisible by n_kv_head 3', 'try n_kv_head 1'],
    ),
    'odd heads cannot turn': (
        ['--n_embd=34', '--position=rotary'],
        ['n_embd / n_head is 17', 'must be even', 'try head_dim 18'],
    ),
    'more layers than can be': (
        ['--n_layer=1000000000'],
        ['n_layer is 1000000000', 'less than 10,000'],
    ),
    'negative learning rate': (
        ['--learning_rate=-1e-3'],
        ['learning_rate is -0.001', 'at least 0'],
    ),
    'a learning rate that is no number': (
        ['--learning_rate=nan'],
        ['learning_rate is nan', 'at least 0'],
    ),
    'an infinite learning rate': (['--learning_rate=1e400'], ['learning_rate is inf', 'finite']),
    'negative clipping': (['--grad_clip=-1'], ['grad_clip is -1', 'at least 0']),
    'warm-up longer than the decay': (
        ['--warmup_iters=50'],
        [
            'warmup_iters 50 is greater than lr_decay_iters 20',
            '--warmup_iters=1, or raise lr_decay',
        ],
    ),
    'no cool-down': (['--lr_schedule=wsd'], ['cooldown_iters is 0', '--cooldown_iters=4']),
    'empty batch': (['--batch_size=0'], ['batch_size is 0', 'at least 1']),
    'a batch without end': (
        ['--batch_size=1' + '0' * 3000],
        ['batch_size is 1', ' ... ', 'less than 2,147,483,648'],
    ),
    'no such dataset': (
        ['--dataset=none'],
        ['none/train.bin is missing', '--input=PATH --out_dir=', 'stdlib_char, tiny'],
    ),
    'no such device': (['--device=cuda:99'], ['--device=cuda:99', 'try --device=auto']),
    'what is no device': (['--device=abacus'], ['--device=abacus', "'cpu', 'cuda'"]),
    'a block longer than the text': (['--block_size=100000'], ['val.bin has', '--block_size=']),
    'a model larger than the memory': (
        ['--n_embd=2000000000', '--n_head=1'],
        ['out of memory. Halve', 'a smaller model'],
    ),
    'no out_dir': (['--out_dir='], ['out_dir is empty', '--out_dir=NAME']),
    'a name too long for a folder': (
        ['--out_dir=' + 'x' * 5000, '--init_from=resume'],
        ['File name too long', 'another path'],
    ),
    'nothing to start from': (
        ['--init_from=resum'],
        ["'resum' is not a model", "did you mean 'resume'?"],
    ),
    'no wandb project': (
        ['--wandb_log', '--wandb_project='],
        ['wandb_project is empty', '--wandb_project=NAME'],
    ),
}


@pytest.mark.parametrize('flags, words', FLAGS.values(), ids=FLAGS)
def test_a_bad_flag_is_told_before_the_first_step(run_main, place, flags, words):
    before = contents(place)
    assert_refused(try_to_train(run_main, place, *flags), words)
    assert contents(place) == before


FILES = {
    'syntax error': (
        'batch_size = 4\nblock_size = = 3',
        ['config.py:2: SyntaxError', 'batch_size = 12'],
    ),
    'unknown key': (
        '\nbatchsize = 4',
        ['config.py:2: batchsize: no such key', 'did you mean batch_size?'],
    ),
    'wrong type': (
        "seed = 1\ndropout = 'none'",
        ["config.py:2: dropout: found 'none'", 'expected a number'],
    ),
    'an error of its own': ('\n\nseed = 1 // 0', ['config.py:3: ZeroDivisionError']),
    'a path with a NUL': ("out_dir = 'a\\0b'", ['NUL', 'choose another']),
    'a path with half a character': (
        "out_dir = 'a\\ud800b'",
        ['that file names cannot contain', 'choose another'],
    ),
}


@pytest.mark.parametrize('text, words', FILES.values(), ids=FILES)
def test_a_bad_config_file_is_told_with_its_line(run_main, place, text, words):
    (place / 'config.py').write_text(text)
    before = contents(place)
    flags = [flag for flag in SMALL_RUN if 'seed' not in flag]
    out_dir = [] if 'out_dir' in text else [f'--out_dir={place / "run"}']
    assert_refused(
        run_main(
            'train.py',
            place / 'config.py',
            *flags,
            f'--data_dir={place / "data"}',
            *out_dir,
            '--overwrite',
        ),
        words,
    )
    assert contents(place) == before


def test_a_config_file_that_is_not_there_is_told_with_the_nearest(run_main):
    assert_refused(
        run_main('train.py', 'config/train_shakespear_char.py'),
        ['no such config file', 'train_shakespeare_char.py?'],
    )


def test_an_out_dir_that_is_a_file_is_told(run_main, place):
    (place / 'taken').write_text('mine')
    before = contents(place)
    for flags, words in (
        ([], ['taken cannot be written', 'choose another --out_dir']),
        (['--init_from=resume'], ['taken is a file']),
    ):
        assert_refused(try_to_train(run_main, place, f'--out_dir={place / "taken"}', *flags), words)
    assert contents(place) == before


def test_a_second_run_in_the_place_of_the_first_is_told(run_main, place):
    before = contents(place)
    assert_refused(
        try_to_train(run_main, place, '--no-overwrite'),
        ['run already contains a run', '--init_from=resume', '--overwrite'],
    )
    assert contents(place) == before


def test_a_run_that_would_go_on_as_another_model_is_told(run_main, place):
    before = contents(place)
    ended = try_to_train(run_main, place, '--init_from=resume', '--n_embd=64')
    assert_refused(
        ended, ['was trained with n_embd 32', 'command line says n_embd 64', '--init_from=scratch']
    )
    ended = try_to_train(run_main, place, '--init_from=resume', '--n_embd=64', '--n_layer=9')
    assert_refused(ended, ['command line says n_layer 9, n_embd 64: leave n_layer, n_embd'])
    ended = try_to_train(run_main, place, '--init_from=resume', '--optimizer=muon')
    assert_refused(
        ended,
        [
            'was trained with optimizer adamw',
            'command line says optimizer muon',
            '--init_from=scratch',
        ],
    )
    ended = try_to_train(run_main, place, '--init_from=resume', '--dropout=2')
    assert_refused(ended, ['dropout is 2.0: it must be at least 0 and less than 1'])
    assert contents(place) == before


def test_an_impossible_model_is_told_before_its_dataset_is_prepared(run_main, place):
    out_dir = f'--out_dir={place / "new"}'
    ended = try_to_train(run_main, place, out_dir, '--dataset=none', '--n_head=5')
    assert_refused(ended, ['n_embd 32 is not divisible by n_head 5'])


def test_a_first_run_without_a_config_is_told_of_a_small_one(run_main, tmp_path):
    ended = run_main('train.py', f'--out_dir={tmp_path / "out"}', f'--data_dir={tmp_path}')
    assert_refused(ended, ['a small run to begin with', 'config/train_shakespeare_char.py'])


def test_a_run_that_is_not_there_to_go_on_with_is_told(run_main, place):
    flags = [f'--out_dir={place / "new"}', '--init_from=resume']
    assert_refused(try_to_train(run_main, place, *flags), ['new: no such folder', 'train first'])
    assert not (place / 'new').exists()


def test_a_precision_that_the_gpu_lacks_is_told(run_main, place, monkeypatch):
    """On a machine that seems to have such a GPU; nothing is computed on it."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Tesla V100')
    ended = try_to_train(run_main, place, '--device=cuda', '--dtype=bfloat16')
    assert_refused(ended, ['--dtype=bfloat16', 'V100', 'use --dtype=float16'])


# Tells that it waits, instead of an error, and for how long.
PATIENT_RANK = """
import sys, time, train
from nib import errors
sleep = time.sleep
def tell(seconds):
    print(f'waits {seconds} s', flush=True)
    sleep(3600)
time.sleep = tell
sys.exit(errors.call(train.main, sys.argv[1:]))
"""


@pytest.mark.slow
def test_accumulation_that_ranks_cannot_share_is_told_once(place, tmp_path):
    """By the first of two processes, because both fail alike."""
    before = contents(place)
    flags = [f'--data_dir={place / "data"}', f'--out_dir={place / "run"}', '--overwrite']
    flags.append('--gradient_accumulation_steps=3')
    first, second = start_on_ranks(2, tmp_path / 'said', PATIENT_RANK, *SMALL_RUN, *flags)
    assert first.end() == 2 and '--gradient_accumulation_steps=4' in first.stderr
    assert len(first.stderr.splitlines()) == 1
    second.wait_for('waits 5.0 s')
    assert second.stderr == '' and contents(place) == before


ALONE = """
import os, sys, time
from nib import errors
def main(argv):
    if os.environ['LOCAL_RANK'] == '1':
        raise errors.UserError('only here')
    time.sleep(60)
errors.PATIENCE = 0.1
errors.run_script(main)
"""


def test_an_error_of_another_rank_alone_is_told_by_it():
    done = run_script('-c', ALONE, env={'LOCAL_RANK': '1'}, python=sys.executable)
    assert (done.returncode, done.stderr) == (2, 'error: only here\n')


@pytest.mark.parametrize('script', ['sample.py', 'bench.py', 'data/shakespeare/prepare.py'])
def test_scripts_that_run_in_one_process_refuse_several(script):
    env = {'TORCHELASTIC_RUN_ID': 'x', 'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2'}
    done = run_script(script, env=env)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f'error: {script} runs in a single process, but torchrun has started' in done.stderr


REFUSED = {
    'train.py': ['--batch_size=0'],
    'sample.py': ['--out_dir=nowhere'],
    'bench.py': ['--steps=0'],
    'convert.py': ['--out_dir=nowhere'],
    'debug_training.py': ['--batch_size=0'],
    'report.py': ['--out_dir=nowhere'],
    'sweep.py': ['--seed=1'],
}


@pytest.mark.slow
def test_every_script_ends_with_exit_code_2():
    scripts = {path.name for path in ROOT.glob('*.py')} - {'model.py', 'configurator.py'}
    assert set(REFUSED) == scripts
    for script, flags in REFUSED.items():
        # One real process; the others are forked.
        done = run_script(script, *flags, python=sys.executable if script == 'train.py' else None)
        assert_refused(done, [])


# -- weights to start from -------------------------------------------------------------------------


def change_config(place, **changes):
    path = place / 'gpt2/config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


WEIGHTS = {
    'a block longer than its positions': (
        None,
        ['--block_size=33'],
        ['block_size 33', 'at most --block_size=32'],
    ),
    'another shape': (
        None,
        ['--n_layer=3'],
        ['n_layer 1, but the command line says n_layer 3', '--init_from=scratch'],
    ),
    'another tokenizer': (None, ['--dataset=tiny'], ['a different tokenizer', '--tokenizer=gpt2']),
    'no weights': (
        lambda place: (place / 'gpt2/model.safetensors').unlink(),
        [],
        ['gpt2', 'model.safetensors', 'download'],
    ),
    'cut weights': (
        lambda place: cut(place / 'gpt2/model.safetensors', 5000),
        [],
        ['gpt2', 'SafetensorError', 'download'],
    ),
    'weights of another config': (
        lambda place: change_config(place, n_embd=10),
        [],
        ['gpt2', 'has shape', 'config.json'],
    ),
    'fewer layers than its config says': (
        lambda place: change_config(place, n_layer=2),
        [],
        ['gpt2', 'h.1.ln_1.weight is missing'],
    ),
    'a size that is no number': (
        lambda place: change_config(place, n_layer='2'),
        [],
        ['gpt2', "n_layer is '2'", 'expected int'],
    ),
    'a broken config': (
        lambda place: (place / 'gpt2/config.json').write_text('{' * 9),
        [],
        ['gpt2', 'JSONDecodeError', 'download'],
    ),
}


@pytest.mark.parametrize('damage, flags, words', WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_will_not_do_are_told(run_main, place, damage, flags, words):
    if damage:
        damage(place)
    before = contents(place)
    ended = run_main(
        'train.py',
        '--dataset=gpt2',
        f'--data_dir={place / "data"}',
        f'--out_dir={place / "run"}',
        '--overwrite',
        '--device=cpu',
        f'--init_from={place / "gpt2"}',
        *flags,
    )
    assert_refused(ended, words)
    assert contents(place) == before


# -- prompts ---------------------------------------------------------------------------------------

PROMPTS = {
    'longer than the context': (
        ['--start=' + 'The cat sees ' * 3],
        ['--start: the prompt has 39 tokens', 'the context of the model has 16', 'last 16 char'],
    ),
    'a file that is not there': (
        ['--start=FILE:{place}/none.txt'],
        ['--start=FILE:', 'none.txt cannot be read', 'No such file'],
    ),
    'a file that is a folder': (
        ['--start=FILE:{place}'],
        ['place', 'is a folder, not a file', 'save the text in a file'],
    ),
    'a file that is not UTF-8': (
        ['--start=FILE:{place}/latin.txt'],
        ['latin.txt', 'not UTF-8 text (byte 3)', 'iconv'],
    ),
    'an empty file': (
        ['--start=FILE:{place}/empty.txt'],
        ['the prompt is empty', 'at least one character'],
    ),
    'empty': (['--start='], ['the prompt is empty', 'at least one character']),
    'without quotes': (
        ['--start', 'The', 'cat'],
        ['cat: no such config file', 'a text with spaces needs quotes'],
    ),
    'characters that the model lacks': (
        ['--start=The caé'],
        ["'é' (the first at offset 6)", 'remove them'],
    ),
    'a stop text that cannot come': (['--stop=é'], ["'é'", 'remove them']),
    'the end of documents in a model of one text': (
        ['--stop=<|endoftext|>'],
        ['--stop: the vocabulary of this model has no <|endoftext|>', 'leave <|endoftext|> out'],
    ),
    'a document that ends in a model of one text': (
        ['--start=a<|endoftext|>'],
        ['--start: the vocabulary of this model has no <|endoftext|>'],
    ),
    'UTF-16 without a mark': (
        ['--start=FILE:{place}/utf16.txt'],
        ['utf16.txt is not UTF-8 text (byte 1) but UTF-16LE', 'iconv -f UTF-16LE -t UTF-8'],
    ),
    'a negative temperature': (
        ['--temperature=-1'],
        ['temperature is -1', 'must be 0 (greedy) or a positive'],
    ),
    'no token to choose from': (['--top_k=0'], ['top_k is 0', 'at least 1']),
    'more than all probability': (['--top_p=1.5'], ['top_p is 1.5', 'at most 1']),
    'fewer than no tokens': (['--max_new_tokens=-1'], ['max_new_tokens is -1', 'at least 0']),
    'no samples': (['--num_samples=0'], ['num_samples is 0', 'at least 1']),
    'what is no checkpoint': (['--which=newest'], ["'newest'", "'best' or a step number"]),
    'a step that was not kept': (['--which=15'], ['no checkpoint of step 15', 'it has: 10']),
    'a step of many digits': (['--which=' + '9' * 5000], ["'best' or a step number"]),
    'no run': (['--out_dir={place}/none'], ['none: no such folder', 'train first']),
}


@pytest.mark.skipif(os.name == 'nt', reason='needs pipes')
def test_a_pipe_is_told_instead_of_waited_for(run_main, place):
    os.mkfifo(place / 'pipe.txt')
    flags = [f'--out_dir={place / "run"}', f'--start=FILE:{place / "pipe.txt"}']
    assert_refused(run_main('sample.py', '--device=cpu', *flags), ['is a pipe, not a file'])
    for script in ('data/text/prepare.py', 'data/shakespeare_char/prepare.py'):
        flags = [f'--input={place / "pipe.txt"}', f'--out_dir={place / "new"}']
        assert_refused(run_main(script, *flags), ['is a pipe, not a file', 'save the text'])


@pytest.mark.parametrize('flags, words', PROMPTS.values(), ids=PROMPTS)
def test_a_bad_prompt_is_told(run_main, place, flags, words):
    (place / 'latin.txt').write_bytes(b'caf\xe9')
    (place / 'empty.txt').write_bytes(b'')
    (place / 'utf16.txt').write_bytes('The cat'.encode('utf-16-le'))
    before = contents(place)
    flags = [flag.replace('{place}', str(place)) for flag in flags]
    assert_refused(
        run_main('sample.py', f'--out_dir={place / "run"}', '--device=cpu', *flags), words
    )
    assert contents(place) == before


# -- a benchmark -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'flags, words',
    [
        (['--batch_size=0'], ['batch_size is 0', 'at least 1']),
        (['--steps=0'], ['steps is 0', 'at least 1']),
        (['--stepps=3'], ['--stepps: no such key', 'did you mean --steps?']),
        (
            ['--mlp=swiglu', '--vs_nanogpt={place}/clone'],
            ['nanoGPT has no mlp swiglu', "GPT-2's architecture"],
        ),
        (['--new_tokens=-1'], ['new_tokens is -1', 'at least 0']),
        (['--n_embd=33'], ['n_embd 33', 'try n_embd 32']),
        (['--vs_nanogpt={place}'], ['place', 'clone of karpathy/nanoGPT']),
        (['--block_size=1000000'], ['val.bin has', '--block_size=']),
    ],
)
def test_a_bad_benchmark_is_told(run_main, place, flags, words):
    (place / 'clone').mkdir()
    (place / 'clone/model.py').write_text('')
    small = [flag for flag in SMALL_RUN if not flag.startswith('--eval')]
    flags = [flag.replace('{place}', str(place)) for flag in flags]
    assert_refused(run_main('bench.py', *small, f'--data_dir={place / "data"}', *flags), words)


# -- texts to prepare ------------------------------------------------------------------------------

TEXTS = {
    'nothing named': ('text', None, [], ['--input=PATH is missing']),
    'only a comma': ('text', None, ['--input=,'], ['--input=PATH is missing']),
    'no such file': (
        'text',
        None,
        ['--input={place}/none'],
        ['none: no such file or folder', '--input=PATH'],
    ),
    'an empty text': ('text', ('a.txt', b''), [], ['the files contain no text', '--input=PATH']),
    'two characters': (
        'text',
        ('a.txt', b'ab'),
        ['--overwrite'],
        ['2 characters', 'use a longer text'],
    ),
    'another text': ('text', ('a.txt', b'ab'), [], ['a dataset made from another text']),
    'a text that is not UTF-8': (
        'text',
        ('a.txt', b'caf\xe9 ' * 99),
        [],
        ['a.txt is not UTF-8', '(byte 3)', 'iconv'],
    ),
    'another type of file': ('text', ('a.docx', b'PK'), [], ['a.docx', '.txt']),
    'a row that is no JSON': (
        'text',
        ('a.jsonl', b'{"text": "a"}\n{'),
        [],
        ['a.jsonl:2', 'every line must be a JSON object'],
    ),
    'a row without the field': (
        'text',
        ('a.jsonl', b'{"body": "a"}'),
        [],
        ['a.jsonl:1', "fields: 'body'", '--field=NAME'],
    ),
    'a field that is no text': (
        'text',
        ('a.jsonl', b'{"text": 1}'),
        [],
        ['a.jsonl:1', 'has type int', '--field=NAME'],
    ),
    'what is no parquet': (
        'text',
        ('a.parquet', b'PAR1 no'),
        [],
        ['a.parquet is not a valid .parquet file', 'recreate it'],
    ),
    'a name for no folder': (
        'text',
        ('a.txt', b'abcdef'),
        ['--name=a/b', '--out_dir='],
        ['a/b', '--name=a_b'],
    ),
    'an unknown tokenizer': (
        'text',
        ('a.txt', b'abcdef'),
        ['--tokenizer=words'],
        ['--tokenizer=words', "'char', 'byte', 'gpt2', a tokenizer.json, the folder of a dataset"],
    ),
    'a character that no tokenizer needs to lack': (
        'text',
        ('a.txt', b'abcdef'),
        ['--replace_missing=?'],
        ['--replace_missing=?', '--tokenizer=FOLDER'],
    ),
    'a replacement that is missing too': (
        'text',
        ('a.txt', b'abcdef'),
        ['--tokenizer={place}/run', '--replace_missing=?'],
        ['--replace_missing=?', "such as --replace_missing=' '"],
    ),
    'characters that a run lacks': (
        'text',
        ('a.txt', 'the c\u00e9 and the c\u00e9!'.encode()),
        ['--tokenizer={place}/run'],
        [
            'lacks 2 of the characters',
            'occur 3 times',
            "'\u00e9' (2), '!' (1)",
            "--replace_missing=' '",
        ],
    ),
    'an end of text that a dataset does not spell': (
        'text',
        ('a.txt', b'abcdef'),
        ['--tokenizer={place}/data/tiny', '--end_of_text=characters'],
        ['--end_of_text=token', 'leave --end_of_text out'],
    ),
    'a folder without a tokenizer': (
        'text',
        ('a.txt', b'abcdef'),
        ['--tokenizer={place}/gpt2'],
        ['gpt2: expected', 'the folder of a dataset, of a run'],
    ),
    'several documents in one Shakespeare': (
        'shakespeare_char',
        ('a.txt', b'one<|endoftext|>two'),
        [],
        ['contains <|endoftext|>', 'data/text/prepare.py --input='],
    ),
    'an out_dir that is a file': (
        'text',
        ('a.txt', b'abcdef' * 9),
        ['--out_dir={place}/a.txt'],
        ['a.txt cannot be written', '--out_dir'],
    ),
    'a home of nobody': (
        'text',
        None,
        ['--input=~nobody-here/a.txt'],
        ['~nobody-here/a.txt', '--input=PATH'],
    ),
    'shakespeare: no such file': (
        'shakespeare_char',
        None,
        ['--input={place}/none'],
        ['none: no such file', '--input=PATH'],
    ),
    'shakespeare: a folder': (
        'shakespeare_char',
        None,
        ['--input={place}'],
        ['is a folder, not a file', 'name that'],
    ),
    'shakespeare: not UTF-8': (
        'shakespeare_char',
        ('a.txt', b'caf\xe9 ' * 50),
        [],
        ['a.txt is not UTF-8', '(byte 3)', 'iconv'],
    ),
    'shakespeare: empty': (
        'shakespeare_char',
        ('a.txt', b''),
        [],
        ['a.txt is empty', '--input=PATH'],
    ),
    'shakespeare: three characters': (
        'shakespeare_char',
        ('a.txt', b'abc'),
        [],
        ['3 characters', 'use a longer text'],
    ),
}


@pytest.mark.parametrize('name, file, flags, words', TEXTS.values(), ids=TEXTS)
def test_a_text_that_will_not_do_is_told_and_the_old_bins_stay(
    run_main, place, name, file, flags, words
):
    if file:
        (place / file[0]).write_bytes(file[1])
        flags = [f'--input={place / file[0]}', *flags]
    before = contents(place)
    flags = [flag.replace('{place}', str(place)) for flag in flags]
    ended = run_main(f'data/{name}/prepare.py', f'--out_dir={place / "data/tiny"}', *flags)
    assert_refused(ended, words)
    assert contents(place) == before


@pytest.mark.parametrize(
    'page, digest, reason',
    [
        ('truncated', SHA256, 'connection lost before all 129,000 bytes arrived'),
        ('stalled', SHA256, 'timed out'),
        ('silent', SHA256, 'timed out'),
        ('drip', SHA256, 'too slow'),
        ('html', SHA256, 'not the expected file (wrong SHA-256)'),
        ('good', '0' * 64, 'not the expected file (wrong SHA-256)'),
        ('missing', SHA256, 'HTTP 404'),
    ],
)
def test_a_download_that_goes_wrong_is_told_and_the_old_bins_stay(
    run_main, place, address, monkeypatch, page, digest, reason
):
    """Tiny Shakespeare's URLs lead to a server that misbehaves."""
    monkeypatch.setattr(shakespeare, 'URLS', (f'{address}/{page}',))
    monkeypatch.setattr(shakespeare, 'SHA256', digest)
    monkeypatch.setattr(shakespeare, 'SIZE', len(CONTENT))
    for name, value in LIMITS.get(page, PATIENT).items():
        monkeypatch.setattr(download, name, value)
    script = place / 'checkout/data/shakespeare_char/prepare.py'  # where no text is at hand
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / 'data/shakespeare_char/prepare.py', script)
    before = contents(place)
    ended = run_main(script, f'--out_dir={place / "data/tiny"}')
    assert_refused(
        ended, ['tiny/input.txt could not be downloaded', f'({reason}', 'save it under this name']
    )
    assert contents(place) == before


@pytest.mark.slow
def test_wandb_without_a_login_offers_to_stay_offline(place, tmp_path):
    """No key, no .netrc, no terminal: the script ends at once, and the existing run stays."""
    before = contents(place)
    environment = {key: value for key, value in os.environ.items() if not key.startswith('WANDB_')}
    done = subprocess.run(
        [
            sys.executable,
            'train.py',
            *SMALL_RUN,
            f'--data_dir={place / "data"}',
            f'--out_dir={place / "run"}',
            '--overwrite',
            '--wandb_log',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**environment, 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1'},
        timeout=PATIENCE,
    )
    assert_refused(done, ['wandb cannot start', 'No API key', 'WANDB_MODE=offline'])
    assert contents(place) == before
