"""ZeRO-2 and 3: parameters gathered around their use, gradients reduced in every microbatch."""

from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from mopsim.graph.tape import Step
from mopsim.program import fsdp2_copies as fsdp2
from mopsim.program.builder import Builder, state_stream, stream_of
from mopsim.program.context import Context
from mopsim.program.data_parallel import flat_host, prepared, reduction
from mopsim.program.further import FurtherLayers
from mopsim.program.replicated import Replicated
from mopsim.program.shared_weight import Edges
from mopsim.program.stage import Stage
from mopsim.program.template import Hooks, Memory, Ops, Template
from mopsim.program.units import ShardedUnit, joined, of_component
from mopsim.program.whole_sums import WholeSums
from mopsim.program.workload import Work, shared
from mopsim.spec.strategy import Dense, Experts


class Shards(FurtherLayers, Edges):
    """Under ZeRO-3 a unit is gathered `prefetch` layers ahead and freed after use; under 2 and 3 its full
    gradient is reduced right after its backward.

    With the copies of torch's FSDP2 (`copied`) every parameter group has a life of its own: what is gathered
    ahead is a buffer, from which the parameters are copied where they are used; a layer's experts are copied
    out when they run and reduced while the rest of the layer goes backward; one reduction's buffer is on its
    way at a time (torch.distributed.fsdp._fully_shard).
    each: whether gradients are reduced in every microbatch. made: bytes of gradients that live to the end of
    the step, by unit. updated: by unit, the op of the last step's update that its first gather waits for.
    """

    _makes = "backward"  # what makes the gradients of a layer's weights

    def __init__(self, context: Context, issue: Builder, stage: Stage) -> None:
        self.c, self.issue, self.stage = context, issue, stage
        self.each = context.strategy.dense.zero >= 2
        self.copied = context.stack.sharding.copies and self.each
        self._modules = context.stack.sharding.groups == "modules"
        self.sums, self.replicas = WholeSums(context, issue), Replicated(context)
        self.ops: list[int] = []
        self.reduced: set[str] = set()
        self.made: dict[str, int] = {}
        self.updated: dict[str, int] = {}
        self._landed: set[str] = set()
        self._opened: dict[str, int] = {}
        self._coming: dict[str, int] = {}
        self._there: dict[str, tuple[ShardedUnit, int]] = {}
        self._reached = ("forward",) * (self.copied and not context.stack.sharding.told(context.strategy))
        self._left = self._copied_out = self._sent = Ops()
        self._grouped: dict[int, list[ShardedUnit]] = {}
        self._landing, self._held, self._deferred = False, 0, 0
        self._unfinished: list[int] = []

    def before(self, layer: int, phase: str, order: Sequence[int]) -> Ops:
        """Gathers that a layer waits for; those of the next layers are issued too, once the layer before has
        run: `prefetch` + 1 layers are full at a time. Full gradients come alive."""
        ready, units = Ops(), self._groups(layer)
        if self.c.shards_params:
            ready = tuple(op for u in units if not self._beside(u) for op in self._wait(u, phase))
            if phase == "backward":
                for unit in filter(self._beside, units):  # gathered now, copied out when they run
                    self._gather(unit, phase, ready or self._left)
            self.ahead(layer, phase, order)
        whole = [unit for unit in units if not self._copied(unit)]
        if self.each and phase == self._makes and whole:
            memory = [("gathered_grads", self._full_grad(unit)) for unit in whole]
            room = () if self.copied else tuple(self.ops[-1 - len(memory) : -len(memory)])
            ready += (self.issue.add("gradients", "compute", "other", phase, (), room, memory),)
        return ready

    def halved(self, halves: bool) -> None:
        """Whether the backward that begins leaves gradients of weights to later."""

    def ahead(self, layer: int, phase: str, order: Sequence[int]) -> None:
        """Start the gathers of the `prefetch` layers after `layer` (-1: of the first ones), and of the head
        after the last one."""
        if not self.c.shards_params or phase in self._reached:
            return
        places = list(order)
        place = places.index(layer) if layer in places else -1
        last = min(place + self.c.strategy.dense.prefetch, len(places))
        for index in range(place + 1, last + 1):
            if index < len(places):
                units = self._groups(places[index])
                for unit in units[::-1] if phase == "backward" and self.copied else units:
                    self._gather(unit, phase, self._left)
            elif index == len(places) and phase == "forward" and self.copied and self._has_head:
                self._gather(self.edge_unit("head"), phase, self._left)

    def start(self, order: Sequence[int]) -> None:
        """A forward begins: torch's FSDP2 gathers for its first layers beside the embedding."""
        if self.copied:
            self.ahead(-1, "forward", order)

    def turn(self, order: Sequence[int]) -> None:
        """The forward is over: torch's FSDP2 gathers for the backward's first layers beside the loss, unless
        its group is the embedding's, after which no layer goes backward."""
        if self.copied:
            self._free_deferred("forward")
        if self.copied and not self.c.one_weight:
            self.ahead(-1, "backward", order)

    def beside(self, template: Template, layer: int, phase: str) -> Hooks:
        """What a layer's parameter groups do while it runs."""
        if not self.copied:
            return {}
        if layer < 0:
            strips = self.c.strategy.vocabulary.loss in ("chunked", "ring")
            early = strips and (self._has_head or (self.stage.is_last and self.c.one_weight))
            return {0: (self._begin_loss,)} if early and phase == "forward" else {}
        found: dict[int, list[Callable[[int], None]]] = {}

        def at(place: int, do: Callable[[int], None]) -> None:
            found.setdefault(place, []).append(do)

        for unit in filter(self._beside, self._groups(layer)):
            first, last = template.products(phase if phase == "forward" else "recompute")
            at(max(first, 0), lambda op, unit=unit: self._wait(unit, phase))  # type: ignore[arg-type, misc]
            if phase == "forward":
                at(last + 1, lambda op, unit=unit: self._release(unit, phase))  # type: ignore[misc]
                continue
            at(max(last + 1, 0), lambda op: self._free_deferred("backward"))
            last = template.products("backward")[1]
            for place in template.places("shared_experts", "backward", last)[-1:]:
                numel = of_component(self.c.model, layer, "shared_experts")
                at(place + 1, partial(self._make_gradients, self._dense(layer), numel, "backward"))
            at(last + 1, lambda op, unit=unit: self._reduce(unit, (op,)))  # type: ignore[misc]
        return found

    def after(self, layer: int, phase: str, ready: Ops = ()) -> None:
        """The layer has run."""
        for unit in self._groups(layer):
            if self._beside(unit):
                continue
            self._release(unit, phase, ready)
            if self.each and phase == self._makes:
                self._reduce(unit, ready)

    def edge(self, name: str, phase: str) -> Ops:
        """Gathers that the embedding or the head waits for."""
        name = "embedding" if name == "head" and self.head_is_gathered else name
        here = name in self.c.edges or (self.copied and self.c.one_weight)
        return self._wait(self.edge_unit(name), phase) if here and self.c.shards_params else ()

    def done(self, name: str, phase: str, ready: Ops = ()) -> None:
        """Embedding or head has run; its full gradient came and went if this was its backward."""
        if name not in self.c.edges:
            self.head_done(phase, ready)
            return
        unit = self.edge_unit(name)
        if name == "embedding" and phase == "backward":
            self.weight_done()
        if self.copied and phase == "backward":
            self.whole(unit, ready)
            return
        if self.each and phase == "backward":
            memory: Memory = (("gathered_grads", self._full_grad(unit)),)
            ready = (self.issue.add("gradients", "compute", unit.component, phase, (), ready, memory),)
        self._release(unit, phase, ready)
        if self.each and phase == "backward":
            self._reduce(unit, ready)

    def _begin_loss(self, _: int) -> None:
        """A loss in strips makes the head's gradient in its forward."""
        if self.c.one_weight:
            self.weight_waits("forward")
            return
        unit = self.edge_unit("head")
        if unit.name not in self._opened:
            self._make_gradients(unit, unit.numel, "forward")

    def _make_gradients(self, unit: ShardedUnit, numel: int, phase: str, _: int = -1) -> None:
        """Gradients of `numel` of a group's parameters, made before the others'."""
        self._opened[unit.name] = numel * self.c.b
        memory = (("gathered_grads", numel * self.c.b),)
        self._pass(f"gradients {unit.name}", unit, (), phase, (), memory)

    @property
    def _has_head(self) -> bool:
        return self.stage.is_last and "head" in self.c.edges

    def finish(self) -> Ops:
        """A microbatch has gone backward: torch's FSDP2 waits for all of its reductions and frees the last
        buffer; its thread waits for gradients that are on their way to the host (finalize_backward)."""
        if not self.copied:
            return ()
        self._free_deferred("backward")
        self.sums.free([unit for unit, _ in self._there.values()], self._release)
        memory, awaited = (self.replicas.over(), ("gathered_grads", -self._held)), self._landing
        done = self.issue.add(
            "reduced", "compute", "other", "backward", (), self._unfinished, memory, awaited=awaited
        )
        self._held, self._sent, self._landing, self._unfinished = 0, (), False, []
        return (done,)

    def _gather(self, unit: ShardedUnit, phase: str, room: Sequence[int]) -> None:
        """Start an all-gather: a prefetch, or the unit's own."""
        group, copied = self.c.groups[unit.group], self._copied(unit)
        away = self._place(unit).param_tier == "host"
        if unit.name in self._coming or unit.name in self._there:
            return
        if group.size == 1 and not away and not copied:
            return
        shard, size = unit.shard_numel * self.c.param, self.c.whole(unit)
        reached = copied and phase in self._reached  # a stream of its own, once the one before is copied out
        room = self._copied_out if reached else room
        if away:
            whole = group.size == 1 and not copied
            room = (self._copy(unit, "h2d", shard, phase, room, (("gathered", size),) if whole else ()),)
        if group.size == 1:
            self._coming[unit.name] = room[0] if room else -1
            return
        memory: Memory = (("gathered", size),)
        first = (fsdp2.gather_copy(self.c, unit),) if copied else ()
        if copied:
            alive = fsdp2.bytes_cast(self.c, unit, away=away)
            memory = (("gathered", size), ("gathered", alive), ("gathered", -alive))
            if not reached:
                room, memory = (self._pass(f"copy in {unit.name}", unit, first, phase, room, memory),), ()
                first = ()
        host, calls = flat_host(self.c, unit, "gather", 1), self.c.exchanges(unit)
        moved = unit.padded * float(self.c.gathered(unit))
        sent = (shared(Work("all_gather", bytes=moved, group=group, launches=calls, host=host)),)
        self._coming[unit.name] = self.issue.add(
            f"gather {unit.name}", stream_of(group, "state"), self._component(unit), phase, first + sent,
            room, memory, layer=unit.layer,
        )  # fmt: skip

    def _wait(self, unit: ShardedUnit, phase: str) -> Ops:
        """What a unit's users wait for; of FSDP2's, its copy-out."""
        self._gather(unit, phase, self._left)
        if unit.name in self._coming:
            op = self._coming.pop(unit.name)
            self._there[unit.name] = unit, self._out(unit, phase, op) if self._copied(unit) else op
        return (self._there[unit.name][1],) if unit.name in self._there else ()

    def _out(self, unit: ShardedUnit, phase: str, op: int) -> int:
        """What has arrived becomes parameters; of a shard that is whole, casts. Offloaded shards are sent
        from a stream of their own, for which the buffer outlives the forward's copy-out until the next one,
        or until the root's forward ends (`all_gather_state`); experts that are recomputed are a root."""
        alone, size = self.c.groups[unit.group].size == 1, self.c.whole(unit)
        away = self._place(unit).param_tier == "host"
        high = fsdp2.bytes_whole(self.c, unit, away=away)
        memory = [high, size - high] if alone else [*fsdp2.bytes_gathered(self.c, unit), -size]
        recomputed = self.c.recomputes(unit.layer) and self._beside(unit)
        if away and (phase == "forward" or recomputed):
            memory = [*(memory if alone else memory[:-1]), -self._deferred]  # held until the copy is issued
            self._deferred = 0 if alone else size
        deps, work = (op,) if op >= 0 else (), (fsdp2.gathered_copy(self.c, unit),)
        steps = tuple(("gathered", step) for step in memory)
        self._copied_out = (self._pass(f"copy out {unit.name}", unit, work, phase, deps, steps),)
        return self._copied_out[0]

    def _free_deferred(self, phase: str) -> None:
        if self._deferred:
            memory, self._deferred = (("gathered", -self._deferred),), 0
            self.issue.add("buffer freed", "compute", "other", phase, (), (), memory)

    def _groups(self, layer: int) -> list[ShardedUnit]:
        """A layer's parameters as they are gathered and reduced together (see Sharding.groups)."""
        if layer not in self._grouped:
            units = self.c.layers[layer]
            groups = {(unit.copies, self.c.groups[unit.group]) for unit in units}
            one = self.c.stack.sharding.flat or all(map(self._copied, units))
            apart = self._modules or len(groups) > 1 or not one
            self._grouped[layer] = units if apart else [joined(units)]
        return self._grouped[layer]

    def _dense(self, layer: int) -> ShardedUnit:
        """The group that a layer's experts are beside."""
        return next(unit for unit in self._groups(layer) if not self._beside(unit))

    def _beside(self, unit: ShardedUnit) -> bool:
        """Whether it is a group of parameters inside of another's module."""
        return unit.component == "experts" and self._modules and self._copied(unit)

    def _component(self, unit: ShardedUnit) -> str:
        """What its exchanges are booked on: those of torch's FSDP2 like its copies."""
        return "other" if self._copied(unit) else unit.component

    def _copied(self, unit: ShardedUnit) -> bool:
        """Whether torch's FSDP2 holds it, which copies it."""
        plain = unit.component == "experts" and self.c.stack.plain_experts(self.c.strategy)
        return self.copied and not plain

    def _pass(
        self, name: str, unit: ShardedUnit, work: Sequence[Work], phase: str, deps: Sequence[int],
        memory: Memory = (),
    ) -> int:  # fmt: skip
        return self.issue.add(name, "compute", "other", phase, work, deps, memory, layer=unit.layer)

    def _release(self, unit: ShardedUnit, phase: str, ready: Ops = ()) -> None:
        """Full parameters are freed, where they are."""
        alone = unit.name == "embedding" and self._modules and not self.c.one_weight
        root = unit.layer < 0 and self.c.stack.sharding.fsdp and not alone and not self.c.one_by_one
        near = {unit.layer, unit.name} & self.stage.near
        kept = root or near or not self.c.reshards if phase == "forward" else self.sums.stays
        if kept or self._there.pop(unit.name, None) is None:
            return  # FSDP's root is gathered once a microbatch
        name, memory = f"release {unit.name}", (("gathered", -self.c.whole(unit)),)
        self._left = (self.issue.add(name, "compute", unit.component, phase, (), ready, memory),)

    def _reduce(self, unit: ShardedUnit, ready: Ops) -> None:
        """The full gradient is summed into the shard's."""
        part, copied = unit.shard_numel * self.c.grad, self._copied(unit)
        last = self._sent_off(unit, part, ready) if copied else ready
        whole, held, before = ((), (), ()) if copied else prepared(self.c, unit)
        if whole or held:
            last = (self._pass(f"flat gradient {unit.name}", unit, whole, "backward", last, held),)
        last, full = (last, 0) if copied else self.sums.keep(unit, last, self._full_grad(unit))
        if self.sums.wait:
            return
        for _, sent in reduction(self.c, [unit]):
            apart = shared(replace(sent, launches=self.c.exchanges(unit, reduced=True)))
            name, work, before = f"reduce {unit.name}", (*before, apart), ()
            stream, part_of = state_stream(sent), self._component(unit)
            last = (self.issue.add(name, stream, part_of, "backward", work, last, layer=unit.layer),)
            self._sent = self._sent or last
        kept = self._kept_grad(unit, part)
        left = () if copied else (*kept, ("gathered_grads", -full))
        if self._place(unit).grad_tier == "host":
            done = self._copy(unit, "d2h", part, "backward", last, left)
            done = self._added(unit, part, done) if copied else done
        else:
            work, name = () if kept else (Work("memory_bound", bytes=3.0 * part),), f"accumulate {unit.name}"
            stream = self.issue.ops[last[0]].stream if last else "compute"
            done = self.issue.add(name, stream, self._component(unit), "backward", work, last, left)
        if not copied and self.c.stack.sharding.waits(self.c.strategy):
            self._pass(f"reduced {unit.name}", unit, (), "backward", (done,))
        if copied:
            self.issue.hold(self.replicas.summed(unit, part, stays=bool(kept)))
        self.ops.append(done)
        self._unfinished.append(done)

    def _sent_off(self, unit: ShardedUnit, part: int, ready: Ops) -> Ops:
        """FSDP2's full gradient becomes the buffer that is reduced; that of the reduction before is freed
        once it is sent (reduce_scatter_max_input_buffers). A loop over the gradients holds the last one until
        the shard's is made (foreach_reduce). Nothing is sent where gradients are summed first."""
        self._release(unit, "backward", ready)
        rest, wait = unit.numel * self.c.b - self._opened.pop(unit.name, 0), self.sums.wait
        ready, rest, width = self.sums.add(unit, ready, rest)
        if wait:
            return ()
        full, size = unit.numel * width, unit.padded * self.c.reduce
        held = unit.last * width * (unit.shard > 1)
        most, last = fsdp2.bytes_reordered(unit, width)
        steps = rest, -self._held, most, last - most, size, held - last - full
        memory = tuple(("gathered_grads", step) for step in steps)
        work, phase = (fsdp2.reduce_copy(self.c, unit, width),), "backward"
        op = self._pass(f"copy in {unit.name}", unit, work, phase, (*ready, *self._sent), memory)
        memory = (*self.replicas.made(unit, part), ("gathered_grads", -held))
        self._pass(f"shard of {unit.name}", unit, (), phase, (op,), memory)
        self._sent, self._held = (), size
        return (op,)

    def _added(self, unit: ShardedUnit, part: int, landed: int) -> int:
        """FSDP2's gradient has arrived in a buffer of its own. To that of an earlier microbatch the thread
        that issues kernels adds it before it goes on; the first is not waited for (foreach_reduce)."""
        if unit.name not in self._landed:
            self._landed.add(unit.name)
            self._landing = True
            return landed
        piece = -(-unit.largest // unit.shard) * self.c.reduce
        memory = (("host/grads", piece), ("host/grads", -piece))
        work = (Work("host_memory", bytes=3.0 * part, launches=unit.tensors),)
        name, component = f"add on host {unit.name}", self._component(unit)
        added = self.issue.add(
            name, "host", component, "backward", work, (landed,), memory, layer=unit.layer, awaited=True
        )
        return self._pass(f"added {unit.name}", unit, (), "backward", (added,))

    def _full_grad(self, unit: ShardedUnit) -> int:
        """Bytes of a unit's whole gradients that are there at a time, but of one that stays: the unit's."""
        own = unit.shard == 1 and self.stage.frees_gradients and self.c.grad == self.c.b
        alive = unit.largest if self.c.stack.sharding.groups == "each" else unit.padded
        return 0 if own else alive * self.c.grad

    def _kept_grad(self, unit: ShardedUnit, size: int) -> Memory:
        """The gradient that stays, where the first backward makes it."""
        if unit.name in self.made or not self.stage.frees_gradients:
            return ()
        self.made[unit.name] = size
        return (("grads", size),)

    def _place(self, unit: ShardedUnit) -> Dense | Experts:
        return self.c.strategy.experts if unit.component == "experts" else self.c.strategy.dense

    def _copy(
        self, unit: ShardedUnit, way: str, size: int, phase: str, deps: Sequence[int],
        memory: Sequence[Step] = (),
    ) -> int:  # fmt: skip
        """A shard between the host and the device."""
        name = f"{'upload' if way == 'h2d' else 'download'} {unit.name}"
        work = (Work(way, bytes=float(size), launches=4),)
        return self.issue.add(name, way, unit.component, phase, work, deps, memory, layer=unit.layer)
