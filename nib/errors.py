"""How a script ends: the user's mistakes as one line, and the exit codes."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_NONFINITE = 3  # the loss or the gradients became NaN or infinite
EXIT_FINDING = 4  # the doctor found what stop_on stops at
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports for `yes | head`
PATIENCE = 5.0  # seconds that another rank than the first waits before it tells an error
FULL = 'out of memory|allocate memory|not enough memory|Storage size calculation overflowed'  # in torch's words
LONGEST = 1500  # characters of the line that tells an error
NO_ROOM = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)  # of a write, which does not know its file's name


class UserError(ValueError):
    """A mistake of the user's; its message is the one line to show: found, expected, where, what to type."""


class NotFinite(Exception):
    """A run has to end because its loss, gradients or weights are not finite; the message says where."""


class Stopped(Exception):
    """A run ends early, by a signal or by the doctor.

    number: the signal's, or FINDING of nib/machine/signals.py. at_end: all steps were done.
    """

    def __init__(self, number: int, at_end: bool = False):
        super().__init__(number)
        self.number, self.at_end = number, at_end


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call main with the command line's arguments and exit with what it returns."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a path may hold bytes, and a text letters, that the terminal cannot show
        stream.reconfigure(errors='backslashreplace')
    sys.exit(call(main, sys.argv[1:]))


def call(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    """What main returns, or the exit code of what ended it, which one line on standard error has told by then."""
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()  # here and not at interpreter exit, where a closed pipe could not be caught
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        try:
            print(
                flush=True
            )  # fails again if the pipe was stdout; another pipe's failure is a bug to show
        except BrokenPipeError:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # so that the last flush at exit is quiet
            return EXIT_BROKEN_PIPE
        raise
    except Exception as error:
        if not (sentence := _sentence(error)):
            raise  # a bug, which keeps its traceback
        return _fail(sentence)


def _sentence(error: Exception) -> str | None:
    """What a person can mend of an error that no place foresaw; None where it is a bug."""
    said = ' '.join(str(error).split())
    # torch has an exception of its own for a full GPU, and a plain RuntimeError for full memory.
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and re.search(FULL, said):
        return (
            'the memory is full. Halve --batch_size and double --gradient_accumulation_steps, or take a smaller model '
            f'(in sample.py, fewer --num_samples); it said: {said[:200]}'
        )
    if isinstance(error, OverflowError):
        return f'a number is too large for this machine, take a smaller one; it said: {said[:200]}'
    if isinstance(error, OSError) and (error.filename is not None or error.errno in NO_ROOM):
        return f'{error.filename or "writing"}: {error.strerror}; name another path, or mend what stands in the way of this one'
    if (
        isinstance(error, UnicodeEncodeError)
        or isinstance(error, ValueError)
        and 'embedded null' in said
    ):
        return f"a path holds a character that no file's name can have, such as NUL: name another; it said: {said[:200]}"
    return None


def _fail(sentence: str) -> int:
    # Processes of one run mostly fail alike. The others leave it to the first to say so: torchrun ends them as soon as it
    # has ended, long before they would speak; an error that is theirs alone is said after a while.
    if os.environ.get('LOCAL_RANK', '0') != '0':
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(PATIENCE)
    line = ' '.join(sentence.splitlines())
    if len(line) > LONGEST:  # a value of thousands of characters; what to type stands at the end
        line = f'{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}'
    print('error:', line, file=sys.stderr)
    return EXIT_USER_ERROR
