# Attention changed in the wrong place: training uses a window of 8 tokens, sampling all tokens.
import torch
from torch.nn import functional as F

import model

include('healthy.py')
out_dir = 'out-lab-generation-differs'


def _attend_in_window(q, k, v, dropout=0.0):
    places = torch.arange(q.shape[2], device=q.device)
    distance = places[:, None] - places
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=(distance >= 0) & (distance < 8),
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )


model.attend = _attend_in_window
