"""Whole gradients that live within a step: of a microbatch beside wider sums, or of all of it."""

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.stage import Stage
from mopsim.program.template import Ops
from mopsim.program.units import ShardedUnit
from mopsim.program.workload import Work


class KeptGrads:
    """Of one stage: those of a model chunk are freed when its next backward begins, made layer by layer and
    added to their sums after it, so that outside of a backward all are there (Sharding.microbatch_grads).

    hidden: bytes of layers that are not played, by model chunk. fresh: bytes, by unit, of gradients of the
    step that a backward has made, where the last step's are freed (Sharding.zero_grad).
    """

    def __init__(self, context: Context, issue: Builder, stage: Stage) -> None:
        self.c, self.issue, self.stage = context, issue, stage
        self._open: dict[str, ShardedUnit] = {}
        self.fresh: dict[str, int] = {}
        self._handed = 0
        self._frees = stage.frees_gradients and context.strategy.dense.zero < 2
        gone = {layer for gap in stage.gaps for layer in gap.hidden}
        self._chunks = [self._units(chunk) for chunk in range(stage.virtual)] if context.keeps_grads else []
        self.hidden = [sum(self._size(u) for u in units if u.layer in gone) for units in self._chunks]
        self._gone = gone

    @property
    def resident(self) -> int:
        """Bytes that the last step has left."""
        return sum(self._size(unit) for units in self._chunks for unit in units)

    def begin(self, chunk: int) -> None:
        """A backward that makes weight gradients begins: those of the last one are freed."""
        if not self._chunks:
            return
        units = self._chunks[chunk]
        self._open = {unit.name: unit for unit in units if unit.layer not in self._gone}
        self.issue.hold((("grads", -sum(map(self._size, units))),))

    def handed(self, size: int) -> None:
        """What parts of a layer handed each other outlives its backward, until that of its model chunk is
        over."""
        self._handed += size
        self.issue.hold([("activations", size)] * bool(size))

    def made(self, *units: ShardedUnit) -> None:
        """Those of units are there."""
        new = {unit.name: unit.padded * self.c.grad for unit in units if unit.name not in self.fresh}
        if self._frees and new:
            self.fresh |= new
            self.issue.hold((("grads", sum(new.values())),))
        found = [self._open.pop(unit.name) for unit in units if unit.name in self._open]
        self.issue.hold(("grads", self._size(unit)) for unit in found)

    def added(self, chunk: int, ready: Ops) -> Ops:
        """All are added to their sums: each is read, written and read in the sums' dtype, its sum read and
        written (DeepSpeed, runtime/bf16_optimizer.py: update_hp_grads)."""
        self.handed(-self._handed)
        if not self._chunks:
            self.made(*(unit for unit in self.c.edges.values() if unit.name == "final" and self.fresh))
            return ready
        self.made(*self._open.values())
        units, wide = self._chunks[chunk], self.c.grad
        size = float(sum(unit.numel for unit in units) * (self.c.b + 4 * wide))
        copy = max((unit.largest for unit in units), default=0) * wide
        work = (Work("memory_bound", bytes=size, launches=2 * sum(unit.tensors for unit in units)),)
        memory = (("grads", copy), ("grads", -copy))
        return (self.issue.add("gradients added", "compute", "other", "backward", work, ready, memory),)

    def _size(self, unit: ShardedUnit) -> int:
        return unit.numel * self.c.b

    def _units(self, chunk: int) -> list[ShardedUnit]:
        """Whose gradients a backward of a model chunk makes."""
        stage, edges = self.stage, self.c.edges
        layers, names = list(stage.every[chunk]), []
        if stage.part(chunk) == 0:
            names.append("embedding")
        if stage.part(chunk) == stage.parts - 1:
            layers += stage.extra
            names += ["final", "head" if "head" in edges else "embedding"]
            names += ["embedding"] if stage.shares_embedding else []
        found = [edges[name] for name in dict.fromkeys(names)]
        return found + [unit for layer in layers for unit in self.c.layers[layer]]
