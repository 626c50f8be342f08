"""SwiGLU products: per-expert matmuls over routes sorted by expert."""

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T for weights stored [out, in]; x [N, H]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def grouped_swiglu(x: Tensor, counts: list[int], gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of rows sorted by expert, differentiable.

    x [sum(counts), H]; counts: rows of each expert; gate and up [E, H, I], down [E, I, H]. torch's grouped
    matmul takes bf16 on CUDA (with 16-byte rows); elsewhere one matmul per expert, which float64 needs.
    """
    if (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.shape[1] % 8 == 0
        and gate.shape[2] % 8 == 0
        and x.shape[0]
    ):
        ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
        hidden = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
        return F.grouped_mm(hidden, down, offs=ends)
    parts = [
        (F.silu(rows @ g) * (rows @ u)) @ d
        for rows, g, u, d in zip(
            torch.split(x, counts), gate.unbind(0), up.unbind(0), down.unbind(0), strict=True
        )
    ]
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
