"""Gradients that torch's FSDP2 sums over replicas of its shards too (HSDP): what of them it holds
(torch.distributed.fsdp._fully_shard, read in torch 2.13.0)."""

from collections.abc import Iterator

from mopsim.graph.tape import Step
from mopsim.program.context import Context
from mopsim.program.units import ShardedUnit
from mopsim.program.workload import CommGroup


class Replicated:
    """Each group's output of the reduce-scatter, which is summed over the replicas in place, is held until
    the backward is over (FSDPParamGroup._all_reduce_state, finalize_backward): a buffer beside the gradient,
    unless the gradient is the buffer: a shard's first one, on the device, in the reduce dtype."""

    def __init__(self, context: Context) -> None:
        self.c, self._held = context, 0

    def made(self, unit: ShardedUnit, part: int) -> Iterator[Step]:
        """A shard's gradient of `part` bytes is made; where the shard is the whole, of a copy that is
        divided (foreach_reduce)."""
        yield "grads", part
        if unit.shard == 1 and self._sums(unit):
            size = unit.padded * self.c.reduce
            yield "gathered_grads", size
            yield "gathered_grads", -size

    def summed(self, unit: ShardedUnit, part: int, *, stays: bool) -> Iterator[Step]:
        """It stays, or has been added to one that is there, or to what is on the host."""
        cast = self.c.reduce != self.c.grad
        held = unit.shard_numel * self.c.reduce * (self._sums(unit) and (cast or not stays))
        self._held += held
        yield "grads", held - part * (not stays)

    def over(self) -> Step:
        """The backward is over."""
        held, self._held = self._held, 0
        return "grads", -held

    def _sums(self, unit: ShardedUnit) -> bool:
        return self.c.groups.get(unit.replicas, CommGroup(1, 1)).size > 1
