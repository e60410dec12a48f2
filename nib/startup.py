"""Lets Ctrl-C end a script without a traceback during its imports, which take seconds.

A script imports this module first. run_script() then restores the usual handling. It also notes
when the script has started.
"""

import os
import signal
import sys
import time

_main = getattr(sys.modules['__main__'], '__file__', None) or ''
_is_script = os.path.dirname(os.path.abspath(_main)) == os.path.dirname(os.path.dirname(__file__))
_is_usual = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # not ignored
if _is_script and _is_usual and not hasattr(sys, 'ps1'):  # a notebook has a prompt
    signal.signal(signal.SIGINT, signal.SIG_DFL)
_started = time.perf_counter()


def started() -> float:
    """Returns when this script started, on the clock of time.perf_counter().

    If the process is not that of a script, such as a notebook, it returns the present.
    """
    return _started if _is_script else time.perf_counter()


def seconds() -> float:
    """Returns how long this script has been running."""
    return time.perf_counter() - started()
