"""The console output of a run: lines, and a progress bar if there is a terminal."""

import os
import sys


class Console:
    """Prints lines on standard output and, on a terminal, a progress bar below them.

    shown: False makes it silent, for ranks other than 0.
    """

    def __init__(self, shown: bool):
        self.shown = shown
        self.has_terminal = shown and _width(sys.stderr) > 0
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
            )

    def say(self, line: str):
        """Prints a line on standard output."""
        if self.bar is not None:
            self.bar.write(line)
        elif self.shown:
            print(line, flush=True)

    def warn(self, line: str):
        """Prints a line on standard error."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif self.shown:
            print(line, file=sys.stderr, flush=True)

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


def _width(stream) -> int:
    """Returns the columns of the terminal, or 0 if there is none or its size is unknown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        return 0
