"""The report of debug_training.py: each value with its healthy range and its meaning.

The report_ functions are generators of lines, because some lines take a while to compute. They
return what is out of range. `training` is the Microscope of debug_training.py: a model, its
batches, and single steps.
"""

import math
import textwrap
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace

from nib.doctor import health, inspection, remedies
from nib.doctor.health import ParameterStats
from nib.doctor.remedies import OutOfRange

MEMORIZED_TOKENS = 1024  # this many can be memorized in 50 steps
ATTENDED = 4  # sequences on which attention is measured
ALL_LAYERS = 6  # models with more layers are abbreviated without --full
WIDTH = 118  # of the report

Report = Generator[str, None, list[OutOfRange]]


def note(text: str, label: str = '') -> str:
    """Wraps an explanation, next to the label of a column if there is one."""
    label = f'{label:16}' if len(label) > 3 else label
    return textwrap.fill(text, WIDTH, initial_indent=label, subsequent_indent=' ' * len(label))


def count(n: int, noun: str) -> str:
    return f'{n:,} {noun}{"s" * (n != 1)}'


def examine(training, full: bool, overfit_steps: int) -> Iterator[str]:
    """Yields the report. full: show every layer of a deep model. overfit_steps: for section 4."""
    x, y = training.batch()
    yield f'One batch in detail: {training.describe()}'
    yield '\nTHE BATCH\n'
    yield from describe_batch(training)
    findings = remedies.judge_shift(float(inspection.shifted_share(x, y)))
    yield '\n1. GRADIENTS AND ONE UPDATE, PARAMETER BY PARAMETER\n'
    findings += yield from report_parameters(training, full)
    yield '\n2. ACTIVATIONS, LAYER BY LAYER\n'
    loss, rows = inspection.measure_layers(training.model, x, y, training.precision, ATTENDED)
    findings += yield from report_layers(training, rows, full)
    yield '\n3. THE LOSS AT THE START\n'
    findings += yield from report_start(training, loss)
    yield '\n4. MEMORIZING THE BATCH\n'
    findings += yield from report_memorizing(training, overfit_steps)
    yield '\n5. WHAT IS OUT OF RANGE\n'
    for finding in findings:
        yield note(f'{finding.what}. {finding.remedy}.', '<- ')
    if not findings:
        yield 'Nothing: all values are in their healthy ranges.'


def describe_batch(training) -> Iterator[str]:
    x, y = training.batch()
    sequences, positions = training.batch_size, training.values['block_size']
    cut = ''
    if x.shape != (sequences, positions):
        cut = (
            f', which has {count(sequences, "sequence")} of {positions:,} '
            f'(--batch_tokens={sequences * positions} examines all)'
        )
    yield note(
        f'{count(len(x), "sequence")} of {count(x.shape[1], "token")}, from the first micro batch '
        f'of step {training.data_step}{cut}.'
    )
    yield from describe_rate(training)
    yield f'  input     {training.show_tokens(x[0, : training.shown])} ...'
    yield f'  target    {training.show_tokens(y[0, : training.shown])} ...'
    share = float(inspection.shifted_share(x, y))
    yield f'Each target should be the next token of the input: {share:.0%} are.'
    if not training.values['dataset']:
        yield note(
            'Random tokens contain nothing to learn: on new ones, no model is better than a '
            'uniform guess, with a loss of ln(vocab_size). But these tokens can be memorized.'
        )


def describe_rate(training) -> Iterator[str]:
    """Yields the learning rate of the step in train.py, if it is not that of the updates below."""
    done, steps = training.steps_done, training.values['max_iters']
    rate, full = training.scheduled_rate, training.values['learning_rate']
    if done >= steps:
        yield f'The run has done all its {count(steps, "step")}: train.py would not run this one.'
    elif rate != full:
        yield (
            f'train.py uses the scheduled learning rate {rate:.4g} for this step; the updates '
            f'below use the full rate, {full:g}.'
        )


def shown_rows(marks: Mapping[str, str], n_layer: int, full: bool) -> tuple[set[str], str]:
    """Selects the rows (h.3, h.3.ln_1.weight, ln_f) to show; also returns a line about the others.

    For a deep model, these are the first, the middle and the last layer, and the first marked row
    of each kind from the other layers. marks: row -> mark, '' for none.
    """
    if full or n_layer <= ALL_LAYERS:
        return set(marks), ''
    layers = {f'h.{i}' for i in (0, n_layer // 2, n_layer - 1)}
    shown = set()
    for name in marks:
        if not name.startswith('h.') or '.'.join(name.split('.')[:2]) in layers:
            shown.add(name)

    def kind(name):
        return name.split('.')[2:], marks[name]

    for name in marks:
        if marks[name] and not any(kind(name) == kind(other) for other in shown):
            shown.add(name)
    hidden = [name for name in marks if name not in shown]
    marked = sum(bool(marks[name]) for name in hidden)
    what = f'{marked} of them marked like those above' if marked else 'none of them marked'
    return shown, f'{len(hidden)} rows of other layers are omitted, {what}: --full shows all'


# -- parameters ------------------------------------------------------------------------------------


def measure_step(training) -> tuple[list[ParameterStats], dict[str, tuple[float, float]], float]:
    """Measures a step, which is undone.

    Returns the statistics of the parameters, the limits of their update ratios by name, and the
    norm of all gradients.
    """
    batch, optimizer = training.batch(), training.new_optimizer()
    training.accumulate([batch])
    rows = inspection.measure_parameters(training.model)
    training.model.zero_grad(set_to_none=True)
    with training.undone() as before:
        _, norm = training.step(optimizer, [batch])
        rows = inspection.add_updates(rows, training.model, before)
    rows = [replace(row, name=row.name.removeprefix('transformer.')) for row in rows]
    method_of = {p: type(part).__name__.lower() for part in optimizer.parts for p in part.params}
    ratios, limits = health.group_ratios(rows), {}
    trained = (p for p in training.model.parameters() if p.requires_grad)
    for row, p in zip(rows, trained):
        method = method_of.get(p, '')  # 'adamw', 'muon', or another optimizer's class
        limits[row.name] = health.limits_of(row, ratios, update_limits(training, method))
    return rows, limits, norm


def report_parameters(training, full: bool) -> Report:
    config, is_new = training.model.config, training.start is None
    rows, limits, norm = measure_step(training)
    norm_limits = health.grad_norm_limits(config.n_layer, config.n_embd, fresh=is_new)
    marks = {row.name: remedies.mark_parameter(row, limits[row.name]) for row in rows}
    shown, omitted = shown_rows(marks, config.n_layer, full)
    width = max(len(row.name) for row in rows)
    yield (
        f'{"parameter":{width}}{"shape":>14}{"weight rms":>12}{"grad mean":>11}{"grad std":>10}'
        f'{"grad max":>10}{"grad norm":>11}{"update/weight":>15}'
    )
    for row in rows:
        if row.name in shown:
            shape = ' x '.join(map(str, row.shape))
            ratio = '-' if row.update_ratio is None else f'{row.update_ratio:.5f}'
            mark = f'  <- {marks[row.name]}' if marks[row.name] else ''
            yield (
                f'{row.name:{width}}{shape:>14}{row.rms:12.4f}{row.grad_mean:11.1e}'
                f'{row.grad_std:10.1e}{row.grad_max:10.1e}{row.grad_norm:11.4f}{ratio:>15}{mark}'
            )
    yield f'{"all":{width}}{training.model.num_params():14,}{"":43}{norm:11.4f}'
    if omitted:
        yield omitted
    yield ''
    yield from explain_weights_and_gradients(training, norm, norm_limits)
    yield from explain_updates(training)
    if any(row.behind_zeros for row in rows):
        yield note(
            'If a c_proj is all zeros, its block adds nothing yet, and no gradient passes through '
            'it. The parameters before it have no gradient in this step, but will have one after '
            'the first update.',
            'zeros',
        )
    findings = remedies.judge_grad_norm(norm, norm_limits)
    rate = training.values['learning_rate']
    return findings + remedies.judge_parameters(rows, limits, rate)


def update_limits(training, method: str) -> tuple[float, float]:
    """Returns the limits for the next step at the full learning rate. method: the optimizer."""
    values, trained = training.values, training.start is not None
    first = not training.has_memory
    return health.update_limits(values['beta1'], first, trained, method, values['warmup_iters'])


def explain_weights_and_gradients(
    training, norm: float, norm_limits: tuple[float, float]
) -> Iterator[str]:
    values, clip = training.values, training.values['grad_clip']
    residual = f'{0.02 / math.sqrt(2 * training.model.config.n_layer):.4f}'
    if values['zero_init']:
        residual = '0'
    yield note(
        f'root mean square of the weights. In a new model: 0.02; {residual} in c_proj, whose '
        f'outputs add up over the layers; gains (ln, norm) 1, biases 0.',
        'weight rms',
    )
    yield note(
        "mean, std and largest absolute value of d loss / d weight over the parameter's entries, "
        'in nats per unit of weight. Healthy: finite, not all 0, and similar in all layers, within '
        'a factor of about ten.',
        'grad ...',
    )
    if not clip:
        clipped = 'grad_clip 0 clips nothing'
    elif norm <= clip:
        clipped = f'below grad_clip {clip:g}, so nothing is clipped'
    else:
        clipped = f'grad_clip {clip:g} divides all gradients by {norm / clip:.2f} for the step'
    low, high = health.GRAD_NORM
    fresh = ''
    if norm_limits != health.GRAD_NORM:
        fresh = (
            f', and up to sqrt(n_layer * n_embd) = {norm_limits[1]:.3g} in a new model, which all '
            f'tokens pull in the same direction'
        )
    yield note(
        f'root of the sum of the squared gradients. Healthy: {low:g} to {high:g} for all '
        f'parameters together{fresh}. Here {norm:.3g}; {clipped}.',
        'grad norm',
    )


def explain_updates(training) -> Iterator[str]:
    values, rate = training.values, training.values['learning_rate']
    begin = '||w after - w before|| / ||w before||: how much one'
    if values['optimizer'] not in health.UPDATE_RANGES:
        yield note(
            f'{begin} step at the full learning rate {rate:g} changes a matrix. The healthy range '
            f'for {values["optimizer"]} is not known, so none is marked.',
            'update/weight',
        )
        return
    low, high = health.UPDATE_RATIO
    least, most = update_limits(training, 'adamw')
    text = (
        f'{begin} AdamW step at the full learning rate {rate:g} changes a matrix. After the start '
        f'of a run, {low:g} to {high:g} is healthy. '
    )
    if training.has_memory:
        text += (
            f'A few times more or less does no harm: values below {least:.1g} or above {most:.1g} '
            f'are marked. '
        )
    else:
        healthy = f'{least:.1g} to {most:.2g}' if least else f'up to {most:.2g}'
        text += (
            f'This first step is larger: AdamW has no state yet, and m / sqrt(v) is 1 or -1, so '
            f'each weight moves by {rate:g} whatever its gradient, and the ratio is learning_rate '
            f'/ weight rms. Later, gradients partly cancel, which makes steps about '
            f'{health.first_step_factor(values["beta1"]):.1f} times smaller, and weights grow. '
            f'Healthy here: {healthy}. '
        )
    text += (
        'Only the matrices of attention and of the MLPs are judged, each group as a whole. '
        'Embeddings and head are not, because a batch contains few of their rows. '
    )
    if values['optimizer'] == 'muon':
        least, most = update_limits(training, 'muon')
        below = f'below {least:.1g} or ' if least else ''
        rms = 0.2 * rate * values['muon_lr_ratio']
        text += (
            f"Muon updates the blocks' matrices. In every step, their weights move by a root mean "
            f'square of about 0.2 * learning_rate * muon_lr_ratio = {rms:.2g}, equally far in rare '
            f'and frequent directions, so larger updates are healthy. They are marked if '
            f'{below}above {most:.2g}. '
        )
    text += 'Biases start at 0 and gains at 1, so their ratio has no range.'
    yield note(text, 'update/weight')
    if not training.has_memory:
        warmup = values['warmup_iters']
        if warmup:
            text = (
                f'This is why training warms up: the real first step has 1/{warmup + 1} of this '
                f'rate, so its update is smaller by this factor.'
            )
        else:
            text = 'warmup_iters is 0, so training begins with exactly this step.'
        yield note(text, ' ' * 16)


# -- layers ----------------------------------------------------------------------------------------


def report_layers(training, rows: list[health.LayerStats], full: bool) -> Report:
    (x, _), config = training.batch(), training.model.config
    n_positions = x.shape[1]
    largest = health.largest_entropy(n_positions)
    marks = {row.name: remedies.mark_layer(row, n_positions) for row in rows}
    shown, omitted = shown_rows(marks, config.n_layer, full)
    yield (
        f'{"layer":12}{"mean":>10}{"std":>10}{"attention adds":>17}{"MLP adds":>11}'
        f'{"dead units":>13}{"attention entropy":>20}{"of the largest":>17}'
    )
    for row in rows:
        if row.name not in shown:
            continue
        line = f'{row.name:12}{row.mean:10.4f}{row.std:10.4f}'
        if row.mlp_std is not None:
            dead = '-' if row.dead is None else f'{row.dead:.1%}'
            line += f'{row.attention_std:17.4f}{row.mlp_std:11.4f}{dead:>13}'
        if row.entropy is not None:
            share = f'{row.entropy / largest:.1%}' if largest else '-'
            line += f'{row.entropy:15.3f} nats{share:>17}'
        yield line + (f'  <- {marks[row.name]}' if marks[row.name] else '')
    if omitted:
        yield omitted
    yield ''
    yield from explain_layers(x, config.mlp, largest)
    return remedies.judge_layers(rows, n_positions)


def explain_layers(x, mlp_kind: str, largest: float) -> Iterator[str]:
    """x: token ids (B, T). largest: the largest possible mean entropy."""
    yield note(
        'of the residual stream after this layer, which every block reads and adds to; without '
        'dropout. Healthy: finite and not 0. The std grows with depth, and the last norm scales it '
        'to about its gain, which is 1 in a new model.',
        'mean, std',
    )
    yield note("std of what the block's attention and MLP add to the stream.", '... adds')
    flat = 'stay below -3, where GELU is flat (its slope is within 0.012 of 0),'
    closed = {
        'gelu': flat,
        'gelu_erf': flat,
        'swiglu': 'have a gate that stays below -6, where SiLU is flat (its slope is within 0.0125 '
        'of 0),',
    }.get(mlp_kind, 'are exactly 0')
    yield note(
        f"share of the MLP's hidden units that {closed} for every one of the {x.numel():,} tokens: "
        f'such units learn nothing from the batch. Healthy: at most {health.DEAD:.0%}.',
        'dead units',
    )
    yield note(
        f'how widely a position spreads its attention, averaged over heads, positions and '
        f'{count(min(ATTENDED, len(x)), "sequence")}. Position t can attend to t positions, so its '
        f'maximum is ln t, and the largest mean is {largest:.3f} nats; 0 means a single position. '
        f'Healthy: above {health.ENTROPY:.0%} of the largest. A new model attends almost evenly, '
        f'and learns where to look.',
        'entropy',
    )


# -- losses ----------------------------------------------------------------------------------------


def report_start(training, loss: float) -> Report:
    vocab_size, n_embd = training.data.vocab_size, training.model.config.n_embd
    n_tokens, guess = training.batch()[0].numel(), math.log(vocab_size)
    is_new, is_text = training.start is None, bool(training.values['dataset'])
    tolerance = health.start_tolerance(n_embd, n_tokens) if is_new else None
    if is_new:
        healthy = f', healthy: within {tolerance:.3f}'
    elif is_text:
        healthy = ', healthy: below 0'
    else:
        healthy = ''
    yield f'loss              {loss:.4f} nats per token'
    yield f'ln(vocab_size)    {guess:.4f} nats: ln {vocab_size:,}, a uniform guess'
    yield f'difference       {loss - guess:+.4f} nats{healthy}\n'
    if is_new:
        yield note(
            f'A new model knows nothing and should guess. Its logits are not quite equal: their '
            f'std is 0.02 * sqrt(n_embd) = {0.02 * math.sqrt(n_embd):.2f}, which adds half of its '
            f'square, {0.0002 * n_embd:.3f}, to the loss. The tolerance is twice that, plus three '
            f'standard errors of a mean over {n_tokens:,} tokens, plus 0.1 for a tied head, which '
            f'predicts its own input at first.'
        )
    elif is_text:
        yield 'These weights are trained, so the loss should be lower than that of a guess.'
    else:
        yield 'A trained model expects real text, so it is worse than a guess on random tokens.'
    return remedies.judge_start(loss, vocab_size, tolerance) if is_new or is_text else []


def report_memorizing(training, steps: int) -> Report:
    whole_x, whole_y = training.batch()
    n_sequences = max(1, MEMORIZED_TOKENS // whole_x.shape[1])
    x = whole_x[:n_sequences, :MEMORIZED_TOKENS].contiguous()
    y = whole_y[:n_sequences, :MEMORIZED_TOKENS].contiguous()
    entropy = inspection.unigram_entropy(y)
    rate, warmup = training.values['learning_rate'], steps // 10
    part = '' if x.shape == whole_x.shape else f', the first {count(len(x), "sequence")}'
    rises = f', reached after a warm-up of {count(warmup, "step")}' if warmup else ''
    yield note(
        f"{count(steps, 'step')} of train.py's train_step on the same {count(x.numel(), 'token')}"
        f'{part}, without dropout, at the full learning rate {rate:g}{rises}.'
    )
    yield ''
    losses: dict[int, float] = {}
    training.model.eval()  # dropout would prevent memorizing
    with training.undone():
        optimizer = training.new_optimizer()
        for step in range(steps + 1):  # a step returns the loss before it, so one more is needed
            optimizer.lr = rate * min(1.0, (step + 1) / (warmup + 1))
            loss, _ = training.step(optimizer, [(x, y)])
            if step % max(1, steps // 5) == 0 or step == steps:
                losses[step] = loss
                yield f'step {step:5}    loss {loss:8.4f}'
    training.model.train()
    goal = health.MEMORIZED * min(entropy, losses[0])
    yield f'healthy:      at most {goal:.4f}\n'
    yield note(
        f'A loss of {loss:.3g} means a probability of exp(-{loss:.3g}) = {math.exp(-loss):.3g} for '
        f'the right token; at the start, it was {math.exp(-losses[0]):.2g}. A model that knows the '
        f'frequency of each token, but does not look at the input, gets no lower than '
        f'{entropy:.3f} nats, the entropy of the targets. The goal is two thirds of that, or of '
        f'the first loss if it is lower. To reach it, the model must learn which token follows '
        f'which. A loop that cannot memorize one batch will not learn a text. But memorizing says '
        f'nothing about new text.'
    )
    return remedies.judge_memorizing(losses, goal)
