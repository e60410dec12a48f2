# The run that every other config in this folder breaks in one place. Nothing is wrong with it, and
# the doctor should say so. It takes a few seconds on a laptop.

include('../train_shakespeare_char.py')
out_dir = 'out-lab-healthy'
n_layer, n_head, n_embd = 2, 2, 64
block_size = 32
batch_size = 16
dropout = 0.0
max_iters = 300
warmup_iters = 30
learning_rate = 2e-3
min_lr = 2e-4
eval_interval = 30
eval_iters = 8
log_interval = 5
dtype = 'float32'  # products this small gain nothing from bfloat16
