"""Makes the imports of a script, which take seconds, faster and lets Ctrl-C end them quietly.

A script imports this module first. run_script() then restores what is usual.
"""

import gc
import os
import signal
import sys

_main = getattr(sys.modules['__main__'], '__file__', None) or ''  # absolute
_is_script = os.path.dirname(_main) == os.path.dirname(os.path.dirname(__file__))
_is_usual = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # not ignored
if _is_script and not hasattr(sys, 'ps1'):  # a notebook has a prompt
    gc.disable()  # it takes a tenth of the time and finds nothing
    if _is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
