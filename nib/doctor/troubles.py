"""The troubles that nib/doctor/rules.py can name: how grave each is, where it comes from, and which keys of the config to change."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Severity = Literal['critical', 'warning', 'note']
SEVERITIES = ('critical', 'warning', 'note')
Advice = (
    str | tuple[Callable[[Mapping], bool], str]
)  # a text, or one for the configs of which the function is true


@dataclass(frozen=True)
class Trouble:
    severity: Severity  # critical: what the run makes is worthless as it is; warning: it could be much better; note: worth knowing
    causes: tuple[Advice, ...]  # the likeliest first
    changes: tuple[Advice, ...]


@dataclass(frozen=True)
class Finding:
    """What the doctor has found at a step of a run."""

    name: str  # of the trouble
    step: int
    severity: Severity
    evidence: str
    causes: tuple[str, ...] = ()  # most likely first
    changes: tuple[str, ...] = ()  # as 'key = value', or in words

    @classmethod
    def of(
        cls, name: str, step: int, evidence: str, config: Mapping, severity: Severity | None = None
    ) -> 'Finding':
        """A trouble of TROUBLES with the advice for this config of train.py. severity: another than the trouble's own."""
        causes, changes = (
            tuple(
                entry if isinstance(entry, str) else entry[1]
                for entry in advice
                if isinstance(entry, str) or entry[0](config)
            )
            for advice in (TROUBLES[name].causes, TROUBLES[name].changes)
        )
        return cls(name, step, severity or TROUBLES[name].severity, evidence, causes, changes)

    @classmethod
    def of_record(cls, name: str, step: int, recorded) -> 'Finding':
        """What metrics.jsonl holds under 'finding/NAME': an object, or the sentence that older runs wrote. Whatever is damaged in
        it is left out."""
        if not isinstance(recorded, dict):
            severity, colon, evidence = str(recorded).partition(': ')
            recorded = (
                {'severity': severity, 'evidence': evidence}
                if severity in SEVERITIES
                else {'evidence': str(recorded)}
            )
        usual = TROUBLES[name].severity if name in TROUBLES else 'note'
        severity = recorded.get('severity')
        lists = (recorded.get(key) for key in ('causes', 'changes'))
        return cls(
            name,
            step,
            severity if severity in SEVERITIES else usual,
            str(recorded.get('evidence', '')),
            *(tuple(map(str, one)) if isinstance(one, list) else () for one in lists),
        )

    def record(self) -> dict:
        """What metrics.jsonl holds of it, beside name and step."""
        return {
            'severity': self.severity,
            'evidence': self.evidence,
            'causes': list(self.causes),
            'changes': list(self.changes),
        }

    def __str__(self) -> str:
        return (
            f'{self.severity}: {self.evidence}. Likely causes, most likely first: {"; ".join(self.causes)}. '
            f'Change: {"; ".join(self.changes)}'
        )


def unclipped(config: Mapping) -> bool:
    return config['grad_clip'] == 0.0


def float16(config: Mapping) -> bool:
    return config['dtype'] == 'float16'


def skips(config: Mapping) -> bool:
    return config['on_nonfinite'] == 'skip'


def no_qk_norm(config: Mapping) -> bool:
    return not config['qk_norm']


def over_early(config: Mapping) -> bool:
    return (
        config['lr_decay_iters'] < 0.8 * config['max_iters'] and config['lr_schedule'] != 'constant'
    )


def guesses_its_input(config: Mapping) -> bool:
    return config['zero_init'] and config['tied_head']


TROUBLES = {
    'diverging': Trouble(
        'critical',
        ('the learning rate is too high', (unclipped, 'no clipping'), 'a stretch of broken text'),
        (
            'lower learning_rate by 3 to 10',
            (unclipped, 'grad_clip = 1'),
            'go on from an earlier checkpoint',
        ),
    ),
    'not_finite': Trouble(
        'critical',
        (
            'the learning rate is far too high',
            (float16, 'an overflow in float16'),
            (unclipped, 'no clipping'),
            'a division by zero or a logarithm of 0 in changed code',
        ),
        (
            'lower learning_rate',
            (unclipped, 'grad_clip = 1'),
            (float16, 'dtype bfloat16 or float32'),
            'on_nonfinite rewind, which gets past a single bad batch',
            (skips, 'or stop, which says where it begins'),
        ),
    ),
    'lr_too_high': Trouble(
        'warning',
        (
            'the learning rate is too high for this model',
            (no_qk_norm, 'no query-key norm, which allows higher rates'),
        ),
        ('lower learning_rate by 3 to 10', (no_qk_norm, 'or set qk_norm')),
    ),
    'lr_too_low': Trouble(
        'warning',
        ('the learning rate is too low', 'weights that begin too large for it'),
        (
            'raise learning_rate 10 times, and again, until the loss falls well',
            'the update ratio is then 0.001 to 0.01',
        ),
    ),
    'plateau': Trouble(
        'warning',
        (
            (over_early, 'the schedule is over long before the run'),
            'the learning rate is too high or too low to get further',
            'the model has learnt what it can',
            'targets that have nothing to do with the inputs',
        ),
        (
            (over_early, 'lr_decay_iters = max_iters'),
            'another learning_rate',
            'a larger n_layer or n_embd',
        ),
    ),
    'exploding_gradients': Trouble(
        'warning',
        (
            'norms left out or weights that begin too large',
            'the learning rate is too high',
            'batches of broken text',
        ),
        (
            "see with debug_training.py which layer's gradients and activations stand out, and mend that",
            'grad_clip = 1 keeps a single bad batch from doing harm',
        ),
    ),
    'vanishing_gradients': Trouble(
        'warning',
        (
            'residual connections or norms left out',
            'weights that begin far too small',
            'too many layers for a model without either',
        ),
        (
            'x = x + layer(norm(x)) in every block',
            'see with debug_training.py where the gradients become small',
        ),
    ),
    'all_clipped': Trouble(
        'warning',
        (
            (lambda config: config['grad_clip'] < 1.0, 'grad_clip is far below the usual norm'),
            'gradients that are too long: norms left out, weights that begin too large',
            'a loss that is summed instead of averaged',
        ),
        (
            (lambda config: config['grad_clip'] < 1.0, 'grad_clip = 1'),
            (
                lambda config: config['grad_clip'] >= 1.0,
                'see with debug_training.py which gradients are so long, and mend that',
            ),
        ),
    ),
    'no_warmup': Trouble(
        'warning',
        (
            "AdamW's first steps are several times larger than later ones, and no warm-up makes them small",
        ),
        ('warmup_iters = 1 to 10 % of max_iters', 'or a lower learning_rate'),
    ),
    'overfitting': Trouble(
        'warning',
        (
            'the text is too short for this model and so many steps',
            (lambda config: config['dropout'] == 0.0, 'no dropout'),
        ),
        (
            'stop where the validation loss is best: OUT_DIR/best holds that step',
            'more text',
            'dropout = 0.1 to 0.3',
            'a smaller model or max_iters',
        ),
    ),
    'underfitting': Trouble(
        'note',
        (
            'the model is too small for so many tokens',
            (lambda config: config['dropout'] > 0.0, 'too much dropout'),
        ),
        (
            'a larger n_layer and n_embd: about 20 tokens a parameter make the most of a given computation',
        ),
    ),
    'constant_batches': Trouble(
        'critical',
        ('the loader returns the same batch at every step', 'a text no longer than one batch'),
        ('see that the step number reaches the loader', 'more text'),
    ),
    'tiny_vocabulary': Trouble(
        'warning',
        (
            'the text was encoded with another tokenizer than the model is made for',
            'a text that is much too short for its tokenizer',
        ),
        ('make the dataset anew with a tokenizer that fits, as prepare.py --tokenizer=char',),
    ),
    'different_texts': Trouble(
        'warning',
        (
            'training and validation text are of different kinds',
            'a text sorted by kind, and cut in two',
            'one of them encoded with another tokenizer',
        ),
        ('take both splits from the same text, document by document, as prepare.py does',),
    ),
    'targets_not_shifted': Trouble(
        'critical',
        (
            'the targets are not the inputs moved by one token',
            'inputs and targets of different windows',
        ),
        ('y[t] = x[t + 1] in the loader',),
    ),
    'val_leaked': Trouble(
        'critical',
        (
            'the validation text was left in the training text',
            'a text that holds its documents more than once',
        ),
        (
            'split first, then remove from the training text what the other holds',
            'the validation loss of this run says nothing',
        ),
    ),
    'dead_units': Trouble(
        'warning',
        (
            'large steps have closed units for good',
            (lambda config: config['bias'], 'biases that begin too far below 0'),
            (
                lambda config: config['mlp'] == 'relu2',
                'squared ReLU, which gives no gradient below 0',
            ),
        ),
        (
            'lower learning_rate or raise warmup_iters',
            (
                lambda config: config['bias'],
                'let biases begin at 0, or leave them out: bias = False',
            ),
            (lambda config: config['mlp'] == 'relu2', 'mlp gelu or swiglu'),
        ),
    ),
    'wrong_initial_loss': Trouble(
        'warning',
        (
            'where it is too high: weights that begin too large, above all those of the head, or a loss that is summed instead of averaged',
            'where it is too low: targets that leak into the inputs or are the inputs',
            (
                guesses_its_input,
                'a tied head behind blocks that begin as the identity: its first guess is the token that it was given',
            ),
        ),
        (
            'a standard deviation of 0.02 for the weights',
            'look at the loss function and the targets',
            (guesses_its_input, 'tied_head = False'),
        ),
    ),
    'throughput_collapse': Trouble(
        'warning',
        (
            'another process uses this machine',
            'the disk cannot deliver the data',
            'the device is too hot, and slower',
        ),
        ('look at the machine (top, nvidia-smi)', 'the training itself is not touched'),
    ),
    'float16_underflow': Trouble(
        'warning',
        (
            'gradients that overflow in float16, so that the loss scale falls until small ones become 0',
            'a loss that is summed instead of averaged',
            'activations that grow',
        ),
        ('dtype bfloat16 or float32', 'average the loss', 'a lower learning_rate'),
    ),
    'weight_decay_too_strong': Trouble(
        'warning',
        ('weight_decay shrinks the weights faster than they learn',),
        ('weight_decay = 0.1, or so that learning_rate * weight_decay * max_iters stays below 1',),
    ),
    'batch_too_small': Trouble(
        'warning',
        ('a step has too few tokens: its gradient is nearly all noise',),
        ('raise batch_size or gradient_accumulation_steps', 'or lower learning_rate'),
    ),
    'generation_differs': Trouble(
        'warning',
        (
            'attention was changed in another place than attention_scores(), so that the cache of keys and values does not know',
            'a layer that looks at later tokens',
            'a fault in nib/generation.py',
        ),
        (
            'change attention in attention_scores() of model.py, which generation follows',
            'the losses are right, samples are not',
        ),
    ),
}
