"""Builder: ops of a program in issue order, single ones, played tapes and whole templates."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from msgspec.structs import replace

from mopsim.graph.experts import EXCHANGES
from mopsim.graph.tape import Step
from mopsim.program.template import START, Hooks, Memory, Template
from mopsim.program.workload import SLOTS, TALKS, CommGroup, Op, Repeat, Work, collective_work, deltas

COMMUNICATOR = {
    "dense_shard": "state", "expert_shard": "state", "vocabulary_shard": "state",
    "dense_replicas": "replicas", "expert_replicas": "replicas", "ring": "vocabulary",
}  # fmt: skip
"""Groups whose communicators have other names."""


class Builder:
    """A program under construction. microbatch: what ops issued now belong to, -1 the optimizer. last: the
    latest op on the compute stream. experts: what ops of a template wait for that wait for EXPERTS.

    groups: ranks of the collectives named in the tapes.
    """

    records = False
    """Whether what each op moves of memory is kept."""

    def __init__(self, groups: Mapping[str, CommGroup]) -> None:
        self.ops: list[Op] = []
        self.groups = groups
        self.microbatch = 0
        self.times = 1
        self.last = START
        self.experts: tuple[int, ...] = ()
        self.alive: dict[str, Step] = {}
        self._pending: list[Step] = []

    def make(self, name: str, size: int, category: str = "activations") -> None:
        """A named buffer comes alive with the next op on the compute stream."""
        self.adopt(name, size, category)
        self._pending.append((category, size))

    def drop(self, *names: str) -> None:
        """Named buffers die before the next op on the compute stream."""
        for name in names:
            category, size = self.alive.pop(name)
            self._pending.append((category, -size))

    def adopt(self, name: str, size: int, category: str = "activations") -> None:
        """A buffer that a played tape left alive gets a name."""
        assert name not in self.alive, f"{name} is alive already"
        self.alive[name] = (category, size)

    def spike(self, size: float, category: str = "activations") -> None:
        """A buffer that comes and goes before the next op on the compute stream."""
        self._pending += ((category, int(size)), (category, -int(size)))

    def rename(self, old: str, new: str, category: str = "") -> None:
        """A named buffer under another name, and perhaps in another category."""
        before, size = self.alive.pop(old)
        assert new not in self.alive, f"{new} is alive already"
        self.alive[new] = (category or before, size)
        if category and category != before:
            self._pending += ((before, -size), (category, size))

    def compute(
        self, name: str, component: str, phase: str, layer: int, work: Iterable[Work], *waits: int | None,
        awaited: bool = False,
    ) -> int:  # fmt: skip
        """An op on the compute stream, after what was issued there before and after `waits`."""
        work = tuple(work)
        return self.add(name, "compute", component, phase, work, waits, layer=layer, awaited=awaited)

    def issue(
        self, name: str, kind: str, size: float, group: str, component: str, phase: str, layer: int = -1
    ) -> int | None:
        """A collective over `size` bytes, once the compute issued so far has run; None in a group of one."""
        ranks = self.groups[group]
        if ranks.size == 1:
            return None
        return self.collective(
            name, kind, size, ranks, component, phase, group, layer=layer, deps=self.so_far()
        )

    def flush(self, component: str, phase: str, layer: int = -1) -> None:
        """Put pending changes of memory into an op of their own."""
        if self._pending:
            self.add("memory", "compute", component, phase, layer=layer)

    def repeat(self, before: int, first: int, times: int) -> tuple[Repeat, list[Step]]:
        """An op for `times` more repetitions of the ops from `first` on, and what it leaves of memory."""
        left: dict[int, int] = {}
        for op in self.ops[first:]:
            for slot, size in op.net:
                left[slot] = left.get(slot, 0) + size * times
        steps = sorted(((SLOTS[slot], size) for slot, size in left.items() if size), key=lambda step: step[1])
        held, self._pending = self._pending, []  # of the next layer's first op, as between any two
        gap = self.add(f"{times} more", "compute", "other", self.ops[-1].phase, (), (), steps)
        self._pending = held
        return Repeat(before, first, gap, times), steps

    def so_far(self) -> tuple[int, ...]:
        """The compute issued so far."""
        return () if self.last == START else (self.last,)

    def hold(self, memory: Iterable[Step]) -> None:
        """Memory that changes before the next op on the compute stream."""
        self._pending += memory

    def add(
        self, name: str, stream: str, component: str, phase: str, work: Sequence[Work] = (),
        deps: Iterable[int | None] = (), memory: Iterable[Step] = (), rendezvous: str = "", *,
        layer: int = -1, awaited: bool = False,
    ) -> int:  # fmt: skip
        """Append one op; returns its index. Steps of `memory` run in order; their height is held until the
        op ends."""
        if stream == "compute" and self._pending:
            memory = [*self._pending, *memory]
            self._pending.clear()
        steps = tuple(memory)
        self._moves(steps)
        peak, net = deltas(steps)
        after = tuple(dict.fromkeys([dep for dep in deps if dep is not None]))
        index = len(self.ops)
        self.ops.append(
            Op(
                index, name, stream, component, phase, layer, tuple(work), after, peak, net, rendezvous,
                self.microbatch, awaited, self.times,
            )
        )  # fmt: skip
        if stream == "compute":
            self.last = index
        return index

    def _moves(self, steps: Memory) -> None:
        """What the op that is appended moves of memory."""

    def play(
        self, template: Template, layer: int, deps: Iterable[int], hooks: Hooks | None = None
    ) -> tuple[int, ...]:
        """Append a template; returns the ops that what follows has to wait for."""
        ops, microbatch, times, beside = self.ops, self.microbatch, self.times, hooks or {}
        start, before = tuple(dict.fromkeys(deps)), template.before
        places: list[int] = []
        self.experts = ()
        for place, piece in enumerate(template.pieces):
            if place in before:
                self._pending += before[place]
            if place in beside:
                for hook in beside[place]:
                    hook(places[-1] if places else START)
            after: tuple[int, ...] = ()
            for dep in piece.deps:
                after += (places[dep],) if dep >= 0 else start if dep == START else self.experts
            peak, net, steps, index = piece.peak, piece.net, template.memory[place], len(ops)
            if piece.stream == "compute":
                self.last = index
                if self._pending:
                    steps = (*self._pending, *steps)
                    peak, net = deltas(steps)
                    self._pending.clear()
            if self.records:
                self._moves(steps)
            places.append(index)
            ops.append(
                Op(
                    index, piece.name, piece.stream, piece.component, piece.phase, layer, piece.work, after,
                    peak, net, "", microbatch, piece.awaited, times,
                )
            )  # fmt: skip
        self._pending += template.before.get(len(places), ())
        for hook in beside.get(len(places), ()):
            hook(places[-1] if places else START)
        return tuple(start if not template.pieces else (places[end] for end in template.ends))

    def weave(self, start: int, middle: int) -> dict[int, int]:
        """Issue ops [start, middle), a forward, and those from middle on, a backward, by turns (`turn_ends`),
        the backward's first.

        That is the order of DualPipe (arXiv 2412.19437) and of Megatron-Core (01cf4fb5,
        models/common/model_chunk_schedule_plan.py): combine backward, attention forward, experts backward,
        dispatch forward, dispatch backward, experts and combine forward, attention backward.
        Returns the new index of each op that moved. Neither part may depend on the other.
        """
        turns = [turns_of(self.ops[middle:]), turns_of(self.ops[start:middle])]
        woven = [op for pair in zip_longest(*turns, fillvalue=()) for turn in pair for op in turn]
        moved = {op.index: start + place for place, op in enumerate(woven)}
        now = moved.get
        self.ops[start:] = [
            replace(op, index=place, deps=tuple([now(dep, dep) for dep in op.deps]))
            for place, op in enumerate(woven, start)
        ]
        return moved

    def tail(self) -> tuple[int, ...]:
        """The last op of every stream."""
        return tuple({op.stream: op.index for op in self.ops}.values())

    def collective(
        self, name: str, kind: str, size: float, group: CommGroup, component: str, phase: str, by: str, *,
        layer: int = -1, deps: Iterable[int | None] = (),
    ) -> int:  # fmt: skip
        """A collective over `size` bytes (the full buffer) of the communicator `by`; nothing is sent in a
        group of one."""
        work = (collective_work(kind, float(size), group),) if group.size > 1 else ()
        stream = stream_of(group, by) if group.size > 1 else "compute"
        return self.add(name, stream, component, phase, work, layer=layer, deps=deps)


class Recorder(Builder):
    """Records a template: its first ops wait for START."""

    records = True

    def __init__(self, groups: Mapping[str, CommGroup]) -> None:
        super().__init__(groups)
        self.memory: list[Memory] = []
        self._before: dict[int, Memory] = {}
        self._marks: dict[str, int] = {}

    def so_far(self) -> tuple[int, ...]:
        return (self.last,)

    def _moves(self, steps: Memory) -> None:
        self.memory.append(steps)

    def cut(self, mark: str) -> None:
        """The player may issue something of its own here."""
        self._marks[mark] = len(self.ops)
        self._before[len(self.ops)] = (*self._before.get(len(self.ops), ()), *self._pending)
        self._pending.clear()

    def template(self, ends: tuple[int, ...] = ()) -> Template:
        """What was recorded. ends: what follows waits for, the last op where none are given."""
        self.cut("end")
        ends = ends or (len(self.ops) - 1,)
        return Template(tuple(self.ops), ends, tuple(self.memory), self._before, self._marks)


def stream_of(group: CommGroup, by: str) -> str:
    """The stream of a collective of this group: of its communicator, or its group's name, and the fabric that
    bounds it."""
    by = COMMUNICATOR.get(by, by)
    return f"{by} scale_up" if group.intra == group.size else f"{by} scale_out"


def state_stream(sent: Work) -> str:
    """The stream of a collective of gradients or parameters."""
    return stream_of(sent.group, "replicas" if sent.kind == "all_reduce" else "state")


def turn_ends(ops: Sequence[Op]) -> list[bool]:
    """Whether another pass that is woven with this one goes on after each op: before and after rows are
    dispatched, and after they are combined. What the host reads before it dispatches is read by then."""
    ends = [op.stream in TALKS and op.name in EXCHANGES for op in ops]
    for place, op in enumerate(ops):
        if ends[place] and op.name == EXCHANGES[0]:
            before = place - 1
            while before >= 0 and ops[before].stream == "read":
                before -= 1
            if before >= 0:
                ends[before] = True
    return ends


def turns_of(ops: Sequence[Op]) -> list[list[Op]]:
    """Cut after every op that ends one."""
    found: list[list[Op]] = [[]]
    for op, ends in zip(ops, turn_ends(ops), strict=True):
        found[-1].append(op)
        if ends:
            found.append([])
    return found
