"""The experts of a rank one after the other, on views of their rows [R, H], which are sorted by expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.operators.dtypes import wide
from mopexec.operators.rows import add_matmul
from mopexec.operators.swiglu import (
    Clamp,
    clamped_activation,
    clamped_activation_backward,
    swiglu_activation,
    swiglu_activation_backward,
)

Weights = dict[str, Tensor]


@dataclass
class _Expert:
    """Parameters of one expert, or their gradients; biases are None where the network has none."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def _each(held: Sequence[Weights]) -> list[_Expert]:
    return [expert for experts in held for expert in _unstacked(experts)]


def _unstacked(experts: Weights) -> list[_Expert]:
    stacks = [experts[f"moe.experts.{name}_proj"].unbind(0) for name in ("gate", "up", "down")]
    biases = [experts.get(f"moe.experts.{name}_proj_bias") for name in ("gate", "up", "down")]
    none = (None,) * len(stacks[0])
    return [
        _Expert(*parts)
        for parts in zip(*stacks, *(none if one is None else one.unbind(0) for one in biases), strict=True)
    ]


def experts_forward_(
    rows: Tensor, inputs: Tensor, route_weights: Tensor, counts: list[int], held: Sequence[Weights],
    clamp: Clamp | None = None,
) -> None:  # fmt: skip
    """Rows [R, H] become weight * expert(input) of inputs sorted by expert, which may be the rows themselves.
    counts: of the experts of all stacks in `held`; more are 0. Temporaries: 2 I rows of one expert.
    """
    start = 0
    for count, expert in zip(counts, _each(held), strict=False):
        if count:
            part, source = rows[start : start + count], inputs[start : start + count]
            weight = route_weights[start : start + count, None]
            gate, up = (
                _product(source, expert.gate, expert.gate_bias),
                _product(source, expert.up, expert.up_bias),
            )
            inner = swiglu_activation(gate, up) if clamp is None else clamped_activation(gate, up, clamp)
            del gate, up
            torch.mm(inner.mul_(weight), expert.down, out=part)
            if expert.down_bias is not None:
                part.addcmul_(weight.to(part.dtype), expert.down_bias)
            del inner
        start += count


def experts_backward_(
    rows: Tensor, inputs: Tensor, route_weights: Tensor, counts: list[int], held: Sequence[Weights],
    grads: Sequence[Weights], clamp: Clamp | None = None, *, whole: bool = False,
) -> Tensor:  # fmt: skip
    """Rows [R, H], gradients of weight * expert(input), become gradients of the inputs in place; grads += the
    weights'. whole: the output runs again too, as in a checkpoint of the products, though nobody reads it.

    Returns the gradients of the route weights [R] in the wide dtype. Temporaries: 5 I rows of one expert.
    """
    grad_weights = torch.empty(rows.shape[0], dtype=wide(rows.dtype), device=rows.device)
    start = 0
    for count, expert, own in zip(counts, _each(held), _each(grads), strict=False):
        if count:
            stop = start + count
            _one_expert_backward(
                rows[start:stop], inputs[start:stop], route_weights[start:stop, None],
                grad_weights[start:stop], expert, own, clamp, whole=whole,
            )  # fmt: skip
        start += count
    return grad_weights


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _one_expert_backward(
    rows: Tensor, inputs: Tensor, route_weights: Tensor, grad_weights: Tensor, expert: _Expert, own: _Expert,
    clamp: Clamp | None, *, whole: bool,
) -> None:  # fmt: skip
    """`experts_backward_` for the rows of one expert."""
    gate, up = _product(inputs, expert.gate, expert.gate_bias), _product(inputs, expert.up, expert.up_bias)
    if clamp is None:
        silu = F.silu(gate)
        inner = silu * up
    else:
        inner = clamped_activation(gate, up, clamp)
    grad_inner = rows @ expert.down.t()
    grad_weights.copy_((inner * grad_inner).sum(-1, dtype=grad_weights.dtype))
    inner.mul_(route_weights)
    if whole:
        _product(inner, expert.down, None)
    add_matmul(own.down, inner.t(), rows)
    del inner
    if expert.down_bias is not None and own.down_bias is not None:
        grad_weights.add_((rows * expert.down_bias).sum(-1, dtype=grad_weights.dtype))
        own.down_bias.add_((rows * route_weights).sum(0))
    grad_inner.mul_(route_weights)
    if clamp is None:
        grad_gate, grad_up = swiglu_activation_backward(grad_inner, gate, up, silu)
    else:
        grad_gate, grad_up = clamped_activation_backward(grad_inner, gate, up, clamp)
    add_matmul(own.gate, inputs.t(), grad_gate)
    add_matmul(own.up, inputs.t(), grad_up)
    for bias, grad in ((own.gate_bias, grad_gate), (own.up_bias, grad_up)):
        if bias is not None:
            bias.add_(grad.sum(0))
    torch.mm(grad_gate, expert.gate.t(), out=rows)
    rows.addmm_(grad_up, expert.up.t())
