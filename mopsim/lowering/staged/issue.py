"""Issue: ops of one program in order, single ones and whole templates."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from mopsim.layers.tape import Step
from mopsim.lowering.staged.template import START, Template
from mopsim.lowering.workload import Op, Work, deltas

Between = tuple[int, Callable[[int], None]]


class Issue:
    """A program under construction. microbatch: what ops issued now belong to, -1 the optimizer."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.microbatch = 0

    def add(
        self, name: str, stream: str, component: str, phase: str, work: Sequence[Work] = (),
        deps: Iterable[int] = (), memory: Sequence[Step] = (), rendezvous: str = "", layer: int = -1,
        awaited: bool = False,
    ) -> int:  # fmt: skip
        """Append one op; returns its index. The height of `memory` is held until the op ends."""
        peak, net = deltas(tuple(memory))
        index = len(self.ops)
        self.ops.append(
            Op(
                index, name, stream, component, phase, layer, tuple(work), tuple(deps), peak, net, rendezvous,
                self.microbatch, awaited,
            )
        )  # fmt: skip
        return index

    def play(
        self, template: Template, layer: int, deps: Sequence[int], between: Between | None = None
    ) -> tuple[int, ...]:
        """Append a template; returns the ops that what follows has to wait for. between: (a place, what is to
        be issued after the piece there, given its op)."""
        ops, microbatch = self.ops, self.microbatch
        start = tuple(dict.fromkeys(deps))
        places: list[int] = []
        for piece in template.pieces:
            after: tuple[int, ...] = ()
            for dep in piece.deps:
                after += start if dep == START else (places[dep],)
            places.append(len(ops))
            ops.append(
                Op(
                    len(ops), piece.name, piece.stream, piece.component, piece.phase, layer,
                    piece.work, after,
                    piece.peak, piece.net, "", microbatch, piece.awaited,
                )
            )  # fmt: skip
            if between and len(places) == between[0] + 1:
                between[1](places[-1])
        return tuple(start if not template.pieces else (places[end] for end in template.ends))

    def weave(self, start: int, middle: int) -> dict[int, int]:
        """Issue ops [start, middle) and those from middle on by turns, a turn ending with a collective.

        Returns the new index of each op that moved. Neither part may depend on the other.
        """
        turns = [_turns(self.ops[start:middle]), _turns(self.ops[middle:])]
        woven = [op for pair in zip_longest(*turns, fillvalue=()) for turn in pair for op in turn]
        moved = {op.index: start + place for place, op in enumerate(woven)}
        self.ops[start:] = [
            replace(op, index=moved[op.index], deps=tuple(moved.get(dep, dep) for dep in op.deps))
            for op in woven
        ]
        return moved

    def tail(self) -> tuple[int, ...]:
        """The last op of every stream."""
        found: dict[str, int] = {}
        for op in self.ops:
            found[op.stream] = op.index
        return tuple(found.values())


def _turns(ops: Sequence[Op]) -> list[list[Op]]:
    """Cut after every collective."""
    found: list[list[Op]] = [[]]
    for op in ops:
        found[-1].append(op)
        if op.stream in ("scale_up", "scale_out"):
            found.append([])
    return found
