# Evaluates the published GPT-2 (774M parameters) on the whole validation split of OpenWebText.

init_from = 'gpt2-large'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
