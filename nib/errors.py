"""How a script ends: the user's mistakes as one line, and the exit codes."""

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_NONFINITE = 3  # the loss or the gradients became NaN or infinite
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports for `yes | head`


class UserError(ValueError):
    """A mistake of the user's; its message is the one line to show: found, expected, where, what to type."""


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call main with the command line's arguments and exit with what it returns."""
    try:
        try:
            status = main(sys.argv[1:])
        finally:
            sys.stdout.flush()  # here and not at interpreter exit, where a closed pipe could not be caught
    except UserError as error:
        print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except (MemoryError, RuntimeError) as error:
        # torch has an exception of its own for a full GPU, and a plain RuntimeError for full memory.
        if not isinstance(error, MemoryError) and not re.search('out of memory|allocate memory|not enough memory', str(error)):
            raise
        print('error: the memory is full. Halve --batch_size and double --gradient_accumulation_steps, or take a smaller model; '
              f'it said: {" ".join(str(error).split())[:200]}', file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        try:
            print(flush=True)  # fails again if the pipe was stdout; another pipe's failure is a bug to show
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush at exit is quiet
            sys.exit(EXIT_BROKEN_PIPE)
        raise
    sys.exit(status)
