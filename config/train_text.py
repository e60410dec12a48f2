# Your own text, which data/text/prepare.py has made a dataset of:
#   python data/text/prepare.py --input=PATH --name=NAME
#   python train.py config/train_text.py --dataset=NAME

include(
    'train_shakespeare_char.py'
)  # the same sizes; add --n_layer, --n_embd, --max_iters for more text
dataset = ''  # you name it: --dataset=NAME wins, here and in the next line
out_dir = f'out-{dataset}'
prepare_dataset = False  # only you know where your text is
fallback_dataset = ''
sample_tokens = 200  # read along while it learns
