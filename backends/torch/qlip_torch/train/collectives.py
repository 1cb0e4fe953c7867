"""The two collectives the objectives need, with gradients.

Legend: W ranks, b rows per rank, B = W*b rows in all. Every rank must call with the same shape.
The gradients are those of the **sum over ranks** of what each rank computes from the result; a
data-parallel engine's mean over ranks then divides them by W.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _GatherRows(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, rows.shape[0]
        gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
        parts = list(gathered.split(rows.shape[0]))
        dist.all_gather(parts, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # All-reduce and slice, because gloo has no reduce-scatter in the older releases we support.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(0, dist.get_rank(ctx.group) * ctx.count, ctx.count), None


class _MeanOverRanks(Function):
    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        mean = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean, group=group)
        return mean / dist.get_world_size(group)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad / dist.get_world_size(ctx.group), None


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows [b, ...] of every rank, in rank order: [W*b, ...]."""
    return _GatherRows.apply(rows, group)  # type: ignore[return-value]


def mean_over_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean over ranks of a tensor, which has the same shape on each."""
    return _MeanOverRanks.apply(value, group)  # type: ignore[return-value]
