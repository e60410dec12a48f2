"""The optimizer: AdamW for every parameter, or Muon for the matrices and AdamW for the rest."""

from collections.abc import Mapping, Sequence

import torch

# Newton-Schulz's quintic of Jordan et al. 2024 (Muon): steep at 0, so that a few iterations suffice; singular values end
# within 0.7 to 1.2, not at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), all parameters updated by one fused kernel."""

    def __init__(
        self, params: Sequence[torch.nn.Parameter], betas: tuple[float, float], weight_decay: float
    ):
        self.params, self.betas, self.weight_decay = list(params), betas, weight_decay
        self.lr_ratio = 1.0
        self.exp_avg = [torch.zeros_like(p) for p in self.params]  # memory of the gradient
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]  # and of its square
        self.n_steps = torch.zeros(
            (), device=self.params[0].device
        )  # on the device, as steps may be left out there

    def step(self, lr: float, usable: torch.Tensor):
        self.n_steps += usable
        torch._fused_adamw_(
            self.params,
            [p.grad for p in self.params],
            self.exp_avg,
            self.exp_avg_sq,
            [],
            [self.n_steps] * len(self.params),
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
        """(parameter, its state by name) for each parameter; the tensors are those that step() changes."""
        names = ('exp_avg', 'exp_avg_sq', 'step')
        return [
            (p, dict(zip(names, (exp_avg, exp_avg_sq, self.n_steps))))
            for p, exp_avg, exp_avg_sq in zip(self.params, self.exp_avg, self.exp_avg_sq)
        ]


class Muon:
    """Muon (Jordan et al. 2024): every matrix moves along its momentum, made orthogonal, so that it moves as far in rare
    directions as in frequent ones. Scaled to the size of AdamW's updates (Liu et al. 2025, section 2.2), so that learning
    rate and weight decay mean the same in both.

    The matrices have one shape, or that shape transposed, and are made orthogonal in one batch: of a small model's matrices
    each alone would be too little work for a matrix product. dtype: of these products.
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
        self.params, self.lr_ratio, self.weight_decay = list(params), lr_ratio, weight_decay
        self.beta, self.iterations, self.dtype = momentum, iterations, dtype
        self.momentum = torch.stack(
            [wide(torch.zeros_like(p)) for p in self.params]
        )  # (N, rows, columns)

    def step(self, lr: float, usable: torch.Tensor):
        gradients = torch.stack([wide(p.grad) for p in self.params])
        gradients = torch.where(usable, gradients, 0.0)
        self.momentum.lerp_(gradients, (1.0 - self.beta) * usable)
        update = orthogonalize(
            gradients.lerp(self.momentum, self.beta), self.iterations, self.dtype
        )  # Nesterov's
        update = update.float() * (-0.2 * update.shape[2] ** 0.5 * lr * usable)
        torch._foreach_mul_(self.params, 1.0 - lr * self.weight_decay * usable)
        torch._foreach_add_(
            self.params, [u if is_wide(p) else u.t() for p, u in zip(self.params, update)]
        )

    def state(self):
        """As AdamW's."""
        return [
            (p, {'momentum': m if is_wide(p) else m.t()})
            for p, m in zip(self.params, self.momentum)
        ]


def is_wide(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def wide(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, transposed where it has more rows than columns."""
    return matrix if is_wide(matrix) else matrix.t()


def orthogonalize(x: torch.Tensor, iterations: int, dtype: torch.dtype) -> torch.Tensor:
    """Near the matrices (N, rows <= columns) that have the singular vectors of x and singular values of 1.

    Every iteration takes each singular value s to a s + b s^3 + c s^5, in products of matrices alone (Jordan et al. 2024).
    """
    a, b, c = QUINTIC
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Optimizer:
    """Updates a model's parameters from their gradients, each by its own method.

    method 'adamw': all by AdamW. 'muon': the blocks' matrices by Muon, with lr_ratio times the learning rate; embeddings,
    output head and vectors by AdamW. Weight decay is for matrices and embeddings: it pulls a weight towards 0, while a
    gain's neutral value is 1 and a bias is no source of overfitting. Not torch.optim's class: that imports the compiler, a
    second's work, and its Muon takes one matrix after the other.
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
    ):
        matrices, others, shapes = [], [], {}
        for name, p in model.named_parameters():
            if method == 'muon' and p.dim() == 2 and '.h.' in name:
                shapes.setdefault(wide(p).shape, []).append(p)
            else:
                (matrices if p.dim() >= 2 else others).append(p)
        self.parts = [
            Muon(params, lr_ratio, momentum, iterations, weight_decay, dtype)
            for params in shapes.values()
        ]
        self.parts += [
            AdamW(params, betas, decay)
            for params, decay in ((matrices, weight_decay), (others, 0.0))
            if params
        ]
        self.lr = 0.0

    @classmethod
    def pick(cls, values: Mapping, model: torch.nn.Module, has_bfloat16: bool) -> 'Optimizer':
        """The optimizer that train.py's config asks for; the products of Muon are bfloat16's where the device has it."""
        return cls(
            model,
            values['optimizer'],
            (values['beta1'], values['beta2']),
            values['weight_decay'],
            values['muon_lr_ratio'],
            values['muon_momentum'],
            values['muon_iterations'],
            torch.bfloat16 if has_bfloat16 else torch.float32,
        )

    @property
    def param_groups(self) -> list[dict]:
        """The parameters, as GradScaler looks for them."""
        return [{'params': part.params} for part in self.parts]

    @torch.no_grad()
    def step(self, usable: torch.Tensor):
        """One step at the learning rate `lr`; where usable is False the device itself leaves it out, and nobody waits to ask."""
        if usable.device.type == 'mps' and not usable:  # its fused kernel does not read found_inf
            return
        for part in self.parts:
            part.step(self.lr * part.lr_ratio, usable)

    def zero_grad(self):
        for part in self.parts:
            for p in part.params:
                p.grad = None

    def named_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The state as 'parameter name/state name' -> tensor, independent of the order of parameters."""
        states = {p: state for part in self.parts for p, state in part.state()}
        return {
            f'{name}/{key}': tensor
            for name, p in model.named_parameters()
            for key, tensor in states[p].items()
        }

    @torch.no_grad()
    def load_named_state(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]):
        """Puts back what named_state() gave. KeyError for a name that the model does not have."""
        own = self.named_state(model)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
