"""ZeRO-3 of a program whose layers are the turns of one loop: what a layer gathers and reduces lies within
its turn (XLA, where collectives are not pipelined over a loop's turns)."""

from collections.abc import Callable, Sequence
from functools import partial

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.shards import Shards
from mopsim.program.stage import Stage
from mopsim.program.template import Hooks, Ops, Template
from mopsim.program.units import ShardedUnit


class LoopedShards(Shards):
    """A turn's gathers begin with it, and it is over when its gradients are reduced. Beside what of the layer
    they run: see Sharding.loop."""

    def __init__(self, context: Context, issue: Builder, stage: Stage) -> None:
        super().__init__(context, issue, stage)
        self._modules = True  # the embedding is no part of the loop, and of no use once it has been read

    def ahead(self, layer: int, phase: str, order: Sequence[int]) -> None:
        """Nothing is gathered before the turn in which it is used."""

    def before(self, layer: int, phase: str, order: Sequence[int]) -> Ops:
        """The gathers of the turn, and those of them that the layer waits for."""
        units = self._groups(layer)
        for unit in units:
            self._gather(unit, phase, self._left)
        ready = tuple(op for unit in units if not self._beside(unit) for op in self._wait(unit, phase))
        if self.each and phase == "backward":
            memory = [("gathered_grads", self._full_grad(unit)) for unit in units]
            ready += (self.issue.add("gradients", "compute", "other", phase, (), self._left, memory),)
        return ready

    def beside(self, template: Template, layer: int, phase: str) -> Hooks:
        """Routed experts' parameters arrive beside what runs before them, and their gradients are reduced
        beside what is left of the layer's backward."""
        found: dict[int, list[Callable[[int], None]]] = {}
        for unit in filter(self._beside, self._groups(layer) if layer >= 0 else ()):
            first, last = template.products("forward" if phase == "forward" else "recompute")
            if phase == "backward":
                first = first if first >= 0 else template.products("backward")[0]
                last = template.products("backward")[1]
            found.setdefault(max(first, 0), []).append(partial(self._arrived, unit, phase))
            found.setdefault(last + 1, []).append(partial(self._used, unit, phase))
        return found

    def after(self, layer: int, phase: str, ready: Ops = ()) -> None:
        """The layer has run, and with its reductions the turn is over."""
        super().after(layer, phase, ready)
        if phase == "backward" and self._unfinished:
            unit = self._groups(layer)[0]
            self._left = (self._pass(f"turn {layer}", unit, (), phase, tuple(self._unfinished)),)
            self._unfinished.clear()

    def _arrived(self, unit: ShardedUnit, phase: str, _: int) -> None:
        ready = self._wait(unit, phase)
        if ready:
            self._pass(f"arrived {unit.name}", unit, (), phase, ready)

    def _used(self, unit: ShardedUnit, phase: str, op: int) -> None:
        self._release(unit, phase, (op,))
        if self.each and phase == "backward":
            self._reduce(unit, (op,))

    def _beside(self, unit: ShardedUnit) -> bool:
        """Whether it has collectives of its own."""
        return unit.component == "experts" and self.c.stack.sharding.loop == "apart"
