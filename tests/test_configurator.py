"""The config: one schema, and files and flags that override it."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import run_script
from hypothesis import example, given, settings
from hypothesis import strategies as st

import configurator
from configurator import configure, read_block, resolve
from nib import hints
from nib.errors import UserError
from nib.schema import Block

ROOT = Path(configurator.__file__).parent

SCRIPT = '''"""Trains a toy.

A second paragraph.
"""
import sys
from typing import Literal

LIMIT = 3  # a constant, no key
# ---------------------------------------------------------------------------
# model
n_layer: int = 12  # number of blocks
dropout: float = 0  # 0 for pretraining

# ---------------------------------------------------------------------------
# run
# ---------------------------------------------------------------------------
start: str = 'a # b'  # prompt, or FILE:path
init: str | None = None
device: str = 'auto'
compile: bool | Literal['auto'] = 'auto'  # torch.compile
dtype: Literal['float32', 'bfloat16', 16] = (
    'float32'
)  # number format


def main():
    pass


later: int = 1
'''

DEFAULTS = {
    'max_iters': 10, 'lr_decay_iters': 10, 'learning_rate': 0.1, 'start': 'x', 'init': None,
    'seed': 1, 'verbose': False, 'compile': 'auto', 'dtype': 'float32', 'device': 'auto',
    'top_p': None,
}  # fmt: skip
TYPES = {
    'max_iters': (int,), 'lr_decay_iters': (int,), 'learning_rate': (float,), 'start': (str,),
    'init': (str, None), 'seed': (int, None), 'verbose': (bool,), 'compile': (bool, 'auto'),
    'dtype': ('float32', 'bfloat16', 16), 'device': (str,), 'top_p': (float, None),
}  # fmt: skip


def block_of(defaults, types) -> Block:
    return Block(defaults, types, comments=dict.fromkeys(types, ''), headings={}, doc='')


KEYS = block_of(DEFAULTS, TYPES)


def pick(value):
    if value == 'gpu':
        raise UserError('gpu is no device')
    return 'cpu' if value == 'auto' else value


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'toy.py'
    path.write_text(SCRIPT)
    return str(path)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes config files into a new folder, which becomes the current one."""
    monkeypatch.chdir(tmp_path)

    def write(text, name='x.py'):
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def value_of(key, *argv):
    return resolve(KEYS, argv)[0][key]


def complaint(*argv, **kwargs):
    with pytest.raises(UserError) as caught:
        resolve(KEYS, argv, **kwargs)
    return str(caught.value)


# the schema


def test_block_is_the_schema(script):
    block = read_block(script)
    assert block.defaults == {
        'n_layer': 12, 'dropout': 0.0, 'start': 'a # b', 'init': None,
        'device': 'auto', 'compile': 'auto', 'dtype': 'float32',
    }  # fmt: skip
    assert type(block.defaults['dropout']) is float
    assert block.types == {
        'n_layer': (int,), 'dropout': (float,), 'start': (str,), 'init': (str, None),
        'device': (str,), 'compile': (bool, 'auto'), 'dtype': ('float32', 'bfloat16', 16),
    }  # fmt: skip
    assert block.comments['start'] == 'prompt, or FILE:path'
    assert block.comments['init'] == ''
    assert block.comments['dtype'] == 'number format'
    assert block.headings == {'n_layer': 'model', 'start': 'run'}
    assert block.doc == 'Trains a toy.'


@pytest.mark.parametrize(
    'lines', ['x: int = 1  # one', 'x: int = (\n    1  # one\n)', 'x: int = (\n    1\n)  # one']
)
def test_a_comment_belongs_to_its_key_if_a_formatter_has_wrapped_the_line(tmp_path, lines):
    path = tmp_path / 'toy.py'
    path.write_text(f'{lines}\ny: int = 2\n')
    assert read_block(str(path)).comments == {'x': 'one', 'y': ''}


@pytest.mark.parametrize(
    'line',
    [
        'help: int = 1',
        'print_config: bool = True',
        '_x: int = 1',
        'x: list = 1',
        'x: int = f()',
        "x: int = 'a'",
        'x = 1',
        'y, x = 1, 2',
    ],
)
def test_block_that_is_no_schema_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / 'toy.py'
    path.write_text(f'\n{line}\n')
    with pytest.raises(UserError, match=r'toy\.py:2: '):
        read_block(str(path))


def test_constants_of_a_script_are_no_keys(tmp_path):
    path = tmp_path / 'toy.py'
    path.write_text('X = 1\n_y = 2\nZ, W = 3, 4\nx: int = 5\n')
    assert read_block(str(path)).defaults == {'x': 5}


# values


@given(value=st.integers())
def test_int_round_trips(value):
    assert value_of('seed', f'--seed={value!r}') == value_of('seed', '--seed', repr(value)) == value


@given(value=st.floats(allow_nan=False))
def test_float_round_trips(value):
    assert value_of('learning_rate', f'--learning_rate={value!r}') == value
    assert value_of('top_p', '--top-p', repr(value)) == value


@given(value=st.text())
def test_text_round_trips_raw(value):
    assert value_of('start', f'--start={value}') == value


@pytest.mark.parametrize(
    'key, value', [(k, v) for k in ('verbose', 'compile') for v in (True, False)]
)
def test_bool_round_trips(key, value):
    for text in (repr(value), repr(value).lower(), repr(value).upper()):
        assert value_of(key, f'--{key}={text}') is value
        assert value_of(key, f'--{key}', text) is value


@pytest.mark.parametrize('value', ['float32', 'bfloat16', 16])
def test_choice_round_trips(value):
    assert value_of('dtype', f'--dtype={value!r}') == value_of('dtype', f'--dtype={value}') == value


@pytest.mark.parametrize('key', ['seed', 'init', 'top_p'])
def test_none_round_trips(key):
    assert value_of(key, '--seed=3', '--init=a', '--top_p=0.5', f'--{key}=None') is None


@pytest.mark.parametrize(
    'item, expected',
    [
        ('--start=123', '123'), ('--start=[1]', '[1]'), ('--start=', ''), ('--start="a"', '"a"'),
        ('--start=a=b', 'a=b'),
        ('--start=None', 'None'), ('--start=True', 'True'), ("--init='a'", "'a'"),
        ('--init=1', '1'), ('--learning_rate=1', 1.0), ('--learning-rate=1e3', 1000.0),
        ('--learning_rate=-inf', float('-inf')),
        ('--max_iters=1e3', 1000), ('--max_iters=1000.0', 1000), ('--max-iters=-5', -5),
    ],
)  # fmt: skip
def test_flag_is_read_as_its_type(item, expected):
    key = item[2:].partition('=')[0].replace('-', '_')
    value = value_of(key, item)
    assert value == expected and type(value) is type(expected)


def test_nan_is_a_float():
    value = value_of('learning_rate', '--learning_rate=nan')
    assert value != value


def test_value_may_be_an_item_of_its_own():
    assert value_of('max_iters', '--max_iters', '-1') == -1
    assert value_of('start', '--start', 'a b') == 'a b'


def test_switches_take_no_value(config):
    path = config('max_iters = 3')
    assert value_of('verbose', '--verbose') is True
    assert value_of('verbose', '--verbose', '--no-verbose') is False
    assert value_of('compile', '--no_compile') is False
    values, _ = resolve(KEYS, ['--compile', path])
    assert (values['compile'], values['max_iters']) == (True, 3)


def test_last_of_a_repeated_flag_wins():
    assert value_of('max_iters', '--max_iters=1', '--max_iters=2') == 2


@pytest.mark.parametrize(
    'item, words',
    [
        ('--max_iters=1.5', ['1.5', 'expected an integer']),
        ('--max_iters=True', ['--max_iters', 'True', 'expected an integer']),
        ('--max_iters=None', ['expected an integer']),
        ('--max_iters=inf', ['expected an integer']),
        ('--max_iters=', ['expected an integer']),
        ('--max_iters=2+2j', ['expected an integer']),
        ('--learning_rate=True', ['expected a number']),
        ('--learning_rate=' + '9' * 400, ['expected a number']),
        ('--learning_rate=__import__("os")', ['expected a number']),
        ('--verbose=1', ['expected True or False']),
        ('--compile=maybe', ["expected True, False or 'auto'"]),
        ('--dtype=bf16', ["'bf16'", "'float32', 'bfloat16' or 16"]),
        ('--dtype=bfloat', ["did you mean 'bfloat16'?"]),
        (
            '--learing_rate=1',
            ['--learing_rate: no such key; did you mean --learning_rate? (--help lists all keys)'],
        ),
        ('--zzz', ['--zzz: no such key (--help']),
        ('--resume', ['--resume: no such key; write --init_from=resume (--help']),
        ('--', ['no such key']),
        ('--max_iters', ['--max_iters', 'no value']),
        ('--no-max_iters', ['max_iters is not a switch']),
        ('--no-verbose=1', ['no such key', '--verbose']),
        ('max_iters=3', ['did you mean --max_iters=3?']),
        ('-max_iters=3', ['-max_iters: no such key; did you mean --max_iters?']),
        ('\u2014max_iters=3', ['max_iters: no such key; did you mean --max_iters?']),
        ('-no-compile', ['-no-compile: no such key; did you mean --no-compile or --compile?']),
        ('---max_iters=3', ['---max_iters: no such key; did you mean --max_iters?']),
        ('--max_iters =3', ['no such key; did you mean --max_iters?']),
        ('-lr=3', ['-lr: no such key; did you mean --learning_rate?']),
        ('--config=x.py', ['--config: no such key; the path of a config file needs no flag']),
    ],
)
def test_wrong_flag_is_named_with_its_remedy(item, words):
    message = complaint(item)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    'name, keys',
    [
        ('lr', ['learning_rate']),  # initials
        ('bs', ['batch_size', 'block_size']),
        ('wd', ['weight_decay']),
        ('max_steps', ['max_bad_steps', 'max_iters']),  # spelling
        ('warmup', ['warmup_iters']),
        ('num_layers', ['n_layer']),
        ('steps', ['max_iters']),  # comments
        ('epochs', ['max_iters']),
        ('context', ['block_size']),
        ('on_critical', ['stop_on']),  # choices
        ('cosine', ['lr_schedule']),
        ('out', ['out_dir']),  # a first word
        ('log', ['log_interval']),
        ('grad_accum', ['gradient_accumulation_steps']),  # the beginnings of words
        ('zzz', []),
        ('no_such', []),
        ('_', []),
    ],
)
def test_another_name_for_a_key_is_understood(name, keys, tmp_path):
    hint = f'did you mean {" or ".join(f"--{key}" for key in keys)}?' if keys else 'no such key ('
    with pytest.raises(UserError) as caught:
        configure(str(ROOT / 'train.py'), [f'--{name}=1'])
    assert hint in str(caught.value)
    if name != '_':
        (tmp_path / 'x.py').write_text(f'{name} = 1')
        with pytest.raises(UserError) as caught:
            configure(str(ROOT / 'train.py'), [str(tmp_path / 'x.py')])
        assert hint.replace('--', '') in str(caught.value)


def test_a_flag_with_one_dash_is_told_together_with_its_value():
    with pytest.raises(UserError) as caught:
        configure(str(ROOT / 'train.py'), ['-batch_size', '3'])
    assert str(caught.value) == (
        '-batch_size: no such key; did you mean --batch_size? (--help lists all keys)'
    )


# Every key of nanoGPT's train.py and bench.py.
NANOGPT = (
    'out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from '
    'wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size '
    'block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 '
    'beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile '
    'real_data seed profile'
)


@pytest.mark.parametrize('key', NANOGPT.split())
def test_every_key_of_nanogpt_exists_or_is_replaced_in_one_line(key, tmp_path):
    script = ROOT / 'train.py'
    keys = read_block(str(script)).types
    if key in keys:
        return
    (tmp_path / 'x.py').write_text(f'{key} = False')
    for item, place in ((f'--{key}=False', f'--{key}'), (str(tmp_path / 'x.py'), f':1: {key}')):
        with pytest.raises(UserError) as caught:
            configure(str(script), [item])
        message = str(caught.value)
        assert f'{place}: a key of nanoGPT: leave ' in message and 'did you mean' not in message
    assert all(name in keys for name in re.findall(r'(\w+) = (?!True)', message))


def test_a_script_that_executes_the_configurator_does_not_go_on_without_its_flags(tmp_path):
    """As nanoGPT's scripts do; the configurator would change nothing."""
    (tmp_path / 'eval.py').write_text("exec(open('configurator.py').read())\nprint('goes on')")
    env = {'PYTHONPATH': str(ROOT)}
    for script in (tmp_path / 'eval.py', 'configurator.py'):
        done = run_script(script, '--batch_size=2', python=sys.executable, env=env)
        assert (done.returncode, done.stdout) == (2, '')
        assert done.stderr.startswith('error: configurator.py is imported, not executed: call ')


def test_flag_is_no_value_of_the_flag_before():
    assert '--max_iters' in complaint('--max_iters', '--verbose')


# files


def test_files_apply_in_order_and_see_each_other(config):
    one, two = (
        config('max_iters = 20', 'one.py'),
        config('lr_decay_iters = max_iters * 2\nmax_iters += 1', 'two.py'),
    )
    values, origins = resolve(KEYS, [one, two])
    assert (values['max_iters'], values['lr_decay_iters']) == (21, 40)
    assert origins['max_iters'] == 'two.py:2' and origins['lr_decay_iters'] == 'two.py:1'
    assert origins['seed'] == 'default'


def test_file_is_python_with_names_of_its_own(config):
    path = config("""
import math as m
from os.path import join
def _double(x):
    return 2 * x
_here = __file__
for _i in range(3):
    max_iters = _double(_i)
learning_rate = m.floor(1.5)
start = _here
""")
    values, origins = resolve(KEYS, [path])
    assert (values['max_iters'], values['learning_rate'], values['start']) == (4, 1.0, path)
    assert type(values['learning_rate']) is float and origins['max_iters'] == 'x.py:8'
    assert values.keys() == DEFAULTS.keys()


def test_a_file_includes_another_as_if_its_lines_stood_there(config, tmp_path):
    (tmp_path / 'base').mkdir()
    (tmp_path / 'base' / 'inner.py').write_text('lr_decay_iters = max_iters * 2\n_shared = 7')
    (tmp_path / 'base' / 'outer.py').write_text(
        "import os\nmax_iters = 30\ninclude('inner.py')\nstart = __file__"
    )
    path = config(
        "include('base/outer.py')\nseed = _shared\ninclude('base/inner.py')\nmax_iters = 5"
    )
    values, origins = resolve(KEYS, [path])
    assert (values['max_iters'], values['lr_decay_iters'], values['seed'], values['start']) == (
        5,
        60,
        7,
        'base/outer.py',
    )
    assert origins['max_iters'] == 'x.py:4' and origins['lr_decay_iters'] == 'base/inner.py:1'
    assert origins['start'] == 'base/outer.py:4'
    values, origins = resolve(KEYS, [path, '--max_iters=2'])
    assert (values['max_iters'], values['lr_decay_iters']) == (2, 4)


def test_functions_and_classes_of_a_config_file_may_hold_any_statement(config):
    path = config("""from contextlib import contextmanager
from dataclasses import dataclass

@contextmanager
def _three():
    yield 3

@dataclass
class _Sizes:
    layers: int

class _Empty: ...

with _three() as _number:
    seed = _Sizes(_number).layers
""")
    assert resolve(KEYS, [path])[0]['seed'] == 3


def test_a_script_that_was_edited_is_read_again(tmp_path):
    """As in a notebook, where the process stays."""
    script = tmp_path / 'script.py'
    for value in (1, 2):
        script.write_text(f'seed: int = {value}')
        assert configurator.read_block(str(script)).defaults == {'seed': value}


def test_a_missing_included_file_gets_a_hint_relative_to_the_file_that_includes_it(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / 'x.py').write_text("include('zen.py')")
    zen = os.path.relpath(ROOT / 'config' / 'zen.py', tmp_path / 'own')
    said = 'own/x.py:1: ValueError: own/zen.py: no such config file'
    assert complaint('own/x.py') == f'{said}; did you mean include({zen!r})?'


def test_what_is_wrong_with_an_included_file_is_named_there(config, tmp_path):
    path = config("include('other.py')")
    assert complaint(path) == 'x.py:1: ValueError: other.py: no such config file'
    for text, said in (
        ('seed = 1\nmax_iter = 3', 'other.py:2: max_iter: no such key'),
        ('seed = 1 / 0', 'other.py:1: Zero'),
        ("include('x.py')", 'other.py:1: ValueError: x.py includes itself'),
    ):
        (tmp_path / 'other.py').write_text(text)
        assert complaint(path).startswith(said)


@pytest.mark.parametrize('flag_first', [True, False])
def test_flag_wins_and_is_seen_inside_the_file(config, flag_first):
    path = config("""max_iters = 5000; lr_decay_iters = max_iters
max_iters += 1
globals()['max_iters'] = 3
seed = max_iters
""")
    argv = ['--max_iters=100', path] if flag_first else [path, '--max_iters=100']
    values, origins = resolve(KEYS, argv)
    assert (values['max_iters'], values['lr_decay_iters'], values['seed']) == (100, 100, 100)
    assert origins['max_iters'] == 'command line' and origins['lr_decay_iters'] == 'x.py:1'


@pytest.mark.parametrize(
    'text, expected',
    [
        ('\nmax_iter = 3', 'x.py:2: max_iter: no such key; did you mean max_iters? '),
        ('def helper(): pass', 'x.py:1: helper: no such key'),
        ('class Helper: pass', 'x.py:1: Helper: no such key'),
        ("max_iters = 1\nmax_iters = 'a'", "x.py:2: max_iters: found 'a', expected an integer"),
        ('max_iters = 1\n\nmax_iters += 0.5', 'x.py:3: max_iters: found 1.5, expected an integer'),
        ('max_iters = True', 'x.py:1: max_iters: found True, expected an integer'),
        ('learning_rate = [1]', 'x.py:1: learning_rate: found [1], expected a number'),
        ('seed = 1\nx = = 2', 'x.py:2: SyntaxError'),
        ('\nreturn 3', 'x.py:2: SyntaxError'),
        ('\n\nseed = missing', "x.py:3: NameError: name 'missing' is not defined"),
        ('def _f():\n    return 1 / 0\nseed = _f()', 'x.py:2: ZeroDivisionError: division by zero'),
        ('import json\nseed = json.loads("{")', 'x.py:2: JSONDecodeError'),
        ('assert False', 'x.py:1: AssertionError'),
        ('max-iters = 3', 'x.py:1: SyntaxError: cannot assign to expression here; a config file'),
        (
            "include = 'y.py'",
            "x.py:1: include: no such key; it is a function: write include('other.py')",
        ),
        ('seed = 1\nmax_iters: 3', "x.py:2: found 'max_iters: 3', which sets nothing; expected"),
        ('max_iters == 3', "x.py:1: found 'max_iters == 3', which sets nothing; expected"),
        ("{'max_iters': 3}", 'x.py:1: found "{\'max_iters\': 3}", which sets nothing; expected'),
        ('if seed:\n    max_iters, 3', "x.py:2: found '(max_iters, 3)', which sets nothing"),
        ('import sys\nsys.exit(0)', 'x.py:2: SystemExit: 0'),
        ('def _f():\n    global seed\n    seed = 1', 'x.py:2: found a global statement'),
        (b'seed = 1\n# \xff', 'x.py: found bytes that are not UTF-8'),
        (b'seed = 1\0', 'x.py'),
        ('(' * 5000, 'x.py'),
    ],
)  # fmt: skip
def test_wrong_file_is_named_with_its_line(config, text, expected):
    assert complaint(config(text)).startswith(expected)


@pytest.mark.parametrize(
    'text, meant',
    [
        ('max_iters = seeed', "seed or the text 'seeed'"),
        ('verbose = true', "True or the text 'true'"),
        ('dtype = bfloat16', "the text 'bfloat16'"),
    ],
)
def test_an_undefined_name_may_be_a_text_without_quotes(config, text, meant):
    name = text.split()[-1]
    assert complaint(config(text)) == (
        f'x.py:1: NameError: name {name!r} is not defined; did you mean {meant}?'
    )


@pytest.mark.parametrize('text', ['raise NameError', 'def _f():\n    seed += 1\n_f()'])
def test_another_name_error_has_no_hint(config, text):
    assert 'did you mean' not in complaint(config(text))


def test_a_file_may_compute_with_numpy(config):
    path = config("""import numpy as np
learning_rate = np.float64(0.5)
max_iters = np.int64(3)
top_p = np.float32(0.25)
seed = np.array(2)
verbose = np.any([True])
device = np.array(['cpu', 'mps'])[0]
""")
    values, _ = resolve(KEYS, [path])
    expected = {'learning_rate': 0.5, 'max_iters': 3, 'top_p': 0.25, 'seed': 2}
    for key, value in (expected | {'verbose': True, 'device': 'cpu'}).items():
        assert values[key] == value and type(values[key]) is type(value)
    said = complaint(config('import numpy as np\nmax_iters = np.float64(0.5)'))
    assert said == 'x.py:2: max_iters: found 0.5, expected an integer'


@pytest.mark.parametrize('value', ['10**5000', '-(10**5000)'])
def test_a_number_that_is_too_large_is_rejected(config, value):
    said = complaint(config(f'max_iters = {value}\nlearning_rate = {value}\nseed = 10**300'))
    found = 'found a number of more than 4,000 digits, expected'
    assert said == f'x.py:1: max_iters: {found} an integer; x.py:2: learning_rate: {found} a number'


def test_a_file_of_a_windows_editor_is_read(config):
    path = config(b'\xef\xbb\xbfseed = 3\r\n\r\nmax_iters = 2\r\n')
    values, origins = resolve(KEYS, [path])
    assert (values['seed'], values['max_iters']) == (3, 2)
    assert (origins['seed'], origins['max_iters']) == ('x.py:1', 'x.py:3')


def test_all_unknown_keys_are_in_one_message(config):
    said = complaint(
        '--learing_rate=1', '--decay-lr', 'True', '--zzz', '2', '--compille', '--seed=1'
    )
    assert said == (
        '--learing_rate: no such key; did you mean --learning_rate?; '
        f'--decay-lr: a key of nanoGPT: {hints.NANOGPT_KEYS["decay_lr"]}; '
        '--zzz: no such key; --compille: no such key; did you mean --compile? '
        '(--help lists all keys)'
    )
    assert complaint('--zzz', 'notes.py') == '--zzz: no such key (--help lists all keys)'
    said = complaint(config('backend = 1\nmax_iter = 3\nseed = 1\ndef zzz(): pass'))
    assert said == (
        f'x.py:1: backend: a key of nanoGPT: {hints.NANOGPT_KEYS["backend"]}; '
        'x.py:2: max_iter: no such key; did you mean max_iters?; x.py:4: zzz: no such key '
        "(the file's own names must begin with _)"
    )


def test_all_that_is_wrong_with_flags_and_files_is_in_one_message(config):
    one = config("device = 'gpu'\nmax_iter = 3\nseed = 'a'\nverbose = 1", 'one.py')
    two = config('seed = 1 / 0\nzzz = 1', 'two.py')
    said = complaint(
        '--zzz=1',
        '--max_iters=abc',
        '--no-seed',
        one,
        two,
        'notes.txt',
        '--init',
        settle={'device': pick},
    )
    assert said == (
        "--max_iters: found 'abc', expected an integer; "
        '--no-seed: seed is not a switch but an integer or None; type --seed=value; '
        'notes.txt: no such config file (flags are written --key=value; a text with spaces needs '
        'quotes); '
        '--init: found no value, expected a text or None; type --init=value; '
        '--zzz: no such key (--help lists all keys); '
        "one.py:3: seed: found 'a', expected an integer or None; "
        'one.py:4: verbose: found 1, expected True or False; '
        'one.py:2: max_iter: no such key; did you mean max_iters? '
        "(the file's own names must begin with _); "
        'gpu is no device; '
        'two.py:1: ZeroDivisionError: division by zero'
    )
    one = config("device = 'gpu'", 'one.py')
    assert complaint('--zzz=1', one, settle={'device': pick}) == (
        '--zzz: no such key (--help lists all keys); gpu is no device'
    )
    assert complaint('--zzz=1', '--device=gpu', settle={'device': pick}) == (
        '--zzz: no such key (--help lists all keys); gpu is no device'
    )


def test_interrupt_in_a_file_passes(config):
    with pytest.raises(KeyboardInterrupt):
        resolve(KEYS, [config('raise KeyboardInterrupt')])


def test_missing_file_names_the_nearest(config, tmp_path, monkeypatch):
    config('seed = 2', 'mine.py')
    (tmp_path / 'config').mkdir()
    config('seed = 3', 'config/train_shakespeare.py')
    monkeypatch.setattr(hints, 'CONFIG_FOLDER', str(tmp_path / 'config'))
    assert complaint('mime.py') == 'mime.py: no such config file; did you mean mine.py?'
    for typed in (
        'config/train_shakespear.py',
        'train_shakespeare',
        'nowhere/train_shakespeare.py',
    ):
        assert (
            complaint(typed)
            == f'{typed}: no such config file; did you mean config/train_shakespeare.py?'
        )


def test_what_is_no_python_file_is_not_executed(config, tmp_path):
    (tmp_path / 'a.py').mkdir()
    assert complaint(str(tmp_path / 'a.py')).startswith(f'{tmp_path / "a.py"}: cannot be read')
    (tmp_path / 'notes.txt').write_text('raise SystemExit')
    for path in (tmp_path, tmp_path / 'notes.txt'):
        assert complaint(str(path)).startswith(f'{path}: not a config file, because its name')
    prepare = {'input': (str,)}, tmp_path / 'notes.txt'
    sample = {'out_dir': (str,)}, tmp_path
    for (types, path), key in ((prepare, 'input'), (sample, 'out_dir')):
        with pytest.raises(UserError, match=f'did you mean --{key}={re.escape(str(path))}'):
            resolve(block_of(dict.fromkeys(types, ''), types), [str(path)])


def test_calls_do_not_leak_into_each_other(config):
    before = dict(DEFAULTS)
    path = config('seed = 9\n_own = 1')
    first = resolve(KEYS, [path, '--max_iters=3'])
    assert first[0]['seed'] == 9
    assert resolve(KEYS, []) == (before, dict.fromkeys(DEFAULTS, 'default'))
    assert resolve(KEYS, [path, '--max_iters=3']) == first
    assert before == DEFAULTS
    assert 'own' in complaint(config('seed = _own'))


# settling


def test_settled_value_is_what_files_see(config):
    path = config("if device == 'cpu': max_iters = 2")
    values, origins = resolve(KEYS, [path], settle={'device': pick})
    assert (values['device'], values['max_iters']) == ('cpu', 2)
    assert origins['device'] == 'default (auto)'


def test_file_that_sets_it_is_settled_again(config):
    one, two = config("device = 'auto'", 'one.py'), config('start = device', 'two.py')
    values, origins = resolve(KEYS, [one, two, '--device=mps'], settle={'device': pick})
    assert (values['device'], values['start'], origins['device']) == ('mps', 'mps', 'command line')
    values, origins = resolve(KEYS, [one, two], settle={'device': pick})
    assert (values['device'], values['start'], origins['device']) == (
        'cpu',
        'cpu',
        'one.py:1 (auto)',
    )


# nothing but UserError


items = st.one_of(
    st.text(),
    st.builds('--{}'.format, st.text()),
    st.builds('--{}={}'.format, st.sampled_from(list(TYPES)), st.text()),
    st.builds('--{}{}'.format, st.sampled_from(['', 'no-', 'no_']), st.sampled_from(list(TYPES))),
    st.text(alphabet='()[]{}0123456789.eE+-_jx\'"\\#: \0\ud800'),
)


@settings(max_examples=300)
@given(argv=st.lists(items, max_size=5))
@example(argv=['--max_iters=' + '9' * 5000])
@example(argv=['--max_iters=0x' + 'f' * 5000])
@example(argv=['--max_iters=' + '(' * 5000])
@example(argv=['--max_iters=' + '-' * 5000 + '1'])
@example(argv=['a' * 5000 + '.py'])
@example(argv=['\0/\0.py'])
def test_any_arguments_give_values_or_a_user_error(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    try:
        values, origins = resolve(KEYS, argv)
    except UserError:
        return
    assert values.keys() == origins.keys() == DEFAULTS.keys()


@settings(max_examples=100)
@given(text=st.one_of(st.binary(), st.text(alphabet='seed=_ 1.+()[]\n:#\t\'"').map(str.encode)))
def test_any_file_gives_values_or_a_user_error(config, text):
    with suppress(UserError):
        resolve(KEYS, [config(text)])


# configure


def test_help_shows_every_key_under_its_heading(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        configure(script, ['--nonsense', '--help'])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.startswith('Trains a toy.\n\nusage: python ')
    lines = [' '.join(line.split()) for line in shown.splitlines()]
    assert '--n_layer: int = 12 number of blocks' in lines
    assert "--compile: bool | 'auto' = 'auto' torch.compile" in lines
    assert (
        lines.index('model')
        < lines.index('--n_layer: int = 12 number of blocks')
        < lines.index('run')
    )
    assert all(f'--{key}:' in shown for key in read_block(script).defaults)
    with pytest.raises(SystemExit):
        configure(script, ['-h'])
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize('width', [30, 40, 60, 80, 120])
def test_help_fits_the_width_of_the_terminal(run_main, monkeypatch, width):
    monkeypatch.setenv('COLUMNS', str(width))
    keys = read_block(str(ROOT / 'train.py'))
    for script in ('train.py', 'report.py', 'sweep.py'):
        shown = run_main(script, '--help').stdout
        assert max(map(len, shown.splitlines())) <= width
    words = ' '.join(run_main('train.py', '--help').stdout.split())
    for key, comment in keys.comments.items():
        default = ' '.join(repr(keys.defaults[key]).split())
        assert re.search(rf'--{key}: [^=]+ = {re.escape(default)} {re.escape(comment)}', words), key


def test_print_config_shows_values_and_origins(script, config, capsys):
    path = config('\ndropout = 1')
    with pytest.raises(SystemExit) as stopped:
        configure(script, ['--print_config', path, '--n_layer=3'], settle={'device': pick})
    assert stopped.value.code == 0
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        'n_layer = 3 # command line',
        'dropout = 1.0 # x.py:2',
        "start = 'a # b' # default",
    ]
    assert "device = 'cpu' # default (auto)" in lines


def test_configure_gives_values_and_origins(script):
    values, origins = configure(script, ['--n-layer=2'])
    assert (values['n_layer'], origins['n_layer'], origins['dropout']) == (
        2,
        'command line',
        'default',
    )


def test_recalled_values_stand_between_defaults_and_files(script, config):
    """Values that do not fit, or belong to keys that are gone, are left out."""
    before = {'n_layer': 3, 'dropout': 0.5, 'gone': 1, 'dtype': 'int8', 'device': 'auto'}

    def recall(values, origins):
        assert (values['dropout'], origins['dropout']) == (1.0, 'x.py:1')
        return {key: value for key, value in before.items() if key != 'dropout'}, 'the run'

    path = config('dropout = 1')
    values, origins = configure(script, [path], settle={'device': pick}, recall=recall)
    assert (values['n_layer'], values['dropout'], values['dtype']) == (3, 1.0, 'float32')
    assert (origins['n_layer'], origins['dropout']) == ('the run', 'x.py:1')
    assert (values['device'], origins['device']) == ('cpu', 'the run (auto)')
    assert 'gone' not in values and origins['dtype'] == 'default'
    assert origins['compile'] == 'default (auto)'


def test_auto_keeps_the_number_below_it_and_says_so(tmp_path):
    """For a key that allows 'auto' but has another default, such as batch_size."""
    defaults, types = {'size': 12, 'mode': 'auto'}, {'size': (int, 'auto'), 'mode': ('auto', 'a')}
    (tmp_path / 'below.py').write_text('size = 30\n')
    (tmp_path / 'own.py').write_text("include('below.py')\nsize = 'auto'\n")
    below, own = str(tmp_path / 'below.py'), str(tmp_path / 'own.py')
    for argv, size, origin in (
        (['--size=auto'], 12, 'command line (auto)'),
        ([below, '--size=auto'], 30, 'command line (auto)'),
        ([own], 30, f'{own}:2 (auto)'),
        ([own, below], 30, f'{below}:1'),
        ([own, '--size=7'], 7, 'command line'),
    ):
        values, origins = resolve(block_of(defaults, types), argv)
        assert (values['size'], origins['size']) == (size, origin), argv
        assert values['mode'] == 'auto'


def test_a_tilde_is_the_home_folder_everywhere_but_in_a_prompt(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')  # Windows
    (tmp_path / 'x.py').write_text("out_dir = '~/of file'")
    defaults = dict.fromkeys(('out_dir', 'input', 'start'), '')
    types = dict.fromkeys(defaults, (str,))
    argv = [str(tmp_path / 'x.py'), '--input=~/a,b~,~/c', '--start=~/d']
    values, _ = resolve(block_of(defaults, types), argv)
    assert values == {
        'out_dir': '/home/me/of file',
        'input': '/home/me/a,b~,/home/me/c',
        'start': '~/d',
    }
