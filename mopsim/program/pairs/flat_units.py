"""Flat units: full buffers come and go on the compute stream, collectives run beside it
(mopexec.flat.units)."""

from collections.abc import Sequence

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.pairs.early_update import EarlyUpdate, sum_of
from mopsim.program.shards import Shards
from mopsim.program.stage import Stage
from mopsim.program.template import Hooks, Ops, Template
from mopsim.program.units import ShardedUnit, looked_up
from mopsim.program.workload import Work


def bytes_cast(param: float, compute: float) -> float:
    """Bytes moved for each parameter of a shard that is cast to the compute dtype; param, compute: of an
    element."""
    return param + compute if param != compute else 0


def bytes_added(reduce: float, grad: float) -> float:
    """For each gradient of a shard that is added to the sum of the step."""
    return reduce + 2 * grad


def bytes_first(reduce: float, grad: float) -> float:
    """For each of the first gradients of a step where the sum is freed after it: they are the sum, as they
    are or in its dtype."""
    return reduce + grad if reduce != grad else 0


class FlatUnits(Shards):
    """A layer's units are gathered together; its experts arrive and are reduced inside of it. A unit's full
    gradient is zeroed once the layer before it has been reduced, under whose recomputation that reduction
    ran. Memory is that of named buffers, moved as the host issues the ops."""

    adds_in_place = True

    def __init__(self, context: Context, issue: Builder, stage: Stage) -> None:
        super().__init__(context, issue, stage)
        self.reducing: list[tuple[ShardedUnit, int | None]] = []
        early = context.strategy.optimizer.overlap == "backward"
        self.early = EarlyUpdate(context, issue, stage) if early else None
        self._loss_begins: Ops = ()
        self._whole = False  # gradients of a shard in a group of one are summed
        precision = context.strategy.precision
        self.cast = precision.param != precision.compute
        self.own_grads = precision.grad == precision.reduce

    def before(self, layer: int, phase: str, order: Sequence[int]) -> Ops:
        """Units of this layer and of `prefetch` more gather; returns what the dense one waits for."""
        for unit in self.c.layers[layer]:
            self._gather(unit, phase)
        self.ahead(layer, phase, order)
        return self._wait(self.c.layers[layer][0], phase)

    def forward_order(self, layer: int, chunk: int) -> Sequence[int]:
        """See `FurtherLayers`. They are gathered like others."""
        return (*self.stage.chunks[chunk], *self.stage.extra)

    def after(self, layer: int, phase: str, ready: Ops = ()) -> None:
        """See `Shards`. Rows of the embedding get their gradients from an MTP layer."""
        super().after(layer, phase, ready)
        if phase == "backward" and layer in self.stage.extra:
            self.finish()
            self._open(self.c.edges["embedding"])

    def projecting(self, template: Template, layer: int, phase: str) -> tuple[Ops, Hooks]:
        """See `FurtherLayers`. The embedding is there to be read, and is reduced in a backward."""
        unit = self.c.edges["embedding"]
        if phase == "backward":
            whole = {len(template.pieces): (lambda _: self._reduce(unit, ()),)}
            return (), whole if unit is not self._head else {}
        waits = (*self.before(layer, phase, self.forward_order(layer, 0)), *self._wait(unit, phase))
        return waits, {template.marks["embedded"]: (lambda _: self._release(unit, phase),)}

    def beside(self, template: Template, layer: int, phase: str) -> Hooks:
        """What happens inside of a layer, or of the loss (layer -1)."""
        if layer < 0:
            return {template.marks["head"]: (lambda _: self._open(self._head),)} if phase == "forward" else {}
        units, experts = self.c.layers[layer], self.c.layers[layer][1:]

        def arrive(_: int) -> None:
            self.issue.experts = tuple(op for unit in experts for op in self._wait(unit, phase))

        def release(_: int) -> None:
            for unit in experts:
                self._release(unit, phase)

        if phase == "forward":
            return {template.marks["experts"]: (arrive,), len(template.pieces): (release,)} if experts else {}

        def recomputed(place: int) -> None:
            self.finish()
            arrive(place)
            self._open(*units, waits=self.issue.experts)

        def reduce(place: int) -> None:
            release(place)
            for unit in experts:
                self._reduce(unit, ())

        again = template.marks.get("experts again")
        return {
            **({again: (arrive,)} if again is not None else {}),
            template.marks["recomputed"]: (recomputed,), template.marks["experts"]: (reduce,),
        }  # fmt: skip

    def edge(self, name: str, phase: str) -> Ops:
        """What the embedding, or final norm and head, wait for; before their backward, zeroed gradients."""
        edges = self.c.edges
        if name == "embedding":
            for unit in looked_up(edges):
                self._gather(unit, phase)
            return tuple(op for unit in looked_up(edges) for op in self._wait(unit, phase))
        if phase == "forward":
            return (*self.normed(), *self._wait(self._head, phase))
        self._begin_update()
        if self._head.name in self._coming:  # the first of several losses
            self._release(self._head, phase)
            if "head" in edges:
                self._reduce(self._head, ())
            self._open(edges["final"])
        return ()

    def normed(self) -> Ops:
        """See `FurtherLayers`. The head is gathered for the first cross entropy."""
        self._loss_begins = self.issue.so_far()
        return self._wait(self.c.edges["final"], "forward")

    def begin(self) -> None:
        """Before the backward of the embedding, whose gradient is open already where it is the head."""
        self.finish()
        self._open(*looked_up(self.c.edges))

    def done(self, name: str, phase: str, ready: Ops = ()) -> None:
        """The embedding, or final norm and head, have run."""
        for unit in [self.c.edges["final"]] if name == "head" else looked_up(self.c.edges):
            self._release(unit, "backward")
            if phase == "backward":
                self._reduce(unit, ready)

    def finish(self) -> Ops:
        """Wait for the reductions on their way, add them to the shards and free the buffers."""
        b, early, any_summed = self.issue, self.early, bool(self.reducing) or self._whole
        if early is not None and any_summed:
            early.room()
        for unit, op in self.reducing:
            part = f"part {unit.name}"
            each = self._opened_sum(unit, part)
            work = Work("memory_bound", bytes=float(unit.shard_numel * each), launches=bool(each))
            done = b.compute(f"accumulate {unit.name}", unit.component, "backward", unit.layer, [work], op)
            b.drop(f"grads {unit.name}", *([part] if part in b.alive else []))
            self._download(unit, done)
        self.reducing, self._whole = [], False
        if early is not None and early.live and any_summed:
            early.summed()
            self.ops = early.ops
        return ()

    def _begin_update(self) -> None:
        """The state of the first buckets that are updated under the last backward goes up from its loss
        on."""
        if self.early is not None and not self.early.live and self.sums.last:
            free = [self.updated.get(f"slot {slot}") for slot in range(self.early.slots)]
            self.early.begin(free, self._loss_begins)

    def _opened_sum(self, unit: ShardedUnit, part: str = "") -> float:
        """Bytes moved for each gradient that is added to the sum of the step; the first one is the sum where
        sums are freed, as it is or in the sum's dtype. part: the buffer that has it."""
        sums, c = sum_of(unit), self.c
        if self.early is None or sums in self.issue.alive:
            return bytes_added(c.reduce, c.grad)
        if part and self.own_grads:
            self.issue.rename(part, sums, "grads")
        else:
            self.issue.make(sums, unit.shard_numel * c.grad, "grads")
        return bytes_first(c.reduce, c.grad)

    def _gather(self, unit: ShardedUnit, phase: str, room: Sequence[int] = ()) -> None:
        b, c = self.issue, self.c
        if unit.name in self._coming:
            return
        up = None
        if self._place(unit).param_tier == "host":
            up = self._copy(unit, "h2d", unit.shard_numel * c.param, phase, b.so_far())
        if self.cast or up is not None:
            b.make(f"cast {unit.name}", unit.shard_numel * c.b, "gathered")
        if self.cast:
            work = Work("memory_bound", bytes=float(unit.shard_numel * bytes_cast(c.param, c.b)))
            b.compute(f"cast {unit.name}", unit.component, phase, unit.layer, [work], up)
        updated = self.updated.pop(unit.name, None)
        self._coming[unit.name] = max(-1 if op is None else op for op in (up, updated))
        if unit.shard > 1:
            size = unit.padded * c.b
            b.make(f"full {unit.name}", size, "gathered")
            self._coming[unit.name] = b.collective(
                f"gather {unit.name}", "all_gather", size, c.groups[unit.group], unit.component, phase,
                "state", layer=unit.layer, deps=(*b.so_far(), up, updated),
            )  # fmt: skip

    def _download(self, unit: ShardedUnit, ready: int) -> None:
        """A gradient shard that lives on the host goes down, to be added to the one there."""
        if self._place(unit).grad_tier == "host":
            self._copy(unit, "d2h", unit.shard_numel * self.c.grad, "backward", (ready,))

    @property
    def _head(self) -> ShardedUnit:
        """Whose parameters project on the vocabulary."""
        return self.c.edges.get("head", self.c.edges["embedding"])

    def _beside(self, unit: ShardedUnit) -> bool:
        return unit.component == "experts"

    def _wait(self, unit: ShardedUnit, phase: str) -> Ops:
        """What was cast to send is freed once the full parameters are there."""
        self._gather(unit, phase)
        self._drop(*(("cast",) if unit.shard > 1 else ()), of=unit)
        op = self._coming[unit.name]
        return () if op < 0 else (op,)

    def _release(self, unit: ShardedUnit, phase: str, ready: Ops = ()) -> None:
        if phase == "backward" or self.c.reshards:
            self._coming.pop(unit.name, None)
            self._drop("full", "cast", of=unit)

    def _drop(self, *parts: str, of: ShardedUnit) -> None:
        self.issue.drop(*(name for part in parts if (name := f"{part} {of.name}") in self.issue.alive))

    def _open(self, *units: ShardedUnit, waits: Ops = ()) -> None:
        """Zeroed full gradient buffers; the gradient shard itself where that is the full one."""
        works = []
        for unit in units:
            own = unit.shard == 1 and self.own_grads
            if own and self.early is not None and sum_of(unit) not in self.issue.alive:
                self.issue.make(sum_of(unit), size := unit.padded * self.c.grad, "grads")
                works.append(Work("memory_bound", bytes=float(size)))
                continue
            if own or f"grads {unit.name}" in self.issue.alive:
                works.append(Work("memory_bound", launches=0))
                continue
            size = unit.padded * self.c.reduce
            self.issue.make(f"grads {unit.name}", size, "gathered_grads")
            works.append(Work("memory_bound", bytes=float(size)))
        self.issue.compute("zero gradients", "other", "backward", units[0].layer, works, *waits)

    def _reduce(self, unit: ShardedUnit, ready: Ops) -> None:
        b, phase = self.issue, "backward"
        if unit.shard == 1:
            self._whole = True
            if not self.own_grads:
                work = Work("memory_bound", bytes=float(unit.padded * self._opened_sum(unit)))
                b.compute(f"accumulate {unit.name}", unit.component, phase, unit.layer, [work])
                b.drop(f"grads {unit.name}")
            self._download(unit, b.last)
            return
        size = unit.padded * self.c.reduce
        b.make(f"part {unit.name}", unit.shard_numel * self.c.reduce, "gathered_grads")
        b.flush(unit.component, phase, unit.layer)  # before an update's gradients are freed
        op = b.issue(
            f"reduce {unit.name}", "reduce_scatter", size, unit.group, unit.component, phase, unit.layer
        )
        self.reducing.append((unit, op))
