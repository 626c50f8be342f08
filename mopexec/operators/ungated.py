"""The activation of a feed-forward of two matrices, without a gate, and its backward: GELU or its tanh form
(arXiv 1606.08415), ReLU or its square (arXiv 2109.08668).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.operators.dtypes import wide
from mopexec.operators.fused import define, nothing
from mopsim.spec.model import ModelSpec

_ATEN: Any = torch.ops.aten
_GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
"""How torch's GELU is asked for each form."""


@dataclass(frozen=True)
class Ungated:
    """function: `ffn_activation` of a ModelSpec."""

    function: str


def ungated_of(spec: ModelSpec) -> Ungated | None:
    """How the network's feed-forwards activate, None where they have a gate."""
    return Ungated(spec.ffn_activation) if spec.ffn_matrices == 2 else None


def plain(up: Tensor, function: str) -> Tensor:
    """As torch composes it, differentiable."""
    if function in _GELU:
        return F.gelu(up, approximate=_GELU[function])
    bounded = F.relu(up)
    return bounded.square() if function == "relu2" else bounded


def ungated_(up: Tensor, how: Ungated) -> Tensor:
    """The activation of up [R, I], in its memory."""
    if how.function in _GELU:
        found: Tensor = _ATEN.gelu.out(up, approximate=_GELU[how.function], out=up)
        return found
    return up.relu_().square_() if how.function == "relu2" else up.relu_()


def ungated_backward_(grad: Tensor, up: Tensor, how: Ungated) -> Tensor:
    """Gradient of up from that of `ungated_`, in grad's memory; up's is overwritten."""
    found: Tensor
    if how.function in _GELU:
        way = _GELU[how.function]
        found = _ATEN.gelu_backward.grad_input(grad, up, approximate=way, grad_input=grad)
    elif how.function == "relu2":
        found = grad.mul_(up.relu_()).mul_(2)
    else:
        found = _ATEN.threshold_backward.grad_input(grad, up, 0, grad_input=grad)
    return found


def _slope(up: Tensor, given: Tensor, function: str) -> Tensor:
    """Gradient of up from that of its activation."""
    found: Tensor
    if function in _GELU:
        found = _ATEN.gelu_backward(given, up, approximate=_GELU[function])
        return found
    if function == "relu2":
        return given * F.relu(up) * 2
    return torch.where(up > 0, given, 0.0)


def _ungated(up: Tensor, function: str) -> Tensor:
    return plain(up.to(wide(up.dtype)), function).to(up.dtype)


def _ungated_backward(grad: Tensor, up: Tensor, function: str) -> Tensor:
    accurate = wide(up.dtype)
    return _slope(up.to(accurate), grad.to(accurate), function).to(up.dtype)


def _weighted_(up: Tensor, weight: Tensor | None, function: str) -> None:
    """up [R, I] = its activation, times weight [R] where given."""
    inner = plain(up.to(wide(up.dtype)), function)
    up.copy_(inner if weight is None else inner * weight[:, None])


def _weighted_backward_(grad: Tensor, up: Tensor, weight: Tensor | None, function: str) -> Tensor:
    """grad [R, I], of the activation after the route weight, becomes that activation; up its gradient.

    Returns the gradient of weight [R], in the wide dtype; [0] without one.
    """
    accurate = wide(up.dtype)
    wider, given = up.to(accurate), grad.to(accurate)
    inner, total = plain(wider, function), given.new_empty(0)
    if weight is not None:
        total, share = (inner * given).sum(-1), weight.to(accurate)[:, None]
        given, inner = given * share, inner * share
    up.copy_(_slope(wider, given, function))
    grad.copy_(inner)
    return total


define("ungated(Tensor up, str function) -> Tensor", _ungated, lambda up, function: torch.empty_like(up))
define("ungated_backward(Tensor grad, Tensor up, str function) -> Tensor", _ungated_backward,
       lambda grad, up, function: torch.empty_like(up))  # fmt: skip
define("ungated_(Tensor(a!) up, Tensor? weight, str function) -> ()", _weighted_, nothing)
define("ungated_backward_(Tensor(a!) grad, Tensor(b!) up, Tensor? weight, str function) -> Tensor",
       _weighted_backward_,
       lambda grad, up, weight, function: torch.empty(
           0 if weight is None else grad.shape[0], dtype=wide(grad.dtype), device="meta"
       ))  # fmt: skip
