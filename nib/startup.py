"""What a script must do before its other imports.

Ctrl-C ends it without a traceback during the imports, which take seconds; run_script() restores the
usual handling. nib.machine.threads sets how torch's threads wait, because torch reads that when it
is imported.
"""

import os
import signal
import sys

import nib.machine.threads  # noqa: F401 - for what it does

_main = getattr(sys.modules['__main__'], '__file__', None) or ''
_is_script = os.path.dirname(os.path.abspath(_main)) == os.path.dirname(os.path.dirname(__file__))
_is_usual = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # not ignored
if _is_script and _is_usual and not hasattr(sys, 'ps1'):  # a notebook has a prompt
    signal.signal(signal.SIGINT, signal.SIG_DFL)
