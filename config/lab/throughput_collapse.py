# A loader that becomes slow after a tenth of the run, as if other processes used the disk.
import time

from nib.tokens.batches import BatchLoader

include('healthy.py')
out_dir = 'out-lab-throughput-collapse'

_starts = BatchLoader.starts


def _starts_slowly(self, step, micro_step):
    if step > 30:
        time.sleep(0.1)
    return _starts(self, step, micro_step)


BatchLoader.starts = _starts_slowly
