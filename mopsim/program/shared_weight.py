"""The edges of a network as torch's FSDP2 groups them, and a weight that embedding and head share."""

from collections.abc import Callable

from msgspec.structs import replace

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.units import ShardedUnit, joined


class Edges:
    """copied: whether parameters are sharded as torch's FSDP2 does."""

    c: Context
    copied: bool
    issue: Builder
    _opened: dict[str, int]
    _make_gradients: Callable[[ShardedUnit, int, str], None]

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

    def weight_waits(self, phase: str) -> None:
        """The gradient that the head's product makes of a shared weight, unless it is there."""
        unit, size = self.edge_unit("embedding"), self.c.edges["embedding"].largest
        if self.copied and unit.name not in self._opened:
            self._make_gradients(unit, size, phase)
        elif not self.copied:
            self.issue.hold((("grads", size * self.c.b),))

    def weight_done(self) -> None:
        """Both gradients are added up."""
        if not self.copied:
            self.issue.hold((("grads", -self.c.edges["embedding"].largest * self.c.b),))
