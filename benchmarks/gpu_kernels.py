"""The parts of benchmarks/gpu.py that look inside a training step.

They find which operations repeat bit for bit, and which kernels take the time. Each function
runs in a process of its own.
"""

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from benchmarks.contestant import make_training, time_steps
from nib.errors import UserError
from nib.kernels.cross_entropy import IGNORED, ChunkedLoss, pad_rows
from nib.machine.device import autocast, has_bfloat16, peak_memory, synchronize
from nib.optim import Optimizer
from nib.tokens.dataset import open_dataset

ATTENTION = {
    'flash': SDPBackend.FLASH_ATTENTION,
    'cuDNN': SDPBackend.CUDNN_ATTENTION,
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
    'math': SDPBackend.MATH,
}
REPEATS = 5
GROUPS = {  # kind of kernel -> parts of its name, in lower case; the first that fits counts
    'attention': ('sdpa', 'flash', 'fmha', 'attention'),
    'matrix products': (
        'nvjet',
        'gemm',
        'cutlass',
        'cublas',
        'splitk',
        'aten::mm',
        'aten::addmm',
        'aten::bmm',
        'triton_tem',
        'triton_mm',
    ),
    'loss': ('log_softmax', 'logsumexp', 'nll', 'cross_entropy', '_softmax'),
    'optimizer': ('multi_tensor', 'adam', 'foreach', 'lpnorm', 'linalg_vector_norm'),
    'norms': ('norm',),
    'embedding': ('embedding', 'index_put', 'atomic'),
    'elementwise and reductions': (
        'triton_',
        'elementwise',
        'reduce',
        'vectorized',
        'copy',
        'fill',
        'aten::add',
        'aten::mul',
        'aten::gelu',
    ),
    'memory': ('memcpy', 'memset'),
}


def start(job: Mapping) -> train.Training:
    """Returns a job's model with its data, ready to train. Raises UserError if compiling fails."""
    said = []
    data = open_dataset(job['folder'], job['block_size'])
    training = make_training(job, data, said.append)
    if job['compile'] and training.model is training.raw_model:
        raise UserError(' '.join(said))
    return training


def serve(job: Mapping, rounds):
    """Trains nibGPT as NANOGPT_LOOP trains nanoGPT; yields the figures of each round."""
    training, step = start(job), 3
    time_steps(training, 0, step)
    memory = peak_memory(job['device'])
    tokens = job['gradient_accumulation_steps'] * job['batch_size'] * job['block_size']
    yield {}
    for _ in rounds:
        seconds = time_steps(training, step, job['steps']) / job['steps']
        step += job['steps']
        yield {
            'tokens/s': tokens / seconds,
            'ms/step': 1000 * seconds,
            'peak memory, MB': memory / 1e6,
            'TFLOP/s': training.flops_per_token * tokens / seconds / 1e12,
        }


# -- does it repeat? -------------------------------------------------------------------------------


def repeat_steps(job: Mapping) -> dict:
    """Whether two runs of 4 steps from the same state are equal bit for bit, and which parameters'
    gradients differ when the same batch is repeated.

    job: a config of train.py, and attention ('default' or a key of ATTENTION), deterministic,
    folder (of the tokens) and lock (a file: only one process at a time measures).
    """
    torch.use_deterministic_algorithms(job['deterministic'])
    attention = sdpa_kernel(ATTENTION[job['attention']]) if job['attention'] in ATTENTION else None
    with attention or contextlib.nullcontext():
        t = start(job)
        initial = {name: p.clone() for name, p in t.raw_model.state_dict().items()}

        def run(n: int = 4) -> list[torch.Tensor]:
            reset(t, job, initial)
            losses = [
                train.train_step(t, t.batches.micro_batches(step), step)[0] for step in range(n)
            ]
            return losses + [p.detach().clone() for p in t.raw_model.parameters()]

        run(2)
        synchronize(t.device)
        with exclusive(job['lock']):
            run(1)
            first, second = run(), run()
            gradients = [gradients_of(t, job, initial) for _ in range(REPEATS)]
            milliseconds = min(1000 * time_steps(t, 4 + i, 1) for i in range(10))
    differing = sorted(
        {
            name
            for other in gradients[1:]
            for name, gradient in other.items()
            if not torch.equal(gradient, gradients[0][name])
        }
    )
    return {
        '4 steps equal': all(map(torch.equal, first, second)),
        'losses equal': all(map(torch.equal, first[:4], second[:4])),
        'gradients that differ': len(differing),
        'of': len(gradients[0]),
        'the first of them': ', '.join(name.removeprefix('transformer.') for name in differing[:6]),
        'ms/step': milliseconds,
    }


def reset(t, config, initial):
    t.raw_model.load_state_dict(initial)
    t.optimizer = Optimizer.pick(config, t.raw_model, has_bfloat16(t.device))
    t.optimizer.lr = config['learning_rate']
    t.bad_steps.reset()


def gradients_of(t, config, initial) -> dict[str, torch.Tensor]:
    reset(t, config, initial)
    loss = train.accumulate_gradients(t, t.batches.micro_batches(0), 0)
    gradients = {name: p.grad.clone() for name, p in t.raw_model.named_parameters()}
    t.optimizer.zero_grad()
    return {'the loss itself': loss, **gradients}


@contextlib.contextmanager
def exclusive(path: str):
    """Waits until no other process holds the lock."""
    import fcntl

    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def repeat_operations(job: Mapping) -> dict:
    """Which operations of a step repeat their results, forward and backward, bit for bit."""
    results = {}
    for name, operation in operations(job).items():
        try:
            first = operation()
            equal = [all(map(torch.equal, first, operation())) for _ in range(REPEATS)]
            results[name] = (
                'equal' if all(equal) else f'differs in {equal.count(False)} of {REPEATS}'
            )
        except Exception as error:  # a kernel that is missing here or cannot be compiled
            results[name] = f'failed: {describe(error)}'
    return results


def operations(job: Mapping) -> dict[str, Callable[[], tuple]]:
    """Name -> a function that returns the operation's output and gradients."""
    device, dtype = job['device'], getattr(torch, job['dtype'])
    B, T, C, H = (job[key] for key in ('batch_size', 'block_size', 'n_embd', 'n_head'))
    torch.manual_seed(0)

    def tensor(*shape, dtype=torch.float32):
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    def forward_and_backward(function, *inputs):
        def run():
            with autocast(job['dtype'], device):
                output = function(*inputs)
            torch.manual_seed(1)
            gradient = torch.randn_like(output)
            return output, *torch.autograd.grad(output, inputs, gradient)

        return run

    def attend(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    V = job['vocab_size']
    ids = (
        torch.rand(B, T, device=device) ** 4 * V
    ).long()  # some tokens are frequent, as in a real text
    targets, weight = ids.flatten(), tensor(V, C)

    def plain_loss(x, weight):
        return F.cross_entropy(F.linear(x, pad_rows(weight)).float(), targets, ignore_index=IGNORED)

    def chunked_loss(x, weight):
        return ChunkedLoss.apply(x, weight, targets, 0.0, True, dtype.itemsize * B * T * V // 4)

    heads = [tensor(B, H, T, C // H, dtype=dtype) for _ in range(3)]
    backends = ATTENTION if device == 'cuda' else {'math': SDPBackend.MATH}
    found = {
        f'attention, {name}': forward_and_backward(attend(backend), *heads)
        for name, backend in backends.items()
    }
    parts = {
        'embedding': (lambda weight: F.embedding(ids, weight), weight),
        'LayerNorm': (lambda x, gain: F.layer_norm(x, (C,), gain), tensor(B * T, C), tensor(C)),
        'linear': (F.linear, tensor(B * T, C), tensor(4 * C, C)),
        'loss at once': (plain_loss, tensor(B * T, C), weight),
    }
    for name, (function, *inputs) in parts.items():
        found[f'{name}, eager'] = forward_and_backward(function, *inputs)
    found['loss in chunks'] = forward_and_backward(chunked_loss, tensor(B * T, C), weight)
    if job['compile']:
        for name, (function, *inputs) in parts.items():
            found[f'{name}, compiled'] = forward_and_backward(torch.compile(function), *inputs)
    return found


def describe(error: BaseException) -> str:
    """The first line of the message of an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[0][:200] if lines else ""}'


# -- where the time goes ---------------------------------------------------------------------------


def profile_steps(training, first: int, n: int) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of a step by kind of kernel, and lines of the 25 kernels that take most."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = training.device.startswith('cuda')
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=kinds) as profiler:
        time_steps(training, first, n)
    kernels = {}
    for event in profiler.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel == on_gpu:
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels[event.key] = kernels.get(event.key, 0.0) + spent / 1000 / n
    groups = {}
    for name, milliseconds in kernels.items():
        groups[kind_of(name)] = groups.get(kind_of(name), 0.0) + milliseconds
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:25]
    return groups, [
        f'{milliseconds:9.3f} ms  {kind_of(name):28}{name[:120]}' for name, milliseconds in longest
    ]


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name. cuDNN is used for attention only; a kernel of the compiler
    is named after the operations around it, too, but computes neither attention nor products."""
    kernel = kernel.lower()
    if kernel.startswith('cudnn'):
        return 'attention'
    kinds = (
        list(GROUPS)[2:]
        if kernel.startswith(('triton_poi', 'triton_per', 'triton_red'))
        else GROUPS
    )
    return next((kind for kind in kinds if any(part in kernel for part in GROUPS[kind])), 'other')
