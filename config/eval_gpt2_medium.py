# Evaluates the published GPT-2 (350M parameters) on the whole validation split of OpenWebText.

init_from = 'gpt2-medium'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
