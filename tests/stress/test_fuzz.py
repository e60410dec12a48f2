"""Random command lines and damaged files, a few hundred of the benchmark's ten thousand."""

import sys

import pytest
from conftest import run_script

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith('linux'), reason='cases are forked and their memory is limited'
)


@pytest.mark.slow
def test_150_random_cases_end_without_a_traceback(tmp_path):
    done = run_script(
        'stress/fuzz.py', '--cases=150', '--seed=300', f'--result={tmp_path / "table.txt"}'
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / 'table.txt').read_text()
    assert (
        table.startswith('150 cases')
        and table.endswith('\ntracebacks 0\n')
        and done.stdout == table
    )
    assert table.splitlines()[-3].split()[-1] == '0'  # nothing else was bad either


@pytest.mark.slow
def test_what_ends_badly_is_seen(tmp_path):
    """A traceback, two error lines, a kill, a timeout: each from a script that does it."""
    done = run_script(
        '-c',
        """
import os, signal, sys, time
from pathlib import Path
from stress import fuzz
from nib.errors import UserError

def two_lines():
    print('error: first', file=sys.stderr)
    raise UserError('second')

def fail(error):
    raise error

def fill():
    return bytearray(1 << 40)

ends = {'well': lambda: None, 'refused': lambda: fail(UserError('no')), 'full': fill,
        'traceback': lambda: fail(KeyError()), 'not one line': two_lines,
        'another exit code': lambda: os.kill(os.getpid(), signal.SIGKILL),
        'too long': lambda: time.sleep(3600)}
for name, end in ends.items():
    fuzz.SECONDS = 1 if name == 'too long' else 600
    fuzz.MAINS['script'] = lambda argv: end()
    made, said = fuzz.Case('', 'script', [], lambda: None), Path(sys.argv[2], name)
    code = fuzz.wait(fuzz.fork(lambda _: fuzz.play(made), Path(sys.argv[1]), said))
    print(name, '->', fuzz.judge(code, said.read_text()) or 'well')
""",
        tmp_path / 'case',
        tmp_path,
    )
    assert done.stdout.splitlines() == [
        'well -> well',
        'refused -> well',
        'full -> well',
        'traceback -> traceback',
        'not one line -> not one line',
        'another exit code -> another exit code',
        'too long -> too long',
    ], done.stderr
