"""One run, one out_dir: a lock that the system takes back when its process ends, however it ends."""
import json
import os
import socket
from pathlib import Path

from nib.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two runs in one out_dir are not noticed there
    fcntl = None

NAME = '.lock'


class RunLock:
    """The right to write to out_dir, from take() until release() or the process's end.

    The file says who holds it, and stays; it means nothing without the system's lock on it, so a dead run's is stale.
    """

    def __init__(self, out_dir):
        self.path = Path(out_dir) / NAME
        self.file = None

    def take(self):
        """UserError where another process has it: its host and pid are named."""
        file = open(self.path, 'a+')
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'{self.path.parent} belongs to a run that is still going ({self._holder(file)}): stop that one, '
                            f'or choose another --out_dir') from None
        except OSError:  # a network file system without locks
            pass
        self.file = file
        file.truncate(0)
        file.write(json.dumps({'host': socket.gethostname(), 'pid': os.getpid()}) + '\n')
        file.flush()

    def release(self):
        if self.file:
            self.file.close()
            self.file = None

    @staticmethod
    def _holder(file) -> str:
        try:
            file.seek(0)
            holder = json.loads(file.read())
            return f'host {holder["host"]}, pid {holder["pid"]}'
        except (OSError, ValueError, KeyError, TypeError):
            return 'it has not said which'
