"""Ulysses attention under autograd: sequence slices traded for heads, attention over the whole sequence,
traded back."""

from functools import partial

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.model.attention import attended
from mopexec.model.auxiliary import Auxiliary
from mopexec.modules.exchange import exchange
from mopexec.operators.attention_core import Core
from mopexec.operators.ulysses import swap
from mopsim.spec.training import TrainSpec


class UlyssesAttention:
    """A drop-in for `Attention.core` on D ranks that hold consecutive slices of their sequences.

    KV heads are replicated where there are fewer of them than ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, parts: list[Tensor], core: Core, sinks: Tensor | None = None) -> Tensor:
        """q [B, S/D, heads, d], k [B, S/D, kv_heads, d], v [B, S/D, kv_heads, e] to [B, S/D, heads, e]; sinks
        [heads].
        """
        kv_heads = parts[1].shape[2]
        if kv_heads < self._group.size:
            parts[1:] = (t.repeat_interleave(self._group.size // kv_heads, dim=2) for t in parts[1:])
        whole = list[Tensor]()
        while parts:
            whole.append(self._trade([parts.pop(0)], to_heads=True))
        if sinks is not None:
            sinks = sinks.chunk(self._group.size)[self._group.place]
        return self._trade([attended(whole, core, sinks)], to_heads=False)

    def _trade(self, given: list[Tensor], *, to_heads: bool) -> Tensor:
        """[B, S/D, heads, d], taken out of a list, to [B, S, heads/D, d] (to_heads), or the inverse."""
        from_dim, to_dim = (2, 1) if to_heads else (1, 2)
        there = partial(swap, group=self._group)
        blocks = exchange(torch.stack(given.pop().chunk(self._group.size, dim=from_dim)), there, there)
        return torch.cat(blocks.unbind(0), dim=to_dim)


def auxiliary(training: TrainSpec, group: Group) -> Auxiliary:
    """The losses beside the cross entropy; counts of a sequence's routes are added up over its ranks."""

    def over_sequence(counts: Tensor) -> None:
        if group.size > 1:
            collectives.all_reduce(counts, group.handle)

    return Auxiliary.of(training, over_sequence)
