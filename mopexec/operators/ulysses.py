"""Ulysses (arXiv 2309.14509): ranks that share a sequence trade positions for heads by all-to-all.

Projections are written straight into the send layout [D, tokens, width / D], block d being the heads of rank
d, so packing copies nothing. Where D exceeds the KV heads, each KV block is projected for every rank that
needs it.
"""

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.operators import kernels
from mopexec.operators.rows import add_matmul


class SequenceExchange:
    """The exchange of one microbatch shape: `batch` sequences of which this rank holds `seq` positions."""

    def __init__(self, group: Group, batch: int, seq: int) -> None:
        self.group, self.batch, self.seq = group, batch, seq
        self.degree = group.size
        self.tokens = batch * seq

    def blocks(self, heads: int) -> int:
        """Distinct blocks that `heads` heads are cut into: D, or all heads where D exceeds them."""
        return min(self.degree, heads)

    def project(self, x: Tensor, weight: Tensor, heads: int) -> Tensor:
        """x [N, H] times weight [heads * d, H] transposed, as the send layout [D, N, width of a block]."""
        blocks = self.blocks(heads)
        width, repeats = weight.shape[0] // blocks, self.degree // blocks
        if repeats == 1 and kernels.NOW.grouped:
            return torch.bmm(x.expand(blocks, -1, -1), weight.view(blocks, width, -1).transpose(1, 2))
        packed = torch.empty((self.degree, self.tokens, width), dtype=x.dtype, device=x.device)
        for place in range(self.degree):
            block = place // repeats
            torch.mm(x, weight[block * width : (block + 1) * width].t(), out=packed[place])
        return packed

    def pack(self, rows: Tensor, heads: int) -> Tensor:
        """Rows [N, heads * d] in the send layout [D, N, width of a block]."""
        blocks = self.blocks(heads)
        packed = torch.stack(rows.chunk(blocks, dim=1)) if blocks > 1 else rows[None]
        return packed if blocks == self.degree else packed.repeat_interleave(self.degree // blocks, dim=0)

    def project_back(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad [N, H] times weight [H, width], as the send layout [D, N, width / D] (the output projection's
        dgrad).
        """
        width = weight.shape[1] // self.degree
        if kernels.NOW.grouped:
            by_place = weight.view(-1, self.degree, width).transpose(0, 1)
            return torch.bmm(grad.expand(self.degree, -1, -1), by_place)
        packed = torch.empty((self.degree, self.tokens, width), dtype=grad.dtype, device=grad.device)
        for place in range(self.degree):
            torch.mm(grad, weight[:, place * width : (place + 1) * width], out=packed[place])
        return packed

    def to_heads(self, given: list[Tensor]) -> Tensor:
        """Send layout [D, N, w] of this rank's positions to all positions [B, S, w] of this rank's heads. It
        is taken out of a list, and freed once it is sent.
        """
        if self.degree == 1:
            return given.pop().view(self.batch, self.seq, -1)
        received = swap(given.pop(), self.group).view(self.degree, self.batch, self.seq, -1)
        return received.transpose(0, 1).reshape(self.batch, self.degree * self.seq, -1)

    def to_positions(self, given: list[Tensor]) -> Tensor:
        """All positions [B, S, w] of this rank's heads to [D, N, w]: this rank's positions, block by block of
        heads. They are taken out of a list, and freed once they are laid out to be sent.
        """
        if self.degree == 1:
            return given.pop().reshape(1, self.tokens, -1)
        by_place = given.pop().reshape(self.batch, self.degree, self.seq, -1).transpose(0, 1)
        by_place = by_place.contiguous()
        return swap(by_place, self.group).view(self.degree, self.tokens, -1)

    def merge(self, packed: Tensor, heads: int) -> Tensor:
        """[D, N, w] to rows [N, blocks * w], copies of a KV block summed (they are gradients then)."""
        blocks = self.blocks(heads)
        if blocks < self.degree:
            packed = packed.view(blocks, self.degree // blocks, self.tokens, -1).sum(1)
        return packed[0] if blocks == 1 else packed.transpose(0, 1).reshape(self.tokens, -1)


def swap(blocks: Tensor, group: Group) -> Tensor:
    """Blocks [D, ..], one for each rank, as the blocks of each rank for this one."""
    received = torch.empty_like(blocks)
    collectives.all_to_all_single(received, blocks, group=group.handle)
    return received


def project_backward(
    grad: Tensor, x: Tensor, weight: Tensor, grad_weight: Tensor, grad_x: Tensor | None
) -> Tensor:
    """Backward of x weight^T: grad_weight += grad^T x; returns grad_x (+)= grad weight. grad [N, out], x [N,
    H].
    """
    add_matmul(grad_weight, grad.t(), x)
    return grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
