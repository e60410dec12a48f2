# A GPT of GPT-2's depth and width on OpenWebText, with half the tokens of train_gpt2.py. Its untied
# head brings it to 162M parameters without more FLOPs per token. It has not been run to the end
# yet, because that requires GPUs; docs/experiments.md describes a small trial.

include('train_gpt2.py')
out_dir = 'out-fast-gpt2'

optimizer = 'muon'
learning_rate = 3e-3  # Muon's updates have the size of AdamW's and tolerate a higher rate
muon_lr_ratio = 1.0
min_lr = 0.0

position = 'rotary'
norm = 'rms'
qk_norm = True
mlp = 'swiglu'
# With zero_init the blocks start as the identity, and a tied head would predict the input token.
tied_head = False
zero_init = True

warmup_iters = 300  # enough with bounded attention scores and orthogonal updates
max_iters = 300000  # half of train_gpt2.py's
lr_schedule = 'wsd'
cooldown_iters = max(1, max_iters * 4 // 10)
