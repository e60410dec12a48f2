"""The troubles that nib/doctor.py can name: how grave each is, where it comes from, and which keys of the config to change."""
from dataclasses import dataclass
from typing import Literal

Severity = Literal['critical', 'warning', 'note']


@dataclass(frozen=True)
class Trouble:
    severity: Severity  # critical: what the run makes is worthless as it is; warning: it could be much better; note: worth knowing
    causes: tuple[str, ...]  # the likeliest first
    change: str


@dataclass(frozen=True)
class Finding:
    """A trouble, named at a step of a run, with its evidence."""
    name: str
    step: int
    evidence: str

    @property
    def trouble(self) -> Trouble:
        return TROUBLES[self.name]

    def __str__(self) -> str:
        return (f'{self.trouble.severity}: {self.evidence}. Likely causes, the likeliest first: {"; ".join(self.trouble.causes)}. '
                f'Change: {self.trouble.change}')


TROUBLES = {
    'diverging': Trouble('critical', (
        'the learning rate is too high, now or since it began to rise', 'no clipping', 'a stretch of broken text'),
        'lower learning_rate by 3 to 10 and see that min_lr is below it; grad_clip 1; go on from an earlier checkpoint'),
    'not_finite': Trouble('critical', (
        'the learning rate is far too high', 'an overflow in float16', 'a division by zero or a logarithm of 0 in changed code'),
        'lower learning_rate; dtype bfloat16 or float32; on_nonfinite rewind gets past a single bad batch'),
    'lr_too_high': Trouble('warning', (
        'the learning rate is too high for this model', 'no query-key norm to bear such a rate'),
        'lower learning_rate by 3 to 10, and min_lr with it; or set qk_norm'),
    'lr_too_low': Trouble('warning', (
        'the learning rate is too low', 'weights that begin too large for it'),
        'raise learning_rate, 10 times at once, until the update ratio is 0.001 to 0.01'),
    'plateau': Trouble('warning', (
        'the schedule is over long before the run', 'the learning rate is too low or too high to get further',
        'the model has learnt what it can', 'targets that have nothing to do with the inputs'),
        'lr_decay_iters = max_iters; another learning_rate; a larger n_layer or n_embd'),
    'exploding_gradients': Trouble('warning', (
        'norms left out or weights that begin too large', 'the learning rate is too high', 'batches of broken text'),
        'grad_clip 1; see with debug_training.py which layer\'s gradient stands out'),
    'vanishing_gradients': Trouble('warning', (
        'residual connections or norms left out', 'weights that begin far too small', 'too many layers for a model without either'),
        'see with debug_training.py where the gradients become small; x = x + layer(norm(x)) in every block'),
    'all_clipped': Trouble('warning', (
        'grad_clip is far below the usual norm', 'a loss that is summed instead of averaged', 'gradients that explode'),
        'grad_clip = 1, or somewhat above the usual norm'),
    'no_warmup': Trouble('warning', (
        'AdamW\'s first steps are several times larger than later ones, and no warm-up makes them small',),
        'warmup_iters = 1 to 5 % of max_iters; or a lower learning_rate'),
    'overfitting': Trouble('warning', (
        'the text is too short for this model and so many steps', 'no dropout'),
        'stop at the step of the best validation loss (OUT_DIR/best holds it); dropout 0.1 to 0.3; more text; a smaller model or '
        'max_iters'),
    'underfitting': Trouble('note', (
        'the model is too small for so many tokens', 'too much dropout or weight decay'),
        'a larger n_layer and n_embd; about 20 tokens a parameter make the most of a given computation'),
    'constant_batches': Trouble('critical', (
        'the loader returns the same batch at every step', 'a text no longer than one batch'),
        'see that the step number reaches the loader; more text'),
    'tiny_vocabulary': Trouble('warning', (
        'the text was encoded with another tokenizer than the model is made for', 'a text that is much too short for its tokenizer'),
        'make the dataset with a tokenizer that fits: prepare.py --tokenizer=char, or one trained on the text'),
    'different_texts': Trouble('warning', (
        'training and validation text are of different kinds', 'a text sorted by kind, and cut in two', 'one of them encoded with '
        'another tokenizer'),
        'take both splits from the same text, document by document, with prepare.py'),
    'targets_not_shifted': Trouble('critical', (
        'the targets are not the inputs moved by one token', 'inputs and targets of different windows'),
        'y[t] = x[t + 1] in the loader'),
    'val_leaked': Trouble('critical', (
        'the validation text was left in the training text', 'a text that holds its documents more than once'),
        'split first, then remove from the training text what the other holds; the validation loss of this run says nothing'),
    'dead_units': Trouble('warning', (
        'large steps have closed units for good', 'biases that begin too far below 0', 'squared ReLU, which gives no gradient below 0'),
        'lower learning_rate or raise warmup_iters; mlp gelu or swiglu'),
    'wrong_initial_loss': Trouble('warning', (
        'weights that begin too large, above all those of the head', 'targets that leak into the inputs or are the inputs',
        'a loss that is summed instead of averaged'),
        'a standard deviation of 0.02 for the weights; look at the loss function'),
    'throughput_collapse': Trouble('warning', (
        'another process uses this machine', 'the disk cannot deliver the data', 'the device is too hot, and slower'),
        'look at the machine (top, nvidia-smi); the training itself is not touched'),
    'float16_underflow': Trouble('warning', (
        'gradients that overflow in float16, so that the loss scale falls until small ones become 0', 'a loss that is summed instead of '
        'averaged', 'activations that grow'),
        'dtype bfloat16 or float32; a lower learning_rate'),
    'weight_decay_too_strong': Trouble('warning', (
        'weight_decay shrinks the weights faster than they learn',),
        'weight_decay = 0.1, or so that learning_rate * weight_decay * max_iters stays below 1'),
    'batch_too_small': Trouble('warning', (
        'a step has too few tokens: its gradient is nearly all noise',),
        'raise batch_size or gradient_accumulation_steps, or else lower learning_rate'),
}
