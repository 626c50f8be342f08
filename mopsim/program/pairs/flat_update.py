"""The end of a step of flat units: replicas, global norm, AdamW bucket by bucket
(mopexec.operators.optimizer)."""

from collections.abc import Sequence

from mopsim.common.units import DTYPE_BYTES
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.stage import Stage
from mopsim.program.template import Memory
from mopsim.program.update import Update
from mopsim.program.workload import Work
from mopsim.spec.layout import Bucket, numel, optimizer_buckets

_O = "optimizer"


class PairUpdate(Update):
    """Clip and AdamW over buckets of the flat shards, in the dtype `wide`."""

    def __init__(self, context: Context, builder: Builder, stage: Stage) -> None:
        super().__init__(context, builder, stage)
        master = context.strategy.precision.masters
        self.wide = 8 if master == "float64" else 4
        self.casts = (DTYPE_BYTES[master] != self.wide) + 2 * (self.moment != self.wide)

    def run(self, reductions: Sequence[int]) -> None:
        """With the update beside the next forward, the state of the first buckets goes up from the
        embedding's backward on, and the step ends with the clip factor."""
        if self.optimizer.overlap == "none":
            super().run(reductions)
            return
        tail = next(
            op for op in reversed(self.b.ops) if (op.component, op.phase) == ("embedding", "backward")
        )
        for index in range(self.slots):
            self._up(index, *tail.deps)
        self._clipped(reductions)

    def beside(self) -> dict[str, int]:
        """The last step's update, on a stream of its own; its first buckets' state is there. By unit, the op
        after which its parameters are new."""
        b, found = self.b, {}
        free: list[int | None] = [None] * self.slots
        for index, bucket in enumerate(self.buckets):
            place = index % self.slots
            up = self._up(index, free[place]) if index >= self.slots else None
            work = self._works([bucket])
            done = b.add(f"adamw {index}", "update", _O, _O, work, (up,))
            free[place] = b.add(f"state {index} down", "d2h", _O, _O, self._state("d2h", bucket), (done,))
            for unit, _, stop in bucket:
                if stop == self.away[unit]:
                    found[self.stage.units[unit].name] = done
        return found

    @property
    def slots(self) -> int:
        """Staging buffers of a bucket each."""
        return min(self.optimizer.slots, len(self.buckets))

    @property
    def staging(self) -> int:
        """Bytes of the staging buffers, and of the largest slice's gradient in the wide dtype."""
        sizes = [[stop - start for _, start, stop in bucket] for bucket in self.buckets]
        each = 2 * self.moment + self.own_master
        return self.slots * max(map(sum, sizes)) * each + max(map(max, sizes)) * self.wide

    def _up(self, index: int, *deps: int | None) -> int:
        work = self._state("h2d", self.buckets[index])
        return self.b.add(f"state {index} up", "h2d", _O, _O, work, deps)

    def _state(self, way: str, bucket: Bucket) -> tuple[Work, ...]:
        return self._copy(way, numel(bucket) * (2 * self.moment + self.own_master), len(bucket))

    def _clipped(self, reductions: Sequence[int]) -> int:
        """Gradient shards over replicas, then the global norm: one number over all ranks."""
        c, b = self.c, self.b
        b.flush("other", "backward")  # its last buffers are gone before replicas' sums begin
        arrived = []
        for unit in self.stage.units:
            if unit.replicas:
                size, name = unit.shard_numel * c.grad, f"replicate {unit.name}"
                arrived.append(b.issue(name, "all_reduce", size, unit.replicas, _O, _O, unit.layer))
        total, launches = sum(self.numels), 4 * len(self.numels)
        work = [Work("memory_bound", bytes=float(total * c.grad), launches=launches)]
        b.compute("norm", _O, _O, -1, work, *arrived)
        return b.compute("clip", _O, _O, -1, [Work("memory_bound", launches=4)], *self._agreed_norm())

    def _agreed_norm(self) -> tuple[int | None, int | None]:
        """What all ranks sum: the square of the norm with the loss, and the routers' loads."""
        b, model = self.b, self.c.model
        agreed = b.issue("norm", "all_reduce", 2 * self.wide, "world", _O, _O)
        loads = 4.0 * model.num_local_experts * model.num_routers
        balanced = b.issue("balance", "all_reduce", loads, "world", _O, _O) if loads else None
        return agreed, balanced

    def _adam(self, bucket: Bucket) -> list[Work]:
        """Clipped gradients in the wide dtype, the fused update, the refresh of the parameter shard."""
        return self._updated([bucket])

    def _updated(self, buckets: list[Bucket]) -> list[Work]:
        longest = max(stop - start for bucket in buckets for _, start, stop in bucket)
        self.b.spike(longest * self.wide * (1 + self.casts), "staging")
        return self._works(buckets)

    def _works(self, buckets: list[Bucket]) -> list[Work]:
        c = self.c
        each = c.grad + 3.0 * self.wide + ((self.wide + c.param) if self.own_master else 0)
        lengths = [stop - start for bucket in buckets for _, start, stop in bucket]
        params, pieces = sum(lengths), len(lengths)
        work = Work("memory_bound", bytes=params * each, launches=(3 if self.own_master else 2) * pieces)
        return [work, Work("optimizer", params=params, launches=pieces)]

    def _on_device(self, last: int) -> int:
        buckets = optimizer_buckets(self.here, self.optimizer.bucket_params)
        return self.b.compute("adamw", _O, _O, -1, self._updated(buckets))

    def _over(self, last: int) -> None:
        """Parameter shards are refreshed by the update, gradients zeroed by the next step's units."""

    def _host_buckets(self) -> list[Bucket]:
        return self.buckets

    def _on_host(self) -> Memory:
        """Its staging buffers are resident."""
        return ()

    def _send(self, bucket: Bucket, after: int) -> int:
        """Clipped, in the wide dtype."""
        b, pieces = self.b, len(bucket)
        size, longest = (f(stop - start for _, start, stop in bucket) for f in (sum, max))
        b.spike(longest * self.wide, "staging")
        work = [Work("memory_bound", bytes=size * (self.c.grad + 3.0 * self.wide), launches=2 * pieces)]
        done = b.compute("clip bucket", _O, _O, -1, work, after)
        if self.dense.grad_tier == "host":
            return done
        copy = (Work("d2h", bytes=float(size * self.wide), launches=pieces),)
        return b.add("gradients down", "d2h", _O, _O, copy, (done,))
