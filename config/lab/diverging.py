# learning_rate typed as 5.0 for 5e-4, and a warm-up as long as the run: the rate rises all the time, and the loss with it.

include('healthy.py')
out_dir = 'out-lab-diverging'
learning_rate = 5.0
lr_schedule = 'constant'
warmup_iters = max_iters
