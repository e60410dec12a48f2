# A loader that forgets to shift the targets by one: the model learns to repeat its input.
from nib.tokens import batches

include('healthy.py')
out_dir = 'out-lab-targets-not-shifted'

_cut = batches.cut_windows


def _cut_unshifted(*arguments):
    x, _ = _cut(*arguments)
    return x, x


batches.cut_windows = _cut_unshifted
