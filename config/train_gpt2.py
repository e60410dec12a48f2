# Trains GPT-2 (124M) from scratch on OpenWebText with nanoGPT's settings, which reached a
# validation loss of about 2.85 in four days on eight A100s.
#   python data/openwebtext/prepare.py   (54 GB of text, 18 GB of bins)
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = 'out-gpt2'
dataset = 'openwebtext'

batch_size = 12  # fits a 40 GB GPU
block_size = 1024
# 5 micro steps on each of 8 GPUs: 491,520 tokens per step, close to GPT-3's half million
gradient_accumulation_steps = 5 * 8

max_iters = 600000  # 300 billion tokens
eval_interval = 1000
wandb_project = 'owt'  # used with --wandb_log
