# A learning rate of 3e4 instead of 3e-4.

include('healthy.py')
out_dir = 'out-lab-not-finite'
learning_rate = 3e4
