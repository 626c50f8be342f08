"""Cross entropy behind FSDP's head: full logits by autograd, or token chunks with the gradient made chunk
by chunk."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mopexec.measure.scope import NOW, category
from mopexec.model.auxiliary import attach
from mopexec.model.transformer import Term
from mopexec.operators.dtypes import wide
from mopexec.operators.loss import chunked_loss as loss_and_gradient


def compute_losses(head: Any, one: Callable[[Term, list[Tensor]], Tensor]) -> None:
    """The head computes `one` loss of each term itself, so that its full weight is there, and freed by FSDP's
    hooks. `one` is given a list that the terms of a call share.
    """

    def losses(terms: list[Term]) -> Tensor:
        total = list[Tensor]()
        main = one(terms.pop(0), total)
        while terms:  # hidden states that no loss saves are gone before the next one's logits
            main = attach(main, one(terms.pop(0), total))
        return main

    head.forward = losses


def full_loss(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    """scale * the summed cross entropy of hidden [N, H] @ weight [V, H]^T against targets [N]: N x V
    logits."""
    with category("logits"):
        loss = F.cross_entropy(_logits(hidden, weight), targets, reduction="sum") * scale
    if loss.requires_grad:
        loss.register_hook(lambda _: setattr(NOW, "category", "logits"))  # type: ignore[no-untyped-call]
    return loss


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, V] in fp32: those that the product makes are freed once they are cast."""
    logits = F.linear(hidden, weight)
    if logits.requires_grad:
        logits.register_hook(lambda _: setattr(NOW, "category", "activations"))  # type: ignore[no-untyped-call]
    return logits.to(wide(hidden.dtype))


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_tokens: int,
    total: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As `full_loss`, `chunk_tokens` rows of logits at a time; one forward product per chunk, none
    repeated. total: of several losses that go backward together; the first puts the weight's gradient into
    it, to which the others add theirs."""
    given = ([] if total is None else total, scale, chunk_tokens)
    return _ChunkedLoss.apply(hidden, weight, targets, *given)  # type: ignore[no-any-return,no-untyped-call]


class _ChunkedLoss(torch.autograd.Function):
    """The gradient of a cross entropy needs nothing from behind it: it is made in the forward, and only
    scaled in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, total: list[Tensor], scale: float,
        chunk_tokens: int,
    ) -> Tensor:  # fmt: skip
        first = not total
        if first:
            with category("gathered_grads"):
                total.append(torch.zeros_like(weight))
        loss, grad = loss_and_gradient(hidden, targets, weight, total[0], scale, chunk_tokens, "forward")
        ctx.gradients = (grad, total[0] if first else None)
        return loss.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        (grad,) = grad_outputs
        whole = None if grad_weight is None else grad_weight.mul_(grad)
        return grad_hidden.mul_(grad), whole, None, None, None, None
