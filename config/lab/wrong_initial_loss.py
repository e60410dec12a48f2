# Initial weights that are ten times too large: the new model is confident, and wrong.
import torch

import model

include('healthy.py')
out_dir = 'out-lab-wrong-initial-loss'

_reset = model.GPT.reset_parameters


def _reset_large(self):
    _reset(self)
    with torch.no_grad():
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)


model.GPT.reset_parameters = _reset_large
