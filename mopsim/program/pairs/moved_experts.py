"""Weights of experts that least-loaded placement moves to other ranks: as the published code has them, in one
tensor with the rank's own (mopsim.graph.rewrites.migration), or apart, as
mopexec.operators.least_loaded has them."""

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


class ForeignExperts:
    """They come before the rows into a buffer of their own, and rows are placed by the counts that are
    exchanged anyway; what their gradients add up to goes home once a layer (mopexec.operators.least_loaded).

    False where experts stay at home.
    """

    reads = 0

    def __init__(self, context: Context, builder: Builder) -> None:
        self.c, self.b = context, builder
        moved = context.migration if context.groups["experts"].size > 1 else None
        self.moved = moved if moved and moved.message else None

    def __bool__(self) -> bool:
        return self.moved is not None

    def gather(self, layer: int, phase: str, ready: int) -> list[int]:
        """Weights arrive; returns what the products wait for."""
        if self.moved is None:
            return []
        self.b.make("migrated", self.moved.received, "gathered")
        return [self._travel(self.moved.message, layer, phase, ready)]

    def read(self, layer: int, phase: str, ready: int) -> int:
        """Nothing: rows of all chunks are known."""
        return ready

    def free(self) -> None:
        """The weights are freed."""
        if self.moved is not None:
            self.b.drop("migrated")

    def open(self) -> None:
        """Their gradients, which all chunks add to."""
        if self.moved is not None:
            self.b.make("migrated gradient", self._reduced(self.moved.received), "gathered_grads")

    def send_home(self, layer: int, ready: int) -> int:
        """Gradients go home and are added there; the weights are freed."""
        if self.moved is None:
            return ready
        size = self._reduced(self.moved.sent)
        self.b.make("gradients home", size, "gathered_grads")
        home = self._travel(self._reduced(self.moved.message), layer, "backward", ready)
        work = Work("memory_bound", bytes=3.0 * size)
        last = self.b.compute("gradients home", "experts", "backward", layer, [work], home)
        self.b.drop("gradients home", "migrated gradient", "migrated")
        return last

    def _reduced(self, size: int) -> int:
        return size // self.c.b * self.c.reduce

    def _travel(self, size: int, layer: int, phase: str, ready: int) -> int:
        group = self.c.groups["experts"]
        return self.b.collective(
            "migrate", "send_recv", size, group, "experts", phase, layer=layer, deps=[ready]
        )
