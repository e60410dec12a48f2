"""The optimizer: AdamW, SGD, or Muon for the matrices and AdamW for the rest."""

from collections.abc import Mapping, Sequence

import torch

from nib.errors import UserError
from nib.machine.ranks import Ranks, clear_gradients
from nib.machine.shares import Shares

# Coefficients of the Newton-Schulz iteration in Muon (Jordan et al. 2024). The polynomial is steep
# at 0, so a few iterations suffice, but singular values end between 0.7 and 1.2, not at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
FIXED = (
    'requires_grad of a parameter has changed since the optimizer was created, but the optimizer '
    'still updates the same parameters: set requires_grad in GPT.__init__; to change it later, '
    'stop the run and resume it'
)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2). One fused kernel updates all parameters."""

    def __init__(
        self, params: Sequence[torch.nn.Parameter], betas: tuple[float, float], weight_decay: float
    ):
        self.params: list[torch.Tensor] = list(params)
        self.betas, self.weight_decay = betas, weight_decay
        self.lr_ratio = 1.0
        self.exp_avg = [torch.zeros_like(p) for p in self.params]  # mean gradient
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]  # mean squared gradient
        # Steps of each parameter, which a resumed run may train only now. They are counted on the
        # device, which decides whether a step is applied.
        self.n_steps = torch.zeros(len(self.params), device=self.params[0].device)
        self.steps = list(self.n_steps.unbind())

    def step(self, lr: float, usable: torch.Tensor):
        self.n_steps += usable
        torch._fused_adamw_(
            self.params,
            [p.grad for p in self.params],
            self.exp_avg,
            self.exp_avg_sq,
            [],
            self.steps,
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            found_inf=(~usable).float(),
        )

    def state(self):
        """Returns (parameter, its state by name) per parameter; step() updates these tensors."""
        names = ('exp_avg', 'exp_avg_sq', 'step')
        states = zip(self.exp_avg, self.exp_avg_sq, self.steps)
        return [(p, dict(zip(names, state))) for p, state in zip(self.params, states)]


class SGD:
    """Gradient descent with momentum: the same as torch.optim.SGD, in one fused kernel.

    A weight moves along its momentum: the sum of its gradients, of which each step keeps the
    fraction `momentum` (Polyak 1964). Weight decay is added to the gradient.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], momentum: float, weight_decay: float):
        self.params: list[torch.Tensor] = list(params)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.lr_ratio = 1.0
        self.momentum_buffer = [torch.zeros_like(p) for p in self.params]

    def step(self, lr: float, usable: torch.Tensor):
        torch._fused_sgd_(
            self.params,
            [p.grad for p in self.params],
            self.momentum_buffer if self.momentum else [],  # as the kernel requires
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=(~usable).float(),
        )

    def state(self):
        """Returns (parameter, its state by name) for each parameter, like AdamW's."""
        return [(p, {'momentum_buffer': m}) for p, m in zip(self.params, self.momentum_buffer)]


class Muon:
    """Muon (Jordan et al. 2024): the update of a matrix is its orthogonalized momentum.

    The update is thus equally large in rare and in frequent directions. It is scaled to the size of
    AdamW's updates (Liu et al. 2025, section 2.2), so learning rate and weight decay mean the same
    in both.

    params: matrices that all have the same shape, or its transpose. They are orthogonalized in one
    batch, because the products of a small model's single matrices would not keep a device busy.
    lr_ratio: factor of the learning rate. dtype: of the matrix products.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        lr_ratio: float,
        momentum: float,
        iterations: int,
        weight_decay: float,
        dtype: torch.dtype,
    ):
        self.params: list[torch.Tensor] = list(params)
        self.lr_ratio, self.weight_decay = lr_ratio, weight_decay
        self.beta, self.iterations, self.dtype = momentum, iterations, dtype
        zeros = [wide(torch.zeros_like(p)) for p in self.params]
        self.momentum = torch.stack(zeros)  # (N, rows, columns)

    def step(self, lr: float, usable: torch.Tensor):
        gradients = torch.stack([wide(p.grad) for p in self.params])
        gradients = torch.where(usable, gradients, 0.0)
        self.momentum.lerp_(gradients, (1.0 - self.beta) * usable)
        nesterov = gradients.lerp(self.momentum, self.beta)
        update = orthogonalize(nesterov, self.iterations, self.dtype)
        update = update.float() * (-0.2 * update.shape[2] ** 0.5 * lr * usable)
        torch._foreach_mul_(self.params, 1.0 - lr * self.weight_decay * usable)
        torch._foreach_add_(
            self.params, [u if is_wide(p) else u.t() for p, u in zip(self.params, update)]
        )

    def state(self):
        """Returns (parameter, its state by name) for each parameter, like AdamW's."""
        return [
            (p, {'momentum': m if is_wide(p) else m.t()})
            for p, m in zip(self.params, self.momentum)
        ]


def is_wide(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def wide(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the matrix, transposed if it has more rows than columns."""
    return matrix if is_wide(matrix) else matrix.t()


def orthogonalize(x: torch.Tensor, iterations: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns approximately orthogonal matrices: the singular vectors of x, singular values near 1.

    x: (N, rows, columns), rows <= columns. Each iteration maps every singular value s to
    a s + b s^3 + c s^5, by matrix products only (Jordan et al. 2024).
    """
    a, b, c = QUINTIC
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def check_state(part):
    """Raises UserError if a part's state() returns copies, which a checkpoint could not restore."""
    for (_, state), (_, again) in zip(part.state(), part.state()):
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.data_ptr() != again[name].data_ptr():
                raise UserError(
                    f'{type(part).__name__}.state() in nib/optim.py returns {name} as a copy or a '
                    f'number, so a resumed run would not continue with it: return the tensor that '
                    f'step() updates in place'
                )


def numbers_of(part) -> dict[str, float]:
    return {name: value for name, value in vars(part).items() if isinstance(value, (int, float))}


class Optimizer:
    """Updates a model's parameters from their gradients.

    method: 'adamw' or 'sgd' for all parameters. 'muon' uses Muon for the matrices of the blocks,
    with lr_ratio times the learning rate, and AdamW for embeddings, output head and vectors.
    momentum: of Muon or SGD. ranks: those that share the parameters among themselves; by default,
    this rank updates all of them.

    Weight decay applies to matrices and embeddings. It pulls weights toward 0, but the neutral
    value of a gain is 1, and biases do not cause overfitting.

    torch.optim is not used: importing it takes a second because it imports the compiler, and its
    Muon processes one matrix at a time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        method: str = 'adamw',
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        lr_ratio: float = 1.0,
        momentum: float = 0.95,
        iterations: int = 5,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = Ranks(),
    ):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.frozen = [p for p in model.parameters() if not p.requires_grad]
        self.shares = Shares(self.params, ranks)
        tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        matrices, others, shapes = [], [], {}
        for name, p in model.named_parameters():
            if not self.shares.has(p):
                continue
            if method == 'muon' and p.dim() == 2 and '.h.' in name and p not in tables:
                shapes.setdefault(wide(p).shape, []).append(p)
            else:
                (matrices if p.dim() >= 2 else others).append(p)
        self.parts: list[Muon | AdamW | SGD] = [
            Muon(params, lr_ratio, momentum, iterations, weight_decay, dtype)
            for params in shapes.values()
        ]
        for params, decay in ((matrices, weight_decay), (others, 0.0)):
            if params and method == 'sgd':
                self.parts.append(SGD(params, momentum, decay))
            elif params:
                self.parts.append(AdamW(params, betas, decay))
        for part in self.parts:
            check_state(part)
        self.lr = 0.0

    @classmethod
    def pick(
        cls, values: Mapping, model: torch.nn.Module, has_bfloat16: bool, ranks: Ranks = Ranks()
    ) -> 'Optimizer':
        """Returns the optimizer of train.py's config.

        has_bfloat16: whether the device supports bfloat16, which Muon then uses for its products.
        ranks: of the run.
        """
        return cls(
            model,
            method=values['optimizer'],
            betas=(values['beta1'], values['beta2']),
            weight_decay=values['weight_decay'],
            lr_ratio=values['muon_lr_ratio'],
            momentum=values['sgd_momentum' if values['optimizer'] == 'sgd' else 'muon_momentum'],
            iterations=values['muon_iterations'],
            dtype=torch.bfloat16 if has_bfloat16 else torch.float32,
            ranks=ranks if values['shard_optimizer'] else Ranks(),
        )

    @property
    def param_groups(self) -> list[dict]:
        """The parameters, in the form that GradScaler expects."""
        return [{'params': self.params}]

    def step(self, usable: torch.Tensor):
        """Performs one step with the learning rate `self.lr`.

        usable: a boolean tensor on the device. If it is false, nothing changes; the device decides
        this itself, so the step does not wait for it.
        """
        self.update(usable)
        self.shares.exchange()

    @torch.no_grad()
    def update(self, usable: torch.Tensor):
        """Performs a step on the parameters of this rank, without communication."""
        if usable.device.type == 'mps' and not usable:  # its fused kernel ignores found_inf
            return
        if any(p.requires_grad for p in self.frozen) or not all(
            p.requires_grad for p in self.params
        ):
            raise UserError(FIXED)
        for part in self.parts:
            for p in part.params:
                if p.grad is None:  # of a layer that no token of this step has used
                    p.grad = torch.zeros_like(p)
            numbers = numbers_of(part)
            part.step(self.lr * part.lr_ratio, usable)
            for name, value in numbers_of(part).items():
                if value not in (numbers.get(name), self.lr * part.lr_ratio):
                    raise UserError(
                        f'{type(part).__name__}.step() in nib/optim.py changes {name}, with which '
                        f'a resumed run would not continue: keep it in a tensor that state() '
                        f'returns'
                    )

    def zero_grad(self):
        clear_gradients(self.params)

    def named_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Returns the state of this rank's share, from 'parameter name/state name' to tensor."""
        states = {p: state for part in self.parts for p, state in part.state()}
        return {
            f'{name}/{key}': tensor
            for name, p in model.named_parameters()
            if p in states
            for key, tensor in states[p].items()
        }

    @torch.no_grad()
    def load_named_state(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]):
        """Restores this rank's share of a state. Raises UserError for one that does not fit."""
        own = self.named_state(model)
        others = {name for name, p in model.named_parameters() if not self.shares.has(p)}
        for name, tensor in tensors.items():
            if name.rpartition('/')[0] in others:
                continue
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(
                    f'the checkpoint has the optimizer state {name}, of shape '
                    f'{tuple(tensor.shape)}, which nib/optim.py lacks: use the nib/optim.py that '
                    f'the run was trained with'
                )
            own[name].copy_(tensor)
