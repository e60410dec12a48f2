"""Values of a config that no run can have, refused before anything is read or written."""

import math
from collections.abc import Mapping

from nib.errors import UserError

COUNTS = (
    'eval_interval',
    'eval_iters',
    'keep_last',
    'log_interval',
    'batch_size',
    'block_size',
    'max_bad_steps',
    'gradient_accumulation_steps',
    'muon_iterations',
)
AMOUNTS = (
    'learning_rate',
    'min_lr',
    'weight_decay',
    'grad_clip',
    'warmup_iters',
    'cooldown_iters',
    'lr_decay_iters',
    'max_iters',
    'sample_tokens',
    'keep_every',
    'muon_lr_ratio',
)


def settle_schedule(config: Mapping) -> dict:
    """The config with numbers in place of the 'auto' of lr_decay_iters and min_lr."""
    settled = dict(config)
    if config['lr_decay_iters'] == 'auto':
        settled['lr_decay_iters'] = config['max_iters']
    if (
        config['min_lr'] == 'auto'
    ):  # as a person writes it: 6e-5 for 6e-4, where the division gives 5.9999999999999995e-05
        settled['min_lr'] = float(f'{config["learning_rate"] / 10:.12g}')
    return settled


def check_config(config: Mapping, world_size: int):
    """UserError for the first value of train.py's config that cannot be. What the model and the data refuse is theirs."""
    config = settle_schedule(config)
    for keys, least, below in (
        (COUNTS, 1, 1 << 31),
        (AMOUNTS, 0, math.inf),
        (('beta1', 'beta2', 'muon_momentum'), 0, 1),
    ):
        for key in keys:
            if not least <= config[key] < below:
                raise UserError(
                    f'{key} is {config[key]}: it must be at least {least}'
                    + (f' and less than {below:,}' if below < math.inf else ' and finite')
                )
    if config['lr_schedule'] != 'constant' and config['min_lr'] > config['learning_rate']:
        raise UserError(
            f'min_lr {config["min_lr"]:g} is more than learning_rate {config["learning_rate"]:g}: lower it, or leave it '
            f'to --min_lr=auto, a tenth of learning_rate'
        )
    warmup, decay, cooldown = (
        config[key] for key in ('warmup_iters', 'lr_decay_iters', 'cooldown_iters')
    )
    if config['lr_schedule'] != 'constant' and warmup > decay:
        raise UserError(
            f'warmup_iters {warmup} is more than lr_decay_iters {decay}: lower it, for instance '
            f'--warmup_iters={max(0, decay // 20)}'
        )
    if config['lr_schedule'] == 'wsd' and not 0 < cooldown <= decay - warmup:
        raise UserError(
            f'cooldown_iters {cooldown}: with lr_schedule wsd it is from 1 to lr_decay_iters - warmup_iters = '
            f'{decay - warmup}, for instance --cooldown_iters={decay // 5}'
        )
    for key in ('out_dir', 'dataset') + ('wandb_project',) * config['wandb_log']:
        if not config[key]:
            raise UserError(f'{key} is empty: name one with --{key}=NAME')
    accumulation = config['gradient_accumulation_steps']
    if accumulation % world_size:
        raise UserError(
            f'gradient_accumulation_steps {accumulation} cannot be shared out over {world_size} processes: try '
            f'--gradient_accumulation_steps={math.ceil(accumulation / world_size) * world_size}'
        )
