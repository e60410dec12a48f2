# The schedule ends after an eighth of the run. From there on, the learning rate is 0 and nothing
# changes.

include('healthy.py')
out_dir = 'out-lab-plateau'
lr_decay_iters = max_iters // 8
min_lr = 0.0
