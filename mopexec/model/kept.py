"""Products whose outputs a recomputation takes from the forward (activations.save_ops), or whose backward is
in two halves."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.operators.again import keeps, kept
from mopexec.operators.put_off import gradients, splits


class _KeptProduct(torch.autograd.Function):
    """x [.., in] W^T + b for a weight [out, in]."""

    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return kept(partial(F.linear, x, weight, bias), name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grads[0].flatten(0, -2)
        (of_weight,) = gradients(_of_weight, (rows, x.flatten(0, -2)), (weight,))
        return None, grads[0] @ weight, of_weight, rows.sum(0) if ctx.biased else None


def _of_weight(grads: Tensor, rows: Tensor) -> tuple[Tensor]:
    return (grads.t() @ rows,)


def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., in] times weight [out, in]^T, plus its bias if there is one: the kernel of that name ("": of
    none that a strategy names)."""
    if not keeps(name) and not splits():
        return F.linear(x, weight, bias)
    return cast(Tensor, _KeptProduct.apply(name, x, weight, bias))  # type: ignore[no-untyped-call]
