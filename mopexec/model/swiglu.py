"""SwiGLU products: per-expert matmuls over routes sorted by expert."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.model.grouped import Groups, RowCounts, fits
from mopsim.spec.model import ModelSpec


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T for weights stored [out, in]; x [N, H]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


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
    grad_up = (bounded * sigmoid).mul_(grad).mul_(up.abs() <= clamp.limit)
    slope = bounded.mul_(1 - sigmoid).mul_(clamp.alpha).add_(1).mul_(sigmoid)
    del sigmoid
    slope.mul_(up.clamp(-clamp.limit, clamp.limit).add_(1)).mul_(grad).mul_(gate <= clamp.limit)
    return slope, grad_up


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
        gate, up = (
            groups.product(x, stacks[f"{name}_proj"], stacks.get(f"{name}_proj_bias"))
            for name in ("gate", "up")
        )
        return groups.product(activate(gate, up, clamp), stacks["down_proj"], stacks.get("down_proj_bias"))
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
