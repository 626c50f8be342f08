"""A backward in two halves (zero bubble, arXiv 2401.10241): gradients of inputs at once, those of the weights
of products when a schedule asks for them.

Of the pass, what these are made of stays until then, the rows that a product read and the gradient of what it
made, and nothing else. Weights that are in no product have their gradients in the first half.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mopexec.measure.scope import NOW, component

Operands = tuple[Tensor, ...]


class PutOff:
    """What the first half of a backward, while entered, leaves for the second. last: done after all else."""

    now: "PutOff | None" = None

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self.last: Callable[[], None] | None = None

    def __enter__(self) -> "PutOff":
        PutOff.now = self
        return self

    def __exit__(self, *error: Any) -> None:
        PutOff.now = None

    def add(self, call: Callable[[], None]) -> None:
        """Calls are made in this order, and what each holds is let go once it was."""
        self._calls.append(call)

    def make(self) -> None:
        """The second half."""
        while self._calls:
            self._calls.popleft()()
        if self.last is not None:
            self.last()


class _Planned:
    now = False


class planned:  # noqa: N801
    """`with planned():` a forward whose backward will be in two halves."""

    def __enter__(self) -> None:
        _Planned.now = True

    def __exit__(self, *error: Any) -> None:
        _Planned.now = False


def splits() -> bool:
    """Whether what runs is of such a pass: its forward, or a recomputation in its backward."""
    return _Planned.now or PutOff.now is not None


def gradients(
    make: Callable[..., Sequence[Tensor]], operands: Sequence[Tensor], weights: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """What a backward returns for weights: what `make` gives of the operands, or None where that is put
    off."""
    later = PutOff.now
    if later is None:
        return make(*operands)
    with torch.enable_grad():
        own = tuple(operand.detach() for operand in operands)  # else they would keep their graphs
        root = _Second.apply(make, own, *weights)  # type: ignore[no-untyped-call]
    owner = component(NOW.component)

    def second() -> None:
        with owner:
            torch.autograd.backward(root)

    later.add(second)
    return [None] * len(weights)


class _Second(torch.autograd.Function):
    """A graph of the weights alone, whose backward makes their gradients: autograd adds what nothing else
    holds without a copy."""

    @staticmethod
    def forward(ctx: Any, make: Callable[..., Sequence[Tensor]], own: Operands, *weights: Tensor) -> Tensor:
        ctx.make, ctx.own = make, own
        return own[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        own = ctx.own
        del ctx.own
        return None, None, *ctx.make(*own)
