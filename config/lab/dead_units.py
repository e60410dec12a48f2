# Initial biases that keep every hidden unit of the first block's MLP inactive.
import torch

import model

include('healthy.py')
out_dir = 'out-lab-dead-units'
bias = True

_reset = model.GPT.reset_parameters


def _reset_closed(self):
    _reset(self)
    bias = self.transformer.h[0].mlp.c_fc.bias
    if bias is not None:  # --no-bias is one of the cures
        torch.nn.init.constant_(bias, -10.0)


model.GPT.reset_parameters = _reset_closed
