"""What a run says: lines on the console, and on a terminal a progress bar."""

import os
import sys


class Console:
    """Lines on standard output, and on a terminal a progress bar below them. Silent on ranks other than 0."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.has_terminal = shown and _width(sys.stderr) > 0
        self.bar = None

    def advance(self, step: int, total: int):
        """Moves the bar, which begins with the first call, when the first step, always the slowest, is done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if step >= total:
                self.bar.refresh()  # it shows what it has come to, before it goes
        elif self.has_terminal:
            from tqdm import tqdm  # imported only where there is a terminal to draw on

            self.bar = tqdm(
                total=total,
                initial=step,
                unit='step',
                dynamic_ncols=True,
                smoothing=0.1,
                leave=False,
            )

    def say(self, line: str):
        if self.bar is not None:
            self.bar.write(line)
        elif self.shown:
            print(line, flush=True)

    def warn(self, line: str):
        """A line on standard error."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif self.shown:
            print(line, file=sys.stderr, flush=True)

    def progress(self, step: int, parts: dict[str, str]):
        """The state of a logged step: its first two parts, for which there is room, on the bar, or all as a line."""
        if self.bar is not None:
            self.bar.set_postfix_str(
                ', '.join(f'{name} {value}' for name, value in list(parts.items())[:2]),
                refresh=False,
            )
        else:
            self.say(
                f'step {step}: ' + ', '.join(f'{name} {value}' for name, value in parts.items())
            )

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _width(stream) -> int:
    """Columns of the terminal; 0 where there is none, or it does not tell."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        return 0
