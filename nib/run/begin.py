"""How a run begins: its config, the weights that it starts from, its dataset and its plan."""

from nib.budget import plan, tokens_per_step
from nib.checkpoint.start import read_start
from nib.checkpoint.weights import PLANNED, Weights
from nib.machine.device import describe_device, pick_dtype
from nib.machine.memory import check_memory
from nib.machine.stopwatch import Stopwatch
from nib.run.checks import check_config, check_schedule, pick_model, settle_schedule
from nib.run.logbook import Logbook
from nib.schema import is_auto
from nib.tokens.dataset import TokenDataset
from nib.tokens.find import data_dir_of, open_or_prepare


def begin(
    values: dict, origins: dict, book: Logbook, watch: Stopwatch
) -> tuple[dict, dict, TokenDataset, Weights | None]:
    """Returns the config, where its values come from, the dataset and the weights (None: new ones).

    values, origins: those of configurator.configure. watch: for --budget. Raises UserError if a
    value is impossible, or if weights or dataset are missing or do not fit.
    """
    ranks = book.ranks
    dtype, reason = pick_dtype(values['dtype'], values['device'])
    may_plan = bool(values['budget'] or values['params'])
    check_config(values, ranks.world_size, may_plan)
    same = {key: value for key, value in values.items() if key != 'out_dir'}  # rank 0 writes it
    ranks.check_same(
        same | {'dtype': dtype},
        f'start all of them with the same command, config files and code; to resume, all must be '
        f'able to read {values["out_dir"]}',
    )
    device = ranks.own_device(values['device'])
    processes = f'{ranks.world_size} process{"es" * (ranks.world_size > 1)}'
    book.say(f'device {describe_device(device)}, {processes}, dtype {dtype} ({reason})')
    start, values = find_start(values, origins, book)
    # A plan chooses keys that are checked only after that.
    planned = may_plan and not (values['eval_only'] or start and start.resumed)
    check_config(values, ranks.world_size, planned)  # again: a checkpoint may bring its own
    values = settle_schedule(values)
    if not planned:
        check_schedule(values)
        # Before a dataset is prepared for an impossible model.
        model = pick_model(values, start.model.vocab_size if start else 1)
        used = values | {'device': device, 'dtype': dtype, 'ranks': ranks.world_size}
        if not values['eval_only']:
            check_memory(model, used, is_auto(origins['batch_size']))
    data = find_data(values, origins, planned, book)
    ranks.check_same(
        {'the fingerprint of the dataset': data.fingerprint[:16]},
        f'copy the bins of {data.folder} from one host to the others',
    )
    ranks.limit_waiting()
    config = values | {
        'device': device,
        'dtype': dtype,
        'ranks': ranks.world_size,
        'dataset': data.name,
        'data_dir': data_dir_of(data),
    }
    if planned:
        book.say('planning: measuring the speed of models of different sizes')
        chosen, line = ranks.on_first(lambda: plan(config, origins, data, watch))
        config, origins = config | chosen, origins | dict.fromkeys(chosen, PLANNED)
        check_config(config, ranks.world_size)
        book.say(line)
    book.say(
        f'dataset {data.name}: {len(data.train):,} training and {len(data.val):,} validation '
        f'tokens, vocabulary {data.vocab_size}; {tokens_per_step(config):,} tokens per step'
    )
    return config, origins, data, start


def find_start(values, origins, book) -> tuple[Weights | None, dict]:
    """Returns the weights to start from (None: new ones) and the values, fitted to their model.

    Raises UserError if init_from names nothing usable, or a key contradicts the weights.
    """
    if book.restarted_by_torchrun():  # the command line is still that of the first start
        values = values | {'init_from': 'resume'}
    if values['init_from'] == 'resume' and not values['eval_only']:
        book.lock_existing()  # before the checkpoint is read, so no other run saves meanwhile
    elif not values['overwrite'] and not values['eval_only']:
        book.check_new()
    start = read_start(
        values['init_from'], values['out_dir'], book.warn, check=Weights.known_tokenizer
    )
    if start:
        own = any(origin.startswith('checkpoint') for origin in origins.values())
        book.say(
            f'{"resuming" if start.resumed else "starting"} from {start.name}'
            f'{" with the config of the run (--print_config shows it)" * own}'
        )
        values = start.adopt(values, origins)
    return start, values


def find_data(values, origins, planned: bool, book) -> TokenDataset:
    """Returns the dataset; only a new run may prepare it. Raises UserError if there is none."""
    if planned and origins['block_size'] != 'command line':
        values = values | {'block_size': 1}  # the plan fits it to the text
    data = open_or_prepare(values, book.ranks, book.say)
    if values['sample_tokens']:
        data.tokenizer.decode([0])  # raises UserError now if its files are missing
    return data


def picks_batch_size(config: dict, origins: dict, start: Weights | None) -> bool:
    """Returns whether the run picks its batch_size; a resumed run keeps the one that it picked."""
    is_new = not (config['eval_only'] or start and start.resumed)
    return is_new and is_auto(origins['batch_size'])


def resume(t, state, start: Weights | None, config: dict, origins: dict, book) -> dict:
    """Restores the checkpoint of a resumed run; returns the changed keys and both their values.

    t: train.py's Training. state: its TrainState.
    """
    if not start or not start.resumed:
        return {}
    state.restore(t, start.resumed, start.tensors)
    own, saved = t.optimizer.named_state(t.raw_model), start.tensors['optimizer']
    by_rank = t.ranks.gather([name for name in own if name not in saved])
    new = [name for names in by_rank for name in names]
    if new and not config['eval_only']:
        book.warn(
            f'warning: {start.name} lacks the optimizer state {new[0]}'
            f'{f" and {len(new) - 1} more" * (len(new) > 1)}: initial values are used'
        )
    config['init_from'] = start.resumed.state['config']['init_from']  # how the run began
    origins['init_from'] = start.resumed.state.get('origins', {}).get('init_from', 'default')
    changes = start.changes(config)
    if changes:
        pairs = (f'{key} {before!r} -> {now!r}' for key, (before, now) in changes.items())
        book.say(f'changed since the checkpoint: {", ".join(pairs)}')
    if state.step >= config['max_iters'] and not config['eval_only']:
        book.say(
            f'{state.step} steps are done, and max_iters is {config["max_iters"]}; to continue '
            f'training, raise --max_iters'
        )
    return changes
