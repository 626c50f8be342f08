"""Cross entropy behind FSDP's head: full logits by autograd, or token chunks with the gradient made chunk
by chunk."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mopexec.measure.scope import NOW, category
from mopexec.operators.dtypes import wide
from mopsim.spec import layout


def full_loss(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    """scale * the summed cross entropy of hidden [N, H] @ weight [V, H]^T against targets [N]: N x V
    logits."""
    with category("logits"):
        logits = F.linear(hidden, weight)
        loss = F.cross_entropy(logits.to(wide(hidden.dtype)), targets, reduction="sum") * scale
    if loss.requires_grad:
        loss.register_hook(lambda _: setattr(NOW, "category", "logits"))  # type: ignore[no-untyped-call]
        logits.register_hook(lambda _: setattr(NOW, "category", "activations"))  # type: ignore[no-untyped-call]
    return loss


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_tokens: int) -> Tensor:
    """As `full_loss`, `chunk_tokens` rows of logits at a time; one forward product per chunk, none
    repeated."""
    return _ChunkedLoss.apply(hidden, weight, targets, scale, chunk_tokens)  # type: ignore[no-any-return,no-untyped-call]


class _ChunkedLoss(torch.autograd.Function):
    """The gradient of a cross entropy needs nothing from behind it: it is made in the forward, while a
    chunk's logits
    are there (3 products per chunk instead of the 4 of a recomputing loss), and only scaled in the
    backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_tokens: int
    ) -> Tensor:
        loss = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        with category("gathered_grads"):
            grad_weight = torch.zeros_like(weight)
        for start, stop in layout.token_slices(hidden.shape[0], chunk_tokens):
            rows = hidden[start:stop]
            loss_of_chunk, grad_logits = _chunk(rows, weight, targets[start:stop], scale)
            loss += loss_of_chunk
            torch.mm(grad_logits, weight, out=grad_hidden[start:stop])
            grad_weight.addmm_(grad_logits.t(), rows)
            del grad_logits
        ctx.gradients = (grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        (grad,) = grad_outputs
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None


def _chunk(rows: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Loss (0-d) of rows [c, H] and the gradient of their logits [c, V] in the compute dtype; targets below
    0 do not count."""
    with category("logits"):
        logits = F.linear(rows, weight).to(wide(rows.dtype))
        counted = (targets >= 0)[:, None]
        wanted = targets.clamp(min=0)[:, None]
        largest = logits.amax(dim=-1, keepdim=True)
        chosen = logits.gather(1, wanted).sub_(largest)
        total = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)  # torch.logsumexp would copy the chunk
        loss = (total.log() - chosen).mul_(counted).sum() * scale
        logits.div_(total.masked_fill_(~counted, math.inf))
        logits.scatter_add_(1, wanted, counted.to(logits.dtype).neg_())
        return loss, logits.mul_(scale).to(rows.dtype)
