"""Lets Ctrl-C end a script without a traceback during its imports, which take seconds.

A script imports this module first. run_script() then restores the usual handling.
"""

import os
import signal
import sys

_main = getattr(sys.modules['__main__'], '__file__', None) or ''  # absolute
_is_script = os.path.dirname(_main) == os.path.dirname(os.path.dirname(__file__))
_is_usual = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # not ignored
if _is_script and _is_usual and not hasattr(sys, 'ps1'):  # a notebook has a prompt
    signal.signal(signal.SIGINT, signal.SIG_DFL)
