# A vocabulary of 4,096 tokens for a text that uses a few dozen of them, as if the model were made
# for another tokenizer.
from dataclasses import replace

from nib.tokens import find

include('healthy.py')
out_dir = 'out-lab-tiny-vocabulary'

_open = find.open_dataset
find.open_dataset = lambda *arguments: replace(_open(*arguments), vocab_size=4096)
