"""Experts under autograd: products over routes sorted by expert."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.measure.scope import NOW, category, passes
from mopexec.model.kept import product
from mopexec.model.parts import ungated
from mopexec.operators.activation import Activation, wings_of
from mopexec.operators.again import keeps, kept
from mopexec.operators.grouped import Groups, RowCounts, fits
from mopexec.operators.put_off import gradients, splits
from mopexec.operators.swiglu import Clamp, clamped_activation, clamped_activation_backward
from mopexec.operators.ungated import Ungated


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
        ctx.groups, ctx.biased, ctx.passes = groups, bias is not None, passes(stack)
        return kept(partial(groups.product, rows, stack, bias), name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, stack = ctx.saved_tensors
        groups, passing, given = ctx.groups, ctx.passes, grads[0]  # the context would hold what it saved

        def made(*both: Tensor) -> tuple[Tensor]:
            with category(NOW.category if passing else "gathered_grads"):  # before autograd has it
                return (groups.of_weights(*both),)

        (of_weights,) = gradients(made, (rows, given), (stack,))
        of_bias = groups.of_bias(given) if ctx.biased else None
        return None, None, groups.product(given, stack.transpose(1, 2)), of_weights, of_bias


def activate(wings: Iterable[Tensor], how: Activation) -> Tensor:
    """What an expert's last product reads, of its first; differentiable."""
    *gates, up = wings
    if isinstance(how, Ungated):
        return ungated(up, how)
    if how is None:
        return F.silu(gates.pop()) * up  # the gate is gone before their product is there
    result: Tensor = _Clamped.apply(gates.pop(), up, how)  # type: ignore[no-untyped-call]
    return result


def grouped_experts(x: Tensor, counts: RowCounts, stacks: Mapping[str, Tensor], how: Activation) -> Tensor:
    """Experts of rows [R, H] sorted by expert, differentiable.

    stacks: gate_proj and up_proj [E, H, I], down_proj [E, I, H], and their biases [E, .] where there are any.
    By grouped products where they fit; elsewhere one product per expert, which float64 needs.
    """
    biased, names = "up_proj_bias" in stacks, (*wings_of(how), "down")
    if fits(x, stacks):
        groups = Groups(counts.ends, x.shape[0], biased=biased)

        def grouped(rows: Tensor, name: str) -> Tensor:
            found: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
                f"experts_{name}", groups, rows, stacks[f"{name}_proj"], stacks.get(f"{name}_proj_bias")
            )
            return found

        out = grouped(activate((grouped(x, name) for name in names[:-1]), how), "down")
        groups.expert = None  # no backward adds a bias
        return out
    weights = zip(*(_of_each(stacks[f"{name}_proj"]) for name in names), strict=True)
    biases: Iterable[Sequence[Tensor | None]] = repeat((None,) * len(names))
    if biased:
        biases = zip(*(_of_each(stacks[f"{name}_proj_bias"]) for name in names), strict=True)
    rows = torch.split(x, counts.by_expert) if len(counts.by_expert) > 1 else (x,)
    each = zip(rows, weights, biases, strict=False)
    outputs = [_one_expert(*one, how) for one in each]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # of one it would be a copy


def _of_each(stack: Tensor) -> Sequence[Tensor]:
    """What each expert has of a stack [E, ...]: views, whose gradients are stacked where they are several."""
    return stack.unbind(0) if len(stack) > 1 else (stack.squeeze(0),)


def _one_expert(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], how: Activation
) -> Tensor:
    firsts = zip(wings_of(how), weights, biases, strict=False)
    inner = activate((_multiplied(name, x, weight, bias) for name, weight, bias in firsts), how)
    return _multiplied("down", inner, weights[-1], biases[-1])


def _multiplied(name: str, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if keeps(f"experts_{name}") or splits():
        return product(f"experts_{name}", rows, weight.t(), bias)
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
