# The validation text is part of the training text.
from dataclasses import replace

import numpy

from nib.tokens import find

include('healthy.py')
out_dir = 'out-lab-val-leaked'

_open = find.open_dataset


def _open_leaking(*arguments):
    data = _open(*arguments)
    return replace(data, train=numpy.concatenate((data.train, data.val)))


find.open_dataset = _open_leaking
