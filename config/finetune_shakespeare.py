# GPT-2, as published, taught to write like Shakespeare: a few minutes on a GPU.

out_dir = 'out-finetune-shakespeare'
init_from = 'gpt2'  # 124M parameters; 'gpt2-xl' writes best, and wants a GPU of 40 GB
dataset = 'shakespeare'
prepare_dataset = True  # one megabyte of text: fetched and prepared by the run itself

batch_size = 1
gradient_accumulation_steps = (
    32  # 32,768 tokens a step: the text has 301,966, so 9 steps are an epoch
)
max_iters = 20  # two epochs; after that it only learns by heart
eval_interval = 5
eval_iters = 40

learning_rate = 3e-5  # small, so that it does not forget what it knows
lr_schedule = 'constant'
warmup_iters = 0
