# A learning rate a thousand times too low.

include('healthy.py')
out_dir = 'out-lab-lr-too-low'
learning_rate = 2e-6
min_lr = 2e-7
