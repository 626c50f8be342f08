"""The edges of a network as torch's FSDP2 groups them, and a weight that two of its places share."""

from collections.abc import Callable

from msgspec.structs import replace

from mopsim.graph.tape import Step
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.stage import Stage
from mopsim.program.units import ShardedUnit, joined, vocabulary_matrix


class Edges:
    """copied: whether parameters are sharded as torch's FSDP2 does."""

    c: Context
    copied: bool
    issue: Builder
    stage: Stage
    _opened: dict[str, int]
    _make_gradients: Callable[[ShardedUnit, int, str], None]
    _release: Callable[[ShardedUnit, str, tuple[int, ...]], None]
    _waiting = 0

    def edge_unit(self, name: str) -> ShardedUnit:
        """torch's FSDP2 has final norm and head in one group of parameters, unless other ranks share the
        head; the embedding too, where it is the head."""
        unit, final = self.c.edges.get(name), self.c.edges["final"]
        if self.copied and self.c.one_weight:
            return joined([self.c.edges["embedding"], final])
        if name != "head" or not self.copied or (unit and unit.group != final.group):
            assert unit is not None
            return unit
        if unit is None:
            return final
        return replace(joined([final, unit]), name=unit.name)

    @property
    def head_is_gathered(self) -> bool:
        """Whether the embedding's weight is gathered for the head too, which shares it (Sharding.tied
        `apart`). FSDP's is in the root, or in a group with the final norm."""
        how = self.c.stack.sharding
        return "head" not in self.c.edges and how.tied == "apart" and not how.fsdp

    def head_done(self, phase: str, ready: tuple[int, ...]) -> None:
        """A head whose weight is the embedding's has run."""
        if self.c.one_weight and phase == "backward":
            self.weight_waits(phase)
        if self.head_is_gathered and phase == "backward":
            self._release(self.edge_unit("embedding"), phase, ready)

    def weight_waits(self, phase: str) -> None:
        """The gradient that the head's product makes of a shared weight, unless it is there: a loss in strips
        in its forward, where its group has it; else autograd, which keeps it for the other one."""
        unit, size = self.edge_unit("embedding"), vocabulary_matrix(self.c.edges["embedding"])
        if self._waiting or (self.copied and unit.name in self._opened):
            return
        if self.copied and phase == "forward":
            self._make_gradients(unit, size, phase)
            return
        self._waiting = size * self.c.b
        self.issue.hold((("activations", self._waiting),))

    def rows_wait(self) -> None:
        """The gradient that rows looked up for an MTP layer make of the embedding, which autograd keeps until
        that of the first layer's rows is added; the next layer's is added to it."""
        if not self.stage.is_first:
            return
        if self._waiting:
            self.issue.hold(self._another())
            return
        self._waiting = vocabulary_matrix(self.c.edges["embedding"]) * self.c.b
        self.issue.hold((("activations", self._waiting),))

    def weight_done(self) -> None:
        """All gradients are added up."""
        if self._waiting:
            memory, self._waiting = (*self._another(), ("activations", -self._waiting)), 0
            self.issue.add("gradients added", "compute", "embedding", "backward", (), (), memory)

    def _another(self) -> tuple[Step, ...]:
        """Another gradient, and the sum of both, which takes their place."""
        return ("activations", 2 * self._waiting), ("activations", -2 * self._waiting)
