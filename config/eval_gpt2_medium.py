# The loss of GPT-2 (350M parameters), as published, on OpenWebText's whole validation split.

init_from = 'gpt2-medium'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
