# The validation text is part of the training text.
from dataclasses import replace
import numpy
from nib import corpus

include('healthy.py')
out_dir = 'out-lab-val-leaked'

_open = corpus.open_dataset


def _open_leaking(folder, block_size):
    data = _open(folder, block_size)
    return replace(data, train=numpy.concatenate((data.train, data.val)))


corpus.open_dataset = _open_leaking
