"""The records of a run: metrics.jsonl, TensorBoard, wandb."""
import json
import math
import re
import secrets
from pathlib import Path

from nib.errors import UserError
from nib.files import atomic_write

WANDB_SECONDS = 20.0  # to reach its server


class Metrics:
    """One record a logged step, under the same names in metrics.jsonl, TensorBoard and wandb.

    Use it on rank 0 only. Continuing from a step drops the records that an interrupted run wrote after it.
    """

    def __init__(self, out_dir, step: int, config: dict, tensorboard: bool = False, wandb_project: str = '',
                 wandb_run_name: str = ''):
        writer = _summary_writer() if tensorboard else None  # made last: it writes at once, and wandb may refuse
        self.wandb = _wandb(out_dir, step, config, wandb_project, wandb_run_name) if wandb_project else None
        self.writer = writer(str(Path(out_dir) / 'tensorboard'), purge_step=step + 1 if step else 0) if writer else None
        self.path, self.file = Path(out_dir) / 'metrics.jsonl', None
        self.rewind(step)

    def rewind(self, step: int):
        """Drops the records of metrics.jsonl after `step`; TensorBoard and wandb keep theirs."""
        if self.file:
            self.file.close()
        kept = [line for line in _whole_lines(self.path) if json.loads(line)['step'] <= step] if step else []
        self.records = [json.loads(line) for line in kept]  # of the run before it was resumed
        with atomic_write(self.path) as file:
            file.write(''.join(line + '\n' for line in kept).encode())
        self.file = open(self.path, 'a', encoding='utf-8')

    def log(self, step: int, values: dict[str, float | str | None]):
        """Writes the values of a step, numbers and texts; a None is left out, and a number that is not finite becomes null
        in metrics.jsonl, which JSON can hold."""
        values = {name: value for name, value in values.items() if value is not None}
        finite = {name: value if isinstance(value, str) or math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({'step': step, **finite}) + '\n')
        self.file.flush()
        if self.writer is not None:
            for name, value in values.items():
                (self.writer.add_text if isinstance(value, str) else self.writer.add_scalar)(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self):
        self.file.close()
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def _whole_lines(path: Path) -> list[str]:
    """The lines that hold a record; a crash may have cut one."""
    def is_record(line):
        try:
            return isinstance(json.loads(line)['step'], int)
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    lines = path.read_text(encoding='utf-8', errors='replace').split('\n') if path.exists() else []
    return [line for line in lines if is_record(line)]


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError('--tensorboard needs a package that is not here: pip install tensorboard') from error
    return SummaryWriter


def _wandb(out_dir, step: int, config: dict, project: str, name: str):
    try:
        import wandb
    except ImportError as error:
        raise UserError('--wandb_log needs a package that is not here: pip install wandb') from error
    # The id is kept, so that a resumed run continues its curves.
    id_file = Path(out_dir) / 'wandb_id'
    kept = id_file.read_text(errors='replace').strip() if step and id_file.exists() else ''
    run_id = kept if re.fullmatch(r'[\w-]{1,64}', kept) else secrets.token_hex(4)
    try:
        run = wandb.init(project=project, name=name or None, config=config, dir=str(out_dir), id=run_id, resume='allow',
                         settings=wandb.Settings(init_timeout=WANDB_SECONDS))
    except (wandb.errors.Error, UnicodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # what follows are hints for programmers
        raise UserError(f'wandb cannot start ({reason}); without an account or network, set the environment variable '
                        f'WANDB_MODE=offline') from error
    id_file.write_text(run_id + '\n')
    return run
