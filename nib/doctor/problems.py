"""The problems that the doctor can report: their severity, likely causes, and what to change."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Severity = Literal['critical', 'warning', 'note']
SEVERITIES: tuple[Severity, ...] = ('critical', 'warning', 'note')
# A text, or a condition on the config and the text to show if it holds.
Advice = str | tuple[Callable[[Mapping], bool], str]


@dataclass(frozen=True)
class Problem:
    """A problem that a run can have, and the advice for it.

    Critical: the result of the run is not usable. Warning: the run could be much better. Note:
    worth knowing.
    """

    severity: Severity
    causes: tuple[Advice, ...]  # most likely first
    changes: tuple[Advice, ...]


def select_advice(entries: tuple[Advice, ...], config: Mapping) -> tuple[str, ...]:
    """Returns the texts that apply to a config of train.py."""
    texts = []
    for entry in entries:
        if isinstance(entry, str):
            texts.append(entry)
        else:
            applies, text = entry
            if applies(config):
                texts.append(text)
    return tuple(texts)


# -- conditions on the config ----------------------------------------------------------------------


def unclipped(config: Mapping) -> bool:
    return config['grad_clip'] == 0.0


def clips_below_1(config: Mapping) -> bool:
    return config['grad_clip'] < 1.0


def clips_at_1_or_more(config: Mapping) -> bool:
    return config['grad_clip'] >= 1.0


def uses_float16(config: Mapping) -> bool:
    return config['dtype'] == 'float16'


def does_not_stop(config: Mapping) -> bool:
    return config['on_nonfinite'] != 'stop'


def does_not_rewind(config: Mapping) -> bool:
    return config['on_nonfinite'] != 'rewind'


def no_qk_norm(config: Mapping) -> bool:
    return not config['qk_norm']


def decays_early(config: Mapping) -> bool:
    early = config['lr_decay_iters'] < 0.8 * config['max_iters']
    return early and config['lr_schedule'] != 'constant'


def has_dropout(config: Mapping) -> bool:
    return config['dropout'] > 0.0


def no_dropout(config: Mapping) -> bool:
    return config['dropout'] == 0.0


def has_biases(config: Mapping) -> bool:
    return config['bias']


def uses_relu2(config: Mapping) -> bool:
    return config['mlp'] == 'relu2'


FACTS = ('cores_taken', 'starts_low', 'gradients_lost')  # which the doctor adds to the config


def cores_taken(config: Mapping) -> bool:
    return config.get('cores_taken', False)


def cores_free(config: Mapping) -> bool:
    return not cores_taken(config)


def starts_low(config: Mapping) -> bool:
    return config.get('starts_low', False)


def starts_high(config: Mapping) -> bool:
    return not starts_low(config)


def gradients_lost(config: Mapping) -> bool:
    return config.get('gradients_lost', False)


def gradients_reach_optimizer(config: Mapping) -> bool:
    return not gradients_lost(config)


def predicts_its_input(config: Mapping) -> bool:
    return config['zero_init'] and config['tied_head']


PROBLEMS: dict[str, Problem] = {
    'diverging': Problem(
        'critical',
        ('the learning rate is too high', (unclipped, 'no clipping'), 'broken text'),
        (
            'lower learning_rate by a factor of 3 to 10',
            (unclipped, 'grad_clip = 1'),
            'start again, or from a checkpoint well before the rise: --init_from=OUT_DIR/step-N',
        ),
    ),
    'not_finite': Problem(
        'critical',
        (
            'the learning rate is far too high',
            (uses_float16, 'float16 overflows'),
            (unclipped, 'no clipping'),
            'changed code divides by zero, or takes the logarithm of 0',
        ),
        (
            'lower learning_rate',
            (unclipped, 'grad_clip = 1'),
            (uses_float16, 'dtype = bfloat16 or float32'),
            (does_not_rewind, 'on_nonfinite = rewind to get past a single bad batch'),
            (does_not_stop, 'on_nonfinite = stop to see where it begins'),
        ),
    ),
    'lr_too_high': Problem(
        'warning',
        (
            'the learning rate is too high for this model',
            (no_qk_norm, 'no query-key norm, which allows higher rates'),
        ),
        (
            'lower learning_rate by a factor of 3 to 10',
            (no_qk_norm, 'set qk_norm if attention looks at a single position'),
        ),
    ),
    'lr_too_low': Problem(
        'warning',
        ('the learning rate is too low', 'the initial weights are too large for it'),
        (
            (
                'multiply learning_rate by 10, repeatedly, until the loss falls quickly and the '
                'update ratio reaches 0.001 to 0.01'
            ),
        ),
    ),
    'plateau': Problem(
        'warning',
        (
            (decays_early, 'the schedule ends long before the run'),
            'the learning rate is too high or too low to make progress',
            'the model has learned what it can',
            'the targets have nothing to do with the inputs',
        ),
        (
            (decays_early, 'lr_decay_iters = max_iters'),
            'a different learning_rate',
            'a larger n_layer or n_embd',
        ),
    ),
    'exploding_gradients': Problem(
        'warning',
        (
            'norms are missing, or initial weights are too large',
            'the learning rate is too high',
            'some passages of the text are broken',
        ),
        (
            'run debug_training.py to find the layer whose gradients and activations stand out',
            'grad_clip = 1 keeps a single bad batch from doing harm',
        ),
    ),
    'vanishing_gradients': Problem(
        'warning',
        (
            (gradients_lost, 'gradients are cleared before the optimizer steps'),
            (gradients_reach_optimizer, 'residual connections or norms are missing'),
            (gradients_reach_optimizer, 'the initial weights are far too small'),
        ),
        (
            (gradients_reach_optimizer, 'x = x + layer(norm(x)) in every block'),
            (
                gradients_reach_optimizer,
                'run debug_training.py to see where the gradients become small',
            ),
            (gradients_lost, 'clear gradients after the step of the optimizer'),
        ),
    ),
    'all_clipped': Problem(
        'warning',
        (
            (clips_below_1, 'grad_clip is far below the usual norm'),
            'the gradients are too large: norms are missing, or initial weights are too large',
            'the loss is summed instead of averaged',
        ),
        (
            (clips_below_1, 'grad_clip = 1'),
            (clips_at_1_or_more, 'run debug_training.py to see which gradients are too large'),
        ),
    ),
    'no_warmup': Problem(
        'warning',
        (
            (
                "AdamW's first steps are several times larger than later ones, and the warm-up has "
                'fewer than 10 steps'
            ),
        ),
        ('warmup_iters = 1 to 10% of max_iters, at least 10', 'or a lower learning_rate'),
    ),
    'overfitting': Problem(
        'warning',
        ('the text is too short for this model and this many steps', (no_dropout, 'no dropout')),
        (
            'stop where the validation loss is best: OUT_DIR/best holds that step',
            'more text',
            'dropout = 0.1 to 0.3',
            'a smaller model or max_iters',
        ),
    ),
    'underfitting': Problem(
        'note',
        ('the model is too small for this many tokens', (has_dropout, 'too much dropout')),
        ('a larger n_layer and n_embd: about 20 tokens per parameter are compute-optimal',),
    ),
    'constant_batches': Problem(
        'critical',
        (
            'the loader returns the same batch at every step',
            'the text is not longer than one batch',
        ),
        ('check that the step number reaches the loader', 'more text'),
    ),
    'tiny_vocabulary': Problem(
        'warning',
        (
            'the text was encoded with a different tokenizer than the model expects',
            'the text is much too short for its tokenizer',
        ),
        ('prepare the dataset with another tokenizer, such as prepare.py --tokenizer=char',),
    ),
    'different_texts': Problem(
        'warning',
        (
            'the training and validation texts are of different kinds',
            'the text was sorted by kind and cut in two',
            'one of them was encoded with a different tokenizer',
        ),
        (
            (
                'take both splits from the same kinds of text: prepare.py assigns whole documents '
                'to them at random, so give it many, or divide long ones'
            ),
        ),
    ),
    'targets_not_shifted': Problem(
        'critical',
        (
            'the targets are not the inputs shifted by one token',
            'inputs and targets come from different windows',
            'the training step computes the loss of other targets',
            'the steps see only a small part of the training text',
        ),
        ('y[t] = x[t + 1] in the loader', 'model(x, y) in the training step'),
    ),
    'val_leaked': Problem(
        'critical',
        (
            'the training text includes the validation text',
            'the text contains documents more than once',
        ),
        (
            'split first, then remove the validation passages from the training text',
            'do not use the validation loss of this run',
        ),
    ),
    'dead_units': Problem(
        'warning',
        (
            'large steps have permanently deactivated units',
            (has_biases, 'the initial biases are too far below 0'),
            (uses_relu2, 'squared ReLU has no gradient below 0'),
        ),
        (
            'lower learning_rate or raise warmup_iters',
            (has_biases, 'initialize biases to 0, or omit them: bias = False'),
            (uses_relu2, 'mlp = gelu or swiglu'),
        ),
    ),
    'wrong_initial_loss': Problem(
        'warning',
        (
            (starts_high, 'the initial weights are too large'),
            (starts_high, 'the loss is summed instead of averaged'),
            (starts_low, 'the targets leak into the inputs, or equal them'),
            (
                predicts_its_input,
                'a tied head after blocks that add nothing predicts the input token at first',
            ),
        ),
        (
            (starts_high, 'initialize weights with a standard deviation of 0.02'),
            'check the loss function and the targets',
            (predicts_its_input, 'tied_head = False'),
        ),
    ),
    'throughput_collapse': Problem(
        'warning',
        (
            (cores_taken, 'other processes use the cores, or a CPU quota applies'),
            (cores_free, 'another process uses the disk or the GPU'),
            (cores_free, 'the disk is too slow for the data'),
            (cores_free, 'the device is too hot and slows down'),
        ),
        (
            'check the machine (top, nvidia-smi)',
            (cores_taken, 'end the other processes, or start each with a smaller OMP_NUM_THREADS'),
            'or ignore it: the losses are not affected',
        ),
    ),
    'float16_underflow': Problem(
        'warning',
        (
            'gradients overflow in float16: the loss scale falls until small ones become 0',
            'the loss is summed instead of averaged',
            'activations grow',
        ),
        ('dtype = bfloat16 or float32', 'average the loss', 'a lower learning_rate'),
    ),
    'weight_decay_too_strong': Problem(
        'warning',
        ('weight_decay shrinks the weights faster than they learn',),
        ('weight_decay = 0.1, or learning_rate * weight_decay * max_iters below 1',),
    ),
    'batch_too_small': Problem(
        'warning',
        ('a step has too few tokens, so its gradient is nearly all noise',),
        ('raise batch_size or gradient_accumulation_steps',),
    ),
    'generation_differs': Problem(
        'warning',
        (
            'attention was changed outside attention_scores(), which the cache follows',
            'another layer reads earlier tokens',
            'a block is applied more often than transformer.h lists it',
            'a layer calls attend() more than once: each CausalSelfAttention has one cache',
            'a layer sees later tokens',
            'nib/generation/ has a bug',
        ),
        (
            'change attention in attention_scores() of model.py, which generation uses too',
            'do not use the samples of this run; its losses are correct',
        ),
    ),
}
