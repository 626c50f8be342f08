"""SwiGLU's activation, clamped (GPT-OSS) or not, and its backward."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mopsim.spec.model import ModelSpec


@dataclass(frozen=True)
class Clamp:
    """SwiGLU of GPT-OSS (arXiv 2508.10925): gate at most `limit`, up within it, a sigmoid of alpha times the
    gate, and up + 1.
    """

    limit: float
    alpha: float


def clamp_of(spec: ModelSpec) -> Clamp | None:
    """How the network's experts clamp, None where they do not."""
    return Clamp(spec.swiglu_limit, spec.swiglu_alpha) if spec.swiglu_limit else None


def clamped_activation(gate: Tensor, up: Tensor, clamp: Clamp) -> Tensor:
    """The activation of clamped gate and up, [R, I] each."""
    bounded = gate.clamp(max=clamp.limit)
    result = (bounded * clamp.alpha).sigmoid_().mul_(bounded)
    del bounded
    return result.mul_(up.clamp(-clamp.limit, clamp.limit).add_(1))


def clamped_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, clamp: Clamp
) -> tuple[Tensor, Tensor]:
    """(grad of gate, grad of up) from that of `clamped_activation`."""
    bounded = gate.clamp(max=clamp.limit)
    sigmoid = (bounded * clamp.alpha).sigmoid_()
    grad_up = (bounded * sigmoid).mul_(grad).mul_(up.abs().le_(clamp.limit))
    slope = bounded.mul_(1 - sigmoid).mul_(clamp.alpha).add_(1).mul_(sigmoid)
    del sigmoid
    slope.mul_(up.clamp(-clamp.limit, clamp.limit).add_(1)).mul_(grad).mul_(gate <= clamp.limit)
    return slope, grad_up


def swiglu_activation(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in gate's memory."""
    return F.silu(gate, inplace=True).mul_(up)


def swiglu_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, silu: Tensor) -> tuple[Tensor, Tensor]:
    """(grad of gate, grad of up) from that of silu(gate) * up; they take the memory of `grad` and of `silu` =
    silu(gate).
    """
    grad_up = silu.mul_(grad)
    grad.mul_(up)
    grad_gate: Tensor = torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
    return grad_gate, grad_up
