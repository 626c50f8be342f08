"""Inputs of layers, or all that they keep, on the host: down once the layer has run, up again one layer ahead
of its backward."""

from collections.abc import Callable, Mapping, Sequence

from mopsim.graph.tape import Step
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.stage import Stage
from mopsim.program.template import Hooks, Template
from mopsim.program.workload import Work
from mopsim.spec.pipeline_order import Slot

Visit = tuple[str, int, int]
"""(phase, microbatch, layer): what a program does to a layer."""


class OffloadedInputs:
    """The copies of one stage, whatever the schedule: its visits of layers, in program order, say which comes
    next. An input that the next visit needs again stays, as does that of an MTP layer.

    Copies are as Megatron-Core's fine-grained activation offloading makes them of `layer_input` (full
    recomputation) or of `attn_norm`, whose input is the layer's (megatron/core/pipeline_parallel/
    fine_grained_activation_offload.py): compute never waits for a copy down, the device's bytes are free
    where it ends, pinned buffers are kept for copies to come.

    hooked: autograd's hooks on saved tensors pack and unpack them instead (mopexec.modules.hooks): every
    input goes, and comes up when its backward asks for it. explicit: a program that lists its operators
    (mopexec.flat) sends an input down beside its layer and frees it after, and takes it up again after the
    core of attention's backward of the layer after; its buffers on the host are there from the start.

    kept: what a layer leaves for its backward beside its input; it goes too where `layers_on_host` says so.
    pinned: bytes of the buffers that the schedule needs.
    """

    def __init__(
        self, context: Context, issue: Builder, stage: Stage, slots: Sequence[Slot],
        kept: Callable[[int], tuple[Step, ...]], explicit: bool = False,
    ) -> None:  # fmt: skip
        self.issue, self.size, self.kept, self.explicit = issue, context.hidden, kept, explicit
        full = context.strategy.activations.recompute == "full"
        self.hooked = full and context.stack.recompute.inputs == "asked"
        self.ahead = int(not (self.hooked or explicit))
        self.visits: list[Visit] = []
        for phase, microbatch, chunk in slots:
            layers = stage.chunks[chunk] if phase == "forward" else reversed(stage.chunks[chunk])
            kind = "backward" if phase == "input_grad" else phase
            self.visits += [(kind, microbatch, layer) for layer in layers]
        self.places = {visit: place for place, visit in enumerate(self.visits)}
        self._last = len(self.visits)
        self.pinned = 0
        self._repeated: set[int] = set()
        self._free: dict[int, list[int]] = {}
        self._down: dict[Visit, int] = {}
        self._up: dict[Visit, int] = {}
        self.window: tuple[int, ...] = ()
        self._newest: tuple[int, ...] = ()
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
        if explicit:
            self.pinned = len(self.away) * self.size

    def contents(self, layer: int) -> tuple[Step, ...]:
        """What of a layer is on the host, by category."""
        category = "boundaries" if self.explicit else "activations"
        return ((category, self.size), *(self.kept(layer) if self.whole else ()))

    def _gone(self, layer: int) -> tuple[Step, ...]:
        return tuple((category, -size) for category, size in self.contents(layer))

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
        if self.explicit and phase == "forward":
            self._take(visit, self.issue.so_far())
            return ()
        self.window = tuple(ready) or self.window
        place = self.places[visit]
        for one in self.visits[place : min(place + 1 + self.ahead, self._last)]:
            self._bring(one)
        return (self._up.pop(visit),) if visit in self._up else ()

    def woven(self, microbatch: int, layers: Sequence[int]) -> None:
        """A backward is woven with a forward: the input of its first layer comes up beside the last visit,
        none of another pass until both are issued (`issued`)."""
        if layers:
            self._bring(("backward", microbatch, layers[0]))
            self._last = self.places["backward", microbatch, layers[-1]] + 1

    def issued(self, places: Mapping[int, int]) -> None:
        """They are, at new places of ops (see Builder.weave)."""
        for ops in (self._down, self._up):
            ops.update({visit: places.get(op, op) for visit, op in ops.items()})
        self._free = {size: [places.get(op, op) for op in ops] for size, ops in self._free.items()}
        self.window = tuple(places.get(op, op) for op in self.window)
        following, self._last = self.visits[self._last : self._last + self.ahead], len(self.visits)
        for one in following:
            self._bring(one)

    def after(self, microbatch: int, layer: int, ready: Sequence[int]) -> None:
        """A layer's forward has run: its input goes down, into a buffer whose copy up is over."""
        visit = ("forward", microbatch, layer)
        follows = self.visits[self.places[visit] + 1] == ("backward", microbatch, layer)
        if layer not in self.away:
            return
        if self.explicit:
            self.issue.hold(self._gone(layer))
        elif self.hooked or not follows:
            self._take(visit, ready)

    def _take(self, visit: Visit, ready: Sequence[int]) -> None:
        """A copy down. Of an explicit program its memory is freed by who waits for it."""
        _, microbatch, layer = visit
        if layer not in self.away:
            return
        size = sum(bytes for _, bytes in self.contents(layer))
        free = self._free.get(size)
        room = (free.pop(0),) if free else ()
        self.pinned += 0 if room or self.explicit else size
        work = (Work("d2h", bytes=float(size)),)
        memory = () if self.explicit else self._gone(layer)
        op = self.issue.add(
            f"boundary {layer} down", "d2h", "other", "forward", work, (*ready, *room), memory, layer=layer
        )
        self._down["backward", microbatch, layer] = op
        self._newest = (op,)

    def repeat(self, layers: Sequence[int], times: int) -> None:
        """Layers that are not played need buffers of the host, as many as these do `times` over; the first
        microbatch makes them."""
        new = [layer for layer in layers if layer in self.away and layer not in self._repeated]
        new = [] if self.explicit else new
        self.pinned += times * sum(size for layer in new for _, size in self.contents(layer))
        self._repeated.update(new)

    def beside(self, template: Template, layer: int) -> Hooks:
        """Inside of a layer's backward an explicit program takes up the next input."""
        if not self.explicit or not self.away:
            return {}
        place = self.places.get(("backward", self.issue.microbatch, layer), len(self.visits)) + 1
        following = self.visits[place : place + 1]
        return {template.marks["core"]: [lambda _, visit=visit: self._bring(visit) for visit in following]}

    def _bring(self, visit: Visit) -> None:
        down = self._down.pop(visit, None)
        if down is None:
            return
        phase, microbatch, layer = visit
        now, self.issue.microbatch = self.issue.microbatch, microbatch
        memory, after = self.contents(layer), (down, *self.window)
        size = sum(bytes for _, bytes in memory)
        if self.explicit:
            self.issue.hold(memory)
            memory, after = (), (*self.issue.so_far(), *self._newest)
        work = (Work("h2d", bytes=float(size)),)
        op = self.issue.add(f"boundary {layer} up", "h2d", "other", phase, work, after, memory, layer=layer)
        self.issue.microbatch = now
        self._up[visit] = op
        if not self.explicit:
            self._free.setdefault(size, []).append(op)
