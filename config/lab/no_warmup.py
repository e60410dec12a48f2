# A learning rate that is bearable, but not in the first step: AdamW's is several times larger than later ones.

include('healthy.py')
out_dir = 'out-lab-no-warmup'
warmup_iters = 0
learning_rate = 0.02
