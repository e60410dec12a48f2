# The run of docs/training_loop.md: a tiny model starts to memorize the Zen of Python in a second.
#   python -c "import this" > zen.txt
#   python data/text/prepare.py --input=zen.txt --name=zen
#   python train.py config/zen.py --device=cpu

out_dir = 'out-zen'
dataset = 'zen'
dtype = 'float32'  # the same digits on every machine

n_layer, n_head, n_embd = 2, 2, 32
block_size = 32
batch_size = 8
gradient_accumulation_steps = 1

learning_rate = 1e-2  # a model of 27,200 parameters tolerates a high rate
min_lr = 1e-3  # learning_rate / 10, as without this line; the chapter uses it
beta2 = 0.99  # a longer memory, because a step has few tokens
max_iters = 300
lr_decay_iters = 300  # explicit, so that --max_iters=150 is the first half of the same run
warmup_iters = 30

eval_interval = 50
eval_iters = 20
log_interval = 50
