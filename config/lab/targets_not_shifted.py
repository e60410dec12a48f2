# A loader that forgets to move the targets by one: the model is asked to repeat what it reads.
from nib import loader

include('healthy.py')
out_dir = 'out-lab-targets-not-shifted'

_gather = loader.gather


def _gather_unshifted(*arguments):
    x, y = _gather(*arguments)
    return x, x


loader.gather = _gather_unshifted
