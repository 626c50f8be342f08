"""Context parallelism by blocks of keys and values, under autograd (`mopexec.operators.context_parallel`)."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mopexec.distributed.mesh import Group
from mopexec.operators.again import kept
from mopexec.operators.attention_core import Core
from mopexec.operators.context_parallel import blocks_backward, blocks_forward


class BlockAttention:
    """A drop-in for `Attention.core` on ranks that hold consecutive slices of their sequences."""

    def __init__(self, group: Group, *, ring: bool) -> None:
        self._group, self._ring = group, ring

    def __call__(self, parts: list[Tensor], core: Core, sinks: Tensor | None = None) -> Tensor:
        """q [B, s, heads, d], k [B, s, kv_heads, d], v [B, s, kv_heads, e] to [B, s, heads, e]."""
        q, k, v = parts
        parts.clear()
        assert sinks is None, "a sink belongs to the whole softmax, not to a block's"
        found = _Blocks.apply(q, k, v, core, self._group, self._ring)  # type: ignore[no-untyped-call]
        return cast(Tensor, found)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, core: Core, group: Group, ring: bool) -> Tensor:
        k, v = k.contiguous(), v.contiguous()
        run = partial(blocks_forward, q, k, v, core, group, ring=ring)
        out, lse, ctx.rests = kept(run, "attention_core")
        ctx.given = core, group, ring
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        core, group, ring = ctx.given
        q, k, v, out, lse = ctx.saved_tensors
        found = blocks_backward(grads[0], q, k, v, out, lse, ctx.rests, core, group, ring=ring)
        return *found, None, None, None
