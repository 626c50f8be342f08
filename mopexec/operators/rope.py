"""Rotary position embedding (arXiv 2104.09864): tables and rotation in at least fp32, as bf16 loses positions
beyond 100K (arXiv 2411.13476). Halves of a head turn together, as in Hugging Face's Llama, or neighbours; of
part of a head where the tables are of that part, as in GLM-4.5.
"""

import math

import torch
from torch import Tensor

from mopexec.operators import kernels
from mopexec.operators.documents import Documents, positions
from mopexec.operators.dtypes import wide
from mopexec.operators.fused import OPS
from mopexec.operators.temperature import temperatures
from mopsim.spec.model import ModelSpec
from mopsim.spec.rope import RopeScaling


def rope_tables(
    spec: ModelSpec,
    start: int,
    stop: int,
    dtype: torch.dtype,
    device: torch.device,
    documents: Documents = (),
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [stop - start, rotated elements / 2], of positions [start, stop); fp32, or float64
    where `dtype` is. With documents a table for each sequence, [B, ..], in which positions restart.
    """
    accurate = wide(dtype)
    frequency = frequencies(spec, accurate, device)
    if documents:
        angle = positions(documents, start, stop, device).to(accurate)[..., None] * frequency
    else:
        angle = torch.outer(torch.arange(start, stop, dtype=accurate, device=device), frequency)
    size = vector_factor(spec.rope_scaling)
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if size == 1.0 else (cos * size, sin * size)


class Positions:
    """Rotary tables of some positions, the factors of queries there, and the documents of the microbatch that
    runs. Tables of sequences that are trained as one are made once and stay.
    """

    def __init__(
        self, spec: ModelSpec, start: int, stop: int, dtype: torch.dtype, device: torch.device,
        documents: Documents = (),
    ) -> None:  # fmt: skip
        self._of, self.documents = (spec, start, stop, dtype, device), documents
        self._make()

    def use(self, documents: Documents) -> None:
        """Those of a microbatch, from its forward to its backward."""
        if documents != self.documents:
            self.documents = documents
            self._make()

    def _make(self) -> None:
        self.cos, self.sin = rope_tables(*self._of, self.documents)
        self.temperature = temperatures(*self._of, self.documents)


def frequencies(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angle per position of each pair of elements, scaled as `spec.rope_scaling` says."""
    scaling, width = spec.rope_scaling, spec.rotary_dim
    base = spec.rope_theta ** (-torch.arange(0, width, 2, dtype=dtype, device=device) / width)
    if scaling.rope_type == "default":
        return base
    if scaling.rope_type == "yarn":
        kept = 1 - _yarn_ramp(scaling, width, spec.rope_theta, base)
    else:
        turns = scaling.original_max_position_embeddings * base / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * kept + base / scaling.factor * (1 - kept)


def vector_factor(scaling: RopeScaling) -> float:
    """What rotated queries and keys are multiplied by (arXiv 2309.00071, 3.4)."""
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def softmax_scale(spec: ModelSpec) -> float:
    """What the products of queries and keys are multiplied by; with YaRN DeepSeek's also by its own factor
    (DeepSeek-V2's published model code).
    """
    scale, scaling = 1 / math.sqrt(spec.head_dim), spec.rope_scaling
    if spec.attention == "mla" and scaling.rope_type == "yarn" and scaling.mscale_all_dim:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_ramp(scaling: RopeScaling, width: int, theta: float, like: Tensor) -> Tensor:
    """Per pair: 0 where the frequency is kept, 1 where it is interpolated, a line between."""

    def pair(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    place = torch.arange(width // 2, dtype=like.dtype, device=like.device)
    return ((place - low) / (high - low or 0.001)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [..., S, heads, d] rotated by its position, differentiable; cos and sin [S, r/2] or [B, S, r/2], of
    the first r of its d elements.

    interleaved: pairs are neighbours in x; the result holds the halves one after the other, which no product
    of queries and keys can tell.
    """
    width = 2 * cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1).to(x.dtype)


def rotate_(
    x: Tensor, cos: Tensor, sin: Tensor, rows: list[tuple[int, int]], *, inverse: bool = False
) -> None:
    """`rotate` in place on x [..., S, heads, d], position slices `rows` at a time; inverse rotates back (the
    backward).

    Temporaries: a slice, of the elements that turn, in the dtype of the tables. Fused: none.
    """
    if kernels.NOW.rotary:
        OPS.rotate_(x, cos, sin, inverse)
        return
    x = x[..., : 2 * cos.shape[-1]]
    for start, stop in rows:
        first, second = x[..., start:stop, :, :].chunk(2, dim=-1)
        c, s = (table[..., start:stop, :].unsqueeze(-2) for table in (cos, sin))
        if inverse:
            s = -s
        turned = (first * c).addcmul_(second, s, value=-1)
        second.copy_((second * c).addcmul_(first, s))
        first.copy_(turned)
