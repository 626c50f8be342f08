"""Small shared pieces of the flat_units schedule: row slices, in-place matmul accumulation,
sliced RMSNorm.
"""

import torch
from torch import Tensor

from mopexec.operators import kernels
from mopexec.operators.dtypes import wide
from mopexec.operators.fused import OPS
from mopsim.spec import layout
from mopsim.spec.layout import SLICE_ROWS


def row_slices(num_rows: int, most: int | None = None) -> list[tuple[int, int]]:
    """[start, stop) slices of at most `most` rows, of SLICE_ROWS where not given; 0: all at once."""
    return layout.token_slices(num_rows, SLICE_ROWS if most is None else most)


def add_matmul(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target += left @ right, without a temporary where the dtypes agree."""
    if target.dtype == left.dtype:
        target.addmm_(left, right)
    else:
        target.add_(left @ right)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows x [..., n] (any strides) into a new contiguous tensor; temporaries: one slice in the
    wide dtype.
    """
    if kernels.NOW.norm:
        norm = OPS.rms_norm if x.is_contiguous() else OPS.rms_norm_strided
        normed: Tensor = norm(x, weight, eps)
        return normed
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = weight.to(wide(x.dtype))
    for start, stop in row_slices(x.shape[0]):
        rows = x[start:stop]
        out[start:stop].copy_(torch.mul(rows, _inverse_rms(rows, eps)).mul_(scale))
    return out


def rms_norm_backward_(
    target: Tensor,
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    eps: float,
    *,
    add: bool = True,
) -> None:
    """target += (or =) gradient of the norm's input x; grad_weight += its weight's. grad is that of the
    output.

    With n = x / rms: dx = (g w - n mean(g w n)) / rms. target may be grad itself where add is False.
    Temporaries: three slices in the wide dtype; fused: none.
    """
    if kernels.NOW.norm:
        OPS.rms_norm_backward_(target, x, grad, weight, grad_weight, eps, add)
        return
    scale = weight.to(wide(x.dtype))
    total = torch.zeros_like(scale)
    leading = tuple(range(x.dim() - 1))
    for start, stop in row_slices(x.shape[0]):
        rows, grads = x[start:stop], grad[start:stop]
        inverse = _inverse_rms(rows, eps)
        normed = torch.mul(rows, inverse)
        product = normed * grads
        total.add_(product.sum(leading))
        mean = product.mul_(scale).mean(-1, keepdim=True)
        del product
        result = torch.mul(grads, scale).sub_(normed.mul_(mean)).mul_(inverse)
        if add:
            target[start:stop].add_(result)
        else:
            target[start:stop].copy_(result)
    grad_weight.add_(total)


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps), [..., 1] in the wide dtype, without forming the squares."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide(rows.dtype))
    norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
    return norm
