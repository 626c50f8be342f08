"""Exchanges between ranks under autograd: the gradient of each goes back by the inverse exchange."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mopexec.measure.scope import category
from mopexec.operators.again import kept

Rows = Callable[[Tensor], Tensor]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Rows, back: Rows, booked: str, name: str) -> Tensor:
        ctx.back, ctx.booked = back, booked
        return kept(partial(there, x), name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with category(ctx.booked) if ctx.booked else nullcontext():
            return ctx.back(grads[0]), None, None, None, None


def exchange(x: Tensor, there: Rows, back: Rows, *, booked: str = "", name: str = "") -> Tensor:
    """there(x), whose gradient is back(gradient). booked: the category of the gradient's memory, where it is
    not that of what runs then. name: what keeps its output by (activations.save_ops)."""
    return cast(Tensor, _Exchange.apply(x, there, back, booked, name))  # type: ignore[no-untyped-call]
