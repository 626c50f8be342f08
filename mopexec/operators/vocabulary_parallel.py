"""Cross entropy of logits whose columns are split over the ranks of a tensor group (arXiv 1909.08053, 3). The
softmax of this rank's columns is kept in fp32, as Megatron-LM's vocab_parallel_cross_entropy keeps it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.measure.scope import category
from mopexec.operators.dtypes import wide
from mopexec.operators.tensor_parallel import gather_rows, scatter_rows


def split_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, group: Group
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum of the losses, equal on all ranks; softmax [n N, V / n] in the wide dtype; for the backward of
    each row the target's column here, whether it is away, whether it counts, each [n N, 1]).

    hidden [N, H] of this rank, targets [n N] of all, weight [V / n, H] of the vocabulary's rows from `start`
    on.
    """
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
        loss = (total.log() - picked).masked_fill_(~counted, 0).sum()
        return loss, exact.div_(total), wanted, away, counted


def split_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, softmax: list[Tensor], wanted: Tensor, away: Tensor,
    counted: Tensor, group: Group,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, H] and weight [V / n, H] from that of the loss. softmax: emptied, to free it
    early.
    """
    with category("logits"):
        exact = softmax.pop()
        exact.scatter_add_(1, wanted, away.to(exact.dtype).sub_(1))
        exact.mul_(counted.to(exact.dtype).mul_(grad))
        rows = exact.to(hidden.dtype)
        del exact
    grad_hidden = scatter_rows(rows @ weight, group)
    return grad_hidden, rows.t() @ gather_rows(hidden, group)


def _reduce(values: Tensor, group: Group, op: Any) -> None:
    if group.size > 1:
        collectives.all_reduce(values, group.handle, op=op)
