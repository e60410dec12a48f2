"""The processes of a run that torchrun starts, and the words between them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nib.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. One process is rank 0 of 1, and every method then does the plain thing."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: object = None  # a gloo group for words between processes, which never wait for a GPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own_device(self, device: str) -> str:
        """The device of this rank: each has a GPU of its own."""
        return f'cuda:{self.local_rank}' if device == 'cuda' else device

    def largest(self, flag: int) -> int:
        """The largest flag of all ranks."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(flag)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, of a tensor on the run's device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """Every rank's value, in their order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def on_first(self, function: Callable):
        """function() is run by rank 0 alone; all ranks get its result, or end where it raised UserError."""
        if self.world_size == 1:
            return function()
        answer = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def start_ranks(device: str) -> Ranks:
    """Joins the processes that torchrun started (gloo on a CPU, NCCL on GPUs); without torchrun, this one alone."""
    if 'RANK' not in os.environ:
        return Ranks()
    rank, local_rank, world_size = (
        int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')
    )
    if world_size == 1:
        return Ranks()
    if device.startswith('cuda:'):
        raise UserError(
            f'--device={device}: each of the {world_size} processes takes a GPU of its own; use --device=cuda'
        )
    if device == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f'{local_rank + 1} processes on this machine, but {torch.cuda.device_count()} GPUs: '
                f'--nproc_per_node={torch.cuda.device_count()}'
            )
        torch.cuda.set_device(local_rank)
    # torchrun may keep one store over its restarts, in which the addresses of the processes that died still stand.
    store, *_ = next(dist.rendezvous('env://'))
    store = dist.PrefixStore(f'restart {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
    dist.init_process_group(
        'nccl' if device == 'cuda' else 'gloo', store=store, rank=rank, world_size=world_size
    )
    patience = timedelta(
        days=7
    )  # while rank 0 prepares a dataset; a process that has died is noticed at once
    return Ranks(rank, local_rank, world_size, dist.new_group(backend='gloo', timeout=patience))


def distribute(
    model: torch.nn.Module,
    local_rank: int,
    device: str,
    batch: tuple[torch.Tensor, torch.Tensor],
    context,
) -> torch.nn.Module:
    """The model as DistributedDataParallel, whose backward pass averages the gradients over all ranks.

    It settles the order in which it sums them only after the first pass. So two passes go before, or the first step of a
    resumed run would round otherwise than the same step of a run that was not stopped.
    """
    distributed = torch.nn.parallel.DistributedDataParallel(
        model, [local_rank] if device.startswith('cuda') else None
    )
    for _ in range(2):
        with context:
            loss = distributed(*batch)
        loss.backward()
    distributed.zero_grad(set_to_none=True)
    return distributed
