# A learning rate 30 times too high.

include('healthy.py')
out_dir = 'out-lab-lr-too-high'
learning_rate = 0.06
lr_schedule = 'constant'
