"""Inputs of layers, or all that they keep, on the host: down once the layer has run, up again one layer ahead
of its backward."""

from collections.abc import Callable, Mapping, Sequence

from mopsim.graph.tape import Step
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.pipeline import Slot
from mopsim.program.stage import Stage
from mopsim.program.template import Hooks, Template
from mopsim.program.workload import Work

Visit = tuple[str, int, int]
"""(phase, microbatch, layer): what a program does to a layer."""


class Boundaries:
    """The copies of one stage, whatever the schedule: its visits of layers, in program order, say which comes
    next. An input that the next visit needs again stays, as does that of an MTP layer.

    Copies are as Megatron-Core's fine-grained activation offloading makes them of `layer_input` (full
    recomputation) or of `attn_norm`, whose input is the layer's (megatron/core/pipeline_parallel/
    fine_grained_activation_offload.py): compute never waits for a copy down, the device's bytes are free
    where it ends, pinned buffers are kept for copies to come.

    hooked: autograd's hooks on saved tensors pack and unpack them instead (mopexec.modules.hooks): every
    input goes, and comes up when its backward asks for it.

    kept: what a layer leaves for its backward beside its input; it goes too where `layers_on_host` says so.
    pinned: bytes of the buffers that the schedule needs.
    """

    def __init__(
        self,
        context: Context,
        issue: Builder,
        stage: Stage,
        slots: Sequence[Slot],
        kept: Callable[[int], tuple[Step, ...]],
    ) -> None:
        self.issue, self.size, self.kept = issue, context.hidden, kept
        full = context.strategy.activations.recompute == "full"
        self.hooked = full and context.stack.recompute.inputs == "asked"
        self.visits: list[Visit] = []
        for phase, microbatch, chunk in slots:
            layers = stage.chunks[chunk] if phase == "forward" else reversed(stage.chunks[chunk])
            kind = "backward" if phase == "input_grad" else phase
            self.visits += [(kind, microbatch, layer) for layer in layers]
        self.places = {visit: place for place, visit in enumerate(self.visits)}
        self.pinned = 0
        self._repeated: set[int] = set()
        self._free: dict[int, list[int]] = {}
        self._down: dict[Visit, int] = {}
        self._up: dict[Visit, int] = {}
        self._window: tuple[int, ...] = ()
        activations = context.strategy.activations
        layers = [layer for chunk in stage.every for layer in chunk]
        self.away: frozenset[int] = frozenset()
        if activations.layer_inputs == "host":
            room = (
                activations.host_budget // self.size if activations.host_budget else len(layers) * len(slots)
            )
            counts = (n for n in range(len(layers), 0, -1) if self._most(set(layers[:n])) <= room)
            self.away = frozenset(layers[: room if stage.degree == 1 else next(counts, 0)])
        self.whole = activations.cpu_offload_layers > 0
        if self.whole:
            self.away = frozenset(layers[: activations.cpu_offload_layers])

    def contents(self, layer: int) -> tuple[Step, ...]:
        """What of a layer is on the host, by category."""
        return (("activations", self.size), *(self.kept(layer) if self.whole else ()))

    def _most(self, layers: set[int]) -> int:
        """Inputs of these layers that wait for their backward at once."""
        alive = most = 0
        for phase, _, layer in self.visits:
            alive += (layer in layers) * ((phase == "forward") - (phase == "backward"))
            most = max(most, alive)
        return most

    def before(self, phase: str, microbatch: int, layer: int, ready: Sequence[int]) -> tuple[int, ...]:
        """A layer is about to run once `ready` ended: its input and that of the next visit come up where they
        are wanted. Returns what the layer has to wait for."""
        visit = (phase, microbatch, layer)
        if visit not in self.places or not self.away:
            return ()
        self._window = tuple(ready) or self._window
        place = self.places[visit]
        for one in self.visits[place : place + (1 if self.hooked else 2)]:
            self._bring(one)
        return (self._up.pop(visit),) if visit in self._up else ()

    def ahead(self, microbatch: int, layers: Sequence[int]) -> None:
        """The input of the first layer of a backward comes up beside the last visit."""
        if layers:
            self._bring(("backward", microbatch, layers[0]))

    def after(self, microbatch: int, layer: int, ready: Sequence[int]) -> None:
        """A layer's forward has run: its input goes down, into a buffer whose copy up is over."""
        back = ("backward", microbatch, layer)
        follows = self.visits[self.places["forward", microbatch, layer] + 1] == back
        if layer not in self.away or (follows and not self.hooked):
            return
        steps = self.contents(layer)
        size = sum(bytes for _, bytes in steps)
        free = self._free.get(size)
        room = (free.pop(0),) if free else ()
        self.pinned += 0 if room else size
        work, memory = (Work("d2h", bytes=float(size)),), tuple((name, -bytes) for name, bytes in steps)
        self._down[back] = self.issue.add(
            f"boundary {layer} down", "d2h", "other", "forward", work, (*ready, *room), memory, layer=layer
        )

    def repeat(self, layers: Sequence[int], times: int) -> None:
        """Layers that are not played need buffers of the host, as many as these do `times` over; the first
        microbatch makes them."""
        new = [layer for layer in layers if layer in self.away and layer not in self._repeated]
        self.pinned += times * sum(size for layer in new for _, size in self.contents(layer))
        self._repeated.update(new)

    def moved(self, places: Mapping[int, int]) -> None:
        """Ops have new indices (see Issue.weave)."""
        for ops in (self._down, self._up):
            ops.update({visit: places.get(op, op) for visit, op in ops.items()})
        self._free = {size: [places.get(op, op) for op in ops] for size, ops in self._free.items()}
        self._window = tuple(places.get(op, op) for op in self._window)

    def beside(self, template: Template, layer: int) -> Hooks:
        """Copies inside of a layer's backward: none, see PairBoundaries."""
        return {}

    def _bring(self, visit: Visit) -> None:
        down = self._down.pop(visit, None)
        if down is None:
            return
        phase, microbatch, layer = visit
        now, self.issue.microbatch = self.issue.microbatch, microbatch
        memory = self.contents(layer)
        size = sum(bytes for _, bytes in memory)
        work = (Work("h2d", bytes=float(size)),)
        op = self.issue.add(
            f"boundary {layer} up", "h2d", "other", phase, work, (down, *self._window), memory, layer=layer
        )
        self.issue.microbatch = now
        self._up[visit] = op
        self._free.setdefault(size, []).append(op)


class PairBoundaries:
    """Copies of a program that lists its forward and backward pairs: the first inputs go down beside their
    layer while `host_budget` lasts, and come up under the attention's backward of the layer after
    (mopexec.flat)."""

    whole, pinned = False, 0

    def __init__(self, context: Context, builder: Builder, stage: Stage) -> None:
        self.c, self.b = context, builder
        layers = [layer for chunk in stage.chunks for layer in chunk]
        self._below = dict(zip(layers[1:], layers, strict=False))
        self._up: dict[int, int] = {}
        self._stored: tuple[int, ...] = ()

    def before(self, phase: str, microbatch: int, layer: int, ready: Sequence[int]) -> tuple[int, ...]:
        """A layer is about to run: its input goes down or is there again. Returns what it has to wait for."""
        if layer >= self.c.offloaded:
            return ()
        if phase == "forward":
            work = (Work("d2h", bytes=float(self.c.hidden)),)
            self._stored = (
                self.b.add(
                    f"boundary {layer} down", "d2h", "other", phase, work, self.b.so_far(), layer=layer
                ),
            )
            return ()
        self._bring(layer)
        return (self._up.pop(layer),)

    def after(self, microbatch: int, layer: int, ready: Sequence[int]) -> None:
        """A layer's forward has run: its input is freed where it went down."""
        if layer < self.c.offloaded:
            self.b.hold((("boundaries", -self.c.hidden),))

    def repeat(self, layers: Sequence[int], times: int) -> None:
        """Buffers of all layers are resident."""

    def ahead(self, microbatch: int, layers: Sequence[int]) -> None:
        """Nothing comes up beside another microbatch's forward."""

    def moved(self, places: Mapping[int, int]) -> None:
        """Ops of these programs keep their places."""

    def beside(self, template: Template, layer: int) -> Hooks:
        """The next input comes up once the feed-forward half has gone backward."""
        return {template.marks["experts"]: (lambda _: self._bring(self._below.get(layer, -1)),)}

    def _bring(self, layer: int) -> None:
        if not 0 <= layer < self.c.offloaded or layer in self._up:
            return
        self.b.hold((("boundaries", self.c.hidden),))
        work = (Work("h2d", bytes=float(self.c.hidden)),)
        deps = (*self.b.so_far(), *self._stored)
        self._up[layer] = self.b.add(
            f"boundary {layer} up", "h2d", "other", "backward", work, deps, layer=layer
        )
