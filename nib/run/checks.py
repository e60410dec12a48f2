"""Checks of config values, before anything is read or written."""

import math
from collections.abc import Mapping

from model import GPTConfig
from nib.errors import UserError
from nib.schema import check_range

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
AMOUNTS = (  # max_iters first: configs compute others from it
    'max_iters',
    'learning_rate',
    'min_lr',
    'weight_decay',
    'grad_clip',
    'warmup_iters',
    'cooldown_iters',
    'lr_decay_iters',
    'sample_tokens',
    'keep_every',
    'muon_lr_ratio',
)


def settle_schedule(config: Mapping) -> dict:
    """Returns the config with numbers in place of 'auto' for lr_decay_iters and min_lr."""
    settled = dict(config)
    if config['lr_decay_iters'] == 'auto':
        settled['lr_decay_iters'] = config['max_iters']
    if config['min_lr'] == 'auto':
        # 12 digits give what a person would write: 6e-05, not 5.9999999999999995e-05.
        settled['min_lr'] = float(f'{config["learning_rate"] / 10:.12g}')
    return settled


def check_config(config: Mapping, world_size: int, planned: bool = False):
    """Raises UserError for the first impossible value of train.py's config.

    Values that depend on the model or the data are checked there. planned: whether --budget or
    --params is still to choose the schedule and the batches, which are not checked then.
    """
    config = settle_schedule(config)
    check_range(config, *COUNTS, least=1, below=1 << 31)
    check_range(config, *AMOUNTS, least=0)
    check_range(config, 'vocab_size', least=0, below=1 << 31)
    check_range(config, 'beta1', 'beta2', 'muon_momentum', 'sgd_momentum', least=0, below=1)
    if config['init_from'] == 'scratch' and not planned:  # other weights may bring a schedule
        check_schedule(config)
    for key in ('out_dir', 'dataset') + ('wandb_project',) * config['wandb_log']:
        if not config[key]:
            raise UserError(f'{key} is empty: set it with --{key}=NAME')
    if not planned:
        check_accumulation(config, world_size)


def reject_plan(values: Mapping, origins: Mapping):
    """Raises UserError if the command or a config file sets --budget or --params."""
    for key in ('budget', 'params'):
        if values[key] and not origins[key].startswith('checkpoint'):  # of a run that was planned
            raise UserError(
                f'{key} is {values[key]!r} ({origins[key]}): only train.py plans runs; leave it out'
            )


def pick_model(config: Mapping, vocab_size: int) -> GPTConfig:
    """Returns the model of train.py's config. Raises UserError if it is impossible."""
    try:
        return GPTConfig.pick(config, vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_accumulation(config: Mapping, world_size: int):
    """Raises UserError if the processes cannot share the micro steps equally."""
    accumulation = config['gradient_accumulation_steps']
    if accumulation % world_size:
        multiple = math.ceil(accumulation / world_size) * world_size
        raise UserError(
            f'gradient_accumulation_steps {accumulation} is not a multiple of the number of '
            f'processes, {world_size}: try --gradient_accumulation_steps={multiple}'
        )


def check_schedule(config: Mapping):
    """Raises UserError if the learning rate schedule, without 'auto', is impossible."""
    if config['lr_schedule'] != 'constant' and config['min_lr'] > config['learning_rate']:
        raise UserError(
            f'min_lr {config["min_lr"]:g} is greater than learning_rate '
            f'{config["learning_rate"]:g}: lower it, or use --min_lr=auto, a tenth of learning_rate'
        )
    warmup, decay = config['warmup_iters'], config['lr_decay_iters']
    if config['lr_schedule'] != 'constant' and warmup > decay:
        raise UserError(
            f'warmup_iters {warmup} is greater than lr_decay_iters {decay}: lower it, for example '
            f'--warmup_iters={max(0, decay // 20)}, or raise lr_decay_iters'
        )
    cooldown = config['cooldown_iters']
    if config['lr_schedule'] == 'wsd' and not 0 < cooldown <= decay - warmup:
        raise UserError(
            f'cooldown_iters is {cooldown}: with lr_schedule wsd it must be from 1 to '
            f'lr_decay_iters - warmup_iters = {decay - warmup}, for example '
            f'--cooldown_iters={decay // 5}'
        )
