"""Parameter groups, AdamW, its step, and the optimizer's state by parameter name."""
import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weight decay for matrices and embeddings, none for biases and LayerNorm gains.

    Decay pulls a weight towards 0; a gain's neutral value is 1, and a bias is no source of overfitting.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]


def adamw(model: torch.nn.Module, learning_rate: float, betas: tuple[float, float],
          weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), all parameters updated in one fused kernel."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)


def step(optimizer: torch.optim.Optimizer, usable: torch.Tensor):
    """One step of a fused optimizer, which the device itself leaves out where `usable` is False: nobody waits to ask."""
    if usable.device.type == 'mps':  # its fused kernel does not read found_inf
        if usable:
            optimizer.step()
        return
    optimizer.found_inf = (~usable).float()
    optimizer.step()


def named_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as 'parameter name/state name' -> tensor, independent of the order of parameters."""
    return {f'{name}/{key}': value for name, parameter in model.named_parameters()
            for key, value in optimizer.state[parameter].items()}


def load_named_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: dict[str, torch.Tensor]):
    """Puts back what named_state() gave. KeyError for a name that the model does not have."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, key = full_name.rsplit('/', 1)
        parameter = parameters[name]
        # fused AdamW keeps the step count on the device too
        optimizer.state[parameter][key] = value.to(parameter.device)
