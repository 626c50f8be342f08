"""Gathering, releasing and reducing flat units (mopexec.flat.units)."""

from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.units import Unit
from mopsim.lowering.workload import Work


class UnitLowering:
    """Full buffers come and go on the compute stream; collectives run beside it."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.c, self.b = context, builder
        self.gathering: dict[str, int | None] = {}
        self.reducing: list[tuple[Unit, int | None]] = []
        precision = context.strategy.precision
        self.cast = precision.param != precision.compute
        self.own_grads = precision.grad == precision.reduce

    def gather(self, unit: Unit, phase: str) -> None:
        """Start gathering, unless the unit is there or on its way."""
        if unit.name in self.gathering:
            return
        b, c = self.b, self.c
        if self.cast:
            b.make(f"cast {unit.name}", unit.shard_numel * c.b, "gathered")
            work = Work("memory_bound", bytes=float(unit.shard_numel * (c.b + c.param)))
            b.compute(f"cast {unit.name}", unit.component, phase, unit.layer, [work])
        if unit.shard == 1:
            self.gathering[unit.name] = None
            return
        size = unit.padded * c.b
        b.make(f"full {unit.name}", size, "gathered")
        self.gathering[unit.name] = b.issue(
            f"gather {unit.name}", "all_gather", size, unit.group, unit.component, phase, unit.layer
        )

    def wait(self, unit: Unit, phase: str) -> int | None:
        """The op after which the full parameters are there. What was cast to send is freed then."""
        self.gather(unit, phase)
        if unit.shard > 1 and f"cast {unit.name}" in self.b.alive:
            self.b.drop(f"cast {unit.name}")
        return self.gathering[unit.name]

    def release(self, *units: Unit) -> None:
        """Free the full parameters."""
        for unit in units:
            del self.gathering[unit.name]
            for name in (f"full {unit.name}", f"cast {unit.name}"):
                if name in self.b.alive:
                    self.b.drop(name)

    def open_grads(self, unit: Unit) -> Work:
        """A zeroed full gradient buffer; the gradient shard itself where that is the full one."""
        if unit.shard == 1 and self.own_grads:
            return Work("memory_bound", launches=0)
        size = unit.padded * self.c.reduce
        self.b.make(f"grads {unit.name}", size, "gathered_grads")
        return Work("memory_bound", bytes=float(size))

    def reduce(self, unit: Unit, phase: str = "backward") -> None:
        """Start summing the full gradients over the shard's ranks."""
        b = self.b
        if unit.shard == 1:
            if not self.own_grads:
                work = Work("memory_bound", bytes=float(unit.padded * (self.c.reduce + 2 * self.c.grad)))
                b.compute(f"accumulate {unit.name}", unit.component, phase, unit.layer, [work])
                b.drop(f"grads {unit.name}")
            return
        size = unit.padded * self.c.reduce
        b.make(f"part {unit.name}", unit.shard_numel * self.c.reduce, "gathered_grads")
        op = b.issue(
            f"reduce {unit.name}", "reduce_scatter", size, unit.group, unit.component, phase, unit.layer
        )
        self.reducing.append((unit, op))

    def finish(self, *, keep: bool = False) -> None:
        """Wait for the reductions on their way, add them to the shards and free the buffers."""
        b = self.b
        for unit, op in self.reducing:
            work = Work("memory_bound", bytes=float(unit.shard_numel * (self.c.reduce + 2 * self.c.grad)))
            b.compute(f"accumulate {unit.name}", unit.component, "backward", unit.layer, [work], op)
            b.drop(f"grads {unit.name}", f"part {unit.name}")
        self.reducing = []
