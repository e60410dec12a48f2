# Blocks without norms and residual connections: the gradient shrinks from block to block.
import torch

import model

include('healthy.py')
out_dir = 'out-lab-vanishing-gradients'
n_layer = 6
model.make_norm = lambda config, width: torch.nn.Identity()


def _forward(self, x, rotary=None):
    return self.mlp(self.ln_2(self.attn(self.ln_1(x), rotary)))


model.Block.forward = _forward
