"""sample.py, run as a user runs it, on a model of a few words."""

import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, run_script, train_once
from small_models import SMALL, make_model

import configurator
import sample as script
from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.hub import nanogpt
from nib.machine import device
from nib.text.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_from_json
from nib.tokens.write import write_dataset


@pytest.fixture(scope='session')
def out_dir(data_dir, tmp_path_factory):
    """Checkpoints of steps 10 and 20; the best is made to be that of step 10."""
    folder = tmp_path_factory.mktemp('sample') / 'run'
    train_once(data_dir, folder, '--keep_last=2')
    store.point(folder, 'best', folder / 'step-00000010')
    return folder


@pytest.fixture(scope='session')
def bytes_out_dir(tmp_path_factory):
    """A model that has learned one document byte by byte, and where it ends."""
    folder = tmp_path_factory.mktemp('bytes')
    write_dataset(
        folder / 'tiny',
        lambda start: [('train', 'é€🙂.', True), ('val', 'é€🙂.', True)] * 200,
        ByteTokenizer(),
        {},
    )
    train_once(
        folder, folder / 'run', '--max_iters=150', '--lr_decay_iters=150', '--eval_interval=150'
    )
    return folder / 'run'


FLAGS = ['--device=cpu', '--dtype=float32', '--max_new_tokens=40', '--num_samples=1']


@pytest.fixture
def sample(run_main):
    """sample(out_dir, *flags): what sample.py writes."""
    return lambda out_dir, *flags: run_main('sample.py', f'--out_dir={out_dir}', *FLAGS, *flags)


def likeliest(out_dir, which, prompt, count, dtype=torch.float32) -> str:
    """Greedy text, made without a cache from the checkpoint's tensors."""
    found, tensors = store.load(out_dir, which)
    tokenizer = tokenizer_from_json(found.state['tokenizer'])
    model = GPT(GPTConfig(**found.state['model'])).eval()
    model.load_state_dict(tensors['model'])
    model.to(dtype)
    ids = tokenizer.encode(prompt).tolist()
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return tokenizer.decode(ids)


BEST = 'step 10 (the best; the newest is step 20)'


@pytest.mark.parametrize(
    'which, step', [('best', BEST), ('latest', 'step 20'), ('10', BEST), ('20', 'step 20')]
)
def test_the_checkpoint_that_was_asked_for_writes_what_its_model_finds_likeliest(
    out_dir, sample, which, step
):
    done = sample(
        out_dir, f'--which={which}', '--start=The cat', '--temperature=0', '--max_new_tokens=9'
    )
    assert done.stdout == likeliest(out_dir, which, 'The cat', 9) + '\n'
    assert f': {step}, trained on tiny' in done.stderr


def test_weights_of_another_precision_write_what_they_find_likeliest(out_dir, run_main):
    for dtype in ('bfloat16', 'float16'):
        done = run_main(
            'sample.py',
            f'--out_dir={out_dir}',
            '--which=latest',
            '--device=cpu',
            f'--dtype={dtype}',
            '--start=The cat',
            '--temperature=0',
            '--max_new_tokens=9',
            '--num_samples=1',
        )
        assert (
            done.stdout == likeliest(out_dir, 'latest', 'The cat', 9, getattr(torch, dtype)) + '\n'
        )
        assert f'{dtype} (as requested)' in done.stderr


def test_8_bit_weights_write_text_on_a_cpu_only(bytes_out_dir, sample, run_main, monkeypatch):
    greedy = ['--start=é', '--temperature=0', '--dtype=int8']
    done = sample(bytes_out_dir, *greedy)
    assert done.returncode == 0 and 'int8 (as requested)' in done.stderr
    assert done.stdout == sample(bytes_out_dir, *greedy, '--dtype=float32').stdout
    monkeypatch.setattr(script, 'pick_device', lambda device: 'cuda')
    done = run_main(script, f'--out_dir={bytes_out_dir}', '--dtype=int8')
    assert (
        done.returncode == 2
        and '--dtype=int8: 8-bit products need a CPU, but the device is cuda' in (done.stderr)
    )
    done = run_main('train.py', '--dtype=int8')
    assert done.returncode == 2 and "--dtype: found 'int8'" in done.stderr


def test_where_compiling_fails_generation_goes_on_without_it(monkeypatch, capsys):
    def generate(compiled):
        raise RuntimeError('no Triton here\nand more')

    monkeypatch.setattr(script, 'device', 'cpu')
    monkeypatch.setattr(script, 'compile', True)
    assert (
        script.can_compile(lambda compiled: iter([torch.tensor([1])] * 5))
        and capsys.readouterr().err == ''
    )
    assert (
        not script.can_compile(generate)
        and capsys.readouterr().err == 'not compiled: no Triton here\n'
    )


@pytest.mark.slow
def test_the_prompt_comes_from_a_flag_a_file_or_standard_input(out_dir, sample, tmp_path):
    (tmp_path / 'prompt.txt').write_text('The dog')
    given = sample(out_dir, '--start=The dog')
    assert (
        given.returncode == 0
        and given.stdout.startswith('The dog')
        and len(given.stdout) == len('The dog') + 40 + 1
    )
    assert sample(out_dir, f'--start=FILE:{tmp_path / "prompt.txt"}').stdout == given.stdout
    path = str(tmp_path / 'prompt.txt')
    assert f'note: --start: {path} is taken as text; to read the file, use FILE:{path}' in (
        sample(out_dir, f'--start={path}').stderr
    )
    assert (
        run_script('sample.py', f'--out_dir={out_dir}', *FLAGS, '--start=-', input='The dog').stdout
        == given.stdout
    )


def test_escapes_in_a_flag_are_read_as_help_shows_them(out_dir, sample, run_main, tmp_path):
    assert r"--start: str = '\n'" in run_main('sample.py', '--help').stdout
    flags = ['--max_new_tokens=400', '--temperature=0.5']
    for stop in (r'\n', '\n'):
        done = sample(out_dir, r'--start=\nThe cat', f'--stop={stop}', *flags)
        assert done.stdout.startswith('\nThe cat') and done.stdout.count('\n') == 3
    config = tmp_path / 'config.py'  # Python has read its escapes already
    config.write_text(r"start = '\nThe\\n'")
    assert r'not in the vocabulary' in sample(out_dir, config).stderr
    done = sample(out_dir, r'--start=The \the', '--num_samples=1')
    assert 'tab' in done.stderr.splitlines()[0] and done.returncode == 2
    assert r"'\\'" in sample(out_dir, r'--start=\\the').stderr


def test_a_default_prompt_that_the_vocabulary_lacks_becomes_its_first_token(run_main, tmp_path):
    """A line break is no token of a model of DNA."""
    model = make_model(replace(SMALL, vocab_size=4, mlp='gelu_erf'))
    config = configurator.read_block(str(ROOT / 'train.py')).defaults
    tensors = {'model': model.state_dict()}
    nanogpt.write_folder(
        tmp_path / 'dna', model.config, tensors, CharTokenizer('ACGT'), {'step': 1}, config
    )
    init_from = f'--init_from={tmp_path / "dna"}'
    ended = run_main('sample.py', init_from, *FLAGS)
    assert ended.returncode == 0 and ended.stdout[0] == 'A' and len(ended.stdout) == 1 + 40 + 1
    ended = run_main('sample.py', init_from, *FLAGS, '--start=ACCG')
    assert ended.returncode == 0 and len(ended.stdout) == 4 + 40 + 1
    ended = run_main('sample.py', init_from, *FLAGS, '--start=ACCGX')
    assert ended.returncode == 2 and "'X'" in ended.stderr


@pytest.mark.parametrize(
    'content',
    [
        b'The cat\nsees ',
        b'The cat\r\nsees ',
        b'\xef\xbb\xbfThe cat\nsees ',
        'The cat\r\nsees '.encode('utf-16'),
    ],
)
def test_a_prompt_is_read_like_a_training_text_however_it_comes(
    out_dir, sample, tmp_path, monkeypatch, content
):
    flags = ['--temperature=0', '--max_new_tokens=3']
    (tmp_path / 'prompt.txt').write_bytes(content)
    from_file = sample(out_dir, f'--start=FILE:{tmp_path / "prompt.txt"}', *flags)
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
    assert sample(out_dir, '--start=-', *flags) == from_file
    plain = sample(out_dir, '--start=The cat\nsees ', *flags)
    assert from_file.stdout == plain.stdout
    is_noted = 'note: --start: ' in from_file.stderr
    assert is_noted == (content != b'The cat\nsees ')


def test_the_same_seed_writes_the_same_and_another_another(out_dir, sample):
    several = sample(out_dir, '--num_samples=3', '--seed=7').stdout
    assert sample(out_dir, '--num_samples=3', '--seed=7').stdout == several
    assert sample(out_dir, '--num_samples=3', '--seed=8').stdout != several
    parts = several.split('\n---------------\n')
    assert len(parts) == 3 and len(set(parts)) == 3


def test_a_sample_ends_after_the_stop_text(out_dir, sample):
    text = sample(out_dir, '--start=The cat', '--stop=.', '--max_new_tokens=400').stdout
    assert text.rstrip('\n').endswith('.') and text.count('.') == 1


def test_a_sample_ends_after_a_stop_text_of_several_tokens_in_each_row(out_dir, sample):
    """Rows that go on longer do not let the shorter ones go on."""
    texts = sample(out_dir, '--stop=s ', '--num_samples=4', '--max_new_tokens=400').stdout.split(
        '\n---------------\n'
    )
    for text in texts:
        assert text.removesuffix('\n').endswith('s ') and text.count('s ') == 1
    assert len({len(text) for text in texts}) > 1


def test_the_end_of_text_starts_and_stops_a_sample_and_characters_are_whole(bytes_out_dir, sample):
    """Each character here is of several bytes, which are of a token each."""
    done = sample(
        bytes_out_dir,
        '--start=<|endoftext|>',
        '--stop=<|endoftext|>',
        '--temperature=0',
        '--num_samples=2',
    )
    text = '<|endoftext|>é€🙂.<|endoftext|>'
    assert done.stdout == f'{text}\n---------------\n{text}\n'


def test_a_sample_that_ends_within_a_character_shows_that(bytes_out_dir, sample):
    done = sample(
        bytes_out_dir,
        '--start=<|endoftext|>',
        '--temperature=0',
        '--num_samples=2',
        '--max_new_tokens=4',
    )
    assert done.stdout == '<|endoftext|>é\ufffd\n---------------\n<|endoftext|>é\ufffd\n'


@pytest.mark.slow
def test_tokens_reach_the_terminal_as_they_come(out_dir):
    """The first characters can be read long before a run of many tokens is over."""
    run = subprocess.Popen(
        [
            sys.executable,
            'sample.py',
            f'--out_dir={out_dir}',
            '--device=cpu',
            '--max_new_tokens=1000000',
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )
    try:
        piece = os.read(run.stdout.fileno(), 1 << 16)
        assert 0 < len(piece) < 8192  # what is not written through comes in buffers of 8192 bytes
        assert run.poll() is None
    finally:
        run.kill()
        run.wait()
        run.stdout.close()


@pytest.mark.slow
class Cell(io.StringIO):
    """An output of a notebook, which shows what was written when it is flushed."""

    def __init__(self, shown: list):
        super().__init__()
        self.shown = shown

    def flush(self):
        self.shown.append(self.getvalue())
        self.seek(0)
        self.truncate()


def test_in_a_notebook_the_text_is_in_one_piece_and_other_cells_keep_their_threads(
    out_dir, sample, monkeypatch
):
    shown, limited = [], []
    monkeypatch.setattr(sys, 'ps1', 'In : ', raising=False)
    monkeypatch.setattr(sys, 'stdout', Cell(shown))
    monkeypatch.setattr(sys, 'stderr', Cell(shown))
    monkeypatch.setattr(device, 'available_cores', lambda: 4)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.setattr(torch, 'set_num_threads', limited.append)
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        monkeypatch.delenv(name, raising=False)
    sample(out_dir, '--start=the', '--max_new_tokens=4')
    assert f'{BEST}, trained on tiny' in shown[0] and shown[1] == 'the'
    assert set(limited) == {4}


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(out_dir):
    run = subprocess.Popen(
        [
            sys.executable,
            'sample.py',
            f'--out_dir={out_dir}',
            '--device=cpu',
            '--max_new_tokens=100000',
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run.stdout.read(10)
    run.stdout.close()
    said = run.stderr.read().decode()
    run.stderr.close()
    assert run.wait(60) == 141 and 'Traceback' not in said
