"""Builder: ops of a program in issue order, single ones, played tapes and whole templates."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

from mopsim.graph.tape import Kernel, Played, Step
from mopsim.program.template import START, Hooks, Memory, Template
from mopsim.program.workload import SLOTS, Group, Op, Program, Repeat, Work, collective_work, deltas
from mopsim.spec.hardware import COLLECTIVES


class Builder:
    """A program under construction. microbatch: what ops issued now belong to, -1 the optimizer. last: the
    latest op on the compute stream. experts: what ops of a template wait for that wait for EXPERTS.

    groups: ranks of the collectives named in the tapes.
    products: the work of a kernel's matmuls or attention, forward or (True) backward, where a recipe gives
    them another dtype.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        dtype: str = "",
        products: Callable[[Kernel, bool], tuple[Work, ...]] | None = None,
    ) -> None:
        self.products = products
        self.ops: list[Op] = []
        self.groups = groups
        self.dtype = dtype
        self.microbatch = 0
        self.times = 1
        self.last = START
        self.experts: tuple[int, ...] = ()
        self.alive: dict[str, Step] = {}
        self._pending: list[Step] = []
        self._works: dict[tuple[int, bool], tuple[Kernel, tuple[Work, ...]]] = {}

    def mark(self, microbatch: int) -> None:
        """From here on, ops belong to `microbatch` (-1: the optimizer)."""
        self.microbatch = microbatch

    def make(self, name: str, size: int, category: str = "activations") -> None:
        """A named buffer comes alive with the next op on the compute stream."""
        assert name not in self.alive, f"{name} is alive already"
        self.alive[name] = (category, size)
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
        return self.collective(name, kind, size, ranks, component, phase, layer=layer, deps=self.so_far())

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
        self._pending, held = (
            [],
            self._pending,
        )  # changes before the next layer's first op, as between any two
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
        peak, net = deltas(steps)
        after = tuple(dict.fromkeys(dep for dep in deps if dep is not None))
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

    def play(
        self, template: Template, layer: int, deps: Iterable[int], hooks: Hooks | None = None
    ) -> tuple[int, ...]:
        """Append a template; returns the ops that what follows has to wait for."""
        ops, microbatch, beside = self.ops, self.microbatch, hooks or {}
        start = tuple(dict.fromkeys(deps))
        places: list[int] = []
        self.experts = ()
        for place, piece in enumerate(template.pieces):
            self._pending += template.before.get(place, ())
            for hook in beside.get(place, ()):
                hook(places[-1] if places else START)
            after: tuple[int, ...] = ()
            for dep in piece.deps:
                after += (places[dep],) if dep >= 0 else start if dep == START else self.experts
            peak, net, index = piece.peak, piece.net, len(ops)
            if piece.stream == "compute":
                self.last = index
                if self._pending:
                    peak, net = deltas((*self._pending, *template.memory[place]))
                    self._pending.clear()
            places.append(index)
            ops.append(
                Op(
                    index, piece.name, piece.stream, piece.component, piece.phase, layer, piece.work, after,
                    peak, net, "", microbatch, piece.awaited, self.times,
                )
            )  # fmt: skip
        self._pending += template.before.get(len(places), ())
        for hook in beside.get(len(places), ()):
            hook(places[-1] if places else START)
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

    def collective(
        self,
        name: str,
        kind: str,
        size: float,
        group: Group,
        component: str,
        phase: str,
        *,
        layer: int = -1,
        deps: Iterable[int | None] = (),
        memory: Iterable[Step] = (),
        awaited: bool = False,
    ) -> int:
        """A collective over `size` bytes (the full buffer); nothing is sent in a group of one."""
        work = (collective_work(kind, float(size), group),) if group.size > 1 else ()
        stream = stream_of(group) if group.size > 1 else "compute"
        return self.add(
            name, stream, component, phase, work, layer=layer, deps=deps, memory=memory, awaited=awaited
        )

    def run(self, played: Sequence[Played], phase: str, layer: int, deps: Iterable[int | None] = ()) -> int:
        """Ops of a played tape: runs of compute kernels of one component joined, collectives on their own
        stream.

        Every op waits for the one before it. Returns the last op's index.
        """
        after = [dep for dep in deps if dep is not None]
        run: list[Played] = []
        last = -1

        def flush() -> None:
            nonlocal last, after
            if run:
                kernel = run[0].kernel
                works = [work for item in run for work in self.works(item.kernel, item.backward)]
                memory = tuple(step for item in run for step in item.memory)
                last = self.add(
                    kernel.name,
                    "compute",
                    kernel.component,
                    phase,
                    works,
                    layer=layer,
                    deps=after,
                    memory=memory,
                )
                after = [last]
                run.clear()

        for item in played:
            kernel = item.kernel
            group = self.groups.get(kernel.group, Group(1, 1))
            if kernel.kind in COLLECTIVES and group.size > 1:
                flush()
                works = self.works(kernel, item.backward)
                stream = stream_of(group)
                last = self.add(
                    kernel.name,
                    stream,
                    kernel.component,
                    phase,
                    works,
                    layer=layer,
                    deps=after,
                    memory=item.memory,
                )
                after = [last]
                continue
            if run and run[0].kernel.component != kernel.component:
                flush()
            run.append(item)
        flush()
        return last

    def works(self, kernel: Kernel, backward: bool) -> tuple[Work, ...]:
        """The work of one pass of a kernel: products forward, or the two products of each backward."""
        key = (id(kernel), backward)  # the kernel is kept beside its work, so that its id stays its own
        if key not in self._works:
            if self.products and kernel.kind in ("matmul", "grouped_matmul", "attention"):
                self._works[key] = (kernel, self.products(kernel, backward))
            else:
                self._works[key] = (kernel, tuple(_works(kernel, backward, self.dtype, self.groups)))
        return self._works[key][1]

    def program(self, stage: int, multiplicity: int, resident: Sequence[Step]) -> Program:
        return Program(tuple(self.ops), stage, multiplicity, tuple(resident))


class Recorder(Builder):
    """Records a template: its first ops wait for START."""

    def __init__(
        self,
        groups: Mapping[str, Group],
        products: Callable[[Kernel, bool], tuple[Work, ...]] | None = None,
    ) -> None:
        super().__init__(groups, products=products)
        self.memory: list[Memory] = []
        self._before: dict[int, Memory] = {}
        self._marks: dict[str, int] = {}

    def so_far(self) -> tuple[int, ...]:
        return (self.last,)

    def add(
        self, name: str, stream: str, component: str, phase: str, work: Sequence[Work] = (),
        deps: Iterable[int | None] = (), memory: Iterable[Step] = (), rendezvous: str = "", *,
        layer: int = -1, awaited: bool = False,
    ) -> int:  # fmt: skip
        steps = (*(self._pending if stream == "compute" else ()), *memory)
        self.memory.append(steps)
        if stream == "compute":
            self._pending.clear()
        return super().add(
            name, stream, component, phase, work, deps, steps, rendezvous, layer=layer, awaited=awaited
        )

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


def stream_of(group: Group) -> str:
    """The fabric that bounds a collective of this group."""
    return "scale_up" if group.intra == group.size else "scale_out"


def _turns(ops: Sequence[Op]) -> list[list[Op]]:
    """Cut after every collective."""
    found: list[list[Op]] = [[]]
    for op in ops:
        found[-1].append(op)
        if op.stream in ("scale_up", "scale_out"):
            found.append([])
    return found


def _works(kernel: Kernel, backward: bool, dtype: str, groups: Mapping[str, Group]) -> list[Work]:
    if kernel.kind == "view":
        return []
    launches = kernel.launches
    if backward and kernel.back_launches is not None:
        launches = kernel.back_launches
    if kernel.kind in ("matmul", "grouped_matmul"):
        found = []
        for place, one in enumerate(kernel.matmuls):
            started = int(place == 0 or kernel.kind != "grouped_matmul")
            shapes = [(one.m, one.k, one.n), (one.k, one.n, one.m)] if backward else [(one.m, one.n, one.k)]
            for m, n, k in shapes:
                found.append(Work(kernel.kind, m=m, n=n, k=k, count=one.count, dtype=dtype, launches=started))
        return found
    if kernel.kind == "attention":
        factor = 2.5 if backward else 1.0  # 5 products against 2 (FlashAttention-2, arXiv 2307.08691)
        return [
            Work(
                "attention",
                flops=factor * kernel.flops,
                seq=kernel.seq,
                bytes=2 * kernel.bytes if backward else kernel.bytes,
                backward=backward,
                dtype=dtype,
            )
        ]
    if kernel.kind in COLLECTIVES:
        return [
            Work(
                kernel.kind,
                bytes=kernel.bytes,
                launches=launches,
                group=groups.get(kernel.group, Group(1, 1)),
            )
        ]
    size = kernel.bytes
    if backward:
        size = 2 * kernel.bytes if kernel.back_bytes is None else kernel.back_bytes
    work = Work("memory_bound", bytes=size, launches=launches, indexed=kernel.indexed)
    return [work] if size or launches else []
