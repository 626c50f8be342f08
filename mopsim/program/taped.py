"""Op templates: a played tape as ops whose dependencies are relative, made once and issued for every
microbatch."""

from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from mopsim.graph.experts import EXCHANGES
from mopsim.graph.tape import GATE_CLAMPS, Kernel, Played, Step
from mopsim.program.builder import Builder, Recorder, stream_of
from mopsim.program.casts import Part
from mopsim.program.context import Context
from mopsim.program.regions import apart, keeps, partner, regathers, region, still_to_read
from mopsim.program.template import START, Template
from mopsim.program.workload import CommGroup, deltas
from mopsim.program.works import works
from mopsim.spec.hardware import COLLECTIVES

_READ = ("place", "rows read", "lengths read", "routes read")
_AWAITED = (*_READ[1:], GATE_CLAMPS)
"""Kernels of reads, before which the host waits for what they are made from; those for whose end it waits."""


class TapeDraft(Recorder):
    """A template being made. ready: what the next piece waits for. back: what of a kernel's backward is
    made; without its weight gradients these come later. late: weight gradients of experts that are made once
    those of their inputs have left (see Host.delayed_grads)."""

    def __init__(self, context: Context, back: Part = "backward") -> None:
        super().__init__(context.groups)
        self.context, self.back, self.split = context, back, back != "backward"
        self.ready: tuple[int, ...] = (START,)
        self.joined: list[Played] = []
        self.coming: dict[str, int] = {}
        self.counted = context.stack.host.counts_read == "never"
        self.late: list[Played] = []
        self.again: set[str] = set()

    def close(self, back: str) -> None:
        """Compute kernels gathered so far become one piece."""
        if not self.joined:
            return
        first = self.joined[0]
        work = tuple(w for item in self.joined for w in works(item.kernel, self.part(item), self.context))
        memory = [step for item in self.joined for step in item.memory]
        name, component = first.kernel.name, first.kernel.component
        self.ready = (self.add(name, "compute", component, _phase(first, back), work, self.ready, memory),)
        self.joined.clear()

    def end_with(self, memory: Sequence[Step]) -> None:
        """Memory steps after all others: the last piece's own where everything waits for it."""
        last = len(self.ops) - 1
        if self.ready == (last,) and self.ops[last].stream == "compute":
            self.memory[last] = (*self.memory[last], *memory)
            peak, net = deltas(self.memory[last])
            self.ops[last] = replace(self.ops[last], peak=peak, net=net)
        else:
            self.ready = (self.add("freed", "compute", "other", "backward", (), self.ready, memory),)

    def read_counts(self, item: Played, back: str) -> None:
        """The host waits for how many rows go where, which decides the sizes of all chunks."""
        if not self.counted and self.ops:
            component, phase = item.kernel.component, _phase(item, back)
            self.ready = (self.add("counts read", "read", component, phase, (), self.ready, awaited=True),)
        self.counted = True

    def awaited(self) -> None:
        """The host waits for what it has started."""
        if self.ops:
            self.ops[-1] = replace(self.ops[-1], awaited=True)

    def join(self, item: Played, following: Played | None, back: str) -> None:
        """A kernel on the compute stream, an op with those before it unless something comes between."""
        context, name = self.context, item.kernel.name
        if name in _READ and item.backward:
            return
        counts = context.stack.host.counts_read == "always" and not self.counted
        if counts and item.kernel.kind == "grouped_matmul" and not item.backward:
            self.close(back)
            self.read_counts(item, back)
        alone = following is not None and _beside(following, context) and not _leads(following)
        if name in _READ or (self.joined and (alone or _splits(self.joined[0], item, back, context))):
            self.close(back)
        if name in _READ:  # the host reads what has been made so far
            self.awaited()
        self.joined.append(self._halved(item))
        if name in _AWAITED and not item.backward:
            self.close(back)
            self.awaited()

    def _halved(self, item: Played) -> Played:
        """An item whose weight gradients come late, as the half before them: what both need stays."""
        kernel, context = item.kernel, self.context
        delays = context.weaves and context.stack.host.delayed_grads and not self.split
        if not (delays and item.backward and kernel.kind == "grouped_matmul"):
            return item
        if context.groups["experts"].size == 1:
            return item
        made, of_weights, gone = _halves(item)
        self.late.append(replace(item, memory=(*of_weights, *gone)))
        return replace(item, memory=tuple(made))

    def weights(self, back: str) -> None:
        """Weight gradients that are late, beside what comes next."""
        if self.late:
            first, self.late, late = self.late[0].kernel, [], self.late
            work = [one for item in late for one in works(item.kernel, "weight_grad", self.context)]
            memory = [step for item in late for step in item.memory]
            self.add(first.name, "compute", first.component, back, work, self.ready, memory)

    def blocks(self, item: Played, following: Played | None, place: int, back: str) -> set[int]:
        """A collective in blocks beside the product after it, or that before; places of what is done too."""
        self.close(back)
        memory, _ = _so_far(item.memory)  # the product has those
        if _leads(item) and following:  # the next product runs on what has arrived
            moved = self.talk(item, back, self.ready, memory)
            self.joined.append(following)
            self.close(back)
        else:  # what the product before has made is sent
            before = self.ops[self.ready[0]].deps if self.ops else (START,)
            moved = self.talk(item, back, before, memory)
        self.ready = (*self.ready, moved)
        return {place + 1} if _leads(item) else set()

    def exchange(self, item: Played, back: str) -> None:
        """A collective that what follows waits for, or runs beside until it needs what comes."""
        self.close(back)
        if item.backward and item.kernel.name == EXCHANGES[0]:
            self.weights(back)
        counted = item.kernel.name == EXCHANGES[0] and not item.backward
        if counted and item.kernel.kind == "all_to_all":
            self.read_counts(item, back)
        op = self.talk(item, back, self.ready, item.memory)
        if item.kernel.beside:
            self.coming |= dict.fromkeys(_brings(item), op)
        else:
            self.ready = (op,)
        if counted and item.kernel.kind == "all_gather":
            self.read_counts(item, back)

    def receive(self, item: Played, back: str) -> None:
        """What a kernel needs is waited for."""
        arrived = {self.coming.pop(name) for name in _needs(item) if name in self.coming}
        if arrived:
            self.close(back)
            self.ready = (*self.ready, *sorted(arrived))

    def part(self, item: Played) -> Part:
        if item.backward and any(one.kernel is item.kernel for one in self.late):
            return "input_grad"
        return self.back if item.backward else "forward"

    def regathered(self, item: Played, source: Kernel, others: int, back: str) -> Played:
        """A product's backward, by experts that gather rows again before the first of those that read them,
        and free them after the last. others: of these that are still to come."""
        self._gathered(source, back)
        gone = ("dispatch", -source.writes[0].bytes)
        return item if others else replace(item, memory=(*item.memory, gone))

    def gather_first(self, later: Sequence[Played], gathers: Mapping[str, Kernel], back: str) -> None:
        """The rows that products of one expert after another gather again, before the first of them."""
        for one in later:
            source = gathers.get(one.kernel.reads[0]) if one.kernel.matmuls and one.backward else None
            if source is not None and one.kernel.loop and regathers(one.kernel, source):
                self._gathered(source, back)

    def _gathered(self, source: Kernel, back: str) -> None:
        if source.writes[0].name in self.again or self.context.groups[source.group].size == 1:
            return
        self.close(back)
        self.again.add(source.writes[0].name)
        whole = [("dispatch", source.writes[0].bytes), *source.scratch]
        whole += [(name, -size) for name, size in source.scratch]
        work, stream = works(source, "forward", self.context), self._stream(source)
        op = self.add(source.name, stream, source.component, "backward", work, self.ready, whole)
        self.ready = (op,)

    def gather_again(self, source: Kernel) -> list[Step]:
        """The rows that a product kept its own of, in their turn or beside all before; what is freed then."""
        works_of, memory = works(source, "forward", self.context), list[Step]()
        deps: tuple[int, ...] = (START,)
        if self.context.stack.kernels.region_backward == "in_turn":
            self.close("backward")
            deps, memory = self.ready, [("activations", int(source.bytes))]
        stream = self._stream(source)
        op = self.add(source.name, stream, source.component, "backward", works_of, deps, memory)
        self.ready = (*(one for one in self.ready if one not in deps), op)
        return [(name, -size) for name, size in memory]

    def talk(self, item: Played, back: str, deps: tuple[int, ...], memory: Sequence[Step]) -> int:
        """A collective on its own stream."""
        part: Part = "backward" if item.backward else "forward"
        work = works(item.kernel, part, self.context)
        stream = self._stream(item.kernel)
        return self.add(
            item.kernel.name, stream, item.kernel.component, _phase(item, back), work, deps, memory
        )

    def _stream(self, kernel: Kernel) -> str:
        """Of a collective: of the fabric of its group."""
        return stream_of(self.context.groups[kernel.group], kernel.group)


def _phase(item: Played, back: str) -> str:
    """back: `backward` in a reverse pass, where kernels that run forward are a recomputation."""
    return "backward" if item.backward else ("recompute" if back == "backward" else "forward")


def template(
    played: Sequence[Played], context: Context, direction: str, last: Sequence[Step] = (), split: bool = False
) -> Template:
    """Ops of a played tape. direction: forward or backward. last: memory steps after all.

    split: without the weight gradients, which `split_backward.weight_grads` holds.

    Runs of compute kernels of one component are one op; collectives lie on the stream of their fabric.
    """
    draft = TapeDraft(context, "input_grad" if split else "backward")
    gathers = {name: item.kernel for item in played for name in region(item.kernel)}
    done: set[int] = set()
    for index, item in enumerate(played):
        kernel = item.kernel
        if index in done:
            continue
        draft.receive(item, direction)
        talks = _talks(item, context)
        source = gathers.get(kernel.reads[0]) if kernel.matmuls and item.backward else None
        if source is not None and (context.groups[source.group].size == 1 or apart(kernel, source, context)):
            if regathers(kernel, source) and not split:
                item = draft.regathered(item, source, still_to_read(played[index + 1 :], kernel), direction)
            source = None
        elif item.backward and kernel.loop and not split:  # first inputs come with the first expert's
            draft.gather_first(played[index + 1 :], gathers, direction)
        following = played[index + 1] if index + 1 < len(played) else None
        if talks and _beside(item, context):
            done |= draft.blocks(item, following, index, direction)
        elif talks:
            draft.exchange(item, direction)
        elif source is not None and (other := partner(played, index, source, done)):
            draft.close(direction)
            done.add(other)
            _column(draft, item, played[other])
        else:
            draft.join(item, following, direction)
    draft.close(direction)
    assert not draft.late, "weight gradients that no exchange was to hide"
    draft.ready = (*draft.ready, *sorted(set(draft.coming.values())))
    if last:
        draft.end_with(last)
    return draft.template(draft.ready)


def _of_weights(item: Played) -> tuple[list[Step], list[Step]]:
    """Memory steps of a product's backward: without, and of, a weight gradient that comes and goes."""
    size = item.kernel.weight_grad
    steps, found = list(item.memory), [("activations", size), ("activations", -size)] if size else []
    for step in found:
        steps.remove(step)
    return steps, found


def _so_far(steps: Sequence[Step]) -> tuple[list[Step], list[Step]]:
    """Memory steps without, and of, the unit's gradients so far, which one of two kernels beside each other
    counts."""
    found = [step for step in steps if step[0] == "gathered_grads"]
    return [step for step in steps if step not in found], found


def _halves(item: Played) -> tuple[list[Step], list[Step], list[Step]]:
    """Memory steps of a product's backward: what its first half makes, what comes and goes with its weight
    gradient, what is freed once both are there."""
    steps, of_weights = _of_weights(item)
    made, gone = ([step for step in steps if (step[1] > 0) is up] for up in (True, False))
    return made, of_weights, gone


def _brings(item: Played) -> list[str]:
    """What a kernel makes, the gradient of a value as `d/name`."""
    kernel = item.kernel
    return [f"d/{name}" for name in kernel.reads] if item.backward else [v.name for v in kernel.writes]


def _needs(item: Played) -> list[str]:
    """What a kernel starts from, written as `_brings` does."""
    kernel = item.kernel
    return [f"d/{v.name}" for v in kernel.writes] if item.backward else list(kernel.reads)


def play(
    builder: Builder, context: Context, played: Sequence[Played], phase: str, layer: int,
    deps: Iterable[int | None] = (),
) -> int:  # fmt: skip
    """A played tape among the ops of a program; returns its last op."""
    direction = "forward" if phase == "forward" else "backward"
    return builder.play(template(played, context, direction), layer, [d for d in deps if d is not None])[-1]


def _talks(item: Played, context: Context) -> bool:
    """Whether this is a collective of several ranks that moves something this way."""
    kernel = item.kernel
    moved = kernel.back_moved if item.backward else kernel.bytes
    return (
        kernel.kind in COLLECTIVES
        and context.groups.get(kernel.group, CommGroup(1, 1)).size > 1
        and moved > 0
    )


def _beside(item: Played, context: Context) -> bool:
    """Whether a collective runs in blocks beside one product: the ring; where told, a region's edges."""
    tensor = bool(context.strategy.overlap.tensor) and item.kernel.group == "tensor"
    return _talks(item, context) and (
        item.kernel.name == "ring" or (tensor and item.kernel.kind != "all_reduce")
    )


def _leads(item: Played) -> bool:
    """Whether that product comes after the collective: in the forward, or in the backward of a scatter."""
    return item.backward == (item.kernel.kind == "reduce_scatter")


def _splits(first: Played, item: Played, direction: str, context: Context) -> bool:
    """Whether an item begins another op: of another component or phase, or of the routed experts, whose
    parameters torch's FSDP2 has in a group of their own."""
    inside = [one.kernel.name.startswith("experts_") for one in (first, item)]
    return (
        first.kernel.component != item.kernel.component
        or _phase(first, direction) != _phase(item, direction)
        or (context.stack.sharding.copies and inside[0] != inside[1])
    )


def _column(draft: TapeDraft, item: Played, gathered: Played) -> None:
    """Backward of a product that begins a region: gathered rows are gathered again beside the input gradient,
    whose sum is scattered, or summed in place, beside the weight gradient (Megatron-Core,
    LinearWithGradAccumulationAndAsyncCommunication); or in turn: input gradient, its sum, gathered rows,
    weight gradient."""
    kernel, again, context, start = item.kernel, gathered.kernel, draft.context, draft.ready
    stream, component = stream_of(context.groups[again.group], again.group), kernel.component
    in_turn = context.stack.kernels.region_backward == "in_turn" and not draft.split
    rows = () if draft.split or (keeps(kernel) and not in_turn) else works(again, "forward", context)
    whole = [("activations", int(again.bytes))] if rows else []
    steps, of_weights = list(item.memory), list[Step]()
    if in_turn:
        steps, of_weights = _of_weights(item)
    steps, summed = _so_far(steps)
    made, gone = ([step for step in steps if (step[1] > 0) is up] for up in (True, False))

    def gather(deps: tuple[int, ...]) -> tuple[int, ...]:
        return (draft.add(again.name, stream, component, "backward", rows, deps, whole),) if rows else ()

    def product(part: Part, deps: tuple[int, ...], memory: Sequence[Step]) -> int:
        work = works(kernel, part, context)
        return draft.add(kernel.name, "compute", component, "backward", work, deps, memory)

    ready = () if in_turn else gather(start)
    inner = product("input_grad", start, steps if draft.split else made)
    scattered = works(again, "backward", context)
    down = draft.add(again.name, stream, component, "backward", scattered, (inner,), gathered.memory)
    if draft.split:
        draft.ready = (down,)
        return
    ready = (gather((down,)) or (down,)) if in_turn else (*ready, inner)
    freed = [(category, -size) for category, size in whole]
    weights = product("weight_grad", ready, [*of_weights, *summed, *gone, *freed])
    draft.ready = (weights,) if in_turn else (weights, down)


def holding(played: list[Played], one: Step) -> list[Played]:
    """A reverse pass that begins and ends in a caller, who holds the layer's output, and its gradient once
    that has been used."""
    category, size = one
    turn = next(place for place, item in enumerate(played) if item.backward)
    found = list(played)
    found[0] = replace(found[0], memory=(one, *found[0].memory))
    found[turn] = replace(found[turn], memory=(*found[turn].memory, one))
    found[-1] = replace(found[-1], memory=(*found[-1].memory, (category, -2 * size)))
    return found
