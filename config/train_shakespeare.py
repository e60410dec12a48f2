# Tiny Shakespeare in GPT-2's tokens, from scratch: words from the first step on, but a small text for a large vocabulary.

out_dir = 'out-shakespeare'
dataset = 'shakespeare'
prepare_dataset = True  # one megabyte of text: fetched and prepared by the run itself

eval_interval = 50  # often: the model soon knows the text by heart
gradient_accumulation_steps = 1
batch_size = 16
dropout = 0.2  # 300,000 tokens are few

learning_rate = 1e-3  # small models bear more
beta2 = 0.99  # a longer memory, as a step has few tokens

if device == 'cpu':
    n_layer, n_head, n_embd = 4, 4, 128  # its embedding of 50,257 tokens is nine tenths of it
    block_size = 64
    max_iters = 500
    eval_iters = 20
else:
    n_layer, n_head, n_embd = 6, 6, 384
    block_size = 256
    max_iters = 1000
warmup_iters = min(50, max_iters // 10)
