"""How a script ends: errors of the user as one line, and the exit codes."""

from nib.startup import in_notebook, not_installed

import errno
import gc
import importlib.util
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

EXIT_USER_ERROR = 2
EXIT_NONFINITE = 3  # the loss or the gradients became NaN or infinite
EXIT_FINDING = 4  # a finding of the doctor that stop_on names
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report Ctrl-C
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report `yes | head`
PATIENCE = 5.0  # seconds that ranks other than the first wait before they print an error
# torch's messages about full memory
FULL = (
    'out of memory|allocate memory|not enough memory|ALLOC_FAILED|'
    'Storage size calculation overflowed'
)
# What torch says -> what to do.
REMEDIES = {
    'no kernel image': (
        'this torch was not built for this GPU: install a build whose CUDA version supports it '
        '(pytorch.org/get-started), or use --device=cpu'
    ),
    'driver version is insufficient|driver on your system is too old': (
        'the NVIDIA driver is older than this torch needs: update the driver, install a torch that '
        'was built for an older CUDA version, or use --device=cpu'
    ),
    'NCCL|ProcessGroupNCCL': (
        'the GPUs could not communicate: set NCCL_DEBUG=WARN to see why; NCCL_P2P_DISABLE=1 often '
        'helps if GPUs have no direct connection; or use one GPU, without torchrun'
    ),
    'Gloo connect': (
        'the processes cannot connect to each other: if they are on several hosts, set '
        'GLOO_SOCKET_IFNAME on each to the network interface that connects it to the others '
        '(ip addr lists the interfaces)'
    ),
    # gloo's messages about a process that does not respond name its source files.
    'gloo/transport|Connection (closed|reset) by peer': (
        'another process of the run has ended or does not respond; if it printed an error, '
        'fix that first. To continue from the last checkpoint, add --init_from=resume to the '
        'command'
    ),
    'not used in producing loss': (
        'a step did not use all weights of the model: with several processes, every weight '
        'needs a gradient in every step; multiply the output of a layer by 0 instead of '
        'skipping it'
    ),
    "can't start new thread": (
        'the system allows no more threads: raise the limit (ulimit -u, or the pids limit of '
        'the container), or use fewer with OMP_NUM_THREADS=1'
    ),
}
MAX_LINE = 1500  # characters of an error line
# Errors of a write, which does not know its file's name.
REQUIRED = ('torch', 'numpy', 'tiktoken', 'requests', 'tqdm', 'safetensors')
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same from libraries whose errors have no number: safetensors, torch.save, numpy.
NOT_WRITTEN = (
    r'os error \d+\)|StreamWriter failed|unexpected pos \d+ vs \d+|\d+ requested and \d+ written'
)


class UserError(ValueError):
    """An error of the user.

    The message is the line to show: what was found, what was expected, where, and what to type.
    """


@contextmanager
def optional(package: str, user: str):
    """Within this context, an import that fails raises UserError: `user` needs the package."""
    try:
        yield
    except ImportError as error:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f'{user} needs a package that is not installed: pip install {package}'
            ) from error
        # It is too old, so that a name or a part of it is missing, or does not fit another package.
        raise UserError(
            f'{user} needs {package}, but it cannot be imported ({error}): '
            f'pip install --upgrade {package}'
        ) from error


@contextmanager
def collecting(problems: list[str]):
    """Within this context, a UserError ends the block and adds its message to the problems."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def warn(line: str):
    """Prints a line on standard error at once."""
    print(line, file=sys.stderr, flush=True)


class NotFinite(Exception):
    """The run must end because its loss, gradients or weights are not finite.

    The message says where.
    """


class Stopped(Exception):
    """The run ends early, because of a signal or the doctor.

    number: the signal, or FINDING of nib/machine/signals.py.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_script(main: Callable[[list[str]], int | None], on_ranks: bool = False) -> NoReturn:
    """Calls main with the command-line arguments and exits with its return value.

    on_ranks: whether torchrun may start several processes of the script.
    """
    for name in ('stdin', 'stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed, as by 2>&-: no other file may get its number
            setattr(sys, name, open(os.devnull, 'r+'))  # noqa: SIM115, open until the end
    # Paths and texts may contain bytes or characters that the terminal cannot show.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):  # it is broken or closed
                stream.reconfigure(errors='backslashreplace')
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by nib/startup.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not gc.isenabled():  # disabled by nib/startup.py
        gc.freeze()  # what has been imported is never garbage
        gc.enable()
    # Each process of another script would print and write everything.
    started = 'TORCHELASTIC_RUN_ID' in os.environ and os.environ.get('WORLD_SIZE', '1') != '1'
    exit_code = call(main if on_ranks or not started else _refuse_torchrun, sys.argv[1:])
    if not in_notebook():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it could only disturb the end
    sys.exit(exit_code)


def _refuse_torchrun(argv: list[str]) -> NoReturn:
    raise UserError(
        f'{sys.argv[0]} runs in a single process, but torchrun has started several: start it with '
        f'python (only train.py supports several processes)'
    )


def call(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    """Calls main(argv) and returns its return value, or the exit code of the error that ended it.

    Prints errors that the user can fix as one line on standard error. Other exceptions are bugs and
    pass through.
    """
    try:
        try:
            return main(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at interpreter exit, a closed pipe could not be caught
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # If the pipe was standard output, this print fails too. Otherwise the error is a bug.
        if try_to_write(sys.stdout, '\n'):
            raise
        return EXIT_BROKEN_PIPE
    except Exception as error:
        sentence = _explain(error)
        if not sentence:
            raise  # a bug, shown with its traceback
        return _fail(sentence)


def try_to_write(stream: TextIO | None, text: str) -> bool:
    """Writes text at once; returns whether that was possible.

    If it was not, because of a closed pipe or a full disk, for example, the stream goes to the null
    device from then on. Otherwise Python would fail at exit, when it flushes the stream again.
    """
    try:
        stream.write(text)  # type: ignore[union-attr]
        stream.flush()  # type: ignore[union-attr]
        return True
    except (OSError, ValueError, AttributeError):  # ValueError: it is closed
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())  # type: ignore[union-attr]
            os.close(null)
        return False


def is_full(error: BaseException) -> bool:
    """Returns whether an error means that the memory, of the machine or a GPU, is full."""
    # torch raises its own exception if a GPU is full, but a plain RuntimeError if memory is full.
    out_of_memory = isinstance(error, RuntimeError) and re.search(FULL, str(error))
    return isinstance(error, MemoryError) or bool(out_of_memory)


def known_remedy(message: str) -> str | None:
    """Returns what to do about a message of torch, if it is a known one."""
    found = (remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, message))
    return next(found, None)


def _explain(error: Exception) -> str | None:
    """Returns a sentence about an unexpected error that the user can fix; None if it is a bug."""
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIRED:
        return not_installed(error.name)
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of os.getcwd()
        return 'the working directory has been deleted: change to another one (cd)'
    if isinstance(error, OSError) and (error.filename is not None or error.errno in NO_ROOM):
        return f'{error.filename or "writing"}: {error.strerror}; fix this, or choose another path'
    message = ' '.join(str(error).split())
    remedy = known_remedy(message) if isinstance(error, RuntimeError) else None
    null_in_path = isinstance(error, ValueError) and 'embedded null' in message
    if is_full(error):
        remedy = (
            'out of memory. Halve --batch_size and double --gradient_accumulation_steps, add '
            '--recompute, or use a smaller model (in sample.py: fewer --num_samples)'
        )
    elif isinstance(error, OverflowError):
        remedy = 'a number is too large for this machine: use a smaller one'
    elif isinstance(error, UnicodeEncodeError) or null_in_path:
        remedy = (
            'a path contains a character that file names cannot contain, such as NUL: choose '
            'another path'
        )
    elif re.search(NOT_WRITTEN, message):
        remedy = 'a file could not be written completely: free some space, or choose another path'
    return remedy and f'{remedy}; the message was: {message[:200]}'


def _escape(character: re.Match) -> str:
    return repr(character[0])[1:-1]


def _fail(sentence: str) -> int:
    """Prints an error as one line on standard error and returns the exit code."""
    # The processes of a run usually fail alike, and the first one prints the error. When it has
    # ended, torchrun ends the others while they wait here. If only another process has failed, it
    # prints its error after the wait.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if os.environ.get('LOCAL_RANK', '0') != '0' and is_main_thread:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(PATIENCE)
    # Files from elsewhere may contain escape sequences, which change the terminal.
    line = re.sub(r'[\x00-\x1f\x7f-\x9f]', _escape, ' '.join(sentence.splitlines()))
    if len(line) > MAX_LINE:  # a very long value; the end of the line says what to type
        line = f'{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}'
    try_to_write(sys.stdout, '')  # what is still to be written, such as on a full disk
    try_to_write(sys.stderr, f'error: {line}\n')
    return EXIT_USER_ERROR
