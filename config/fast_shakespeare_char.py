# Tiny Shakespeare in characters, as fast as possible: a validation loss below 1.886 on two CPU
# cores in 6 to 9% of nanoGPT's time. docs/experiments.md lists what each idea gains.

include('train_shakespeare_char.py')
out_dir = 'out-fast-shakespeare-char'

optimizer = 'muon'
learning_rate = 0.012
min_lr = 0.0
muon_lr_ratio = 0.5
muon_momentum = 0.85  # a short memory for a short run

position = 'rotary'
rotary_base = 100.0  # resolves the distances within a short context
qk_norm = True  # allows a higher learning rate
mlp = 'swiglu'
tied_head = False  # the embedding and the head need different updates
zero_init = True
smear = 2  # no layer has to look for the previous two characters

if device == 'cpu':
    n_layer = 2  # fewer, larger operations
    batch_size = 24
    learning_rate = 0.02  # with higher rates, seeds differ more
    max_iters = 104
    eval_iters = 4  # the end of the run evaluates the whole split anyway
    log_interval = 10
else:
    max_iters = 400
warmup_iters = 10
lr_schedule = 'wsd'
cooldown_iters = max_iters * 2 // 3
eval_interval = max_iters  # an evaluation costs as much as ten steps
