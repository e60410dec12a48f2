# A model without norms, trained without clipping.
import torch

import model

include('healthy.py')
out_dir = 'out-lab-exploding-gradients'
grad_clip = 0.0
n_layer = 6
model.make_norm = lambda config, width: torch.nn.Identity()

_reset = model.GPT.reset_parameters


def _reset_large(self):
    """Makes the output of every layer 1.5 times as large as its input."""
    _reset(self)
    for name, parameter in self.named_parameters():
        if parameter.dim() > 1 and '.h.' in name:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)


model.GPT.reset_parameters = _reset_large
