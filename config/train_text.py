# Trains on your own text:
#   python data/text/prepare.py --input=PATH --name=NAME
#   python train.py config/train_text.py --dataset=NAME
import os

# The same model and steps. For more text, raise --n_layer, --n_embd and --max_iters.
include('train_shakespeare_char.py')
dataset = ''  # given by --dataset=NAME, also in the next line
out_dir = f'out-{os.path.basename(dataset.rstrip(os.sep))}'
prepare_dataset = False  # only you know where your text is
fallback_dataset = ''
sample_tokens = 200  # shows what the model writes while it learns
