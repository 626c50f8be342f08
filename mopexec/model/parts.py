"""The modules that every layer is made of: norm, linear, dense FFN."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (float64 in float64)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class FeedForward(nn.Module):
    """Dense SwiGLU, also the shared expert."""

    def __init__(
        self, hidden: int, inner: int, dtype: torch.dtype, device: torch.device, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, inner, dtype, device, bias)
        self.up_proj = linear(hidden, inner, dtype, device, bias)
        self.down_proj = linear(inner, hidden, dtype, device, bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class _Linear(nn.Linear):
    """An nn.Linear whose weight [outputs, inputs] is left as it is made: `init_weights` fills it."""

    def reset_parameters(self) -> None:
        """Nothing: torch.nn.utils.skip_init would not work on fake tensors."""


def linear(
    inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, bias: bool = False
) -> nn.Linear:
    """x [.., inputs] to [.., outputs]; uninitialised."""
    return _Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)
