# A GPT of GPT-2's depth and width on OpenWebText, for half the tokens of train_gpt2.py. With a head of its own it has 162M
# parameters, and no more FLOPs a token. Not run to its end yet: that takes GPUs. docs/speed.md has a small trial.

include('train_gpt2.py')
out_dir = 'out-fast-gpt2'

optimizer = 'muon'
learning_rate = 3e-3  # Muon's updates are of AdamW's size and bear more
muon_lr_ratio = 1.0
min_lr = 0.0

position = 'rotary'
norm = 'rms'
qk_norm = True
mlp = 'swiglu'
tied_head = (
    False  # behind blocks that begin as the identity a tied head finds the token that it was given
)
logit_cap = 15.0
zero_init = True

warmup_iters = 300  # with bounded attention scores and orthogonal updates a few are enough
max_iters = 300000  # half of train_gpt2.py's
lr_schedule = 'wsd'
cooldown_iters = max(1, max_iters * 4 // 10)
