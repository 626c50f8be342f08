"""Gradients of a step's microbatches, summed whole and reduced with the last one's, and parameters that stay
whole until then: torch's FSDP2 and FSDP1 without gradient synchronization (Sharding.whole_sums, stays)."""

from collections.abc import Callable, Sequence

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.fsdp2_copies import summed
from mopsim.program.template import Ops
from mopsim.program.units import ShardedUnit
from mopsim.program.workload import Work
from mopsim.spec.sharding import during


class WholeSums:
    """last: whether a backward is a model chunk's last one, which reduces."""

    def __init__(self, context: Context, issue: Builder) -> None:
        self.c, self.issue, self.last = context, issue, True
        sharding, pipeline = context.stack.sharding, context.strategy.pipeline
        self._kept, self._stays = (
            during(when, pipeline.pipeline_parallel) for when in (sharding.whole_sums, sharding.stays)
        )
        # FSDP1's no_sync frees what it would free between forward and backward (_should_free_in_backward)
        self._stays = self._stays or bool(self._kept and sharding.flat and not context.reshards)
        self._there: set[str] = set()

    @property
    def wait(self) -> bool:
        """Whether nothing is reduced yet."""
        return self._kept and not self.last

    @property
    def stays(self) -> bool:
        """Whether what was gathered for this backward is there for the passes after it."""
        return self._stays and not self.last

    def free(self, units: Sequence[ShardedUnit], release: Callable[[ShardedUnit, str], None]) -> None:
        """A backward is over. Where parts of a stage have one root it frees what others' forwards have
        gathered too (FSDPState._root_post_backward_final_callback); programs whose parameters stay in
        pipelines have a root for each."""
        for unit in () if self._stays else units:
            release(unit, "backward")

    def add(self, unit: ShardedUnit, ready: Ops, rest: int) -> tuple[Ops, int, int]:
        """The full gradient of a microbatch, of which `rest` bytes are still to be made, becomes the sum, or
        is added to it; the last one's only to one that is there. Returns what a reduction of it waits for,
        what of the bytes is left to be made, and the width of an element."""
        first, full = unit.name not in self._there, unit.numel * self.c.b
        if first and not self.wait:
            return ready, rest, self.c.b
        self._there.add(unit.name)
        copied = not first or self.c.b != self.c.reduce  # else what is made is the sum
        steps = (rest, unit.numel * self.c.reduce * first, -full) if copied else (rest,)
        memory = tuple(("gathered_grads", step) for step in steps)
        work, name = (summed(self.c, unit, first=first),), f"sum {unit.name}"
        op = self.issue.add(name, "compute", "other", "backward", work, ready, memory, layer=unit.layer)
        return (op,), 0, self.c.reduce

    def keep(self, unit: ShardedUnit, ready: Ops, full: int) -> tuple[Ops, int]:
        """FSDP1's flat gradient of a microbatch becomes the sum, or is added to it, in the compute dtype
        (autograd's AccumulateGrad; under no_sync the hook after it returns before it reduces). full: bytes
        that its making had taken. Returns what a reduction waits for and the bytes that it frees."""
        first, size = unit.name not in self._there, unit.padded * self.c.b
        if not self._kept or (first and not self.wait):
            return ready, full
        self._there.add(unit.name)
        work = () if first else (Work("memory_bound", bytes=3.0 * size),)
        memory = (("gathered_grads", size - full),) if first else (("gathered_grads", -full),) * self.wait
        name = f"sum {unit.name}"
        op = self.issue.add(name, "compute", "other", "backward", work, ready, memory, layer=unit.layer)
        return (op,), full + size
