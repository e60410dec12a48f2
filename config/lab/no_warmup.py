# A learning rate that is fine later, but not in the first step, which AdamW makes several times
# larger than later ones.

include('healthy.py')
out_dir = 'out-lab-no-warmup'
warmup_iters = 0
learning_rate = 0.006
