"""Training passes as CUDA graphs: two launches instead of about 400.

The kernels of a small model take less time on a GPU than the processor needs to launch them.
"""

import gc
import random
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nib.machine.compiling import explain_failure
from nib.machine.device import kept_buffers

SMALL_PASS = 4e12  # FLOPs; an H100 computes these in about the time that the launches take


# -- any function ----------------------------------------------------------------------------------


def warm_up(function: Callable[[], Any], device: torch.device):
    """Calls a function twice on another stream, so that its kernels are loaded before a capture.

    Raises RuntimeError if it waits for the GPU, which a capture does not allow.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                function()
                mode = torch.cuda.get_sync_debug_mode()
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')  # torch warns that it is a prototype
                    torch.cuda.set_sync_debug_mode('error')
                try:
                    function()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
        finally:
            torch.cuda.current_stream().wait_stream(stream)  # before its memory is used again


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool=None):
    """Captures what is launched in its block. Raises RuntimeError if that is not possible."""
    collects = gc.isenabled()
    gc.disable()  # freeing another graph would end the capture
    try:
        with torch.cuda.graph(graph, pool):
            yield
    except RuntimeError:
        # Otherwise, the random generator fails as if the capture were still in progress.
        device = torch.cuda.current_device()
        fresh = torch.Generator(torch.device('cuda', device)).graphsafe_get_state()
        torch.cuda.default_generators[device].graphsafe_set_state(fresh)
        raise
    finally:
        if collects:
            gc.enable()


# -- training passes -------------------------------------------------------------------------------


def has_small_passes(t) -> bool:
    """Returns whether launching the kernels of a run's passes takes longer than running them.

    t: train.py's Training. Passes of several ranks, or with recomputation, cannot be captured.
    """
    if not t.device.startswith('cuda') or t.ranks.world_size > 1 or t.raw_model.config.recompute:
        return False
    return t.flops_per_token * t.batches.batch_size * t.batches.block_size < SMALL_PASS


def capture_model(
    model: torch.nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    context,
    say: Callable[[str], None],
) -> torch.nn.Module:
    """Returns the model as a GraphedModel, or the model itself if that fails, and reports which.

    batch: x and y, with the shape of all batches. context: of the forward pass, such as autocast.
    """
    started = time.perf_counter()
    try:
        with torch.cuda.device(batch[0].device):
            graphed = GraphedModel(model, batch, context)
            free, total = torch.cuda.mem_get_info()
        if free < total / 2:  # graphs keep the memory of a pass; evaluations need some, too
            raise RuntimeError(f'only {free / 1e9:.1f} of {total / 1e9:.1f} GB would remain free')
    except Exception as error:  # whatever a changed model raises
        graphed = None  # frees its memory
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        reason = explain_failure(error)
        say(f'continuing without CUDA graphs (--no-cuda_graph skips the attempt): {reason}')
        return model
    say(f'training passes captured as CUDA graphs in {time.perf_counter() - started:.1f} s')
    return graphed


class GraphedModel(torch.nn.Module):
    """A model whose loss and gradients for a batch are computed by replaying two CUDA graphs.

    The graphs repeat the kernels of the captured pass, on the same memory. They do not repeat its
    Python code, so the model itself runs if the shape of the batch or the fingerprint of the model
    has changed since.
    """

    def __init__(self, model: torch.nn.Module, batch, context):
        super().__init__()
        self.module = model
        self.batch = [ids.clone() for ids in batch]
        self.anchor = torch.zeros((), device=batch[0].device, requires_grad=True)
        self.passes = 0
        self.gradients = [(p, torch.zeros_like(p)) for p in model.parameters() if p.requires_grad]
        self.restore_gradients()
        with kept_buffers(model):
            warm_up(lambda: self.compute_loss(context).backward(), self.anchor.device)
            before = fingerprint(model), random.getstate(), torch.get_rng_state().tolist()
            self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with capture(self.forward_graph):
                loss = self.compute_loss(context)
            self.grad_loss = torch.ones_like(loss)
            with capture(self.backward_graph, self.forward_graph.pool()):
                loss.backward(self.grad_loss)
        self.loss = loss.detach()
        self.fingerprint = fingerprint(model)
        if before != (self.fingerprint, random.getstate(), torch.get_rng_state().tolist()):
            raise RuntimeError(
                'a pass changes an attribute of the model or draws random numbers on the CPU, '
                'which a graph would not repeat'
            )
        model.zero_grad(set_to_none=True)

    def compute_loss(self, context) -> torch.Tensor:
        with context:
            return self.module(*self.batch)

    def restore_gradients(self):
        """Restores the gradients that the graph adds to, if they were removed or replaced."""
        removed = [grad for p, grad in self.gradients if p.grad is None]
        if removed:
            torch._foreach_zero_(removed)
        for p, grad in self.gradients:
            if p.grad is not None and p.grad is not grad:  # of a pass without the graph
                grad.copy_(p.grad)
            p.grad = grad

    def forward(self, x, y):
        is_same = x.shape == self.batch[0].shape and torch.is_grad_enabled()
        if is_same and fingerprint(self.module) == self.fingerprint:
            return Replay.apply(self.anchor, self, x, y)
        return self.module(x, y)


def fingerprint(model: torch.nn.Module) -> list:
    """Returns what must not change as long as the graphs of a model are used.

    These are the attributes of its modules that are numbers, strings and flags, the number of their
    hooks and submodules, and the memory of parameters and buffers.
    """
    found: list = []
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, (int, float, str)):
                found.append(value)
            elif isinstance(value, dict):
                found.append(len(value))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found += (tensor.data_ptr(), tensor.requires_grad)
    return found


class Replay(torch.autograd.Function):
    """The pass of a GraphedModel. The anchor makes autograd call backward()."""

    @staticmethod
    def forward(ctx: Any, anchor, graphed: GraphedModel, x, y):
        graphed.passes += 1
        ctx.graphed, ctx.number = graphed, graphed.passes
        for static, ids in zip(graphed.batch, (x, y)):
            static.copy_(ids)
        graphed.forward_graph.replay()
        return graphed.loss.clone()  # the next pass overwrites it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss):
        if ctx.number != ctx.graphed.passes:
            raise RuntimeError(
                'a CUDA graph keeps only the activations of its last forward pass, but this '
                'backward pass belongs to an earlier one: use --no-cuda_graph'
            )
        ctx.graphed.restore_gradients()
        ctx.graphed.grad_loss.copy_(grad_loss)
        ctx.graphed.backward_graph.replay()
        return None, None, None, None
