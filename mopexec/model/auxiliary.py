"""Losses of routers that steer the gradient beside the cross entropy, and are no part of the loss that is
told.

Both are written so that no split of the ranks changes them: the balance loss is one of each sequence (arXiv
2412.19437, equations 17 to 20), the z-loss one of each token (arXiv 2202.08906, equation 5).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopexec.operators.router_losses import route_shares
from mopsim.spec.training import TrainSpec


@dataclass(frozen=True)
class Auxiliary:
    """Weights of the losses in the objective. balance: of the routers' balance loss, z: of their z-loss, each
    a mean over the `tokens` of the global batch, whether or not their targets count. mtp: of the MTP modules'
    loss, a mean over the targets that count and over the modules (arXiv 2412.19437, equation 25).
    sum_over_sequence: adds up [B, E] counts in place over the ranks that share sequences.
    """

    balance: float = 0.0
    z: float = 0.0
    mtp: float = 0.0
    tokens: int = 1
    sum_over_sequence: Callable[[Tensor], object] = lambda counts: None

    @classmethod
    def of(
        cls, training: TrainSpec, sum_over_sequence: Callable[[Tensor], object] = lambda counts: None
    ) -> "Auxiliary":
        """As the plan's training has them."""
        return cls(
            training.router_aux_loss_coef,
            training.router_z_loss_coef,
            training.mtp_loss_coef,
            training.global_batch * training.seq_len,
            sum_over_sequence,
        )


class _Attach(torch.autograd.Function):
    """A tensor as it is; the backward also sends 1 to `loss`, so that its gradient joins the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], torch.ones_like(ctx.like)


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """x, with the gradient of the scalar `loss` in whatever backward passes through it."""
    attached: Tensor = _Attach.apply(x, loss)  # type: ignore[no-untyped-call]
    return attached


def router_loss(logits: Tensor, scores: Tensor, experts: Tensor, batch: int, weights: Auxiliary) -> Tensor:
    """What these tokens add to the routers' losses; logits and scores [B * s, E], experts [B * s, top_k] of
    s positions of each of `batch` sequences.
    """
    total = logits.new_zeros(())
    if weights.z:
        total = total + weights.z * logits.logsumexp(-1).square().sum()
    if weights.balance:
        share = route_shares(experts, batch, scores.detach(), weights.sum_over_sequence)
        part = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        total = total + weights.balance * (part.view(batch, -1, part.shape[-1]).sum(1) * share).sum()
    return total / weights.tokens
