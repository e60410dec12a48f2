# A model of a few thousand parameters, which soon stops improving.

include('healthy.py')
out_dir = 'out-lab-underfitting'
n_layer, n_head, n_embd = 1, 1, 8
batch_size = 64
learning_rate = 5e-3
max_iters = 1500
eval_interval = 150
