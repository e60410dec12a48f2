"""The parameters that each rank updates when the optimizer is sharded."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from nib.machine.ranks import Ranks


class Shares:
    """Divides parameters among the ranks: stage 1 of ZeRO (Rajbhandari et al. 2020, section 5.1).

    A rank keeps the optimizer's state of its share only, updates these parameters, and receives the
    others. Weights and gradients are whole on every rank, so only saving has to know about it.

    params: those that are trained, in the same order on all ranks.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], ranks: Ranks = Ranks()):
        self.ranks = ranks
        owners = assign([p.numel() for p in params], ranks.world_size)
        self.owners = dict(zip(params, owners))

    def has(self, parameter: torch.nn.Parameter) -> bool:
        """Returns whether this rank updates the parameter."""
        return self.owners.get(parameter) == self.ranks.rank

    @torch.no_grad()
    def exchange(self):
        """Sends the parameters that this rank has updated to the others, and receives theirs."""
        if self.ranks.world_size > 1:
            sent = [dist.broadcast(p, src, async_op=True) for p, src in self.owners.items()]
            for work in sent:
                work.wait()

    def collect(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the state of all ranks on rank 0; on the others, that of this rank.

        state: tensors by name. All ranks must call this. What comes from others is on the CPU.
        """
        collected = dict(state)
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        for rank, theirs in enumerate(self.ranks.gather(kinds)[1:], start=1):
            for name, (shape, dtype) in theirs.items():
                if self.ranks.is_first:
                    collected[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(collected[name], rank, group=self.ranks.control)
                elif self.ranks.rank == rank:
                    dist.send(state[name].cpu().contiguous(), 0, group=self.ranks.control)
        return collected


def assign(sizes: Sequence[int], n: int) -> list[int]:
    """Returns which of n ranks owns each tensor, so that all own about as many numbers.

    The tensors are whole: the largest comes first, and goes to the rank that owns the least so far.
    """
    owners, loads = [0] * len(sizes), [0] * n
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners
