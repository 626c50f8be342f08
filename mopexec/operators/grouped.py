"""Grouped products: all experts of a rank in one kernel. Rows [R, a] are sorted by expert, and counted on the
device, so that no count is uploaded for them.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.operators import kernels
from mopexec.operators.fused import OPS
from mopsim.spec.stack import GROUPED_ROW

BLOCK = GROUPED_ROW // torch.bfloat16.itemsize
"""Elements in bf16 of which grouped products want rows to be multiples."""


@dataclass(frozen=True)
class RowCounts:
    """Rows of each expert of a rank, by where they come from, in that order.

    each [sources][experts] on the host; device: the same on the device, int64. beside: of the ranks that
    split the same experts (expert-tensor parallelism), each a source.
    """

    each: list[list[int]]
    device: Tensor
    beside: "RowCounts | None" = None

    @property
    def ends(self) -> Tensor:
        """Where each expert's rows end, on the device."""
        return ends_of(self.device)

    @property
    def by_source(self) -> list[int]:
        """Rows of each source."""
        return [sum(counts) for counts in self.each]

    @property
    def by_expert(self) -> list[int]:
        """Rows of each expert."""
        return [sum(counts) for counts in zip(*self.each, strict=True)]


def ends_of(arrived: Tensor) -> Tensor:
    """Where each expert's rows end, [.., experts] int32, of arrivals [.., sources, experts]."""
    return arrived.sum(-2).cumsum(-1, dtype=torch.int32)


def expert_order(arrived: Tensor, total: int) -> Tensor | None:
    """Positions of arrivals (by source, then expert) in the order by expert, then source: [total] int64. None
    where the two are the same. arrived [.., sources, experts] counts them; where of several chunks, `total`
    is theirs together and positions are in their own chunk.
    """
    if 1 in arrived.shape[-2:]:
        return None
    order: Tensor = OPS.arrival_order(arrived, total)
    return order


def fits(rows: Tensor, stacks: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Whether the stack asks for grouped products and torch has them: bf16, rows of whole 16 bytes."""
    hidden, inner = stacks[f"{prefix}up_proj"].shape[1:]  # packed rows are wider than they multiply
    whole = rows.shape[0] > 0 and hidden % BLOCK == 0 and inner % BLOCK == 0
    asked = kernels.NOW.grouped and rows.dtype == torch.bfloat16 and whole
    return asked and _in_one_kernel(rows.device)


@functools.cache
def _in_one_kernel(device: torch.device) -> bool:
    """Whether torch's grouped products are one kernel there. On NVIDIA's cards but Hopper and Blackwell's
    data centre ones they are a loop over experts, for whose counts each product makes the host wait; these it
    has already (torch 2.10 to 2.13, aten/src/ATen/native/cuda/GroupedBlas.cpp).
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def _leaves_memory(device: torch.device) -> bool:
    """Whether the card's kernel leaves in an expert's product over no rows what was in memory: Blackwell's
    (torch 2.13, github.com/pytorch/pytorch/issues/172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


class Groups:
    """ends [E] int32: where each expert's rows end; of each row its expert where there are biases."""

    def __init__(self, ends: Tensor, num_rows: int, *, biased: bool) -> None:
        self.ends = ends
        self._empty: Tensor | None = None
        if _leaves_memory(ends.device):
            self._empty = (ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None]
        self.expert: Tensor | None = None
        if biased:
            place = torch.arange(num_rows, dtype=ends.dtype, device=ends.device)
            self.expert = torch.searchsorted(ends, place, right=True)

    def product(self, rows: Tensor, stack: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows [R, a] times their experts' [E, a, b]."""
        out = F.grouped_mm(rows, stack, offs=self.ends)
        return out if bias is None else out.add_(self.of_rows(bias))

    def of_rows(self, bias: Tensor) -> Tensor:
        """A bias [E, b] row by row."""
        assert self.expert is not None
        return bias.index_select(0, self.expert)

    def of_weights(self, rows: Tensor, grads: Tensor) -> Tensor:
        """Gradient of a stack [E, a, b]: rows [R, a] transposed times grads [R, b], by expert; zero where it
        has no rows."""
        product = F.grouped_mm(rows.t(), grads, offs=self.ends)
        return product if self._empty is None else product.masked_fill_(self._empty, 0)

    def of_bias(self, grads: Tensor) -> Tensor:
        """Gradient of a bias [E, b]: the sum of each expert's rows, as a product with ones: in a fixed
        order."""
        ones = torch.ones((grads.shape[0], BLOCK), dtype=grads.dtype, device=grads.device)
        return self.of_weights(ones, grads)[:, 0]

    def add_weights(self, target: Tensor, rows: Tensor, grads: Tensor) -> None:
        """target [E, a, b] += `of_weights`."""
        target.add_(self.of_weights(rows, grads))

    def add_bias(self, target: Tensor | None, grads: Tensor) -> None:
        """target [E, b] += `of_bias`."""
        if target is not None:
            target.add_(self.of_bias(grads))
