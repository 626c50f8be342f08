"""The modules that every layer is made of: norm, linear, dense FFN."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopexec.model.kept import product
from mopexec.operators import kernels
from mopexec.operators.activation import wings_of
from mopexec.operators.fused import OPS
from mopexec.operators.norms import layer_norm, layer_norm_backward_
from mopexec.operators.rows import rms_norm, rms_norm_backward_
from mopexec.operators.ungated import Ungated, plain, ungated_of
from mopsim.spec.model import ModelSpec


class _Norm(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        rms_norm_backward_(grad_x, x, grads[0], weight, grad_weight, ctx.eps, add=False)
        return grad_x, grad_weight, None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, as torch composes it, or in one kernel each way."""
    if not kernels.NOW.norm:
        return F.rms_norm(x, weight.shape, weight, eps)
    found: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return found


def unweighted_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, as `norm`."""
    if not kernels.NOW.norm:
        return F.rms_norm(x, x.shape[-1:], None, eps)
    return norm(x, x.new_ones(x.shape[-1]), eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (float64 in float64)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.eps)


class _Centred(torch.autograd.Function):
    """LayerNorm; keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.biased = eps, bias is not None
        return layer_norm(x, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        grad_bias = torch.zeros_like(weight) if ctx.biased else None
        layer_norm_backward_(grad_x, x, grads[0], weight, grad_weight, grad_bias, ctx.eps, add=False)
        return grad_x, grad_weight, grad_bias, None


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias over the last dimension: torch's, or a kernel each way that
    keeps its input alone."""

    def __init__(
        self, size: int, eps: float, dtype: torch.dtype, device: torch.device, *, bias: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype, device=device)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not kernels.NOW.norm:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        found: Tensor = _Centred.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        return found


def norm_of(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> RMSNorm | LayerNorm:
    """A norm of the network's rows."""
    given = (spec.hidden_size, spec.rms_norm_eps, dtype, device)
    return LayerNorm(*given, bias=spec.norm_bias) if spec.norm == "layernorm" else RMSNorm(*given)


class _Gate(torch.autograd.Function):
    """Keeps what it reads."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        found: Tensor = OPS.swiglu(gate, up)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return OPS.swiglu_backward(grads[0], *ctx.saved_tensors)


class _Ungated(torch.autograd.Function):
    """Keeps what it reads."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, how: Ungated) -> Tensor:
        ctx.save_for_backward(up)
        ctx.how = how
        found: Tensor = OPS.ungated(up, how.function)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return OPS.ungated_backward(grads[0], *ctx.saved_tensors, ctx.how.function), None


def ungated(up: Tensor, how: Ungated) -> Tensor:
    """The activation of a feed-forward without a gate, under autograd: in one kernel each way, or in a graph
    that is compiled as torch composes it."""
    if torch.compiler.is_compiling():
        return plain(up, how.function)
    found: Tensor = _Ungated.apply(up, how)  # type: ignore[no-untyped-call]
    return found


def activation(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up under autograd, as torch composes it, or in one kernel each way."""
    if not kernels.NOW.activation:
        return F.silu(gate) * up
    found: Tensor = _Gate.apply(gate, up)  # type: ignore[no-untyped-call]
    return found


class FeedForward(nn.Module):
    """Dense FFN, SwiGLU or without a gate, also the shared expert."""

    def __init__(
        self, spec: ModelSpec, inner: int, dtype: torch.dtype, device: torch.device, bias: bool = False
    ) -> None:
        super().__init__()
        self.how, hidden = ungated_of(spec), spec.hidden_size
        for name in wings_of(self.how):
            self.add_module(f"{name}_proj", linear(hidden, inner, dtype, device, bias))
        self.down_proj = linear(inner, hidden, dtype, device, bias)

    @property
    def firsts(self) -> tuple[str, ...]:
        """The names of its first products."""
        return tuple(f"{name}_proj" for name in wings_of(self.how))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.activate(*(self.get_submodule(name)(x) for name in self.firsts)))
        return result

    def activate(self, *wings: Tensor) -> Tensor:
        """What the last product reads, of the first."""
        return activation(*wings) if self.how is None else ungated(wings[0], self.how)


class _Linear(nn.Linear):
    """An nn.Linear whose weight [outputs, inputs] is left as it is made: a source fills it."""

    def reset_parameters(self) -> None:
        """Nothing: torch.nn.utils.skip_init would not work on fake tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return product("", x, self.weight, self.bias)


def linear(
    inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, bias: bool = False
) -> nn.Linear:
    """x [.., inputs] to [.., outputs]; uninitialised."""
    return _Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)
