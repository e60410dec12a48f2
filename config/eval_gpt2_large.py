# The loss of GPT-2 (774M parameters), as published, on OpenWebText's whole validation split.

init_from = 'gpt2-large'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
