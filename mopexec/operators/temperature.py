"""Queries scaled by their position, in layers without rotary positions (arXiv 2501.19399; Llama 4)."""

import torch
from torch import Tensor

from mopexec.operators.documents import Documents, positions
from mopexec.operators.dtypes import wide
from mopsim.spec.model import ModelSpec


def temperatures(
    spec: ModelSpec, start: int, stop: int, dtype: torch.dtype, device: torch.device,
    documents: Documents = (),
) -> Tensor | None:  # fmt: skip
    """Factors [stop - start] of positions [start, stop), fp32, or float64 where `dtype` is; None where the
    network has none. With documents those of each sequence, [B, ..], in which positions restart.
    """
    if not spec.attn_temperature_tuning:
        return None
    accurate = wide(dtype)
    if documents:
        place = positions(documents, start, stop, device).to(accurate)
    else:
        place = torch.arange(start, stop, dtype=accurate, device=device)
    return torch.log1p(torch.floor((place + 1) / spec.floor_scale)) * spec.attn_scale + 1


def temper_(x: Tensor, factors: Tensor) -> None:
    """x [..., S, heads, d] times its positions' factors, [S] or [B, S]. The backward is the same."""
    x.mul_(factors[..., None, None])


def tempered(x: Tensor, factors: Tensor) -> Tensor:
    """As `temper_`, into a new tensor."""
    return torch.mul(x, factors[..., None, None], out=torch.empty_like(x))
