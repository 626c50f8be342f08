"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of Hugging Face's Llama."""

import torch
from torch import Tensor

from mopexec.model.routing import wide


def rope_tables(
    start: int, stop: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [stop - start, head_dim / 2], of positions [start, stop)."""
    accurate = wide(dtype)
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=accurate, device=device) / head_dim)
    angle = torch.outer(torch.arange(start, stop, dtype=accurate, device=device), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., S, heads, d] rotated by its position, differentiable; cos and sin [S, d/2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_(
    x: Tensor, cos: Tensor, sin: Tensor, rows: list[tuple[int, int]], *, inverse: bool = False
) -> None:
    """`rotate` in place on x [..., S, heads, d], position slices `rows` at a time; inverse rotates back (the
    backward).

    Temporaries: 3/2 of a slice.
    """
    for start, stop in rows:
        first, second = x[..., start:stop, :, :].chunk(2, dim=-1)
        c, s = cos[start:stop, None, :], sin[start:stop, None, :]
        if inverse:
            s = -s
        crossed = first * s
        first.mul_(c).sub_(second * s)
        second.mul_(c).add_(crossed)
