# Tiny Shakespeare in characters with a modern architecture, that of Qwen3.

include('train_shakespeare_char.py')
out_dir = 'out-modern-shakespeare-char'

position = 'rotary'  # relative positions: learns faster, without a table of parameters
norm = 'rms'  # LayerNorm's mean and bias turned out to be unnecessary
qk_norm = True  # bounds the attention scores
mlp = 'swiglu'  # a lower loss than the GELU MLP with as many parameters
n_kv_head = n_head // 2  # halves the key-value cache at almost the same loss
