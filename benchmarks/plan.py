"""What `bench.py --plan` prints: the memory, the FLOPs, the time and the cost of a run.

Nothing is trained. Memory is estimated by nib/machine/memory_plan.py. The time is that of the run's
FLOPs at a stated share of a device's peak rate (MFU), without evaluations and checkpoints.
"""

from collections.abc import Mapping, Sequence

from model import GPT, GPTConfig
from nib.budget import tokens_per_step
from nib.errors import UserError
from nib.machine.device import ShapesOnly
from nib.machine.memory import available_memory
from nib.machine.memory_plan import plan_memory
from nib.machine.rates import look_up_peak, measure_flops, peak_flops
from nib.report.history import show_seconds

PARTS = {
    'weights': 'weights',
    'gradients': 'gradients',
    'optimizer': "optimizer's state",
    'activations': 'activations, with 16-bit copies of the weights',
    'logits': 'logits and the rest of the loss',
    'work': 'temporary tensors and gaps, on a CPU',
    'update': "optimizer's temporary tensors",
}


def describe_plan(
    values: Mapping, vocab_size: int, devices: Sequence[str], mfu: float, price: float
) -> str:
    """Returns the plan of a run.

    values: train.py's config with the device, dtype and ranks to use. devices: names such as
    'H100'. price: of an hour of one device; 0: unknown. Raises UserError for a device without a
    known rate.
    """
    model = GPTConfig.pick(values, vocab_size)
    with ShapesOnly():
        gpt = GPT(model)
    plan = plan_memory(model, values, values['compile'])
    tokens = tokens_per_step(values)
    flops_per_token = 3 * sum(gpt.flops_per_token().values())
    flops = flops_per_token * tokens * values['max_iters']
    ranks = values['ranks']
    each, count = (' of a process', f'{ranks} devices') if ranks > 1 else ('', 'one device')
    rows = [
        ('parameters', f'{gpt.num_params():,}'),
        ('tokens per step', f'{tokens:,}'),
        ('tokens of the run', f'{tokens * values["max_iters"]:,}'),
        ('FLOPs per token', f'{flops_per_token:.4g}'),
        ('FLOPs of the run', f'{flops:.4g}'),
        ('', ''),
        (f'memory{each}, batch_size {values["batch_size"]}, {values["dtype"]}', 'MB'),
        *((f'  {label}', f'{getattr(plan, part) / 1e6:,.0f}') for part, label in PARTS.items()),
        ('  at the peak', f'{plan.peak / 1e6:,.0f}'),
        (
            f'  available on {values["device"]} now',
            f'{available_memory(values["device"]) / 1e6:,.0f}',
        ),
        ('', ''),
        (f'time of the run on {count}, at an MFU of {100 * mfu:g}%', ''),
    ]
    rates = {
        name: look_up_peak(name, 'bfloat16') or look_up_peak(name, 'float16') for name in devices
    }
    own = peak_flops(values['device'], values['dtype'])
    rates[f'this {values["device"]}'] = own or measure_flops(values['device'], values['dtype'])
    for name, rate in rates.items():
        if not rate:
            raise UserError(
                f'--devices: the peak rate of {name!r} is not known: write names such as H100, '
                'separated by commas'
            )
        seconds = flops / (rate * mfu * ranks)
        time = show_seconds(seconds) if seconds >= 1 else 'less than 1 s'
        cost = f', cost {seconds / 3600 * ranks * price:,.2f}' if price else ''
        rows.append((f'  {name}, {rate / 1e12:,.4g} TFLOP/s', f'{time}{cost}'))
    width = max(len(label) for label, _ in rows)
    return ''.join(f'{label:{width}}  {value}'.rstrip() + '\n' for label, value in rows)
