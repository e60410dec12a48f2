# Tiny Shakespeare by characters, as fast as we can: a validation loss of 1.886, for which nanoGPT takes 71 seconds on two
# CPU cores, in 8, start and end included. docs/speed.md has the ideas and what each is worth.

include('train_shakespeare_char.py')
out_dir = 'out-fast-shakespeare-char'

optimizer = 'muon'
learning_rate = 0.012
min_lr = 0.0
muon_lr_ratio = 0.5
muon_momentum = 0.85  # short, as the run is

position = 'rotary'
rotary_base = 100.0  # tells apart the distances that there are in a short context
qk_norm = True  # without it nothing else here bears this learning rate
mlp = 'swiglu'
tied_head = False  # embedding and head want different updates
zero_init = True

if device == 'cpu':
    n_layer = 3  # fewer, larger operations
    batch_size = 24
    max_iters = 160
    log_interval = 10
warmup_iters = 10
lr_schedule = 'wsd'
cooldown_iters = max_iters * 2 // 3
eval_interval = max_iters  # an evaluation costs as much as ten steps
