"""A layer and the loss of a candidate as its program has them: what each takes at least, in time and memory.

Many candidates share a layer: they differ in what surrounds it (shards, stages, where the state is). So the
templates of one stand for all of them, at some milliseconds for each kind of layer.
"""

from dataclasses import dataclass, field, replace

from mopsim.common.errors import MopError
from mopsim.cost import seconds
from mopsim.program.context import make_context
from mopsim.program.lower import passes_of
from mopsim.program.passes import Passes
from mopsim.program.template import Template
from mopsim.program.workload import NUM_DEVICE_SLOTS, deltas, on_host
from mopsim.search.build import build
from mopsim.search.problem import RING
from mopsim.search.space import Space
from mopsim.spec.model import LayerKind

LAYER = (
    "micro_batch", "tensor", "sequence", "exchange", "experts", "expert_tensor", "strided", "dispatcher",
    "chunks", "ffn_slices", "recompute", "modules", "boundary_host",
)  # fmt: skip
"""Columns that a layer's templates depend on."""
LOSS = ("micro_batch", "tensor", "sequence", "vocabulary", "loss", "loss_slices")
"""Those of the loss."""
TURNS = 64
"""Turns of a ring of vocabulary shards up to which its loss is made, of as many equal ops as turns and
strips. A longer one computes as much in smaller strips, so it takes at least as long; its memory may be less.
"""


@dataclass(frozen=True)
class LayerPiece:
    """A forward and a backward of one microbatch.

    chain: seconds from the first op on the compute stream to the end of the last one, where nothing else
    runs; busy: those in which that stream computes; routed: of these, those of experts; issued: kernels that
    the host starts.
    left: device bytes that the forward adds; height: the most that the backward has above its start, the
    forward for the loss.
    """

    chain: float
    busy: float
    routed: float
    issued: float
    left: int
    height: int


@dataclass
class Pieces:
    """The pieces of a space's candidates, made as they are asked for."""

    space: Space
    made: dict[tuple[int, ...], dict[LayerKind, LayerPiece] | None] = field(default_factory=dict)
    losses: dict[tuple[int, ...], LayerPiece | None] = field(default_factory=dict)

    def layers(self, index: int) -> dict[LayerKind, LayerPiece] | None:
        """By kind of layer (Passes.key), those of a row; None where a rule refuses it."""
        row = self.space.row(index)
        key = tuple(row[name] for name in LAYER)
        if key not in self.made:
            passes = self._passes(row)
            self.made[key] = self._layers(passes) if passes else None
        return self.made[key]

    def loss(self, index: int) -> LayerPiece | None:
        """Final norm, projection and cross entropy of a row, once."""
        row = self.space.row(index)
        long = row["loss"] == RING and row["vocabulary"] > TURNS
        if long:
            row["vocabulary"] = max(turns for turns in range(1, TURNS + 1) if row["vocabulary"] % turns == 0)
        key = tuple(row[name] for name in LOSS)
        if key not in self.losses:
            passes = self._passes(row)
            found = self._loss(passes) if passes else None
            self.losses[key] = replace(found, left=0, height=0) if found and long else found
        return self.losses[key]

    def _passes(self, row: dict[str, int]) -> Passes | None:
        problem, stack = self.space.problem, self.space.stack
        try:
            context = make_context(
                problem.model,
                build(self.space.family, problem, row),
                problem.training,
                problem.hardware.scale_up_size,
                stack,
            )
        except MopError:
            return None
        return passes_of(context)

    def _loss(self, passes: Passes) -> LayerPiece:
        return self._piece(passes.loss("forward"), passes.loss("backward"), first=True)

    def _layers(self, passes: Passes) -> dict[LayerKind, LayerPiece]:
        kinds = {passes.key(layer): layer for layer in reversed(range(len(passes.context.layers)))}
        return {
            kind: self._piece(passes.forward(layer), passes.backward(layer)) for kind, layer in kinds.items()
        }

    def _piece(self, forward: Template, backward: Template, first: bool = False) -> LayerPiece:
        """first: the forward has the height that counts."""
        ahead, back = self._alone(forward), self._alone(backward)
        left, height = _memory(forward)
        chain, busy, routed, issued = (one + other for one, other in zip(ahead, back, strict=True))
        return LayerPiece(chain, busy, routed, issued, left, height if first else _memory(backward)[1])

    def _alone(self, template: Template) -> tuple[float, float, float, float]:
        """(chain, busy, routed, issued) of a template that has all streams to itself, each in the order of
        issue."""
        last: dict[str, float] = {}
        ends: list[float] = []
        begins, busy, routed, issued = None, 0.0, 0.0, 0.0
        priced: dict[int, float] = {}
        for op in template.pieces:
            for work in op.work:  # equal work is one object
                if id(work) not in priced:
                    priced[id(work)] = seconds(work, self.space.machine)
            took = sum(priced[id(work)] for work in op.work)
            start = max([last.get(op.stream, 0.0), *(ends[dep] for dep in op.deps if dep >= 0)])
            ends.append(start + took)
            last[op.stream] = ends[-1]
            issued += sum(on_host(op.work, op.component in self.space.stack.host.graphs))
            if op.stream == "compute":
                begins = start if begins is None else begins
                busy += took
                routed += took if op.component == "experts" else 0.0
        return last.get("compute", 0.0) - (begins or 0.0), busy, routed, issued


def _memory(template: Template) -> tuple[int, int]:
    """(device bytes that a template leaves, the most that it has above its start)."""
    scripts = enumerate((*template.memory, ()))
    steps = [(*template.before.get(place, ()), *script) for place, script in scripts]
    top, left = (
        sum(size for slot, size in found if slot < NUM_DEVICE_SLOTS)
        for found in deltas(tuple(step for some in steps for step in some))
    )
    return left, top
