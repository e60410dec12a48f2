# A weight decay of 20 instead of 0.1: weights shrink faster than they learn.

include('healthy.py')
out_dir = 'out-lab-weight-decay-too-strong'
weight_decay = 20.0
