# The loss of GPT-2 (1.5 billion parameters), as published, on OpenWebText's whole validation split.

init_from = 'gpt2-xl'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
