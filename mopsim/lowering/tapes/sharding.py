"""Gathering, releasing and reducing units, as ops."""

from collections.abc import Iterable

from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.units import Unit
from mopsim.lowering.workload import Group, Work

Deps = Iterable[int | None]


class Sharding:
    """Issues the collectives of units on one program and remembers what is gathered."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.context, self.builder = context, builder
        self.gathered: dict[str, int] = {}

    def group(self, unit: Unit) -> Group:
        return self.context.groups[unit.group]

    def gather(self, unit: Unit, phase: str, deps: Deps = ()) -> int | None:
        """All-gather a unit's shards into a full buffer; with one shard the parameters are used in place."""
        if unit.name in self.gathered or unit.shard == 1 or self.context.strategy.dense.zero < 3:
            return self.gathered.get(unit.name)
        size = unit.padded * self.context.b
        op = self.builder.collective(
            f"gather {unit.name}", "all_gather", size, self.group(unit), unit.component, phase,
            layer=unit.layer, deps=deps, memory=(("gathered", size),),
        )  # fmt: skip
        self.gathered[unit.name] = op
        return op

    def release(self, unit: Unit, phase: str) -> None:
        """Free the full buffer after the compute issued so far."""
        if self.gathered.pop(unit.name, None) is not None:
            size = unit.padded * self.context.b
            self.builder.add(
                f"release {unit.name}",
                "compute",
                unit.component,
                phase,
                layer=unit.layer,
                memory=(("gathered", -size),),
            )

    def reduce(self, unit: Unit, phase: str, deps: Deps, buffer: str) -> int:
        """Sum a unit's gradients (the named full buffer) over all holders into the shard, then free the
        buffer."""
        context, b = self.context, self.builder
        category, size = b.alive.pop(buffer)
        part = unit.shard_numel * context.grad
        op = b.collective(
            f"reduce {unit.name}",
            "reduce_scatter",
            size,
            self.group(unit),
            unit.component,
            phase,
            layer=unit.layer,
            deps=deps,
            memory=((category, part), (category, -size)),
        )
        replicas = context.groups.get(unit.replicas, Group(1, 1))
        if replicas.size > 1:
            op = b.collective(
                f"all-reduce {unit.name}",
                "all_reduce",
                part,
                replicas,
                unit.component,
                phase,
                layer=unit.layer,
                deps=(op,),
            )
        work = (Work("memory_bound", bytes=3.0 * part),)
        return b.add(
            f"accumulate {unit.name}",
            "compute",
            unit.component,
            phase,
            work,
            layer=unit.layer,
            deps=(op,),
            memory=((category, -part),),
        )
