"""SwiGLU under autograd: products over routes sorted by expert."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.operators.grouped import Groups, RowCounts, fits
from mopexec.operators.swiglu import Clamp, clamped_activation, clamped_activation_backward


class _Clamped(torch.autograd.Function):
    """(min(up) + 1) * gate * sigmoid(alpha gate) of clamped products; keeps the two, no more."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, clamp: Clamp) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.clamp = clamp
        return clamped_activation(gate, up, clamp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return *clamped_activation_backward(grads[0], gate, up, ctx.clamp), None


class _Product(torch.autograd.Function):
    """Rows times their experts' weights; keeps both. A bias' gradient is a product too, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, groups: Groups, rows: Tensor, stack: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, stack)
        ctx.groups, ctx.biased = groups, bias is not None
        return groups.product(rows, stack, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, stack = ctx.saved_tensors
        groups, given = ctx.groups, grads[0]
        of_weights = groups.of_weights(rows, given)
        of_bias = groups.of_bias(given) if ctx.biased else None
        return None, groups.product(given, stack.transpose(1, 2)), of_weights, of_bias


def activate(gate: Tensor, up: Tensor, clamp: Clamp | None) -> Tensor:
    """SwiGLU's activation, differentiable."""
    if clamp is None:
        return F.silu(gate) * up
    result: Tensor = _Clamped.apply(gate, up, clamp)  # type: ignore[no-untyped-call]
    return result


def grouped_swiglu(x: Tensor, counts: RowCounts, stacks: Mapping[str, Tensor], clamp: Clamp | None) -> Tensor:
    """SwiGLU of rows [R, H] sorted by expert, differentiable.

    stacks: gate_proj and up_proj [E, H, I], down_proj [E, I, H], and their biases [E, .] where there are any.
    By grouped products where they fit; elsewhere one product per expert, which float64 needs.
    """
    biased = "gate_proj_bias" in stacks
    if fits(x, stacks):
        groups = Groups(counts.ends, x.shape[0], biased=biased)

        def product(rows: Tensor, name: str) -> Tensor:
            found: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
                groups, rows, stacks[f"{name}_proj"], stacks.get(f"{name}_proj_bias")
            )
            return found

        return product(activate(product(x, "gate"), product(x, "up"), clamp), "down")
    gates, ups, downs = (stacks[f"{name}_proj"].unbind(0) for name in ("gate", "up", "down"))
    rows = torch.split(x, counts.by_expert)
    if not biased:
        each = zip(rows, gates, ups, downs, strict=True)
        return torch.cat([activate(r @ g, r @ u, clamp) @ d for r, g, u, d in each])
    biases = zip(*(stacks[f"{name}_proj_bias"].unbind(0) for name in ("gate", "up", "down")), strict=True)
    parts = []
    for r, g, u, d, (bg, bu, bd) in zip(rows, gates, ups, downs, biases, strict=True):
        inner = activate(torch.addmm(bg, r, g), torch.addmm(bu, r, u), clamp)
        parts.append(torch.addmm(bd, inner, d))
    return torch.cat(parts)
