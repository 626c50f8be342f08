"""ZeRO-2 and 3: parameters gathered around their use, gradients reduced in every microbatch."""

from collections.abc import Sequence

from mopsim.layers.tape import Step
from mopsim.lowering.context import Context
from mopsim.lowering.staged.data_parallel import message_work, reduction
from mopsim.lowering.staged.issue import Issue
from mopsim.lowering.staged.stage import Stage
from mopsim.lowering.staged.template import stream_of
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
        self.ops: list[int] = []
        self.reduced: set[str] = set()
        self._full: dict[str, int] = {}
        self._left: Ops = ()
        self.made: dict[str, int] = {}

    def before(self, layer: int, phase: str, order: Sequence[int]) -> Ops:
        """Gathers that a layer waits for; those of the next layers are issued too, once the layer before has
        run: `prefetch` + 1 layers are full at a time. Full gradients come alive."""
        ready: Ops = ()
        if self.zero == 3:
            place = list(order).index(layer)
            ahead = self.c.strategy.dense.prefetch
            for index in range(place, min(place + ahead, len(order) - 1) + 1):
                for unit in self.c.layers[order[index]]:
                    self._gather(unit, phase, self._left)
            ready = tuple(self._full[unit.name] for unit in self.c.layers[layer] if unit.name in self._full)
        if self.each and phase == "backward":
            memory = [("gathered_grads", self._full_grad(unit)) for unit in self.c.layers[layer]]
            ready += (
                self.issue.add(
                    "gradients",
                    "compute",
                    "other",
                    phase,
                    (),
                    self.ops[-1 - len(memory) : -len(memory)],
                    memory,
                ),
            )
        return ready

    def after(self, layer: int, phase: str, ready: Ops = ()) -> None:
        """The layer has run."""
        for unit in self.c.layers[layer]:
            self._leave(unit, phase, ready)

    def edge(self, name: str, phase: str) -> Ops:
        """Gathers that the embedding or the head waits for."""
        unit = self.c.edges.get(name)
        if unit is None or self.zero < 3:
            return ()
        self._gather(unit, phase, ())
        return (self._full[unit.name],) if unit.name in self._full else ()

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
        away = self._place(unit).param_tier == "host"
        if unit.name in self._full or (group.size == 1 and not away):
            return
        size = unit.padded * self.c.b
        if away:
            memory = (("gathered", size),) if group.size == 1 else ()
            room = (self._copy(unit, "h2d", unit.shard_numel * self.c.param, phase, room, memory),)
        if group.size == 1:
            self._full[unit.name] = room[0]
            return
        work = (Work("all_gather", bytes=float(size), group=group),)
        self._full[unit.name] = self.issue.add(
            f"gather {unit.name}", stream_of(group), unit.component, phase, work, room, (("gathered", size),),
            layer=unit.layer,
        )  # fmt: skip

    def _leave(self, unit: Unit, phase: str, ready: Ops) -> None:
        strategy = self.c.strategy
        root = (
            unit.layer < 0 and strategy.runtime == "fully_shard"
        )  # FSDP's root is gathered once a microbatch
        keep = phase == "forward" and (root or not strategy.dense.reshard_after_forward)
        if unit.name in self._full and not keep:
            del self._full[unit.name]
            memory = (("gathered", -unit.padded * self.c.b),)
            name = f"release {unit.name}"
            self._left = (self.issue.add(name, "compute", unit.component, phase, (), ready, memory),)
        if not self.each or phase != "backward":
            return
        last = ready
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
        part = unit.shard_numel * self.c.grad
        left: Memory = (*self._kept_grad(unit, part), ("gathered_grads", -self._full_grad(unit)))
        if self._place(unit).grad_tier == "host":
            self.ops.append(self._copy(unit, "d2h", part, phase, last, left))
            return
        work = (Work("memory_bound", bytes=3.0 * part),)
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
