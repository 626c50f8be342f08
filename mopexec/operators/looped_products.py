"""The experts of a rank one after the other, on views of their rows [R, H], which are sorted by expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopexec.operators.activation import Activation, activated, activated_, activated_backward, wings_of
from mopexec.operators.dtypes import wide
from mopexec.operators.rows import add_matmul

Weights = dict[str, Tensor]


@dataclass
class _Expert:
    """Parameters of one expert, or their gradients, by name; no biases where the network has none."""

    weights: Weights
    biases: Weights

    def product(self, x: Tensor, name: str) -> Tensor:
        bias = self.biases.get(name)
        return x @ self.weights[name] if bias is None else torch.addmm(bias, x, self.weights[name])


def _each(held: Sequence[Weights]) -> list[_Expert]:
    return [expert for experts in held for expert in _unstacked(experts)]


def _unstacked(experts: Weights) -> list[_Expert]:
    def of(suffix: str) -> dict[str, tuple[Tensor, ...]]:
        stacks = {name: experts.get(f"moe.experts.{name}_proj{suffix}") for name in ("gate", "up", "down")}
        return {name: stack.unbind(0) for name, stack in stacks.items() if stack is not None}

    weights, biases = of(""), of("_bias")
    return [
        _Expert(*({name: stack[place] for name, stack in one.items()} for one in (weights, biases)))
        for place in range(len(weights["up"]))
    ]


def experts_forward_(
    rows: Tensor, inputs: Tensor, route_weights: Tensor, counts: list[int], held: Sequence[Weights],
    how: Activation = None,
) -> None:  # fmt: skip
    """Rows [R, H] become weight * expert(input) of inputs sorted by expert, which may be the rows themselves.
    counts: of the experts of all stacks in `held`; more are 0. Temporaries: 2 I rows of one expert,
    without a gate I rows, clamped 4.
    """
    start = 0
    for count, expert in zip(counts, _each(held), strict=False):
        if count:
            part, source = rows[start : start + count], inputs[start : start + count]
            weight = route_weights[start : start + count, None]
            inner = activated_([expert.product(source, name) for name in wings_of(how)], how)
            torch.mm(inner.mul_(weight), expert.weights["down"], out=part)
            if "down" in expert.biases:
                part.addcmul_(weight.to(part.dtype), expert.biases["down"])
            del inner
        start += count


def experts_backward_(
    rows: Tensor, inputs: Tensor, route_weights: Tensor, counts: list[int], held: Sequence[Weights],
    grads: Sequence[Weights], how: Activation = None, *, whole: bool = False,
) -> Tensor:  # fmt: skip
    """Rows [R, H], gradients of weight * expert(input), become gradients of the inputs in place; grads += the
    weights'. whole: the output runs again too, as in a checkpoint of the products, though nobody reads it.

    Returns the gradients of the route weights [R] in the wide dtype. Temporaries: 6 I rows of one expert,
    without a gate 4 I rows, clamped 7.
    """
    grad_weights = torch.empty(rows.shape[0], dtype=wide(rows.dtype), device=rows.device)
    start = 0
    for count, expert, own in zip(counts, _each(held), _each(grads), strict=False):
        if count:
            stop = start + count
            _one_expert_backward(
                rows[start:stop], inputs[start:stop], route_weights[start:stop, None],
                grad_weights[start:stop], expert, own, how, whole=whole,
            )  # fmt: skip
        start += count
    return grad_weights


def _one_expert_backward(
    rows: Tensor, inputs: Tensor, route_weights: Tensor, grad_weights: Tensor, expert: _Expert, own: _Expert,
    how: Activation, *, whole: bool,
) -> None:  # fmt: skip
    """`experts_backward_` for the rows of one expert."""
    names, down = wings_of(how), expert.weights["down"]
    wings = [expert.product(inputs, name) for name in names]
    inner, silu = activated(wings, how)
    grad_inner = rows @ down.t()
    grad_weights.copy_((inner * grad_inner).sum(-1, dtype=grad_weights.dtype))
    inner.mul_(route_weights)
    if whole:
        torch.mm(inner, down)
    add_matmul(own.weights["down"], inner.t(), rows)
    del inner
    if "down" in expert.biases:
        grad_weights.add_((rows * expert.biases["down"]).sum(-1, dtype=grad_weights.dtype))
        own.biases["down"].add_((rows * route_weights).sum(0))
    wings = activated_backward(grad_inner.mul_(route_weights), wings, silu, how)
    for name, grad in zip(names, wings, strict=True):
        add_matmul(own.weights[name], inputs.t(), grad)
        if name in own.biases:
            own.biases[name].add_(grad.sum(0))
    torch.mm(wings[0], expert.weights[names[0]].t(), out=rows)
    for name, grad in zip(names[1:], wings[1:], strict=True):
        rows.addmm_(grad, expert.weights[name].t())
