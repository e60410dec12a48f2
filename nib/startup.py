"""Makes the imports of a script, which take seconds, faster and lets Ctrl-C end them quietly.

A script imports this module first. run_script() then restores the usual behavior. It also
records when the script started.
"""

import gc
import importlib.util
import os
import signal
import sys
import time


def in_notebook() -> bool:
    """Returns whether this process is a notebook's or a console's, which goes on after a script."""
    return hasattr(sys, 'ps1')  # its prompt


def not_installed(package: str) -> str:
    return f'the package {package} is not installed: pip install -r requirements.txt'


_SCRIPTS = 'bench convert debug_training report sample sweep train'.split()
_DATASETS = 'openwebtext shakespeare shakespeare_char stdlib_char text'.split()
_main = getattr(sys.modules['__main__'], '__file__', None) or ''
if os.path.isabs(_main):  # as it is of a script; and realpath needs no working directory then
    _main = os.path.realpath(_main)
_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
# Not another program, such as your own prepare.py, which may never call run_script().
_is_script = _main in [
    *(os.path.join(_root, f'{name}.py') for name in _SCRIPTS),
    *(os.path.join(_root, 'data', name, 'prepare.py') for name in _DATASETS),
]
if _is_script:
    for _package in ('torch', 'numpy'):  # nib/errors.py names the others, if they are needed
        if importlib.util.find_spec(_package) is None:
            print(f'error: {not_installed(_package)}', file=sys.stderr)
            sys.exit(2)
_is_usual = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # not ignored
_started = time.perf_counter()
if _is_script and not in_notebook():
    gc.disable()  # a tenth of the import time, and it finds nothing
    if _is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def started() -> float:
    """Returns when this script started, on the clock of time.perf_counter().

    If the process is not that of a script, such as a notebook, it returns the present.
    """
    return _started if _is_script else time.perf_counter()


def seconds() -> float:
    """Returns how long this script has been running."""
    return time.perf_counter() - started()
