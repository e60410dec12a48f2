"""How a script ends: one line for every mistake, its exit code, a traceback only for a bug."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
from nib.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_USER_ERROR

ROOT = Path(configurator.__file__).parent

RUNNER = '''"""Toy."""
import os
import signal
import sys

import configurator
from nib.errors import UserError, run_script

mode: str = 'print'  # what to do


def main(argv):
    values, origins = configurator.configure(__file__, argv)
    assert 'torch' not in sys.modules
    if values['mode'] == 'error':
        raise UserError('two\\nlines')
    if values['mode'] == 'interrupt':
        os.kill(os.getpid(), signal.SIGINT)
    if values['mode'] == 'bug':
        raise KeyError('bug')
    if values['mode'] == 'no file':
        open('nowhere/at all')
    if values['mode'] == 'no room':
        with open('/dev/full', 'w') as file:
            file.write('x')
    if values['mode'] == 'large':
        range(10 ** 30)[10 ** 29:].__len__()
    if values['mode'] == 'full':
        bytearray(1 << 60)
    if values['mode'] == 'letters':
        print('caf\\xe9')
    if values['mode'] == 'other pipe':
        raise BrokenPipeError('of a worker')
    if values['mode'] == 'status':
        return 3
    print('x' * int(values['mode']) if values['mode'].isdigit() else 'done')


if __name__ == '__main__':
    run_script(main)
'''


@pytest.fixture
def run(tmp_path):
    path = tmp_path / 'toy.py'
    path.write_text(RUNNER)

    def run(*argv, **kwargs):
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), **kwargs.pop('env', {})}
        kwargs = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **kwargs}
        return subprocess.run(
            [sys.executable, str(path), *argv], text=True, env=environment, cwd=tmp_path, **kwargs
        )

    return run


@pytest.mark.parametrize('argv, line', [
    (['--mod=1'], 'error: --mod: no such key; did you mean --mode? (--help lists all keys)\n'),
    (['--mode=error'], 'error: two lines\n'),
    (['--a\nb'], 'error: --a b: no such key (--help lists all keys)\n'),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_2(run, argv, line):
    done = run(*argv)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_USER_ERROR, '', line)


@pytest.mark.parametrize(
    'mode, words',
    [
        pytest.param(
            'no room',
            ['No space left', 'choose another path'],
            marks=pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has it'),
        ),
        ('no file', ['nowhere/at all', 'No such file', 'choose another path']),
        ('large', ['a number is too large', 'use a smaller one']),
        ('full', ['out of memory. Halve', '--batch_size', 'a smaller model']),
    ],
)
def test_what_no_place_foresaw_is_one_line_where_a_person_can_mend_it(run, mode, words):
    done = run(f'--mode={mode}')
    assert done.returncode == EXIT_USER_ERROR and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith('error: ') and all(word in done.stderr for word in words)


def test_what_a_terminal_cannot_show_is_escaped(run):
    done = run('--mode=letters', env={'PYTHONIOENCODING': 'ascii'})
    assert (done.returncode, done.stderr) == (0, '') and done.stdout.startswith('caf\\xe9\n')


def test_main_decides_the_exit_status(run):
    assert run().returncode == 0
    assert run('--mode=status').returncode == 3
    done = run('--help')
    assert (done.returncode, done.stderr) == (0, '') and '--mode: str' in done.stdout


def test_a_bug_keeps_its_traceback(run):
    for mode in ('bug', 'other pipe'):
        done = run(f'--mode={mode}')
        assert done.returncode == 1 and 'Traceback' in done.stderr


def test_interrupt_exits_130_without_traceback(run):
    done = run('--mode=interrupt')
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, '')


@pytest.mark.parametrize('mode', ['--mode=1', '--mode=1000000', '--help'])
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_closed_stdout_ends_quietly(run, mode, unbuffered):
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run(mode, stdout=write_end, env={'PYTHONUNBUFFERED': unbuffered})
    os.close(write_end)
    assert (done.returncode, done.stderr) == (EXIT_BROKEN_PIPE, '')
