"""The report of debug_training.py, as lines to read: every figure with its healthy range and what it means.

The report_ functions are generators of lines, as some take a while to compute, and return what is out of range. `training`
is debug_training.py's: the model, its batches, and single steps of it.
"""

import math
import textwrap
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import replace

from nib.doctor import health, inspection
from nib.doctor.health import OutOfRange

MEMORIZED_TOKENS = 1024  # as many can be learnt by heart in 50 steps
ATTENDED = 4  # sequences whose attention is measured
ALL_LAYERS = 6  # so many are shown without --full
WIDTH = 118

Report = Generator[str, None, list[OutOfRange]]


def note(text: str, label: str = '') -> str:
    """A sentence that explains, beside the label of a column where it has one."""
    label = f'{label:16}' if len(label) > 3 else label
    return textwrap.fill(text, WIDTH, initial_indent=label, subsequent_indent=' ' * len(label))


def count(n: int, noun: str) -> str:
    return f'{n:,} {noun}{"s" * (n != 1)}'


def examine(training, full: bool, overfit_steps: int) -> Iterator[str]:
    """All of the report. full: every layer, also of a deep model."""
    yield f'One batch under the microscope: {training.describe()}'
    yield '\nTHE BATCH\n'
    yield from describe_batch(training)
    findings = health.judge_shift(inspection.shifted_share(*training.batch()))
    yield '\n1. GRADIENTS AND ONE UPDATE, PARAMETER BY PARAMETER\n'
    findings += yield from report_parameters(training, full)
    yield '\n2. ACTIVATIONS, LAYER BY LAYER\n'
    loss, rows = inspection.measure_layers(
        training.model, *training.batch(), training.precision, ATTENDED
    )
    findings += yield from report_layers(training, rows, full)
    yield '\n3. THE LOSS AT THE START\n'
    findings += yield from report_start(training, loss)
    yield '\n4. LEARNING THE BATCH BY HEART\n'
    findings += yield from report_memorizing(training, overfit_steps)
    yield '\n5. WHAT IS OUT OF RANGE\n'
    for finding in findings:
        yield note(f'{finding.what}. {finding.remedy}.', '<- ')
    if not findings:
        yield 'Nothing: all figures are in their healthy ranges.'


def describe_batch(training) -> Iterator[str]:
    x, y = training.batch()
    sequences, positions = training.batch_size, training.values['block_size']
    cut = (
        ''
        if x.shape == (sequences, positions)
        else (
            f', the beginning of {count(sequences, "sequence")} of {positions:,} (--batch_tokens={sequences * positions} takes all)'
        )
    )
    yield note(
        f'{count(len(x), "sequence")} of {count(x.shape[1], "token")}, which step {training.data_step} of the run begins '
        f'with{cut}.'
    )
    yield f'  input     {training.show_tokens(x[0, : training.shown])} ...'
    yield f'  target    {training.show_tokens(y[0, : training.shown])} ...'
    yield f'Each target should be the next token of the input: {inspection.shifted_share(x, y):.0%} are.'
    if not training.values['dataset']:
        yield note(
            'Random tokens hold nothing to be learnt: on new ones no model can do better than ln(vocab_size), a guess. '
            'But these here can be learnt by heart.'
        )


def shown_rows(
    names: Iterable[str], marks: Mapping[str, str], n_layer: int, full: bool
) -> tuple[set[str], str]:
    """Which rows (h.3, h.3.ln_1.weight, ln_f) to show, and a line about the others. Of a deep model these are the first layer,
    the middle one and the last, and of what is marked elsewhere the first of each kind of row. marks: row -> mark."""
    names = list(names)
    if full or n_layer <= ALL_LAYERS:
        return set(names), ''
    some = {f'h.{i}' for i in (0, n_layer // 2, n_layer - 1)}
    shown = {
        name for name in names if not name.startswith('h.') or '.'.join(name.split('.')[:2]) in some
    }

    def kind(name):
        return name.split('.')[2:], marks[name]

    for name in names:
        if name in marks and not any(kind(name) == kind(other) for other in shown & marks.keys()):
            shown.add(name)
    hidden = [name for name in names if name not in shown]
    marked = sum(name in marks for name in hidden)
    what = f'{marked} of them marked like those above' if marked else 'none of them marked'
    return shown, f'{len(hidden)} rows of the layers between are left out, {what}: --full shows all'


# -- parameters ------------------------------------------------------------------------------------------------------


def report_parameters(training, full: bool) -> Report:
    values, config, batch = training.values, training.model.config, training.batch()
    training.accumulate([batch])
    rows = inspection.measure_parameters(training.model)
    training.model.zero_grad(set_to_none=True)
    optimizer = training.new_optimizer()
    with training.undone() as before:
        _, norm = training.step(optimizer, [batch])
        rows = inspection.add_updates(rows, training.model, before)
    method_of = {
        p: type(part).__name__.lower() for part in optimizer.parts for p in part.params
    }  # 'adamw' or 'muon'
    methods = [method_of.get(p, '') for p in training.model.parameters()]
    rows = [replace(row, name=row.name.removeprefix('transformer.')) for row in rows]
    state = values['beta1'], not training.has_memory, training.start is not None
    limits = {
        row.name: health.update_limits(*state, row.name, method)
        for row, method in zip(rows, methods)
    }
    norm_limits = health.grad_norm_limits(config.n_layer, config.n_embd, training.start is None)
    marks = {
        row.name: mark for row in rows if (mark := health.mark_parameter(row, limits[row.name]))
    }
    shown, left_out = shown_rows((row.name for row in rows), marks, config.n_layer, full)
    width = max(len(row.name) for row in rows)
    yield (
        f'{"parameter":{width}}{"shape":>14}{"weight rms":>12}{"grad mean":>11}{"grad std":>10}{"grad max":>10}'
        f'{"grad norm":>11}{"update/weight":>15}'
    )
    for row in rows:
        if row.name in shown:
            ratio = '-' if row.update_ratio is None else f'{row.update_ratio:.5f}'
            mark = f'  <- {marks[row.name]}' if row.name in marks else ''
            yield (
                f'{row.name:{width}}{" x ".join(map(str, row.shape)):>14}{row.rms:12.4f}{row.grad_mean:11.1e}'
                f'{row.grad_std:10.1e}{row.grad_max:10.1e}{row.grad_norm:11.4f}{ratio:>15}{mark}'
            )
    yield f'{"all":{width}}{training.model.num_params():14,}{"":43}{norm:11.4f}'
    if left_out:
        yield left_out
    yield ''
    yield from explain_parameters(
        training,
        norm,
        norm_limits,
        health.update_limits(*state),
        health.update_limits(*state, method='muon'),
    )
    if any(row.behind_zeros for row in rows):
        yield note(
            'Where a c_proj is all 0, its block passes nothing on yet, and no gradient passes it: the rows before it have '
            'none in this step, and will have when it has moved.',
            'zeros',
        )
    return health.judge_grad_norm(norm, norm_limits) + health.judge_parameters(
        rows, limits, values['learning_rate']
    )


def explain_parameters(
    training,
    norm: float,
    norm_limits: tuple[float, float],
    limits: tuple[float, float],
    muon_limits: tuple[float, float],
) -> Iterator[str]:
    """limits, muon_limits: of the update ratio of a matrix that AdamW moves, and of one that Muon moves."""
    values, clip, rate = (
        training.values,
        training.values['grad_clip'],
        training.values['learning_rate'],
    )
    residual = (
        f'{0.02 / math.sqrt(2 * training.model.config.n_layer):.4f}'
        if not values['zero_init']
        else '0'
    )
    yield note(
        f'root mean square of the weights. Fresh: 0.02; {residual} in c_proj, whose outputs add up over the layers; '
        f'gains (ln, norm) 1, biases 0.',
        'weight rms',
    )
    yield note(
        "mean, std and largest absolute value of d loss / d weight over the parameter's entries, in nats per unit of "
        'weight. Healthy: finite, not all 0, and of one size in all layers but for a factor of ten or so.',
        'grad ...',
    )
    if not clip:
        clipped = 'grad_clip 0 clips nothing'
    elif norm <= clip:
        clipped = f'below grad_clip {clip:g}, so nothing is clipped'
    else:
        clipped = (
            f'grad_clip {clip:g} makes all gradients {norm / clip:.2f} times smaller for the step'
        )
    fresh = (
        ''
        if norm_limits == health.GRAD_NORM
        else (
            f', and up to sqrt(n_layer * n_embd) = {norm_limits[1]:.3g} in a fresh model, which all tokens pull the same way'
        )
    )
    yield note(
        f'root of the sum of the squared gradients. Healthy: all parameters together {health.GRAD_NORM[0]:g} to '
        f'{health.GRAD_NORM[1]:g}{fresh}. Here {norm:.3g}; {clipped}.',
        'grad norm',
    )
    if values['optimizer'] not in health.UPDATE_RANGES:
        yield note(
            f'||w after - w before|| / ||w before|| of one step at the full learning rate {rate:g}: how much of itself a '
            f'matrix changes. What is healthy with {values["optimizer"]} is not known here, so none is marked for it.',
            'update/weight',
        )
        return
    low, high = health.UPDATE_RATIO
    ratio = (
        f'||w after - w before|| / ||w before|| of one AdamW step at the full learning rate {rate:g}: how much of itself a '
        f'matrix changes. In a run well under way {low:g} to {high:g} is healthy. '
    )
    if training.has_memory:
        ratio += f'A few times more or less is no fault: marked is what is below {limits[0]:.1g} or above {limits[1]:.1g}. '
    else:
        ratio += (
            f'This first step is larger: AdamW has no memory yet, m / sqrt(v) is 1 or -1, so each weight moves by {rate:g} '
            f'whatever its gradient, and the ratio is learning_rate / weight rms. In later steps gradients partly cancel, '
            f'which makes them about {health.first_step_factor(values["beta1"]):.1f} times smaller, and the weights grow. '
            f'Healthy here: {f"{limits[0]:.1g} to" if limits[0] else "up to"} {limits[1]:.2g}. '
        )
    ratio += f'Embeddings and head may change {health.APART:g} times as much, as each row is of one token. '
    if values['optimizer'] == 'muon':
        below = f'below {muon_limits[0]:.1g} or ' if muon_limits[0] else ''
        ratio += (
            f"The blocks' matrices are Muon's: in every step, the first like all others, their weights move by a root "
            f'mean square of about 0.2 * learning_rate * muon_lr_ratio = {0.2 * rate * values["muon_lr_ratio"]:.2g}, as '
            f'far in rare directions as in frequent ones, so they bear more. Theirs are marked {below}above '
            f'{muon_limits[1]:.2g}. '
        )
    yield note(
        ratio + 'Biases start at 0 and gains at 1, so their ratio has no range.', 'update/weight'
    )
    if not training.has_memory:
        warmup = values['warmup_iters']
        yield note(
            f'This is why training warms up: its real first step has 1/{warmup + 1} of this rate.'
            if warmup
            else 'warmup_iters is 0, so training really begins with this step.',
            ' ' * 16,
        )


# -- layers ----------------------------------------------------------------------------------------------------------


def report_layers(training, rows: list[health.LayerStats], full: bool) -> Report:
    (x, _), config = training.batch(), training.model.config
    largest = health.largest_entropy(x.shape[1])
    marks = {row.name: mark for row in rows if (mark := health.mark_layer(row, x.shape[1]))}
    shown, left_out = shown_rows((row.name for row in rows), marks, config.n_layer, full)
    yield (
        f'{"layer":12}{"mean":>10}{"std":>10}{"attention adds":>17}{"MLP adds":>11}{"dead units":>13}'
        f'{"attention entropy":>20}{"of the largest":>17}'
    )
    for row in rows:
        if row.name not in shown:
            continue
        line = f'{row.name:12}{row.mean:10.4f}{row.std:10.4f}'
        if row.entropy is not None:
            share = f'{row.entropy / largest:.1%}' if largest else '-'
            dead = '-' if row.dead is None else f'{row.dead:.1%}'
            line += f'{row.attention_std:17.4f}{row.mlp_std:11.4f}{dead:>13}{row.entropy:15.3f} nats{share:>17}'
        yield line + (f'  <- {marks[row.name]}' if row.name in marks else '')
    if left_out:
        yield left_out
    yield ''
    yield note(
        'of the residual stream, the numbers that every block reads and adds to, behind this layer; without dropout. '
        'Healthy: finite and not 0. The std grows with depth, and the last norm brings it back to about its gain, 1 when '
        'fresh.',
        'mean, std',
    )
    yield note("std of what the block's attention and MLP add to the stream.", '... adds')
    closed = {
        'relu2': 'are exactly 0',
        'gelu': 'stay below -3, where GELU is flat (its slope within 0.012 of 0),',
        'swiglu': 'have a gate that stays below -6, where SiLU is flat (its slope within 0.0125 of 0),',
    }
    closed = closed.get(config.mlp, 'are exactly 0')
    yield note(
        f"share of the MLP's hidden units that {closed} for every one of the {x.numel():,} tokens: they learn nothing "
        f'from them. Healthy: at most {health.DEAD:.0%}.',
        'dead units',
    )
    yield note(
        f'how widely a position spreads its attention, mean over heads, positions and '
        f'{count(min(ATTENDED, len(x)), "sequence")}. Position t sees t places, so ln t is its most, and {largest:.3f} '
        f'nats the largest mean; 0 is all on one place. Healthy: above {health.ENTROPY:.0%} of the largest. A fresh model '
        f'spreads almost evenly, and learns where to look.',
        'entropy',
    )
    return health.judge_layers(rows, x.shape[1])


# -- losses ----------------------------------------------------------------------------------------------------------


def report_start(training, loss: float) -> Report:
    vocab_size, n_embd, n_tokens = (
        training.data.vocab_size,
        training.model.config.n_embd,
        training.batch()[0].numel(),
    )
    guess, fresh, is_text = (
        math.log(vocab_size),
        training.start is None,
        bool(training.values['dataset']),
    )
    tolerance = health.start_tolerance(n_embd, n_tokens) if fresh else None
    healthy = (
        f', healthy: within {tolerance:.3f}' if fresh else ', healthy: below 0' if is_text else ''
    )
    yield f'loss              {loss:.4f} nats per token'
    yield f'ln(vocab_size)    {guess:.4f} nats: ln {vocab_size:,}, a guess among all tokens alike'
    yield f'difference       {loss - guess:+.4f} nats{healthy}\n'
    if fresh:
        yield note(
            f'A fresh model knows nothing and should guess. Its logits are not quite equal: they spread by 0.02 * '
            f'sqrt(n_embd) = {0.02 * math.sqrt(n_embd):.2f}, which costs half of its square, {0.0002 * n_embd:.3f}. Twice '
            f'that is allowed for, three standard errors of a mean over {n_tokens:,} tokens, and 0.1 for a tied head, '
            f'which first guesses its own input.'
        )
    elif is_text:
        yield 'These weights have learnt something, so they should know more than a guess.'
    else:
        yield 'A model that has learnt to expect something is worse than a guess on random tokens.'
    return health.judge_start(loss, vocab_size, tolerance) if fresh or is_text else []


def report_memorizing(training, steps: int) -> Report:
    x, y = (
        part[: max(1, MEMORIZED_TOKENS // part.shape[1]), :MEMORIZED_TOKENS].contiguous()
        for part in training.batch()
    )
    entropy, losses, rate, warmup = (
        inspection.unigram_entropy(y),
        {},
        training.values['learning_rate'],
        steps // 10,
    )
    part = (
        '' if x.shape == training.batch()[0].shape else f', the first {count(len(x), "sequence")}'
    )
    rises = f', to which it rises over the first {count(warmup, "step")}' if warmup else ''
    yield (
        note(
            f"{count(steps, 'step')} of train.py's train_step on the same {count(x.numel(), 'token')}{part}, without "
            f'dropout, at the full learning rate {rate:g}{rises}.'
        )
        + '\n'
    )
    training.model.eval()  # dropout would keep it from learning by heart
    with training.undone():
        optimizer = training.new_optimizer()
        for step in range(
            steps + 1
        ):  # each tells the loss before it, so the last one is there for its loss alone
            optimizer.lr = rate * min(1.0, (step + 1) / (warmup + 1))
            loss, _ = training.step(optimizer, [(x, y)])
            if step % max(1, steps // 5) == 0 or step == steps:
                losses[step] = loss
                yield f'step {step:5}    loss {loss:8.4f}'
    training.model.train()
    goal = health.MEMORIZED * min(entropy, losses[0])
    yield f'healthy:      at most {goal:.4f}\n'
    yield note(
        f'A loss of {loss:.3g} is a probability of exp(-{loss:.3g}) = {math.exp(-loss):.3g} for the right token; at the '
        f'start it was {math.exp(-losses[0]):.2g}. One who knows how often each token comes, but does not look at the '
        f'input, gets no lower than {entropy:.3f} nats, the entropy of the targets: two thirds of that, and of the first '
        f'loss, takes learning what follows what. A loop that cannot learn one batch by heart will not learn a text; that '
        f'it can says nothing about new text.'
    )
    return health.judge_memorizing(losses, goal)
