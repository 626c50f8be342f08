"""Logit strips: token rows times a block of vocabulary rows, folded into three numbers per token
and freed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mopexec.operators.dtypes import wide
from mopexec.operators.rows import add_matmul
from mopsim.spec import layout


@dataclass
class Fold:
    """Per token, in the wide dtype: running maximum, sum of exponentials below it, and the target's logit.
    Each [N].
    """

    maximum: Tensor
    total: Tensor
    target: Tensor

    @classmethod
    def empty(cls, num_tokens: int, dtype: torch.dtype, device: torch.device) -> "Fold":
        """Nothing folded yet."""
        accurate = wide(dtype)
        return cls(
            torch.full((num_tokens,), float("-inf"), dtype=accurate, device=device),
            torch.zeros(num_tokens, dtype=accurate, device=device),
            torch.zeros(num_tokens, dtype=accurate, device=device),
        )

    def finish(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(log of the sum of exponentials [N], sum of the losses of targets [N] that count).

        Where a target is below 0 the normaliser is infinite, so that the gradient is zero.
        """
        normaliser = self.maximum + self.total.log()
        ignored = targets < 0
        total = (normaliser - self.target).masked_fill_(ignored, 0.0).sum()
        return normaliser.masked_fill_(ignored, math.inf), total

    def add(self, strip: Tensor, targets: Tensor, first: int, start: int, stop: int) -> None:
        """Fold in the strip [stop - start, rows] of tokens [start, stop) and vocabulary rows from
        `first` on.
        """
        maximum = torch.maximum(self.maximum[start:stop], strip.amax(1))
        self.total[start:stop].mul_((self.maximum[start:stop] - maximum).exp_())
        self.total[start:stop].add_(torch.sub(strip, maximum[:, None]).exp_().sum(1))
        self.maximum[start:stop].copy_(maximum)
        local, inside = _local(targets[start:stop], first, strip.shape[1])
        picked = strip.gather(1, local[:, None])[:, 0].to(self.target.dtype)
        self.target[start:stop].add_(picked.mul_(inside))


def fold_block(fold: Fold, hidden: Tensor, targets: Tensor, block: Tensor, first: int, chunk: int) -> None:
    """Fold logits of hidden [N, H] with vocabulary rows block [rows, H], `chunk` tokens at a time.

    Temporaries of a chunk: one strip, and one in the wide dtype.
    """
    for start, stop in layout.token_slices(hidden.shape[0], chunk):
        strip = hidden[start:stop] @ block.t()
        fold.add(strip, targets, first, start, stop)
        del strip


def block_backward(
    hidden: Tensor, targets: Tensor, normaliser: Tensor, block: Tensor, first: int, scale: float, chunk: int,
    grad_hidden: Tensor, grad_block: Tensor,
) -> None:  # fmt: skip
    """grad_hidden [N, H] and grad_block [rows, H] += scale times the gradients of the summed loss, strip by
    strip.
    """
    for start, stop in layout.token_slices(hidden.shape[0], chunk):
        strip = hidden[start:stop] @ block.t()
        strip_gradient_(strip, targets[start:stop], normaliser[start:stop], first, scale)
        grad_hidden[start:stop].addmm_(strip, block)
        add_matmul(grad_block, strip.t(), hidden[start:stop])
        del strip


def whole_forward(strip: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the losses of targets [n] that count; exponentials [n, V] in the wide dtype, of each logit
    below its row's maximum, in the strip's memory where that is wide; their sums [n, 1]) of a strip over the
    whole vocabulary.
    """
    accurate = wide(strip.dtype)
    maximum = strip.amax(1, keepdim=True).to(accurate)
    chosen = strip.gather(1, targets.clamp(min=0)[:, None]).to(accurate).sub_(maximum)
    exact = strip.sub_(maximum) if strip.dtype == accurate else torch.sub(strip, maximum)
    sums = exact.exp_().sum(1, keepdim=True)
    return (sums.log() - chosen).masked_fill_(targets[:, None] < 0, 0.0).sum(), exact, sums


def whole_backward_(strip: Tensor, exact: Tensor, sums: Tensor, targets: Tensor, scale: float) -> None:
    """A strip [n, V] becomes scale * (softmax - one-hot) of what `whole_forward` gives; rows that do not
    count become 0. In place, of both.
    """
    counts = (targets >= 0)[:, None].to(exact.dtype).mul_(scale)
    exact.mul_(counts / sums).scatter_add_(1, targets.clamp(min=0)[:, None], counts.neg_())
    if exact is not strip:
        strip.copy_(exact)


def strip_gradient_(strip: Tensor, targets: Tensor, normaliser: Tensor, first: int, scale: float) -> None:
    """A strip [n, rows] becomes scale * (softmax - one-hot), in place. Temporaries: one strip in the wide
    dtype.
    """
    probability = torch.sub(strip, normaliser[:, None]).exp_()
    local, inside = _local(targets, first, strip.shape[1])
    probability.scatter_add_(1, local[:, None], inside.to(probability.dtype).neg_()[:, None])
    strip.copy_(probability.mul_(scale))


def _local(targets: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """(row inside the block, clamped; whether the target is in the block at all), each [n]."""
    local = targets - first
    inside = (local >= 0) & (local < rows)
    return local.clamp_(0, rows - 1), inside
