# Tiny Shakespeare by characters with today's architecture, the one that Hugging Face calls Qwen3.

include('train_shakespeare_char.py')
out_dir = 'out-modern-shakespeare-char'

position = 'rotary'  # distances instead of places: learns faster, and no table to learn
norm = 'rms'  # LayerNorm's mean and bias turned out not to be needed
qk_norm = True  # keeps attention scores in bounds
mlp = 'swiglu'  # as many parameters as GELU's MLP, a lower loss
n_kv_head = n_head // 2  # a key-value cache of half the size, for hardly any loss
