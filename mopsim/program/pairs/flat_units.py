"""Flat units: full buffers come and go on the compute stream, collectives run beside it (mopexec.flat.units).

What torch's own FSDP and Megatron's data parallelism do instead: mopsim.program.shards.
"""

from collections.abc import Sequence

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.template import Hooks, Template
from mopsim.program.units import Unit
from mopsim.program.workload import Work
from mopsim.spec.strategy import Dense, Experts

Ops = tuple[int, ...]


class FlatUnits:
    """The units of one program. A unit's full gradient is zeroed once the layer before it has been reduced,
    under whose recomputation that reduction ran."""

    each = True

    def __init__(self, context: Context, builder: Builder) -> None:
        self.c, self.b = context, builder
        self.gathering: dict[str, int | None] = {}
        self.made: dict[str, int] = {}
        self.ops: list[int] = []
        self.reduced: set[str] = set()
        self.reducing: list[tuple[Unit, int | None]] = []
        precision = context.strategy.precision
        self.cast = precision.param != precision.compute
        self.own_grads = precision.grad == precision.reduce

    def before(self, layer: int, phase: str, order: Sequence[int]) -> Ops:
        """Units of this layer and of `prefetch` more gather; returns what the dense one waits for."""
        place = list(order).index(layer)
        for target in order[place : place + 1 + self.c.strategy.dense.prefetch]:
            for unit in self.c.layers[target]:
                self.gather(unit, phase)
        return self._wait(self.c.layers[layer][0], phase)

    def start(self, order: Sequence[int]) -> None:
        """A forward begins."""

    def turn(self, order: Sequence[int]) -> None:
        """A forward is over."""

    def beside(self, template: Template, layer: int, phase: str) -> Hooks:
        """What happens inside of a layer, or of the loss (layer -1)."""

        def head(_: int) -> None:
            self._open(self._head)

        if layer < 0:
            return {template.marks["head"]: (head,)} if phase == "forward" else {}
        units = self.c.layers[layer]

        def arrived(_: int) -> None:
            self._experts(units[1], phase)

        if phase == "forward":
            return {template.marks["experts"]: (arrived,)} if units[1:] else {}

        def recomputed(_: int) -> None:
            self.finish()
            self._open(*units, waits=self._experts(units[1], phase) if units[1:] else ())

        def reduce(_: int) -> None:
            for unit in units[1:]:
                self._release(unit)
                self._reduce(unit)

        return {template.marks["recomputed"]: (recomputed,), template.marks["experts"]: (reduce,)}

    def after(self, layer: int, phase: str, ready: Ops = ()) -> None:
        """The layer has run."""
        units = self.c.layers[layer]
        if phase == "forward":
            self._release(*units if self.c.reshards else ())
        else:
            self._release(units[0])
            self._reduce(units[0])

    def edge(self, name: str, phase: str) -> Ops:
        """What the embedding, or final norm and head, wait for; before their backward, zeroed gradients."""
        edges = self.c.edges
        if name == "embedding":
            return self._wait(edges[name], phase)
        if phase == "forward":
            self.gather(edges["final"], phase)
            return (*self._wait(edges["final"], phase), *self._wait(self._head, phase))
        if self._head.name in self.gathering:  # the first of several losses
            self._release(self._head)
            if "head" in edges:
                self._reduce(self._head)
            self._open(edges["final"])
        return ()

    def begin(self, name: str) -> None:
        """Before the backward of the embedding."""
        self.finish()
        self._open(self.c.edges[name])

    def done(self, name: str, phase: str, ready: Ops = ()) -> None:
        """The embedding, or final norm and head, have run."""
        unit = self.c.edges["final" if name == "head" else name]
        if unit.name in self.gathering:
            self._release(unit)
        if phase == "backward":
            self._reduce(unit)

    def finish(self) -> Ops:
        """Wait for the reductions on their way, add them to the shards and free the buffers."""
        b = self.b
        for unit, op in self.reducing:
            work = Work("memory_bound", bytes=float(unit.shard_numel * (self.c.reduce + 2 * self.c.grad)))
            done = b.compute(f"accumulate {unit.name}", unit.component, "backward", unit.layer, [work], op)
            b.drop(f"grads {unit.name}", f"part {unit.name}")
            self._download(unit, done)
        self.reducing = []
        return ()

    def gather(self, unit: Unit, phase: str) -> None:
        """Start gathering, unless the unit is there or on its way."""
        if unit.name in self.gathering:
            return
        b, c = self.b, self.c
        up = self._upload(unit, phase)
        if self.cast or up is not None:
            b.make(f"cast {unit.name}", unit.shard_numel * c.b, "gathered")
        if self.cast:
            work = Work("memory_bound", bytes=float(unit.shard_numel * (c.b + c.param)))
            b.compute(f"cast {unit.name}", unit.component, phase, unit.layer, [work], up)
        if unit.shard == 1:
            self.gathering[unit.name] = up
            return
        size = unit.padded * c.b
        b.make(f"full {unit.name}", size, "gathered")
        self.gathering[unit.name] = b.collective(
            f"gather {unit.name}", "all_gather", size, c.groups[unit.group], unit.component, phase,
            layer=unit.layer, deps=(*b.so_far(), up),
        )  # fmt: skip

    def _upload(self, unit: Unit, phase: str) -> int | None:
        """A shard that lives on the host comes up."""
        if self._place(unit).param_tier == "device":
            return None
        work = (Work("h2d", bytes=float(unit.shard_numel * self.c.param)),)
        name, deps = f"upload {unit.name}", self.b.so_far()
        return self.b.add(name, "h2d", unit.component, phase, work, deps, layer=unit.layer)

    def _place(self, unit: Unit) -> Dense | Experts:
        strategy = self.c.strategy
        return strategy.experts if unit.component == "experts" else strategy.dense

    def _download(self, unit: Unit, ready: int) -> None:
        """A gradient shard that lives on the host goes down, to be added to the one there."""
        if self._place(unit).grad_tier == "host":
            work = (Work("d2h", bytes=float(unit.shard_numel * self.c.grad)),)
            name = f"download {unit.name}"
            self.b.add(name, "d2h", unit.component, "backward", work, (ready,), layer=unit.layer)

    @property
    def _head(self) -> Unit:
        """Whose parameters project on the vocabulary."""
        return self.c.edges.get("head", self.c.edges["embedding"])

    def _wait(self, unit: Unit, phase: str) -> Ops:
        """The op after which the full parameters are there. What was cast to send is freed then."""
        self.gather(unit, phase)
        if unit.shard > 1 and f"cast {unit.name}" in self.b.alive:
            self.b.drop(f"cast {unit.name}")
        op = self.gathering[unit.name]
        return () if op is None else (op,)

    def _experts(self, unit: Unit, phase: str) -> Ops:
        self.b.experts = self._wait(unit, phase)
        return self.b.experts

    def _release(self, *units: Unit) -> None:
        """Free the full parameters."""
        for unit in units:
            del self.gathering[unit.name]
            for name in (f"full {unit.name}", f"cast {unit.name}"):
                if name in self.b.alive:
                    self.b.drop(name)

    def _open(self, *units: Unit, waits: Ops = ()) -> None:
        """Zeroed full gradient buffers; the gradient shard itself where that is the full one."""
        works = []
        for unit in units:
            own = unit.shard == 1 and self.own_grads
            if own or f"grads {unit.name}" in self.b.alive:
                works.append(Work("memory_bound", launches=0))
                continue
            size = unit.padded * self.c.reduce
            self.b.make(f"grads {unit.name}", size, "gathered_grads")
            works.append(Work("memory_bound", bytes=float(size)))
        self.b.compute("zero gradients", "other", "backward", units[0].layer, works, *waits)

    def _reduce(self, unit: Unit, phase: str = "backward") -> None:
        """Start summing the full gradients over the shard's ranks."""
        b = self.b
        if unit.shard == 1:
            if not self.own_grads:
                work = Work("memory_bound", bytes=float(unit.padded * (self.c.reduce + 2 * self.c.grad)))
                b.compute(f"accumulate {unit.name}", unit.component, phase, unit.layer, [work])
                b.drop(f"grads {unit.name}")
            self._download(unit, b.last)
            return
        size = unit.padded * self.c.reduce
        b.make(f"part {unit.name}", unit.shard_numel * self.c.reduce, "gathered_grads")
        op = b.issue(
            f"reduce {unit.name}", "reduce_scatter", size, unit.group, unit.component, phase, unit.layer
        )
        self.reducing.append((unit, op))
