# Trains a character-level GPT on tiny Shakespeare: minutes on a GPU, under two on two CPU cores.

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
prepare_dataset = True  # 1 MB of text, which the run downloads and prepares itself
fallback_dataset = 'stdlib_char'  # without a network: the source of Python's standard library

eval_interval = 250  # often, because this model overfits
gradient_accumulation_steps = 1

learning_rate = 1e-3  # small models tolerate a higher rate
beta2 = 0.99  # a longer memory, because a step has few tokens

if device == 'cpu':  # a smaller model and fewer steps, for a result within two minutes
    n_layer, n_head, n_embd = 4, 4, 128
    block_size = 64
    batch_size = 12
    mlp = 'gelu_erf'  # exact, as in nanoGPT: on a CPU, far faster than GPT-2's approximation
    dropout = 0.0  # the run is too short to overfit
    max_iters = 2000
    eval_iters = 20
    log_interval = 50
else:
    n_layer, n_head, n_embd = 6, 6, 384
    block_size = 256
    batch_size = 64
    dropout = 0.2  # 5000 steps read the text 80 times
    max_iters = 5000
warmup_iters = min(100, max_iters // 10)  # a tenth of a short run
