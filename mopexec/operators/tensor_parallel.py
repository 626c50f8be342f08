"""Regions of tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198): rows gathered at
the begin, partial sums scattered at the end, each the backward of the other; products that gather their rows
again in the backward.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.nn import functional as F

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group


def gather_first(x: Tensor, group: Group) -> Tensor:
    """Parts [m, ..] of each rank to [n * m, ..] in rank order."""
    if group.size == 1:
        return x
    out = x.new_empty((group.size * x.shape[0], *x.shape[1:]))
    collectives.all_gather_single(out, x.contiguous(), group.handle)
    return out


def scatter_first(x: Tensor, group: Group) -> Tensor:
    """The inverse of `gather_first`, of the sum over the ranks' x."""
    if group.size == 1:
        return x
    out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    collectives.reduce_scatter_single(out, x.contiguous(), group.handle)
    return out


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """Rows [m, H] of each rank to [n * m, H] in rank order; parts [B, s, H] of sequences to [B, n * s, H]."""
    out = gather_first(x, group)
    if x.dim() == 2 or group.size == 1:
        return out
    parts = out.unflatten(0, (group.size, x.shape[0]))  # type: ignore[no-untyped-call]
    return cast(Tensor, parts.transpose(0, 1).flatten(1, 2))


def scatter_rows(x: Tensor, group: Group) -> Tensor:
    """The inverse of `gather_rows`, of the sum over the ranks' x."""
    if x.dim() > 2 and group.size > 1:
        x = x.unflatten(1, (group.size, -1)).transpose(0, 1).flatten(0, 1)  # type: ignore[no-untyped-call]
    return scatter_first(x, group)


def products_forward(
    x: Tensor, group: Group, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """x [.., m, H] gathered over the group, times each weight [out, H]^T, plus its bias if there is one."""
    whole = gather_rows(x, group)
    return tuple(F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def of_inputs(grads: Sequence[Tensor], group: Group, weights: Sequence[Tensor]) -> Tensor:
    """The gradient of a rank's own rows."""
    partial = grads[0].flatten(0, -2) @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        partial.addmm_(grad.flatten(0, -2), weight)
    return scatter_rows(partial.view((*grads[0].shape[:-1], partial.shape[-1])), group)


def of_weights(group: Group, x: Tensor, *grads: Tensor) -> list[Tensor]:
    """The gradients of the weights, from a rank's own rows x, gathered again."""
    whole = gather_rows(x, group).flatten(0, -2)
    return [grad.flatten(0, -2).t() @ whole for grad in grads]
