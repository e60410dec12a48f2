"""The processes of a run that torchrun starts, and their communication."""

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nib.errors import UserError
from nib.machine.device import kept_buffers

# How long a process waits for another one that does not respond, for example because its host is
# unreachable. If a process ends and its host is reachable, the others notice at once.
LONGEST_WAIT = timedelta(minutes=30)
# What torchrun tells its processes; all but the address are numbers.
VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_PORT', 'MASTER_ADDR')


@dataclass
class Ranks:
    """This process and the other processes of the run.

    A single process is rank 0 of 1, and its methods need no communication. With several, a method
    that waits raises RuntimeError if another process has ended or does not respond in time; see
    limit_waiting().
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None  # a gloo group for messages that wait for no GPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own_device(self, device: str) -> str:
        """Returns the device of this rank: each one uses its own GPU."""
        return f'cuda:{self.local_rank}' if device == 'cuda' else device

    def limit_waiting(self):
        """Limits the wait for another process to LONGEST_WAIT. Call it when the dataset is ready.

        Until then, the first process may prepare the dataset for hours while the others wait.
        """
        if self.world_size > 1:
            beginning = self.control
            self.control = dist.new_group(backend='gloo', timeout=LONGEST_WAIT)
            dist.destroy_process_group(beginning)

    def largest(self, flag: int) -> int:
        """Returns the largest flag of all ranks."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(flag)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks of a tensor on the run's device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """Returns the values of all ranks, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def check_same(self, values: Mapping, remedy: str):
        """Raises UserError on all ranks if a key does not have the same value on all of them."""
        found = self.gather(dict(values))
        for key in values:
            by_rank = [theirs.get(key) for theirs in found]
            if any(value != by_rank[0] for value in by_rank):
                raise UserError(f'{key} differs between the processes, {by_rank} by rank: {remedy}')

    def on_first(self, function: Callable[[], Any]):
        """Calls function() on rank 0 only and returns its result on all ranks.

        If it raises UserError, all ranks raise it.
        """
        if self.world_size == 1:
            return function()
        answer: list[Any] = [None, None]  # result, message of the error
        if self.is_first:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def distribute(
        self, model: torch.nn.Module, device: str, batch: tuple[torch.Tensor, torch.Tensor], context
    ) -> torch.nn.Module:
        """Returns the model as DistributedDataParallel, which averages gradients over all ranks.

        A single process gets the model itself. context: of forward passes.

        DistributedDataParallel fixes the order of its sums only after the first pass, so two passes
        are run here. Otherwise the first step of a resumed run would round differently from the
        same step of an uninterrupted run.
        """
        if self.world_size == 1:
            return model
        distributed = torch.nn.parallel.DistributedDataParallel(
            model,
            [self.local_rank] if device.startswith('cuda') else None,
            gradient_as_bucket_view=True,  # otherwise there is a second copy of them
        )
        with kept_buffers(model):
            for _ in range(2):
                with context:
                    loss = distributed(*batch)
                loss.backward()
        clear_gradients(model.parameters())
        return distributed

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def clear_gradients(params: Iterable[torch.nn.Parameter]):
    """Removes the gradients, or sets them to 0 if they lie in DistributedDataParallel's buckets.

    It keeps the buckets, and new gradients would accumulate beside them.
    """
    for p in params:
        if p.grad is not None and p.grad._is_view():
            p.grad.zero_()
        else:
            p.grad = None


def start_ranks(device: str) -> Ranks:
    """Joins the processes that torchrun started; without torchrun, this process is the only one.

    They communicate through gloo on CPUs and NCCL on GPUs. Raises UserError if there are not enough
    GPUs, or if the variables of torchrun are incomplete.
    """
    # Some launchers of clusters set one of the two, for programs of their own.
    if 'RANK' not in os.environ or os.environ.get('WORLD_SIZE', '1') == '1':
        return Ranks()
    rank, local_rank, world_size = _read_environment()
    if device.startswith('cuda:'):
        raise UserError(
            f'--device={device}: each of the {world_size} processes needs its own GPU; '
            f'use --device=cuda'
        )
    if device == 'cuda':
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UserError(
                f'{local_rank + 1} processes on this machine, but only {n_gpus} '
                f'GPU{"s" * (n_gpus != 1)}: use --nproc_per_node={n_gpus}'
            )
        torch.cuda.set_device(local_rank)
    # Ctrl-C ends a process that waits for others: Python's handler would wait with it. StopSignal
    # takes over when training begins.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored
        with suppress(ValueError):  # this is not the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    # torchrun may keep its store over restarts, with the addresses of processes that have died.
    try:
        store, *_ = next(dist.rendezvous('env://'))
    except (dist.DistError, ValueError) as error:
        address = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
        raise UserError(
            f'process {rank} of {world_size} cannot join the others at {address} (MASTER_ADDR, '
            f'MASTER_PORT): {str(error).splitlines()[0]}'
        ) from error
    restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    store = dist.PrefixStore(f'restart {restarts}', store)
    backend = 'nccl' if device == 'cuda' else 'gloo'
    dist.init_process_group(
        backend, timeout=LONGEST_WAIT, store=store, rank=rank, world_size=world_size
    )
    control = dist.new_group(backend='gloo', timeout=timedelta(days=7))  # see limit_waiting()
    dist.barrier(control)  # rank 0 may host the store, which the others need until here
    return Ranks(rank, local_rank, world_size, control)


def _read_environment() -> tuple[int, int, int]:
    """Returns RANK, LOCAL_RANK and WORLD_SIZE. Raises UserError if a variable is unusable."""
    found = {name: os.environ.get(name, '') for name in VARIABLES}
    wrong = [
        name
        for name, value in found.items()
        if not (value if name == 'MASTER_ADDR' else value.isdecimal())
    ]
    if not wrong and int(found['RANK']) >= int(found['WORLD_SIZE']):
        wrong = ['RANK']
    if wrong:
        what = f'is {found[wrong[0]]!r}' if found[wrong[0]] else 'is not set'
        raise UserError(
            f'{wrong[0]} {what}, but RANK={found["RANK"]} and '
            f'WORLD_SIZE={found["WORLD_SIZE"]} indicate several processes: start them with '
            f'torchrun, which sets {", ".join(VARIABLES)}; for a single process, unset RANK'
        )
    return int(found['RANK']), int(found['LOCAL_RANK']), int(found['WORLD_SIZE'])
