# Fine-tunes the published GPT-2 to write like Shakespeare: a few minutes on a GPU.

out_dir = 'out-finetune-shakespeare'
init_from = 'gpt2'  # 124M parameters; 'gpt2-xl' writes best but needs a 40 GB GPU
dataset = 'shakespeare'
prepare_dataset = True  # 1 MB of text, which the run downloads and prepares itself

batch_size = 1
gradient_accumulation_steps = 32  # 32,768 tokens per step; 9 steps are an epoch
max_iters = 20  # two epochs; after that it only memorizes
eval_interval = 5
eval_iters = 40

learning_rate = 3e-5  # small, so that the model does not forget what it knows
lr_schedule = 'constant'
warmup_iters = 0
