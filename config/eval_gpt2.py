# Evaluates the published GPT-2 (124M parameters) on the whole validation split of OpenWebText.

init_from = 'gpt2'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
