"""One training in several processes: what each has of a batch, what they add up, and how they agree.

Every process takes an equal part of each batch, in its order; gradients are added up once, after all micro-batches. So
1 x 32, 2 x 16 and 4 x 8 samples give the same steps, but for rounding; many steps make it visible, as they do that of
another number of threads. Where a bias stands before a batch norm, its gradient is nothing but rounding, so running
means differ a little more, and with them losses in validation (by 7e-4).

Nothing is sent before all processes have said that they can go on: one that runs out of memory says so instead, and all
take the step again. That is also why `nn.SyncBatchNorm` is not used: it sends without asking, and would wait for ever
for a process that has no memory left. Untested: more than one GPU.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm

from workbench.layers import Shard


class PeerLost(RuntimeError):
    """Another process of the training is gone; torchrun starts all of them again, from the last checkpoint."""


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Another process of the training has run out of memory in this step."""


@dataclass(frozen=True)
class World:
    """The processes of a training as one of them sees them; that of one process sends nothing.

    Every process calls the same methods in the same order.

    Args:
        rank: Of this process, by node and then by place on the node.
        size: Processes.
        writes: Whether this process writes logs, pictures and checkpoints.
        order: What torch calls the processes, by rank.
    """

    rank: int = 0
    size: int = 1
    writes: bool = True
    order: tuple[int, ...] = (0,)

    def part(self, n: int) -> slice:
        """This process's samples among the n of a batch; n is a multiple of the size."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def most(self, value: int) -> int:
        """The largest of the values that the processes give."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        _send(dist.all_reduce, values, dist.ReduceOp.MAX)
        return int(values)

    def first(self, value: Any) -> Any:
        """What the process of rank 0 gives: tensors and plain values."""
        if self.size == 1:
            return value
        values = [value]
        _send(dist.broadcast_object_list, values, self.order[0])
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """What each process gives, by rank: plain values."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        _send(dist.all_gather_object, values, value)
        return [values[i] for i in self.order]

    def agree(self) -> None:
        """Go on with the step.

        Raises:
            PeerOutOfMemory: another process cannot.
        """
        if self.most(0):
            raise PeerOutOfMemory("another process of the training ran out of memory; lower batch_size")

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all processes, which have as many, by rank; without a gradient.

        Raises:
            PeerOutOfMemory: as `agree`.
        """
        if self.size == 1:
            return x
        x = x.detach().contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.agree()
        _send(dist.all_gather, parts, x)
        return torch.cat([parts[i] for i in self.order])

    def mean(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over the processes in the place of tensors; one message for each type.

        Raises:
            PeerOutOfMemory: as `agree`.
        """
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for x in tensors:
            by_type.setdefault(x.dtype, []).append(x)
        joined = [torch.cat([x.reshape(-1) for x in kind]) for kind in by_type.values()]
        self.agree()
        for flat, kind in zip(joined, by_type.values(), strict=True):
            _send(dist.all_reduce, flat)
            flat /= self.size
            for x, mean in zip(kind, flat.split([x.numel() for x in kind]), strict=True):
                x.copy_(mean.view(x.shape))

    def shard(self, compiled: bool = False) -> Shard:
        """This process's rows, for what a model draws or counts over a batch.

        Args:
            compiled: The model is being compiled: what sends is not.
        """
        if self.size == 1:
            return Shard()
        return Shard(self.rank, self.size, torch.compiler.disable(self.gather) if compiled else self.gather)


ALONE = World()


def _send(operation: Callable[..., Any], *arguments: Any) -> None:
    try:
        operation(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(f"the processes of the training have lost each other: {error}") from error


@contextmanager
def joined(device: str, node: int, every_node_writes: bool) -> Iterator[World]:
    """The world of a process that torchrun has started.

    Args:
        device: `cpu` (gloo) or `cuda` (NCCL for what is on the GPUs, gloo for the rest).
        node: Number of this node, from 0.
        every_node_writes: The first process of each node writes, and not that of the first node alone.
    """
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        ranks = [None] * dist.get_world_size()
        _send(dist.all_gather_object, ranks, node * here + local)
        rank, order = node * here + local, tuple(sorted(range(len(ranks)), key=ranks.__getitem__))
        yield World(rank, len(ranks), local == 0 if every_node_writes else rank == 0, order)
    finally:
        gc.collect()  # what still holds the group keeps it from ending
        dist.destroy_process_group()


def _full(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize > 2 else x.float()


class _Normalise(torch.autograd.Function):
    """Batch norm over the samples of all processes, with its exact gradient; also gives mean and variance.

    Each process sends mean and variance of its samples forward, and two sums over its gradient back.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.stack(torch.batch_norm_update_stats(_full(x), None, None, 0.0))  # mean and variance
        means, variances = world.gather(own[None]).unbind(1)  #                            (processes, c) each
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.world = eps, world
        ctx.mark_non_differentiable(mean, var)
        return batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        rstd = torch.rsqrt(var + ctx.eps)
        given = (_full(grad), _full(x), weight, mean, var, mean, rstd, False, ctx.eps, [True] * 3)
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(*given)  # as if mean and var were given
        means = torch.stack([of_bias, of_weight])
        ctx.world.mean([means])
        shift, slope = weight * rstd * means / (x.numel() // x.shape[1])
        slope = slope * rstd
        shift, slope = (part.view(1, -1, *[1] * (x.dim() - 2)) for part in (shift - slope * mean, slope))
        return (of_x - torch.addcmul(shift, x, slope)).to(x.dtype), of_weight, of_bias, None, None


def _forward(norm: nn.modules.batchnorm._BatchNorm, world: World, x: Tensor) -> Tensor:
    """Of a batch norm whose samples are divided."""
    if not norm.training:
        return type(norm).forward(norm, x)
    y, mean, var = _Normalise.apply(x, norm.weight, norm.bias, norm.eps, world)
    n = world.size * x.numel() // x.shape[1]
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (n / (n - 1)), norm.momentum)
    return y


@contextmanager
def synchronised(model: nn.Module, world: World, compiled: bool = False) -> Iterator[None]:
    """Let the batch norms of a model see the samples of all processes in training; names of weights stay.

    Args:
        compiled: The model is being compiled: its batch norms are not, as they send.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if world.size > 1 else []
    for norm in norms:
        forward = partial(_forward, norm, world)
        norm.forward = torch.compiler.disable(forward) if compiled else forward
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def mean_terms(world: World, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over the processes of each term of a loss."""
    if world.size == 1:
        return dict(terms)
    values = torch.stack(list(terms.values()))
    world.mean([values])
    return dict(zip(terms, values, strict=True))
