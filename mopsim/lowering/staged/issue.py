"""Issue: ops of one program in order, single ones and whole templates."""

from collections.abc import Iterable, Sequence

from mopsim.layers.tape import Step
from mopsim.lowering.staged.template import START, Template
from mopsim.lowering.workload import Op, Work, deltas


class Issue:
    """A program under construction. microbatch: what ops issued now belong to, -1 the optimizer."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.microbatch = 0

    def add(
        self, name: str, stream: str, component: str, phase: str, work: Sequence[Work] = (),
        deps: Iterable[int] = (), memory: Sequence[Step] = (), rendezvous: str = "", layer: int = -1,
    ) -> int:  # fmt: skip
        """Append one op; returns its index. The height of `memory` is held until the op ends."""
        peak, net = deltas(tuple(memory))
        index = len(self.ops)
        self.ops.append(
            Op(
                index, name, stream, component, phase, layer, tuple(work), tuple(deps), peak, net, rendezvous,
                self.microbatch,
            )
        )  # fmt: skip
        return index

    def play(self, template: Template, layer: int, deps: Sequence[int]) -> tuple[int, ...]:
        """Append a template; returns the ops that what follows has to wait for."""
        base, ops, microbatch = len(self.ops), self.ops, self.microbatch
        start = tuple(dict.fromkeys(deps))
        for offset, piece in enumerate(template.pieces):
            after: tuple[int, ...] = ()
            for dep in piece.deps:
                after += start if dep == START else (base + dep,)
            ops.append(
                Op(
                    base + offset, piece.name, piece.stream, piece.component, piece.phase, layer,
                    piece.work, after,
                    piece.peak, piece.net, "", microbatch,
                )
            )  # fmt: skip
        return tuple(start if not template.pieces else (base + end for end in template.ends))

    def tail(self) -> tuple[int, ...]:
        """The last op of every stream."""
        found: dict[str, int] = {}
        for op in self.ops:
            found[op.stream] = op.index
        return tuple(found.values())
