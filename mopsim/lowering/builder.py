"""Builder: appends ops to a program, keeps the order of streams, and turns played tapes into ops."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from mopsim.layers.tape import Kernel, Played, Step
from mopsim.lowering.workload import Group, Op, Program, Work, collective_work, deltas
from mopsim.spec.hardware import COLLECTIVES


class Builder:
    """A program under construction. groups: ranks of the collectives named in the tapes.

    products: the work of a kernel's matmuls or attention, forward or (True) backward, where a recipe gives
    them another dtype.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        dtype: str,
        products: Callable[[Kernel, bool], tuple[Work, ...]] | None = None,
    ) -> None:
        self.products = products
        self.ops: list[Op] = []
        self.groups = groups
        self.dtype = dtype
        self.microbatch = 0
        self.marks: dict[int, int] = {}
        self.last = -1
        self.alive: dict[str, Step] = {}
        self._pending: list[Step] = []
        self._works: dict[tuple[int, bool], tuple[Kernel, tuple[Work, ...]]] = {}

    def mark(self, microbatch: int) -> None:
        """From here on, ops belong to `microbatch` (-1: the optimizer)."""
        self.microbatch = microbatch
        self.marks[microbatch] = len(self.ops)

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
        self.last = self.add(
            name, "compute", component, phase, work, layer=layer, deps=waits, awaited=awaited
        )
        return self.last

    def issue(
        self, name: str, kind: str, size: float, group: str, component: str, phase: str, layer: int = -1
    ) -> int | None:
        """A collective over `size` bytes, once the compute issued so far has run; None in a group of one."""
        ranks = self.groups[group]
        if ranks.size == 1:
            return None
        deps = (self.last,) if self.last >= 0 else ()
        return self.collective(name, kind, size, ranks, component, phase, layer=layer, deps=deps)

    def flush(self, component: str, phase: str, layer: int = -1) -> None:
        """Put pending changes of memory into an op of their own."""
        if self._pending:
            self.add("memory", "compute", component, phase, layer=layer)

    def add(
        self,
        name: str,
        stream: str,
        component: str,
        phase: str,
        work: Sequence[Work] = (),
        *,
        layer: int = -1,
        deps: Iterable[int | None] = (),
        memory: Iterable[Step] = (),
        rendezvous: str = "",
        awaited: bool = False,
    ) -> int:
        """Append one op; returns its index. Steps of `memory` run in order; their height is held until the
        op ends."""
        if stream == "compute" and self._pending:
            memory = [*self._pending, *memory]
            self._pending.clear()
        peak, net = deltas(tuple(memory))
        index = len(self.ops)
        after = tuple(dict.fromkeys(dep for dep in deps if dep is not None))
        self.ops.append(
            Op(
                index,
                name,
                stream,
                component,
                phase,
                layer,
                tuple(work),
                after,
                peak,
                net,
                rendezvous,
                self.microbatch,
                awaited,
            )
        )
        return index

    def stream_of(self, group: Group) -> str:
        """The fabric that bounds a collective of this group."""
        return "scale_up" if group.intra == group.size else "scale_out"

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
        stream = self.stream_of(group) if group.size > 1 else "compute"
        return self.add(
            name, stream, component, phase, work, layer=layer, deps=deps, memory=memory, awaited=awaited
        )

    def play(self, played: Sequence[Played], phase: str, layer: int, deps: Iterable[int | None] = ()) -> int:
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
                stream = self.stream_of(group)
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
        return Program(tuple(self.ops), stage, multiplicity, tuple(resident), self.marks)


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
