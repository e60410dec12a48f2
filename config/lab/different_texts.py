# A validation text in a different alphabet from the training text.
from dataclasses import replace

from nib.tokens import find

include('healthy.py')
out_dir = 'out-lab-different-texts'

_open = find.open_dataset


def _open_two_texts(*arguments):
    data = _open(*arguments)
    return replace(data, val=(data.vocab_size - 1 - data.val).astype(data.val.dtype))


find.open_dataset = _open_two_texts
