"""Ulysses attention under autograd: sequence slices traded for heads, attention over the whole sequence,
traded back."""

from functools import partial

from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.model.attention import causal_attention
from mopexec.model.auxiliary import Auxiliary
from mopexec.modules.exchange import exchange
from mopexec.operators.attention_core import Core
from mopexec.operators.ulysses import trade
from mopsim.spec.training import TrainSpec


class UlyssesAttention:
    """A drop-in for `Attention.core` on D ranks that hold consecutive slices of their sequences.

    KV heads are replicated where there are fewer of them than ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, core: Core, sinks: Tensor | None = None) -> Tensor:
        """q [B, S/D, heads, d], k [B, S/D, kv_heads, d], v [B, S/D, kv_heads, e] to [B, S/D, heads, e]; sinks
        [heads].
        """
        kv_heads = k.shape[2]
        if kv_heads < self._group.size:
            k, v = (t.repeat_interleave(self._group.size // kv_heads, dim=2) for t in (k, v))
        whole = [self._trade(t, to_heads=True) for t in (q, k, v)]
        if sinks is not None:
            sinks = sinks.chunk(self._group.size)[self._group.place]
        return self._trade(causal_attention(whole[0], whole[1], whole[2], core, sinks), to_heads=False)

    def _trade(self, x: Tensor, *, to_heads: bool) -> Tensor:
        """[B, S/D, heads, d] to [B, S, heads/D, d] (to_heads), or the inverse."""
        there, back = (partial(trade, group=self._group, to_heads=way) for way in (to_heads, not to_heads))
        return exchange(x, there, back)


def auxiliary(training: TrainSpec, group: Group) -> Auxiliary:
    """The losses beside the cross entropy; counts of a sequence's routes are added up over its ranks."""

    def over_sequence(counts: Tensor) -> None:
        if group.size > 1:
            collectives.all_reduce(counts, group.handle)

    return Auxiliary.of(training, over_sequence)
