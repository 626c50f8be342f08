"""Experts under nested checkpoints (mopexec.operators.nested_experts): a layer's recomputation runs their
chunks as the forward does and keeps their rows; a chunk's backward is sent gradients alone."""

from mopsim.program.pairs.experts_pair import ExpertsPair
from mopsim.program.workload import Work


class NestedExperts(ExpertsPair):
    """Rows of chunk i that are kept are `kept.i`."""

    whole = True

    def recompute(self, layer: int, *waits: int | None) -> None:
        """What the backward starts from. waits: the gather of the expert unit."""
        self._chunks(layer, "recompute", self._again(layer, "recompute", waits))

    def backward(self, layer: int, *waits: int | None) -> None:
        self._after(layer, waits)

    def _sent(self, phase: str) -> dict[str, int]:
        return {"grads": self.row} if phase == "backward" else super()._sent(phase)

    def _experts_forward(
        self, i: int, layer: int, phase: str, works: list[Work], arrived: int | None, *waits: int | None
    ) -> None:
        if phase == "recompute":  # results take the place of no rows
            b, received = self.b, self._sizes(i)[2]
            b.rename("rows", f"kept.{i}")
            b.make("rows", 0 if self.grouped else received * self.row)
            if self.grouped:
                b.spike(received * (self.inner * self.c.b + self.row))
        super()._experts_forward(i, layer, phase, works, arrived, *waits)

    def _combine(self, i: int, arrived: int | None, layer: int, phase: str) -> None:
        if phase == "forward":
            super()._combine(i, arrived, layer, phase)
            return
        b, size = self.b, self.c.chunk_tokens(i) * self.row
        b.make("unread sum", size, "dispatch")
        b.compute("zero sum", "experts", phase, layer, [self.elementwise(size, 1, 1)])
        super()._combine(i, arrived, layer, phase)
        b.drop("unread sum")

    def _experts_backward(
        self, i: int, layer: int, phase: str, works: list[Work], arrived: int | None, *waits: int | None
    ) -> None:
        self.b.rename(f"kept.{i}", "rows")
        super()._experts_backward(i, layer, phase, works, arrived, *waits)
