# Trains GPT-2 (124M) on OpenWebText on one GPU with 24 GB, such as an RTX 3090 or 4090, with a
# tenth of the tokens of train_gpt2.py. Computed, not measured: 30.7 billion tokens at 854
# MFLOP each are 2.6e19 FLOP. At an MFU of 40%, this takes an RTX 4090 (165 TFLOP/s) 4.6 days, and
# an RTX 3090 (71 TFLOP/s) 10.7 days. To compute it for another GPU:
#   python bench.py config/train_gpt2_24gb.py --plan --devices=A40
#   python data/openwebtext/prepare.py   (54 GB of text, 18 GB of bins)
#   python train.py config/train_gpt2_24gb.py

include('train_gpt2.py')
out_dir = 'out-gpt2-24gb'

batch_size = 24  # about 13 GB, estimated
gradient_accumulation_steps = 20  # 491,520 tokens per step, as in train_gpt2.py

max_iters = 62500  # 30.7 billion tokens
warmup_iters = 700
