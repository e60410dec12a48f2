# Eight tokens per step: each gradient is nearly all noise.

include('healthy.py')
out_dir = 'out-lab-batch-too-small'
batch_size = 1
block_size = 8
