"""Gradients in router logits of the losses beside the cross entropy, as `mopexec.model.auxiliary` defines
them: they are a token's own, and no graph is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.operators.router import router_scores, scores_backward
from mopsim.spec.model import ModelSpec
from mopsim.spec.training import TrainSpec


def route_shares(
    experts: Tensor, batch: int, like: Tensor, sum_over_sequence: Callable[[Tensor], object]
) -> Tensor:
    """Routes of each sequence to each expert over those of an even load, [batch, E] in the dtype of `like`
    [.., E]; experts [batch * s, top_k].
    """
    chosen = experts.view(batch, -1).long()
    counts = like.new_zeros(batch, like.shape[-1])
    counts.scatter_add_(1, chosen, counts.new_ones(()).expand_as(chosen))
    sum_over_sequence(counts)
    return counts * counts.shape[1] / counts.sum(1, keepdim=True)


@dataclass(frozen=True)
class RouterLosses:
    """balance, z: weights of a token's losses in the objective. length: positions of a sequence on a rank of
    `group`, which shares it.
    """

    spec: ModelSpec
    balance: float
    z: float
    length: int
    group: Group

    @classmethod
    def of(cls, spec: ModelSpec, training: TrainSpec, group: Group) -> "RouterLosses":
        """As the plan's training has them: means over the tokens of the global batch."""
        tokens = training.global_batch * training.seq_len
        balance, z = training.router_aux_loss_coef / tokens, training.router_z_loss_coef / tokens
        return cls(spec, balance, z, training.seq_len // group.size, group)

    def shares(self, experts: Tensor, like: Tensor) -> Tensor | None:
        """`route_shares` of a layer's choice, of whole sequences; None where nothing asks for them."""
        batch = experts.shape[0] // self.length
        return route_shares(experts, batch, like, self._sum) if self.balance else None

    def add_gradient_(self, grad: Tensor, logits: Tensor, shares: Tensor | None, start: int) -> None:
        """grad [n, E] of the logits of tokens from `start` on += that of the losses."""
        if self.z:
            grad.add_(logits.softmax(-1) * logits.logsumexp(-1, keepdim=True), alpha=2 * self.z)
        if shares is None:
            return
        scores = router_scores(logits, self.spec)
        total = scores.sum(-1, keepdim=True) + 1e-20
        share = shares[torch.arange(start, start + len(grad), device=grad.device) // self.length]
        share -= (share * scores).sum(-1, keepdim=True) / total
        grad.add_(scores_backward(share.div_(total), scores, self.spec), alpha=self.balance)

    def _sum(self, counts: Tensor) -> None:
        if self.group.size > 1:
            collectives.all_reduce(counts, self.group.handle)
