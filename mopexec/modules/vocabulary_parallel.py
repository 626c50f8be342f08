"""The vocabulary split over the ranks of a tensor group: rows of the embedding, columns of the logits (arXiv
1909.08053, 3).
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.distributed.mesh import Group
from mopexec.modules.exchange import exchange
from mopexec.operators.tensor_parallel import gather_first, scatter_first
from mopexec.operators.vocabulary_parallel import split_backward, split_forward


def by_rank(values: Tensor, group: Group) -> Tensor:
    """Values [B, s] of whole sequences in the order of rows gathered over the group: [n * B, s / n]."""
    if group.size == 1:
        return values
    parts = values.unflatten(1, (group.size, -1))  # type: ignore[no-untyped-call]
    return cast(Tensor, parts.transpose(0, 1).flatten(0, 1))


class SplitEmbedding:
    """A drop-in for the forward of an embedding of which this rank has the rows from `start` on."""

    def __init__(self, module: Any, start: int, group: Group) -> None:
        self._module, self._start, self._group = module, start, group

    def __call__(self, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens [B, s], and ids of learned positions, to this rank's part [B, s / n, H] of what they embed
        to."""
        weight = self._module.weight
        local = by_rank(tokens, self._group) - self._start
        away = (local < 0) | (local >= weight.shape[0])
        found = F.embedding(local.masked_fill(away, 0), weight).masked_fill(away[..., None], 0)
        there, back = (partial(one, group=self._group) for one in (scatter_first, gather_first))
        own = None if ids is None else ids.chunk(self._group.size, dim=-1)[self._group.place]
        result: Tensor = self._module.placed(exchange(found, there, back), own)
        return result


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, scale: float, group: Group
    ) -> Tensor:
        loss, ctx.exact, *found = split_forward(hidden, weight, targets, start, group)
        ctx.save_for_backward(hidden, weight, *found)
        ctx.scale, ctx.group = scale, group
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        exact = [ctx.exact]  # saved, it would live to the end of the backward
        del ctx.exact
        hidden, weight, wanted, away, counted = ctx.saved_tensors
        grad = grads[0] * ctx.scale
        both = split_backward(grad, hidden, weight, exact, wanted, away, counted, ctx.group)
        return *both, None, None, None, None


def split_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, scale: float, group: Group
) -> Tensor:
    """scale * the summed cross entropy; hidden [B, s / n, H] of this rank, targets [B, s] of all, weight
    [V / n, H] of the vocabulary's rows from `start` on. Equal on all ranks of the group.
    """
    order = by_rank(targets, group).flatten()
    result: Tensor = _Loss.apply(hidden.flatten(0, 1), weight, order, start, scale, group)  # type: ignore[no-untyped-call]
    return result
