"""The norm of a layer's rows, as the network has it: RMSNorm, or LayerNorm (arXiv 1607.06450) with a bias or
without.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mopexec.operators import kernels
from mopexec.operators.dtypes import wide
from mopexec.operators.fused import OPS, define, nothing
from mopexec.operators.rows import rms_norm, rms_norm_backward_, row_slices
from mopsim.spec.model import ModelSpec

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class LayerNorms:
    """Norms by their names in a layer's weights. centred: LayerNorm."""

    eps: float
    centred: bool

    @classmethod
    def of(cls, spec: ModelSpec) -> "LayerNorms":
        return cls(spec.rms_norm_eps, spec.norm == "layernorm")

    def forward(self, x: Tensor, weights: Weights, name: str) -> Tensor:
        """Rows x [..., n] (any strides) normed, a new contiguous tensor."""
        weight = weights[f"{name}.weight"]
        if not self.centred:
            return rms_norm(x, weight, self.eps)
        return layer_norm(x, weight, weights.get(f"{name}.bias"), self.eps)

    def backward_(
        self, target: Tensor, x: Tensor, grad: Tensor, weights: Weights, grads: Weights, name: str, *,
        add: bool = True,
    ) -> None:  # fmt: skip
        """target += (or =) gradient of x from that of the normed rows, which it may be where add is False;
        grads += the weights'."""
        weight, grad_weight = weights[f"{name}.weight"], grads[f"{name}.weight"]
        if not self.centred:
            rms_norm_backward_(target, x, grad, weight, grad_weight, self.eps, add=add)
            return
        grad_bias = grads.get(f"{name}.bias")
        layer_norm_backward_(target, x, grad, weight, grad_weight, grad_bias, self.eps, add=add)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of rows x [..., n] into a new contiguous tensor; temporaries: one slice in the wide dtype."""
    if kernels.NOW.norm:
        norm = OPS.layer_norm if x.is_contiguous() else OPS.layer_norm_strided
        normed: Tensor = norm(x, weight, bias, eps)
        return normed
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    accurate = wide(x.dtype)
    scale, shift = weight.to(accurate), None if bias is None else bias.to(accurate)
    for start, stop in row_slices(x.shape[0]):
        rows, _ = _normed(x[start:stop], eps)
        rows.mul_(scale)
        out[start:stop].copy_(rows if shift is None else rows.add_(shift))
        del rows  # before the next slice is there
    return out


def layer_norm_backward_(
    target: Tensor, x: Tensor, grad: Tensor, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor | None,
    eps: float, *, add: bool = True,
) -> None:  # fmt: skip
    """See `LayerNorms.backward_`. With n = (x - mean) / deviation and s = g w: dx = (s - mean(s) - n mean(s
    n)) / deviation. Temporaries: three slices in the wide dtype; fused: none.
    """
    if kernels.NOW.norm:
        OPS.layer_norm_backward_(target, x, grad, weight, grad_weight, grad_bias, eps, add)
        return
    accurate, leading = wide(x.dtype), tuple(range(x.dim() - 1))
    scale = weight.to(accurate)
    total = torch.zeros_like(scale)
    shifted = None if grad_bias is None else torch.zeros_like(scale)
    for start, stop in row_slices(x.shape[0]):
        grads = grad[start:stop]
        normed, inverse = _normed(x[start:stop], eps)
        product = normed * grads
        total.add_(product.sum(leading))
        if shifted is not None:
            shifted.add_(grads.sum(leading, dtype=accurate))
        slope = product.mul_(scale).mean(-1, keepdim=True)
        del product
        result = torch.mul(grads, scale)
        result.sub_(result.mean(-1, keepdim=True)).sub_(normed.mul_(slope)).mul_(inverse)
        if add:
            target[start:stop].add_(result)
        else:
            target[start:stop].copy_(result)
    grad_weight.add_(total)
    if grad_bias is not None and shifted is not None:
        grad_bias.add_(shifted)


def _normed(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rows centred, over their deviation; 1 / deviation), in the wide dtype."""
    accurate = wide(rows.dtype)
    centred = torch.sub(rows, rows.mean(-1, keepdim=True, dtype=accurate))
    inverse: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    inverse.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
    return centred.mul_(inverse), inverse


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    rows = x.to(wide(x.dtype))
    centred = rows - rows.mean(-1, keepdim=True)
    found = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(rows.dtype)
    return (found if bias is None else found + bias.to(rows.dtype)).to(x.dtype)


def _layer_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    found: Tensor = torch.ops.aten.native_layer_norm(x.contiguous(), list(weight.shape), weight, bias, eps)[0]
    return found


def _layer_norm_backward_(
    target: Tensor, x: Tensor, grad: Tensor, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor | None,
    eps: float, add: bool,
) -> None:  # fmt: skip
    rows, leading = x.to(wide(x.dtype)), tuple(range(x.dim() - 1))
    centred = rows - rows.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, given = centred * inverse, grad.to(rows.dtype)
    scaled, product = given * weight.to(rows.dtype), given * normed
    slope = (scaled * normed).mean(-1, keepdim=True)
    dx = ((scaled - scaled.mean(-1, keepdim=True) - normed * slope) * inverse).to(target.dtype)
    total, shifted = product.sum(leading), given.sum(leading)
    if add:
        target.add_(dx)
    else:
        target.copy_(dx)
    grad_weight.add_(total.to(weight.dtype))
    if grad_bias is not None:
        grad_bias.add_(shifted.to(weight.dtype))


def _meta(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", _layer_norm, _meta,
       _layer_norm_cuda)  # fmt: skip
define("layer_norm_strided(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", _layer_norm, _meta)
define("layer_norm_backward_(Tensor(a!) target, Tensor x, Tensor grad, Tensor weight, Tensor(b!) grad_weight,"
       " Tensor(c!)? grad_bias, float eps, bool add) -> ()", _layer_norm_backward_, nothing)  # fmt: skip
