"""ZeRO-2 and 3: parameters gathered around their use, gradients reduced in every microbatch."""

from collections.abc import Sequence

from mopsim.layers.tape import Step
from mopsim.lowering.builder import Hooks, Template, stream_of
from mopsim.lowering.context import Context
from mopsim.lowering.fsdp.copies import gather_copy, gathered_copy, reduce_copy
from mopsim.lowering.staged.data_parallel import message_work, reduction
from mopsim.lowering.staged.issue import Issue
from mopsim.lowering.staged.stage import Stage
from mopsim.lowering.units import Unit
from mopsim.lowering.workload import Work
from mopsim.spec.strategy import Dense, Experts

Ops = tuple[int, ...]
Memory = tuple[Step, ...]


class Shards:
    """Under ZeRO-3 a unit is gathered `prefetch` layers ahead and freed after use; under 2 and 3 its full
    gradient is
    reduced right after its backward. each: whether gradients are reduced in every microbatch. made: bytes of
    gradients that live to the end of the step, by unit.
    """

    def __init__(self, context: Context, issue: Issue, stage: Stage) -> None:
        self.c, self.issue, self.stage = context, issue, stage
        self.zero = context.strategy.dense.zero
        self.each = self.zero >= 2
        self._copies = context.stack.sharding.copies
        self.ops: list[int] = []
        self.reduced: set[str] = set()
        self._full: dict[str, int] = {}
        self._left: Ops = ()
        self._arrived: set[str] = set()
        self._sent: Ops = ()
        self._gone: set[str] = set()
        self.made: dict[str, int] = {}

    def before(self, layer: int, phase: str, order: Sequence[int]) -> Ops:
        """Gathers that a layer waits for; those of the next layers are issued too, once the layer before has
        run: `prefetch` + 1 layers are full at a time. Full gradients come alive."""
        ready: Ops = ()
        if self.c.shards_params:
            place = list(order).index(layer)
            ahead = self.c.strategy.dense.prefetch
            for index in range(place, min(place + ahead, len(order) - 1) + 1):
                for unit in self.c.layers[order[index]]:
                    self._gather(unit, phase, self._left)
            ready = tuple(op for unit in self.c.layers[layer] for op in self._wait(unit, phase))
        if self.each and phase == "backward":
            memory = [("gathered_grads", self._full_grad(unit)) for unit in self.c.layers[layer]]
            room = () if self._copies else tuple(self.ops[-1 - len(memory) : -len(memory)])
            ready += (
                self.issue.add(
                    "gradients",
                    "compute",
                    "other",
                    phase,
                    (),
                    room,
                    memory,
                ),
            )
        return ready

    def after(self, layer: int, phase: str, ready: Ops = ()) -> None:
        """The layer has run."""
        for unit in self.c.layers[layer]:
            if unit.name not in self._gone:
                self._leave(unit, phase, ready)
        self._gone.clear()

    def beside(self, template: Template, layer: int, phase: str) -> Hooks:
        """What FSDP2 does when a layer's experts have gone backward: their group of parameters is reduced
        beside the rest of the layer."""
        if layer < 0 or phase == "forward" or len(self.c.layers[layer]) == 1:
            return {}

        def leave(op: int) -> None:
            unit = self.c.layers[layer][1]
            if self._copied(unit):
                self._leave(unit, "backward", (op,))
                self._gone.add(unit.name)

        return {template.products("backward")[1] + 1: (leave,)}

    def begin(self, name: str) -> None:
        """Before the backward of the embedding."""

    def finish(self) -> Ops:
        """After the last backward of a microbatch."""
        return ()

    def edge(self, name: str, phase: str) -> Ops:
        """Gathers that the embedding or the head waits for."""
        unit = self.c.edges.get(name)
        if unit is None or not self.c.shards_params:
            return ()
        self._gather(unit, phase, ())
        return self._wait(unit, phase)

    def done(self, name: str, phase: str, ready: Ops = ()) -> None:
        """The embedding or the head has run; its full gradient came and went if this was its backward."""
        unit = self.c.edges.get(name)
        if unit is None:
            return
        if self.each and phase == "backward":
            memory: Memory = (("gathered_grads", self._full_grad(unit)),)
            ready = (self.issue.add("gradients", "compute", unit.component, phase, (), ready, memory),)
        self._leave(unit, phase, ready)

    def _gather(self, unit: Unit, phase: str, room: Sequence[int]) -> None:
        group = self.c.groups[unit.group]
        away, copied = self._place(unit).param_tier == "host", self._copied(unit)
        if unit.name in self._full or (group.size == 1 and not away and not copied):
            return
        size = unit.padded * self.c.b
        if away:
            memory = (("gathered", size),) if group.size == 1 else ()
            room = (self._copy(unit, "h2d", unit.shard_numel * self.c.param, phase, room, memory),)
        if group.size == 1:
            if copied and not away:  # a copy in the compute dtype, of nothing that was sent
                memory = (("gathered", size),)
                room = (self._pass(f"cast {unit.name}", unit, (), phase, room, memory),)
            self._full[unit.name] = room[0]
            return
        if copied:
            room = (self._pass(f"copy in {unit.name}", unit, (gather_copy(self.c, unit),), phase, room),)
        work = (Work("all_gather", bytes=float(size), group=group),)
        self._full[unit.name] = self.issue.add(
            f"gather {unit.name}", stream_of(group), unit.component, phase, work, room, (("gathered", size),),
            layer=unit.layer,
        )  # fmt: skip

    def _wait(self, unit: Unit, phase: str) -> Ops:
        """What a unit's users wait for; of FSDP2's, its copy-out."""
        if unit.name not in self._full:
            return ()
        if self._copied(unit) and unit.name not in self._arrived:
            self._arrived.add(unit.name)
            work, ready = (gathered_copy(self.c, unit),), (self._full[unit.name],)
            self._full[unit.name] = self._pass(f"copy out {unit.name}", unit, work, phase, ready)
        return (self._full[unit.name],)

    def _copied(self, unit: Unit) -> bool:
        """Whether torch's FSDP2 holds it, which copies it (see Sharding.copies)."""
        return self._copies and not (
            unit.component == "experts" and self.c.stack.plain_experts(self.c.strategy)
        )

    def _pass(
        self,
        name: str,
        unit: Unit,
        work: Sequence[Work],
        phase: str,
        deps: Sequence[int],
        memory: Memory = (),
    ) -> int:
        return self.issue.add(name, "compute", "other", phase, work, deps, memory, layer=unit.layer)

    def _leave(self, unit: Unit, phase: str, ready: Ops) -> None:
        root = unit.layer < 0 and self.c.stack.sharding.fsdp  # FSDP's root is gathered once a microbatch
        keep = phase == "forward" and (root or not self.c.reshards)
        if unit.name in self._full and not keep:
            del self._full[unit.name]
            self._arrived.discard(unit.name)
            memory = (("gathered", -unit.padded * self.c.b),)
            name = f"release {unit.name}"
            self._left = (self.issue.add(name, "compute", unit.component, phase, (), ready, memory),)
        if not self.each or phase != "backward":
            return
        last = ready
        if self._copied(unit):  # one buffer is on its way at a time (reduce_scatter_max_input_buffers)
            work: tuple[Work, ...] = (reduce_copy(self.c, unit),)
            last = (self._pass(f"copy in {unit.name}", unit, work, phase, (*ready, *self._sent)),)
            self._sent = ()
        for message in reduction(self.c, [unit]):
            last = (
                self.issue.add(
                    f"reduce {unit.name}",
                    stream_of(message[2]),
                    unit.component,
                    phase,
                    message_work(message),
                    last,
                ),
            )
            self._sent = self._sent or last
        part = unit.shard_numel * self.c.grad
        kept = self._kept_grad(unit, part)
        left: Memory = (*kept, ("gathered_grads", -self._full_grad(unit)))
        if self._place(unit).grad_tier == "host":
            self.ops.append(self._copy(unit, "d2h", part, phase, last, left))
            return
        work = () if kept else (Work("memory_bound", bytes=3.0 * part),)
        stream = self.issue.ops[last[0]].stream if last else "compute"
        self.ops.append(
            self.issue.add(f"accumulate {unit.name}", stream, unit.component, phase, work, last, left)
        )

    def _full_grad(self, unit: Unit) -> int:
        """Bytes of a unit's whole gradient before it is reduced; a whole one that stays is the unit's own."""
        own = unit.shard == 1 and self.stage.frees_gradients and self.c.grad == self.c.b
        return 0 if own else unit.padded * self.c.grad

    def _kept_grad(self, unit: Unit, size: int) -> Memory:
        """The gradient shard, where the first backward makes it."""
        if unit.name in self.made or not self.stage.frees_gradients:
            return ()
        self.made[unit.name] = size
        return (("grads", size),)

    def _place(self, unit: Unit) -> Dense | Experts:
        strategy = self.c.strategy
        return strategy.experts if unit.component == "experts" else strategy.dense

    def _copy(
        self, unit: Unit, way: str, size: int, phase: str, deps: Sequence[int], memory: Sequence[Step] = ()
    ) -> int:
        """A shard between the host and the device."""
        work = (Work(way, bytes=float(size), launches=4),)
        name = f"{'upload' if way == 'h2d' else 'download'} {unit.name}"
        return self.issue.add(name, way, unit.component, phase, work, deps, memory, layer=unit.layer)
