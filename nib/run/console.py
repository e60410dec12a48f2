"""The console output of a run: lines, and a progress bar if there is a terminal."""

import os
import select
import sys
from typing import TextIO

from nib.errors import try_to_write

PATIENCE = 1.0  # seconds to wait for somebody who does not read the output
PIECE = 1000  # characters written at once: a pipe that takes any bytes takes 4096
GAP = '\n[some output was dropped, because nobody was reading it]\n'


class Output:
    """A stream of the console that neither fails nor keeps the run waiting.

    Text is lost if the stream cannot be written, as after a closed pipe, on a full disk or without
    the terminal, and while nobody reads it, as after Ctrl-S or in `less`.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self._patience = PATIENCE  # 0 after text was left out

    def write(self, text: str):
        while text and self._wait():
            if not self._patience:
                self._patience, text = PATIENCE, GAP + text
            try_to_write(self._stream, text[:PIECE])
            text = text[PIECE:]

    def flush(self):
        """Does nothing: write() has flushed."""

    def __getattr__(self, name: str):
        return getattr(self._stream, name)  # for tqdm: encoding, fileno

    def _wait(self) -> bool:
        """Waits until the stream takes text; returns whether it does."""
        try:
            ready = bool(select.select([], [self._stream], [], self._patience)[1])
        except (OSError, ValueError, TypeError):  # not a file, as in a notebook; Windows
            return True
        if not ready:
            self._patience = 0.0
        return ready

    def columns(self) -> int:
        """Returns the columns of the terminal, or 0 if there is none or its size is unknown."""
        try:
            return os.get_terminal_size(self.fileno()).columns if self.isatty() else 0
        except (OSError, ValueError, AttributeError):
            return 0


class Console:
    """Prints lines on standard output and, on a terminal, a progress bar below them.

    shown: False makes it silent, for ranks other than 0.
    """

    def __init__(self, shown: bool):
        self.shown = shown
        self._out, self._err = Output(sys.stdout), Output(sys.stderr)
        self.has_terminal = shown and self._err.columns() > 0
        self.bar = None

    def advance(self, step: int, total: int):
        """Moves the bar to `step`.

        The first call creates it, so the slow first step does not distort the rate.
        """
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if step >= total:
                self.bar.refresh()  # show the final state before it disappears
        elif self.has_terminal:
            from tqdm import tqdm  # imported only if there is a terminal

            self.bar = tqdm(
                total=total,
                initial=step,
                unit='step',
                dynamic_ncols=True,
                smoothing=0.1,
                leave=False,
                file=self._err,
            )

    def say(self, line: str):
        """Prints a line on standard output."""
        self._print(line, self._out)

    def warn(self, line: str):
        """Prints a line on standard error."""
        self._print(line, self._err)

    def _print(self, line: str, output: Output):
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.clear()
        output.write(line + '\n')
        if self.bar is not None:
            self.bar.refresh()

    def progress(self, step: int, parts: dict[str, str]):
        """Shows a logged step as a line, or its first two parts on the progress bar."""
        if self.bar is not None:
            first = list(parts.items())[:2]
            text = ', '.join(f'{name} {value}' for name, value in first)
            self.bar.set_postfix_str(text, refresh=False)
        else:
            text = ', '.join(f'{name} {value}' for name, value in parts.items())
            self.say(f'step {step}: {text}')

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
