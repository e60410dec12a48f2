# Only four thousand training tokens, which the model memorizes.
from dataclasses import replace

from nib.tokens import find

include('healthy.py')
out_dir = 'out-lab-overfitting'
learning_rate = 4e-3

_open = find.open_dataset


def _open_little(*arguments):
    data = _open(*arguments)
    return replace(data, train=data.train[:4096])


find.open_dataset = _open_little
