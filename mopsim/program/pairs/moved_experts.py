"""Weights of experts that least-loaded placement moves to other ranks (mopsim.graph.experts.migration)."""

from mopsim.graph.liveness import backward, everything, forward
from mopsim.graph.rewrites.migration import migration
from mopsim.graph.tape import Tape
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.taped import play
from mopsim.program.workload import Work


class MovedExperts:
    """They come before the rows, into one tensor with the rank's own; their gradients go home.

    False where experts stay at home.
    """

    def __init__(self, context: Context, builder: Builder) -> None:
        self.c, self.b = context, builder
        moved = context.migration if context.groups["experts"].size > 1 else None
        self._tape = migration(moved) if moved else None
        self.reads = moved.reads if moved else 0

    def __bool__(self) -> bool:
        return self._tape is not None

    @property
    def tape(self) -> Tape:
        assert self._tape is not None
        return self._tape

    def gather(self, layer: int, phase: str, ready: int) -> list[int]:
        """Weights arrive; returns what the products wait for."""
        if not self:
            return []
        last = play(self.b, self.c, forward(self.tape, everything(self.tape)), phase, layer, [ready])
        for name in ("migrated", "packed"):
            self.b.adopt(name, self.tape.values[name].bytes, "gathered")
        return [last]

    def read(self, layer: int, phase: str, ready: int) -> int:
        """The host reads how many rows of a later chunk go to each rank, once all it has started is done (of
        the first they are read with the plan)."""
        if not self.reads:
            return ready
        b = self.b
        idle = b.add("await", "compute", "router", phase, (), (ready,), layer=layer, awaited=True)
        work = (Work("memory_bound", launches=self.reads),)
        return b.add("rows read", "compute", "router", phase, work, (idle,), layer=layer, awaited=True)

    def free(self) -> None:
        """The weights are freed."""
        if self:
            self.b.drop("migrated", "packed")

    def open(self) -> None:
        """The gradient of the packed weights, which all chunks add to."""
        if self:
            self.b.make("packed gradient", self.tape.values["packed"].bytes, "gathered")

    def send_home(self, layer: int, ready: int) -> int:
        """Gradients go home; the weights are freed."""
        if not self:
            return ready
        last = play(self.b, self.c, backward(self.tape, everything(self.tape)), "backward", layer, [ready])
        for name in ("packed gradient", "migrated"):  # the tape has freed them
            del self.b.alive[name]
        self.b.drop("packed")
        return last
