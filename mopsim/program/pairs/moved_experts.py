"""Weights of experts that least-loaded placement moves to other ranks: as the published code has them, in one
tensor with the rank's own (mopsim.graph.rewrites.migration), or apart, as
mopexec.operators.least_loaded has them."""

from mopsim.graph.liveness import everything, forward
from mopsim.graph.rewrites.migration import Migration, migration
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.taped import play
from mopsim.program.workload import Work


class ForeignExperts:
    """They come before the rows into a buffer of their own, and rows are placed by the counts that are
    exchanged anyway; what their gradients add up to goes home once a layer (mopexec.operators.least_loaded).
    """

    def __init__(self, context: Context, builder: Builder, moved: Migration) -> None:
        self.c, self.b, self.moved = context, builder, moved

    def gather(self, layer: int, phase: str, ready: int) -> int:
        """Weights arrive; returns what the products wait for."""
        self.b.make("migrated", self.moved.received, "gathered")
        return self._travel(self.moved.message, layer, phase, ready)

    def read(self, layer: int, phase: str) -> None:
        """Nothing: rows of all chunks are known."""

    def free(self) -> None:
        """The weights are freed."""
        self.b.drop("migrated")

    def open(self) -> None:
        """Their gradients, which all chunks add to."""
        self.b.make("migrated gradient", self._reduced(self.moved.received), "gathered_grads")

    def send_home(self, layer: int, ready: int) -> None:
        """Gradients go home and are added there; the weights are freed."""
        size = self._reduced(self.moved.sent)
        self.b.make("gradients home", size, "gathered_grads")
        home = self._travel(self._reduced(self.moved.message), layer, "backward", ready)
        work = Work("memory_bound", bytes=3.0 * size)
        self.b.compute("gradients home", "experts", "backward", layer, [work], home)
        self.b.drop("gradients home", "migrated gradient", "migrated")

    def _reduced(self, size: int) -> int:
        return size // self.c.b * self.c.reduce

    def _travel(self, size: int, layer: int, phase: str, ready: int) -> int:
        group = self.c.groups["experts"]
        return self.b.collective(
            "migrate", "send_recv", size, group, "experts", phase, "experts", layer=layer, deps=[ready]
        )


class PackedExperts(ForeignExperts):
    """They come before the rows, into one tensor with the rank's own (backward: TapedExperts)."""

    def __init__(self, context: Context, builder: Builder, moved: Migration) -> None:
        super().__init__(context, builder, moved)
        self.tape = migration(moved)

    def gather(self, layer: int, phase: str, ready: int) -> int:
        last = play(self.b, self.c, forward(self.tape, everything(self.tape)), phase, layer, [ready])
        for name in ("migrated", "packed"):
            self.b.adopt(name, self.tape.values[name].bytes, "gathered")
        return last

    def read(self, layer: int, phase: str) -> None:
        """The host reads how many rows of a later chunk go to each rank, once all it has started is done (of
        the first they are read with the plan)."""
        if self.moved.reads:
            idle = self.b.compute("await", "router", phase, layer, (), self.b.last, awaited=True)
            work = [Work("memory_bound", launches=self.moved.reads)]
            self.b.compute("rows read", "router", phase, layer, work, idle, awaited=True)

    def free(self) -> None:
        self.b.drop("migrated", "packed")


def moved_experts(context: Context, builder: Builder) -> ForeignExperts | None:
    """None where experts stay at home."""
    moved = context.migration if context.groups["experts"].size > 1 else None
    packed = context.stack.recompute.chunk_inputs == "autograd"
    if moved is None or not (packed or moved.message):
        return None
    return (PackedExperts if packed else ForeignExperts)(context, builder, moved)
