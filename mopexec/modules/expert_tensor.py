"""Expert-tensor parallelism: the ranks of a group split every routed expert of theirs; each gets the rows of
all, and the sums of what they make of them go back.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mopexec.distributed.mesh import Group
from mopexec.measure.scope import category
from mopexec.modules.exchange import exchange
from mopexec.modules.experts import by_expert, permute
from mopexec.operators.expert_tensor import gather_blocks, scatter_blocks
from mopexec.operators.grouped import RowCounts


class _Regathered:
    """Saved-tensor hooks: of gathered rows only a rank's own are kept; the backward gathers them again,
    for as long as autograd holds one of the views."""

    def __init__(self, own: Tensor, gather: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        self._own, self._gather = own.detach(), gather
        self._storage = rows.untyped_storage()._cdata
        self._rows: Tensor | None = None

    def pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata != self._storage:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self._rows is None:
            with category("dispatch"), torch.no_grad():
                self._rows = self._gather(self._own)
        return self._rows.as_strided(*packed)


class SplitExperts:
    """A drop-in for the forward of `Experts` that hold this rank's columns of each expert. regathers: rows
    are gathered again for the backward, where no checkpoint stands around it.
    """

    def __init__(self, module: nn.Module, group: Group, *, regathers: bool) -> None:
        self._forward, self._group, self._regathers = module.forward, group, regathers

    def __call__(self, x: Tensor, counts: RowCounts) -> Tensor:
        """Rows sorted by expert [R, H] to [R, H]."""
        everyone = counts.beside
        assert everyone is not None
        with category("dispatch"):
            sizes = everyone.by_source
            order = by_expert(everyone)
            collected, returned = (
                partial(one, sizes=sizes, group=self._group) for one in (gather_blocks, scatter_blocks)
            )

            def gather(own: Tensor) -> Tensor:
                whole = exchange(own, collected, returned, booked="dispatch")
                return whole if order is None else permute(whole, *order)

            rows = gather(x)
        hooks: Any = nullcontext()
        if self._regathers and rows.requires_grad:
            again = _Regathered(x, gather, rows)
            hooks = saved_tensors_hooks(again.pack, again.unpack)
        with hooks:
            rows = self._forward(rows, everyone)
        with category("dispatch"):
            if order is not None:
                rows = permute(rows, *reversed(order))
            return exchange(rows, returned, collected, booked="dispatch")
