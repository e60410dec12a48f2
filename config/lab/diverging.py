# A learning rate of 5.0 instead of 5e-4, with a warm-up as long as the run: the rate keeps rising,
# and so does the loss.

include('healthy.py')
out_dir = 'out-lab-diverging'
learning_rate = 5.0
lr_schedule = 'constant'
warmup_iters = max_iters
