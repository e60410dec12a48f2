# min_lr typed as 5.0 for 5e-4: the learning rate rises instead of falling, and the loss with it.

include('healthy.py')
out_dir = 'out-lab-diverging'
min_lr = 5.0
lr_schedule = 'linear'
