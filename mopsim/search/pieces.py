"""A layer and the loss of a candidate as its program has them: what each takes at least, in time and memory.

Many candidates share a layer: they differ in what surrounds it (shards, stages, where the state is). So the
templates of one stand for all of them, at some milliseconds for each kind of layer.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from mopsim.common.errors import MopError
from mopsim.cost import seconds
from mopsim.program.builder import Builder
from mopsim.program.context import make_context
from mopsim.program.lower import passes_of
from mopsim.program.passes import Passes
from mopsim.program.template import Ops, Template
from mopsim.program.workload import NUM_DEVICE_SLOTS, Op, Work, deltas, on_host
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
class Alone:
    """Ops that have all streams to themselves, each in the order of issue.

    chain: seconds from the first op on the compute stream to the end of the last one, what comes before it
    over; busy: those in which that stream computes; routed: of these, those of experts; talks: those in which
    the busier fabric is busy; issued: kernels that the host starts.
    """

    chain: float
    busy: float
    routed: float
    talks: float
    issued: float


@dataclass(frozen=True)
class LayerPiece:
    """A forward and a backward of one microbatch.

    left: device bytes that the forward adds; height: the most that the backward has above its start, the
    forward for the loss.
    """

    forward: Alone
    backward: Alone
    left: int
    height: int

    @property
    def chain(self) -> float:
        return self.forward.chain + self.backward.chain

    @property
    def busy(self) -> float:
        return self.forward.busy + self.backward.busy

    @property
    def routed(self) -> float:
        return self.forward.routed + self.backward.routed

    @property
    def issued(self) -> float:
        return self.forward.issued + self.backward.issued


@dataclass
class Pieces:
    """The pieces of a space's candidates, made as they are asked for."""

    space: Space
    made: dict[tuple[int, ...], dict[LayerKind, LayerPiece] | None] = field(default_factory=dict)
    losses: dict[tuple[int, ...], LayerPiece | None] = field(default_factory=dict)
    pairs: dict[tuple[Hashable, ...], Alone] = field(default_factory=dict)
    latest: tuple[tuple[int, ...], Passes | None] | None = None
    priced: dict[int, tuple[Work, float]] = field(default_factory=dict)

    def layers(self, index: int) -> dict[LayerKind, LayerPiece] | None:
        """By kind of layer (Passes.key), those of a row; None where a rule refuses it."""
        row = self.space.row(index)
        key = tuple(row[name] for name in LAYER)
        if key not in self.made:
            passes = self._made(row)
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

    def _made(self, row: dict[str, int]) -> Passes | None:
        """The passes of a row's layers; those asked for last are kept."""
        key = tuple(row[name] for name in LAYER)
        if self.latest is None or self.latest[0] != key:
            self.latest = key, self._passes(row)
        return self.latest[1]

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
        left, height = _memory(forward)
        height = height if first else _memory(backward)[1]
        return LayerPiece(self._alone(forward.pieces), self._alone(backward.pieces), left, height)

    def woven(self, index: int, ahead: tuple[LayerKind, ...], back: tuple[LayerKind, ...]) -> Alone:
        """A forward through layers of these kinds woven with a backward through others, in their order, of a
        row that no rule refuses."""
        row = self.space.row(index)
        key = (tuple(row[name] for name in LAYER), ahead, back)
        if key not in self.pairs:
            passes = self._made(row)
            assert passes is not None, "a row that a rule refuses"
            first, issue = passes.context.model.layer_kinds(), Builder(passes.context.groups)
            ready = Ops()
            for kind in ahead:
                ready = issue.play(passes.forward(first[kind][0]), 0, ready)
            middle, ready = len(issue.ops), Ops()
            for kind in back:
                ready = issue.play(passes.backward(first[kind][0]), 0, ready)
            issue.weave(0, middle)
            self.pairs[key] = self._alone(issue.ops)
        return self.pairs[key]

    def _alone(self, ops: Sequence[Op]) -> Alone:
        """What comes before the first op on the compute stream may be over when that begins."""
        last: dict[str, float] = {}
        ends: list[float] = []
        follows: list[bool] = []
        busy, routed, issued = 0.0, 0.0, 0.0
        talks = {"scale_up": 0.0, "scale_out": 0.0}
        for op in ops:
            for work in op.work:  # equal work is one object
                if id(work) not in self.priced:
                    self.priced[id(work)] = (work, seconds(work, self.space.machine))
            took = sum(self.priced[id(work)][1] for work in op.work)
            compute, deps = op.stream == "compute", [dep for dep in op.deps if dep >= 0]
            follows.append(compute or any(follows[dep] for dep in deps))
            start = max([last.get(op.stream, 0.0), *(ends[dep] for dep in deps)])
            ends.append(start + took if follows[-1] else 0.0)
            last[op.stream] = ends[-1]
            issued += sum(on_host(op.work, op.component in self.space.stack.host.graphs))
            if compute:
                busy += took
                routed += took if op.component == "experts" else 0.0
            elif op.stream in talks:
                talks[op.stream] += took
        return Alone(last.get("compute", 0.0), busy, routed, max(talks.values()), issued)


def _memory(template: Template) -> tuple[int, int]:
    """(device bytes that a template leaves, the most that it has above its start)."""
    scripts = enumerate((*template.memory, ()))
    steps = [(*template.before.get(place, ()), *script) for place, script in scripts]
    top, left = (
        sum(size for slot, size in found if slot < NUM_DEVICE_SLOTS)
        for found in deltas(tuple(step for some in steps for step in some))
    )
    return left, top
