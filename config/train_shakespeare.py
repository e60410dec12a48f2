# Trains from scratch on tiny Shakespeare in GPT-2's tokens. The model writes words from the first
# step, but the text is small for so large a vocabulary.

out_dir = 'out-shakespeare'
dataset = 'shakespeare'
prepare_dataset = True  # 1 MB of text, which the run downloads and prepares itself

eval_interval = 50  # often, because the model soon memorizes the text
gradient_accumulation_steps = 1
batch_size = 16
dropout = 0.2  # 300,000 tokens are easy to overfit

learning_rate = 1e-3  # small models tolerate a higher rate
beta2 = 0.99  # a longer memory, because a step has few tokens

if device == 'cpu':
    n_layer, n_head, n_embd = 4, 4, 128  # nine tenths of the parameters embed the 50,257 tokens
    block_size = 64
    mlp = 'gelu_erf'  # exact: on a CPU, far faster than GPT-2's approximation
    max_iters = 500
    eval_iters = 20
else:
    n_layer, n_head, n_embd = 6, 6, 384
    block_size = 256
    max_iters = 1000
warmup_iters = min(50, max_iters // 10)
