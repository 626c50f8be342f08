"""Templates: ops recorded once and issued for every layer and microbatch that runs alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from msgspec import structs

from mopsim.graph.tape import Step
from mopsim.program.workload import Op

START, EXPERTS = -1, -2
"""Dependencies of a template's ops: what the template as a whole waits for, and what its experts wait for."""
Memory = tuple[Step, ...]
Ops = tuple[int, ...]
Hooks = Mapping[int, Sequence[Callable[[int], None]]]
"""What is issued inside a template, by the place that it comes before; it gets the op of the place before."""
FRAMES = (
    ("h", "rope"), ("h", "k_norm"), ("h", "rope_k"), ("y", ""), ("u", ""), ("routed", ""),
    ("rows", "experts_down"), ("rows_g", "experts_down"),
    ("rows", "experts_down_bias"), ("rows_g", "experts_down_bias"), ("act", "experts_down_bias"),
    ("rows", "scatter_rows"), ("o", "scatter_a"), ("ffn_act", "scatter_f"),
    ("shared_act", "scatter_f"),
)  # fmt: skip
"""Variables of the frames of Python that run a layer, and its routed experts, and the kernels to the end of
which they are there (the last of those that run)."""


def merged(first: Hooks, second: Hooks) -> Hooks:
    """Hooks of both, at one place those of the first before the others."""
    return {place: (*first.get(place, ()), *second.get(place, ())) for place in {**first, **second}}


@dataclass(frozen=True)
class Template:
    """Ops recorded once and issued for every layer and microbatch that runs alike.

    pieces: ops whose deps are places in the template, START or EXPERTS. ends: the pieces that what follows
    has to wait for. memory: what each piece does, in order. before: what is done before a piece (a place
    after the last one: after all), where hooks may come between. marks: places by name.
    """

    pieces: tuple[Op, ...]
    ends: tuple[int, ...]
    memory: tuple[Memory, ...]
    before: Mapping[int, Memory]
    marks: Mapping[str, int]

    def products(self, phase: str) -> tuple[int, int]:
        """First and last place of a phase with products of experts, -1 without."""
        return self._products.get(phase, (-1, -1))

    @cached_property
    def _products(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for place, piece in enumerate(self.pieces):
            if any(work.kind == "grouped_matmul" for work in piece.work):
                found[piece.phase] = found.get(piece.phase, (place, place))[0], place
        return found

    def places(self, component: str, phase: str, before: int) -> list[int]:
        """Places of a component's pieces in a phase, before a place."""
        pieces = enumerate(self.pieces[: max(before, 0)])
        return [place for place, piece in pieces if (piece.component, piece.phase) == (component, phase)]

    def then(self, after: "Template") -> "Template":
        """This, and after it the other."""
        by = len(self.pieces)

        def moved(deps: tuple[int, ...]) -> tuple[int, ...]:
            found = [self.ends if dep == START else (dep + by if dep >= 0 else dep,) for dep in deps]
            return tuple(place for places in found for place in places)

        pieces = tuple(structs.replace(piece, deps=moved(piece.deps)) for piece in after.pieces)
        before = dict(self.before)
        for place, steps in after.before.items():
            before[by + place] = (*before.get(by + place, ()), *steps)
        marks = {**self.marks, **{name: by + place for name, place in after.marks.items()}}
        memory = self.memory + after.memory
        return Template(self.pieces + pieces, moved(after.ends), memory, before, marks)
