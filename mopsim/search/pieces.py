"""A layer and the loss of a candidate as its program has them: what each takes at least, in time and memory.

Many candidates share a layer: they differ in what surrounds it (shards, stages, where the state is). So the
templates of one stand for all of them, at some milliseconds for each kind of layer.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, cast

from mopsim.common.errors import MopError
from mopsim.engine.upper import communication
from mopsim.program.context import Context, make_context
from mopsim.program.dispatcher import buffers
from mopsim.program.host_time import Around
from mopsim.program.lower import passes_of
from mopsim.program.passes import Passes
from mopsim.program.pinned import rounding
from mopsim.program.template import Template
from mopsim.search.build import build
from mopsim.search.flow import Alone, Busy, Flow, Priced, Prices, alone, device_bytes
from mopsim.search.problem import PARTS, RING, Column, Made, once
from mopsim.search.space import Space
from mopsim.spec.model import LayerKind

ROUTED = (
    "micro_batch", "tensor", "sequence", "exchange", "experts", "expert_tensor", "strided", "dispatcher",
    "chunks", "ffn_slices", "recompute", "modules", "saved",
)  # fmt: skip
"""Columns that the templates of a layer with experts depend on."""
DENSE = tuple(
    name for name in ROUTED if name not in ("experts", "expert_tensor", "strided", "dispatcher", "chunks")
)
"""Those of a layer without."""
LAYER = (*ROUTED, "boundary_host")
"""Those of all, and where a layer's input waits, which decides whether it does where no kernel keeps it."""
LOSS = ("micro_batch", "tensor", "sequence", "vocabulary", "loss", "loss_slices")
"""Those of the loss."""
EMBEDDING = ("micro_batch", "tensor", "sequence", "vocabulary", "loss")
"""Those of the embedding, which a ring may split too."""
BLOCKS = (
    "micro_batch", "tensor", "pipeline", "sequence", "experts", "expert_tensor", "expert_shard", "strided",
    "vocabulary", "loss", "dense_shard", "zero",
)  # fmt: skip
"""Those of the blocks that are pinned on the host."""
MARKS = ("recomputed", "experts")
"""Marks of flat units' backward: where gradients of its weights are opened, where its experts are over."""
TURNS = 64
"""Turns of a ring of vocabulary shards up to which its loss is made, of as many equal ops as turns and
strips. A longer one computes as much in smaller strips, so it takes at least as long; its memory may be less.
"""
Key = tuple[int, ...]


@dataclass(frozen=True)
class LayerPiece:
    """A forward and a backward of one microbatch; what is asked of it is made then.

    templates: make those of the two; around: makes what the host's time depends on (`Prices.of`). heights_of:
    the pass (0, 1) whose heights count, None where its memory is not known.
    """

    templates: tuple[Callable[[], Template], Callable[[], Template]]
    prices: Prices
    around: Callable[[], Around | None] = lambda: None
    heights_of: int | None = 1

    @cached_property
    def compute(self) -> tuple[Busy, Busy]:
        """Seconds of the compute stream of the forward and of the backward."""
        ahead, back = (self.prices.compute(make()) for make in self.templates)
        return ahead, back

    @cached_property
    def ahead(self) -> Priced:
        """The forward."""
        return self.prices.of(self.templates[0](), self.around())

    @cached_property
    def back(self) -> Priced:
        return self.prices.of(self.templates[1](), self.around())

    @cached_property
    def left(self) -> int:
        """Device bytes that the forward adds."""
        return 0 if self.heights_of is None else _memory(self.templates[0]())[2]

    @cached_property
    def _parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        at = self.heights_of
        return ((0,), (0,)) if at is None else _memory(self.templates[at]())[:2]

    @property
    def starts(self) -> tuple[int, ...]:
        """Places where the parts of the backward begin, of the loss the forward's (`_starts`)."""
        return self._parts[0]

    @property
    def heights(self) -> tuple[int, ...]:
        """The most that each part has above the start of the pass."""
        return self._parts[1]

    @property
    def height(self) -> int:
        return max(self.heights)

    @cached_property
    def forward(self) -> Alone:
        return alone(Flow().play(self.ahead))

    @cached_property
    def backward(self) -> Alone:
        return alone(Flow().play(self.back))

    @cached_property
    def parts(self) -> tuple[Alone, ...]:
        """Of the backward, each by itself."""
        stops = (*self.starts[1:], len(self.back.streams))
        return tuple(self.back.seconds(*place) for place in zip(self.starts, stops, strict=True))

    @property
    def chain(self) -> float:
        return self.forward.chain + self.backward.chain

    @property
    def paced(self) -> float:
        return self.forward.paced + self.backward.paced

    @property
    def busy(self) -> float:
        return self.compute[0].all + self.compute[1].all

    @property
    def slowed(self) -> float:
        """`busy` where a collective always runs beside."""
        return self.ahead.slowed + self.back.slowed

    @property
    def issued(self) -> float:
        """Seconds of the host."""
        return self.ahead.issued + self.back.issued


@dataclass(frozen=True)
class PipelinePart:
    """Layers of one part of a pipeline by their kinds, in the order of a pass. first, last: of the network,
    with the embedding, with the loss."""

    kinds: tuple[LayerKind, ...] = ()
    first: bool = False
    last: bool = False


@dataclass(frozen=True)
class Pieces:
    """The pieces of a space's candidates, made as they are asked for: once for each family of a problem."""

    space: Space

    def __getstate__(self) -> dict[str, Any]:
        return {"space": self.space}

    @cached_property
    def made(self) -> dict[Hashable, Any]:
        """By what they are, with the columns and values that they depend on."""
        return cast(dict[Hashable, Any], self.space.problem.pieces.setdefault(self.space.family, {}))

    @cached_property
    def _every(self) -> tuple[Column, ...]:
        return self.space.within()

    @cached_property
    def prices(self) -> Prices:
        """On the space's machine."""
        return once(self.made, "prices", lambda: Prices(self.space.machine, self.space.stack))

    def layers(self, index: int) -> dict[LayerKind, LayerPiece] | None:
        """By kind of layer (Passes.key), those of a row; None where a rule refuses it."""
        return self._known(LAYER, index, lambda passes: self._layers(index, passes))

    def wires(self, index: int) -> int:
        """Bytes of the communicators of all layers' exchanges of a row that no rule refuses."""
        key = (*LAYER, *self.key(index, LAYER))

        def add() -> int:
            layers = self.layers(index)
            passes = self._passes((self.space.family, *key), self.space.row(index))
            assert layers is not None, "a row that a rule refuses"
            assert passes is not None, "a row that a rule refuses"
            made = (make() for piece in layers.values() for make in piece.templates)
            works = (work for one in made for op in one.pieces for work in op.work)
            return communication(works, buffers(passes.context))

        return once(self.made, ("wires", *key), add)

    def loss(self, index: int) -> LayerPiece | None:
        """Final norm, projection and cross entropy of a row, once."""
        turns, long = self._turns(index)
        which = None if long else 0
        return self._known(LOSS, index, lambda one: self._piece(one.loss, which), vocabulary=turns)

    def _turns(self, index: int) -> tuple[int, bool]:
        """(Ranks that share the vocabulary, at most TURNS of a ring; whether a ring is longer)."""
        kind, turns, *_ = self.key(index, ("loss", "vocabulary"))
        long = kind == RING and turns > TURNS
        return max(one for one in range(1, TURNS + 1) if turns % one == 0) if long else turns, long

    def woven(self, index: int, ahead: PipelinePart, back: PipelinePart) -> Alone:
        """A forward through one part woven with a backward through another, of a row that no rule refuses."""
        inputs = self.inputs(index)
        loss = LOSS if ahead.last or back.last else ()

        def make() -> Alone:
            parts = (("back", back), ("ahead", ahead))  # as Builder.weave has them
            return alone(*(self._flow(index, part, way, inputs) for way, part in parts))

        return once(self.made, (self.key(index, LAYER), self.key(index, loss), ahead, back, inputs), make)

    def inputs(self, index: int) -> str:
        """Where layer inputs of a row wait for the backward: `device`, `host`, or `some` there."""
        c = self.space.columns
        if not c["boundary_host"][index]:
            return "device"
        return "host" if c["boundary_parts"][index] == PARTS else "some"

    def key(self, index: int, names: tuple[str, ...]) -> Key:
        """Values of some columns of a row, and what decides beside them what its parts are (Space.within) and
        how far its groups spread: the ranks of its stage, 0 where these are whole scale-up domains and a
        group's ranks lie side by side."""

        def make() -> Key:
            problem, c = self.space.problem, self.space.columns
            ranks = problem.world_size // int(c["pipeline"][index])
            apart = ranks if ranks % problem.domain or c["strided"][index] else 0
            return (*(int(c[name][index]) for name in names), *self._within(index), apart)

        return once(self._keys, (index, names), make)

    @cached_property
    def _keys(self) -> dict[Hashable, Key]:
        return {}

    def _within(self, index: int) -> Key:
        return tuple(int(column[index]) for column in self._every)

    def _flow(self, index: int, part: PipelinePart, way: str, inputs: str) -> Flow:
        """A pass through a part. Where inputs of layers are on the host, each goes as its layer ends and
        comes back as its backward begins; where only some are, they go and none comes back."""
        loss = LOSS if part.last else ()

        def make() -> Flow:
            layers, embedding = self.layers(index), self.embedding(index)
            assert layers is not None, "a row that a rule refuses"
            assert embedding is not None, "a row that a rule refuses"
            edges = {"first": embedding if part.first else None}
            edges["last"], size = self.loss(index) if part.last else None, embedding.left
            before, after = ("first", "last") if way == "ahead" else ("last", "first")
            flow, first, last = Flow(), edges[before], edges[after]
            flow = flow.play(getattr(first, way)) if first else flow.hold(size)
            for kind in part.kinds:
                if way == "back" and inputs == "host":
                    flow.hold(size)
                flow.play(getattr(layers[kind], way))
                if way == "ahead" and inputs != "device":
                    flow.free(size)
            flow = flow.play(getattr(last, way)) if last else flow.free(size)
            return flow.settled()

        return once(self.made, (self.key(index, LAYER), self.key(index, loss), part, way, inputs), make)

    def embedding(self, index: int) -> LayerPiece | None:
        """Of a row; what its forward leaves is the first layer's input."""
        turns = self._turns(index)[0]
        return self._known(EMBEDDING, index, lambda one: self._piece(one.embedding), vocabulary=turns)

    def pinned(self, index: int) -> dict[str, float]:
        """Pinned bytes of a row on the host over those of its tensors (mopsim.program.pinned); nothing where
        a rule refuses it."""

        def make() -> dict[str, float]:
            context = self._context(self.space.row(index))
            return rounding(context) if context else {}

        return once(self.made, ("pinned", *self.key(index, BLOCKS)), make)

    def _known(
        self, names: tuple[str, ...], index: int, make: Callable[[Passes], Made], **changed: int
    ) -> Made | None:
        """What was made of a row like this one before; None where a rule refuses it, which may be for what
        it has in other columns. changed: columns that have other values."""
        key = (*names, *self.key(index, names), *changed.values())
        if key in self.made:
            return cast(Made, self.made[key])
        passes = self._passes((self.space.family, *key), self.space.row(index) | changed)
        return once(self.made, key, lambda: make(passes)) if passes else None

    def _passes(self, key: tuple[object, ...], row: dict[str, int]) -> Passes | None:
        made = self.space.problem.made
        if key in made:
            return cast(Passes, made[key])
        context = self._context(row)
        return cast(Passes, made.setdefault(key, passes_of(context))) if context else None

    def _context(self, row: dict[str, int]) -> Context | None:
        """None where a rule refuses the row."""
        problem = self.space.problem
        domain, on = problem.hardware.scale_up_size, problem.hardware.device.architecture
        try:
            strategy = build(self.space.family, problem, row)
            return make_context(problem.model, strategy, problem.training, domain, self.space.stack, on)
        except MopError:
            return None

    def _layers(self, index: int, passes: Passes) -> dict[LayerKind, LayerPiece]:
        """Layers that have equal templates share their pieces: without experts, wherever other layers' are;
        whose inputs are kept, wherever these wait."""
        model, c = self.space.problem.model, self.space.columns
        stay, away = passes, bool(c["boundary_host"][index])
        if away:
            values, row = self.key(index, ROUTED), self.space.row(index) | {"boundary_host": 0}
            key = (self.space.family, *LAYER, *values[: len(ROUTED)], 0, *values[len(ROUTED) :])
            stay = self._passes(key, row) or passes

        def piece(kind: LayerKind, layer: int) -> LayerPiece:
            key, own = (kind, *self.key(index, ROUTED if kind.routed else DENSE)), away
            if stay is not passes:
                own = not once(self.made, ("kept", key), lambda: stay.keeps_input(layer))
            return once(
                self.made, ("layer", own, key), lambda: self._of_layer(passes if own else stay, layer)
            )

        count = model.num_hidden_layers + model.num_nextn_predict_layers
        kinds = {model.layer_kind(layer): layer for layer in reversed(range(count))}
        return {kind: piece(kind, layer) for kind, layer in kinds.items()}

    def _of_layer(self, passes: Passes, layer: int) -> LayerPiece:
        @cache
        def around() -> Around:
            return Around.of(passes.context, passes.again(), woven=passes.context.weaves, layer=layer)

        ways = partial(passes.forward, layer), partial(passes.backward, layer)
        return LayerPiece(ways, self.prices, around)

    def _piece(self, template: Callable[[str], Template], heights_of: int | None = 1) -> LayerPiece:
        """Of what has a template for each direction."""
        ways = cache(partial(template, "forward")), cache(partial(template, "backward"))
        return LayerPiece(ways, self.prices, heights_of=heights_of)


def _memory(template: Template) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(where a template's parts begin, the most device bytes that it has above its start in each of them,
    those that it leaves)."""
    starts, heights, left = _starts(template), [0], 0
    for place, script in enumerate((*template.memory, ())):
        if place in starts[1:]:
            heights.append(left)
        height, change = device_bytes((*template.before.get(place, ()), *script))
        heights[-1] = max(heights[-1], left + height)
        left += change
    return starts, tuple(heights), left


def _starts(template: Template) -> tuple[int, ...]:
    """Places where the parts of a backward begin, which have other weights and gradients: its first op, and
    those marked, or the one after the last product of its experts."""
    marked = [template.marks[name] for name in MARKS if name in template.marks]
    last = template.products("backward")[1]
    return (0, *(marked or [last + 1] * (last >= 0)))
