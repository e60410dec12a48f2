# Evaluates the published GPT-2 (1.5B parameters) on the whole validation split of OpenWebText.

init_from = 'gpt2-xl'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
