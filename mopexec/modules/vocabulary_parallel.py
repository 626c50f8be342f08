"""The vocabulary split over the ranks of a tensor group: rows of the embedding, columns of the logits (arXiv
1909.08053, 3).
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.measure.scope import category
from mopexec.modules.tensor_parallel import gather_rows, scatter_rows, sum_rows
from mopexec.operators.dtypes import wide


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

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [B, s] to this rank's part [B, s / n, H] of their embeddings."""
        weight = self._module.weight
        local = by_rank(tokens, self._group) - self._start
        away = (local < 0) | (local >= weight.shape[0])
        found = F.embedding(local.masked_fill(away, 0), weight).masked_fill(away[..., None], 0)
        return sum_rows(found.flatten(0, 1), self._group).view(tokens.shape[0], -1, weight.shape[1])


class _Loss(torch.autograd.Function):
    """Keeps the softmax of this rank's columns in fp32, as Megatron-LM's vocab_parallel_cross_entropy."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, scale: float, group: Group
    ) -> Tensor:
        with category("logits"):
            logits = F.linear(gather_rows(hidden, group), weight)
            exact = logits.to(wide(logits.dtype))
            del logits
            top = exact.amax(-1, keepdim=True)
            _reduce(top, group, dist.ReduceOp.MAX)
            exact.sub_(top)
            wanted = (targets - start)[:, None]
            away = (wanted < 0) | (wanted >= weight.shape[0])
            wanted = wanted.masked_fill(away, 0)
            picked = exact.gather(1, wanted).masked_fill_(away, 0)
            both = torch.cat((picked, exact.exp_().sum(-1, keepdim=True)), dim=1)
            _reduce(both, group, dist.ReduceOp.SUM)
            picked, total = torch.split(both, 1, dim=1)
            counted = (targets >= 0)[:, None]
            loss: Tensor = (total.log() - picked).masked_fill_(~counted, 0).sum() * scale
            exact.div_(total)
        ctx.save_for_backward(hidden, weight, wanted, away, counted)
        ctx.exact = exact  # saved, it would live to the end of the backward
        ctx.scale, ctx.group = scale, group
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, wanted, away, counted = ctx.saved_tensors
        exact = ctx.exact
        del ctx.exact
        with category("logits"):
            exact.scatter_add_(1, wanted, away.to(exact.dtype).sub_(1))
            exact.mul_(counted.to(exact.dtype).mul_(grads[0] * ctx.scale))
            rows = exact.to(hidden.dtype)
            del exact
        grad_hidden = scatter_rows(rows @ weight, ctx.group)
        grad_weight = rows.t() @ gather_rows(hidden, ctx.group)
        return grad_hidden, grad_weight, None, None, None, None


def _reduce(values: Tensor, group: Group, op: Any) -> None:
    if group.size > 1:
        collectives.all_reduce(values, group.handle, op=op)


def split_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, scale: float, group: Group
) -> Tensor:
    """scale * the summed cross entropy; hidden [B, s / n, H] of this rank, targets [B, s] of all, weight
    [V / n, H] of the vocabulary's rows from `start` on. Equal on all ranks of the group.
    """
    order = by_rank(targets, group).flatten()
    result: Tensor = _Loss.apply(hidden.flatten(0, 1), weight, order, start, scale, group)  # type: ignore[no-untyped-call]
    return result
