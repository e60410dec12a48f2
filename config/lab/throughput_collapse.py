# A loader that waits, as for a disk that others use, from a tenth of the run on.
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
