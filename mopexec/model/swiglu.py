"""SwiGLU under autograd: products over routes sorted by expert."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.model.kept import product
from mopexec.operators.again import keeps, kept
from mopexec.operators.grouped import Groups, RowCounts, fits
from mopexec.operators.put_off import gradients, splits
from mopexec.operators.swiglu import Clamp, clamped_activation, clamped_activation_backward

_NAMES = ("gate", "up", "down")


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
    def forward(
        ctx: Any, name: str, groups: Groups, rows: Tensor, stack: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(rows, stack)
        ctx.groups, ctx.biased = groups, bias is not None
        return kept(partial(groups.product, rows, stack, bias), name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, stack = ctx.saved_tensors
        groups, given = ctx.groups, grads[0]
        (of_weights,) = gradients(lambda *both: (groups.of_weights(*both),), (rows, given), (stack,))
        of_bias = groups.of_bias(given) if ctx.biased else None
        return None, None, groups.product(given, stack.transpose(1, 2)), of_weights, of_bias


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

        def grouped(rows: Tensor, name: str) -> Tensor:
            found: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
                f"experts_{name}", groups, rows, stacks[f"{name}_proj"], stacks.get(f"{name}_proj_bias")
            )
            return found

        return grouped(activate(grouped(x, "gate"), grouped(x, "up"), clamp), "down")
    weights = zip(*(stacks[f"{name}_proj"].unbind(0) for name in _NAMES), strict=True)
    biases: Iterable[Sequence[Tensor | None]] = repeat((None, None, None))
    if biased:
        biases = zip(*(stacks[f"{name}_proj_bias"].unbind(0) for name in _NAMES), strict=True)
    rows = torch.split(x, counts.by_expert)
    each = zip(rows, weights, biases, strict=False)
    return torch.cat([_one_expert(*one, clamp) for one in each])


def _one_expert(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], clamp: Clamp | None
) -> Tensor:
    inner = activate(
        _multiplied("gate", x, weights[0], biases[0]), _multiplied("up", x, weights[1], biases[1]), clamp
    )
    return _multiplied("down", inner, weights[2], biases[2])


def _multiplied(name: str, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if keeps(f"experts_{name}") or splits():
        return product(f"experts_{name}", rows, weight.t(), bias)
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
