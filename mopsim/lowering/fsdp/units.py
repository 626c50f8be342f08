"""How FSDP2 gathers and reduces a group of parameters
(torch.distributed.fsdp._fully_shard._fsdp_collectives).

Gather: shards cast and copied into the all-gather buffer, copied out into one tensor per parameter, buffer
freed. Reduce: gradients copied into a buffer of the reduce dtype, which lives until the next reduction; the
shards become the gradients.
"""

from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.fsdp.copies import gather_copy, gathered_copy, reduce_copy
from mopsim.lowering.units import Unit
from mopsim.lowering.workload import Group, Work


class FsdpUnits:
    """Parameter groups of one program."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.c, self.b = context, builder
        self.coming: dict[str, int | None] = {}
        self.there: set[str] = set()
        self.reduced: set[str] = set()
        self.held = ""
        self.sent: int | None = None
        self.reductions: list[int] = []
        dense = context.strategy.dense
        self.offload = dense.param_tier == "host"

    def gather(self, unit: Unit, phase: str) -> None:
        """Start the all-gather (a prefetch, or the group's own)."""
        if unit.name in self.coming or unit.name in self.there:
            return
        b, c = self.b, self.c
        waits: list[int] = []
        if unit.shard == 1:
            self.coming[unit.name] = self._upload(unit, phase)
            return
        uploaded = self._upload(unit, phase)
        if uploaded is not None:
            waits.append(uploaded)
        b.make(f"buffer {unit.name}", unit.padded * c.b, "gathered")
        b.spike(unit.shard_numel * (c.b if c.param != c.b else 0), "gathered")
        b.compute(f"copy in {unit.name}", "other", phase, unit.layer, [gather_copy(c, unit)], *waits)
        size = float(unit.padded * c.b)
        self.coming[unit.name] = b.issue(
            f"gather {unit.name}", "all_gather", size, unit.group, "other", phase, unit.layer
        )

    def wait(self, unit: Unit, phase: str) -> None:
        """The full parameters, one tensor each."""
        if unit.name in self.there:
            return
        self.gather(unit, phase)
        b, c = self.b, self.c
        op = self.coming.pop(unit.name)
        b.make(f"full {unit.name}", unit.numel * c.b, "gathered")
        if unit.shard == 1:
            b.spike(unit.largest * c.b, "gathered")
        b.compute(f"copy out {unit.name}", "other", phase, unit.layer, [gathered_copy(c, unit)], op)
        if unit.shard > 1:
            b.drop(f"buffer {unit.name}")
        self.there.add(unit.name)

    def release(self, unit: Unit) -> None:
        """Reshard."""
        if unit.name in self.there:
            self.there.discard(unit.name)
            self.b.drop(f"full {unit.name}")

    def reduce(self, unit: Unit, phase: str = "backward") -> None:
        """Sum the full gradients (buffer `grads <unit>`) into the shard's gradient."""
        b, c = self.b, self.c
        self.release(unit)
        if self.held:
            b.drop(self.held)
        b.make(f"reduce {unit.name}", unit.padded * c.reduce, "gathered_grads")
        # the buffer before is freed once it is sent (reduce_scatter_max_input_buffers is 1)
        b.compute(f"copy in {unit.name}", "other", phase, unit.layer, [reduce_copy(c, unit)], self.sent)
        b.drop(f"grads {unit.name}")
        self.held = f"reduce {unit.name}"
        shard = unit.shard_numel * c.reduce
        b.make(f"shard {unit.name}", shard, "grads")
        size = float(unit.padded * c.reduce)
        op = b.issue(f"reduce {unit.name}", "reduce_scatter", size, unit.group, "other", phase, unit.layer)
        self.sent = op
        replicas = c.groups.get(unit.replicas, Group(1, 1))
        if replicas.size > 1:
            name, ready = f"all-reduce {unit.name}", (b.last, op)
            op = b.collective(
                name, "all_reduce", shard, replicas, "other", phase, layer=unit.layer, deps=ready
            )
        if op is not None:
            self.reductions.append(op)
        if self.offload:
            self._download(unit, phase, shard, op)
        elif unit.name in self.reduced:
            self._accumulate(unit, phase, shard, op)
            b.drop(f"shard {unit.name}")
        else:
            b.rename(f"shard {unit.name}", f"gradient {unit.name}")
        self.reduced.add(unit.name)

    def _accumulate(self, unit: Unit, phase: str, shard: int, op: int | None) -> None:
        """The shard's gradient of another microbatch is added on the stream that reduced it
        (`post_reduce_stream`)."""
        b, name, work = self.b, f"accumulate {unit.name}", [Work("memory_bound", bytes=3.0 * shard)]
        if op is None:
            b.compute(name, "other", phase, unit.layer, work)
            return
        stream = b.ops[op].stream
        self.reductions.append(b.add(name, stream, "other", phase, work, layer=unit.layer, deps=(op,)))

    def finish(self) -> None:
        """Wait for all reductions; the last buffer is freed."""
        if self.held:
            self.b.drop(self.held)
            self.held = ""
        self.b.compute("reduced", "other", "backward", -1, [], *self.reductions)
        self.reductions, self.sent = [], None

    def forget_gradients(self) -> None:
        """The gradient shards of the step die (when the next one begins)."""
        for name in list(self.b.alive):
            if name.startswith("gradient "):
                self.b.drop(name)

    def _upload(self, unit: Unit, phase: str) -> int | None:
        """CPU offload: the shard is copied to the device before it is sent."""
        if not self.offload:
            return None
        b, size = self.b, unit.shard_numel * self.c.param
        b.spike(size, "gathered")
        work = (Work("h2d", bytes=float(size), launches=4),)
        deps = (b.last,) if b.last >= 0 else ()
        return b.add(f"upload {unit.name}", "h2d", "other", phase, work, layer=unit.layer, deps=deps)

    def _download(self, unit: Unit, phase: str, size: int, op: int | None) -> None:
        """CPU offload: the reduced gradient goes to the host and dies on the device."""
        b = self.b
        host = ("host/grads", size)
        first = unit.name not in self.reduced
        work = (Work("d2h", bytes=float(size), launches=4),)
        deps = (b.last, op)
        piece = -(-unit.largest // unit.shard) * self.c.reduce
        memory = (host,) if first else (("host/grads", piece), ("host/grads", -piece))
        down = b.add(
            f"download {unit.name}", "d2h", "other", phase, work, layer=unit.layer, deps=deps, memory=memory
        )
        if first:
            b.adopt(f"gradient {unit.name}", size, "host/grads")
        b.drop(f"shard {unit.name}")
        self.reductions.append(down)
