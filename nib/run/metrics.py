"""The records of a run: metrics.jsonl, TensorBoard, wandb."""

import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from nib.doctor.finding import Finding
from nib.errors import UserError, optional
from nib.files import atomic_write

LATEST_STEP = 1 << 53  # larger numbers are not steps
WANDB_SECONDS = 20.0  # timeout for its server at the start
WANDB_LAST_SECONDS = 60  # and at the end, unless WANDB_FINISH_TIMEOUT says otherwise


class Metrics:
    """Writes records under the same names to metrics.jsonl, TensorBoard and wandb.

    Use it on rank 0 only. A run that resumes from `step` drops the later records of an interrupted
    run. config: train.py's, which says whether to use TensorBoard and wandb.

    Call rewind() before the first record: until then, nothing is changed in out_dir.

    What cannot be written does not stop the run, but `warn` prints a line. Records of metrics.jsonl
    are kept for the next attempt; TensorBoard and wandb are no longer used.
    """

    def __init__(self, out_dir, step: int, config: dict, warn: Callable[[str], None] = print):
        self.writer_class = _summary_writer() if config['tensorboard'] else None
        self.writer: Any = None
        self.wandb = _wandb(out_dir, step, config) if config['wandb_log'] else None
        self.wandb_step = self.wandb.step if self.wandb else 0  # it takes no earlier steps
        self.path = Path(out_dir) / 'metrics.jsonl'
        self.file: FileIO | None = None
        self._warn = warn

    def rewind(self, step: int):
        """Opens the files, without the records after `step`.

        wandb keeps its own, and takes no new ones there.
        """
        if self.wandb is not None:
            self.path.with_name('wandb_id').write_text(f'{self.wandb.id}\n')
        # Records of this run from before it was resumed.
        records = read_records(self.path)[0] if step else []
        self.records = [record for record in records if record['step'] <= step]
        with atomic_write(self.path) as file:
            file.write(''.join(json.dumps(record) + '\n' for record in self.records).encode())
        self.reopen()
        if self.writer_class and not self._works('TensorBoard', self._start_drawing, step):
            self.writer = self.writer_class = None
        self._unwritten = b''  # records that the file has not taken yet

    def reopen(self):
        if self.file:
            self.file.close()
        self.file = open(self.path, 'ab', buffering=0)  # noqa: SIM115, closed by close()

    def log(self, step: int, values: Mapping[str, float | str | None]):
        """Records the values of a step, numbers or texts; None is left out.

        Non-finite numbers become null in metrics.jsonl, because JSON cannot represent them.
        """
        present = {name: value for name, value in values.items() if value is not None}
        self._write(
            step,
            {
                name: value if isinstance(value, str) or math.isfinite(value) else None
                for name, value in present.items()
            },
        )
        self._show(step, present)

    def log_finding(self, finding: Finding):
        """Records a finding of the doctor: an object in metrics.jsonl, a text elsewhere."""
        self._write(finding.step, {f'finding/{finding.name}': finding.record()})
        self._show(finding.step, {f'finding/{finding.name}': str(finding)})

    def _write(self, step: int, values: Mapping):
        is_first_attempt = not self._unwritten
        record = {'step': step, 'time': round(time.time(), 3), **values}  # seconds since 1970
        line = json.dumps(record, default=float)  # also a tensor, or a number of NumPy
        self._unwritten += (line + '\n').encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self.file.write(self._unwritten) :]
        except OSError as error:
            if is_first_attempt:
                self._warn(f'{self.path} cannot be written: {error.strerror}; trying again')

    def _show(self, step: int, values: Mapping):
        """Sends values to TensorBoard and wandb."""
        if self.writer is not None and not self._works('TensorBoard', self._draw, step, values):
            self.writer = self.writer_class = None
        if self.wandb is not None and not self._works('wandb', self._send, step, values):
            self.wandb = None

    def _start_drawing(self, step: int):
        if self.writer is not None:
            self.writer.close()
        folder = str(self.path.parent / 'tensorboard')
        self.writer = self.writer_class(folder, purge_step=step + 1 if step else 0)

    def _draw(self, step: int, values: Mapping):
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            else:
                self.writer.add_scalar(name, value, step)

    def _send(self, step: int, values: Mapping):
        if step >= self.wandb_step:  # it has the earlier steps from before a rewind or a crash
            self.wandb.log(values, step)
            self.wandb_step = step

    def _works(self, name: str, call: Callable, *arguments) -> bool:
        """Calls a service and returns whether it worked; its errors have no common base class."""
        try:
            call(*arguments)
            return True
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'.removesuffix(': ')
            self._warn(f'{name} no longer works: {reason}')
            return False

    def close(self, exit_code: int = 0):
        """Closes everything. exit_code: that of the run; wandb shows whether it is 0."""
        if self.file:
            if self.file.closed:
                return
            self.file.close()
        if self.writer is not None:
            self._works('TensorBoard', self.writer.close)
        if self.wandb is not None:
            self._works('wandb', self.wandb.finish, exit_code)


def read_records(path: Path) -> tuple[list[dict], int]:
    """Returns the records of metrics.jsonl and the number of unreadable lines.

    An unreadable last line is not counted: the run may still be writing it, or a crash cut it off.
    """
    records, unread = [], 0
    lines = path.read_bytes().decode(errors='replace').split('\n') if path.exists() else []
    for index, line in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            unread += bool(line.strip()) and index < len(lines) - 1
            continue
        step = record.get('step') if isinstance(record, dict) else None
        if type(step) is int and 0 <= step < LATEST_STEP:
            records.append(record)
        else:
            unread += 1
    return records, unread


def _summary_writer():
    with optional('tensorboard', '--tensorboard'):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def _wandb(out_dir, step: int, config: dict):
    with optional('wandb', '--wandb_log'):
        import wandb
    # The id is kept in a file, so a resumed run continues its curves.
    id_file = Path(out_dir) / 'wandb_id'
    kept = id_file.read_text(errors='replace').strip() if step and id_file.exists() else ''
    run_id = kept if re.fullmatch(r'[\w-]{1,64}', kept) else secrets.token_hex(4)
    # By default, wandb waits for hours if the network fails. What it has not sent stays in out_dir.
    os.environ.setdefault('WANDB_FINISH_TIMEOUT', str(WANDB_LAST_SECONDS))
    try:
        run = wandb.init(
            project=config['wandb_project'],
            name=config['wandb_run_name'] or None,
            config=config,
            dir=str(out_dir),
            id=run_id,
            resume='allow',
            settings=wandb.Settings(init_timeout=WANDB_SECONDS),
        )
    except (wandb.errors.Error, ValueError) as error:  # ValueError: WANDB_MODE=ofline, by pydantic
        lines = str(error).splitlines() or [type(error).__name__]
        # Hints for developers follow. pydantic names the variable and its values in the next lines.
        reason = ' '.join(' '.join(lines[: 3 if isinstance(error, ValueError) else 1]).split())
        raise UserError(
            f'wandb cannot start ({reason}); without an account or network, set the environment '
            f'variable WANDB_MODE=offline'
        ) from error
    return run
