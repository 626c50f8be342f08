"""The end of a step: replicas, global norm, AdamW on device, host or streamed
(mopexec.flat.optimizer)."""

from mopsim.common.units import DTYPE_BYTES
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.workload import Work
from mopsim.spec.layout import optimizer_buckets

_O = "optimizer"


def update(context: Context, builder: Builder) -> None:
    """Ops from the last gradient shard to the refreshed parameters."""
    Update(context, builder).lower()


class Update:
    """Clip and AdamW over buckets of the flat shards."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.c, self.b = context, builder
        precision, self.optimizer = context.strategy.precision, context.strategy.optimizer
        self.master = precision.param if precision.master == "param" else precision.master
        self.own_master = precision.master != "param"
        self.moment = int(DTYPE_BYTES[precision.moments])
        self.wide = 8 if self.master == "float64" else 4
        units = context.units()
        self.numels = [unit.shard_numel for unit in units]
        self.total = sum(self.numels)
        host = self.optimizer.state_tier == "host"
        self.away = [int(numel * self.optimizer.host_fraction) if host else 0 for numel in self.numels]
        self.here = [numel - away for numel, away in zip(self.numels, self.away, strict=True)]
        self.buckets = optimizer_buckets(self.away, self.optimizer.bucket_params)
        self.sizes = [sum(stop - start for _, start, stop in bucket) for bucket in self.buckets]

    def lower(self) -> None:
        self._norm()
        if any(self.here):
            self._on_device()
        if any(self.away) and self.optimizer.update_on == "host":
            self._by_host()
        elif any(self.away):
            self._streamed()

    def _norm(self) -> None:
        """Gradient shards over replicas, then the global norm: one number over all ranks."""
        c, b = self.c, self.b
        arrived = []
        for unit in c.units():
            if unit.replicas:
                size = unit.shard_numel * c.grad
                arrived.append(
                    b.issue(f"replicate {unit.name}", "all_reduce", size, unit.replicas, _O, _O, unit.layer)
                )
        work = [Work("memory_bound", bytes=float(self.total * c.grad), launches=4 * len(self.numels))]
        b.compute("norm", _O, _O, -1, work, *arrived)
        agreed = b.issue("norm", "all_reduce", 2 * self.wide, "world", _O, _O)
        loads = 4.0 * c.model.num_local_experts * c.model.num_moe_layers
        balanced = b.issue("balance", "all_reduce", loads, "world", _O, _O) if loads else None
        b.compute("clip", _O, _O, -1, [Work("memory_bound", launches=4)], agreed, balanced)

    def _adam(self, params: int, pieces: int) -> list[Work]:
        """Clipped gradients in the wide dtype, the fused update, the refresh of the parameter shard."""
        c = self.c
        each = c.grad + 3.0 * self.wide + ((self.wide + c.param) if self.own_master else 0)
        works = [Work("memory_bound", bytes=params * each, launches=(3 if self.own_master else 2) * pieces)]
        return [*works, Work("optimizer", params=params, launches=pieces)]

    def _widened(self, piece: int) -> int:
        """Temporaries of tensors that are not in the update's dtype."""
        found = 0 if DTYPE_BYTES[self.master] == self.wide else self.wide
        return piece * (found + (0 if self.moment == self.wide else 2 * self.wide))

    def _on_device(self) -> None:
        buckets = optimizer_buckets(self.here, self.optimizer.bucket_params)
        piece = max(stop - start for bucket in buckets for _, start, stop in bucket)
        self.b.spike(piece * self.wide + self._widened(piece), "staging")
        pieces = sum(len(bucket) for bucket in buckets)
        self.b.compute("adamw", _O, _O, -1, self._adam(sum(self.here), pieces))

    def _streamed(self) -> None:
        """H2D master and moments | update | D2H, through the slots."""
        b = self.b
        slots = min(self.optimizer.slots, len(self.buckets))
        each = 2 * self.moment + (int(DTYPE_BYTES[self.master]) if self.own_master else 0)
        b.make("slots", slots * max(self.sizes) * each, "staging")
        b.compute("slots", _O, _O, -1, [])
        free: list[int] = [b.last] * slots
        up: dict[int, int] = {}
        for index in range(len(self.buckets)):
            self._load(index, each, free, up)
            if slots > 1 and index + 1 < len(self.buckets):
                self._load(index + 1, each, free, up)
            bucket = self.buckets[index]
            piece = max(stop - start for _, start, stop in bucket)
            b.spike(piece * self.wide + self._widened(piece), "staging")
            done = b.compute(
                f"adamw {index}", _O, _O, -1, self._adam(self.sizes[index], len(bucket)), up[index]
            )
            work = (
                Work(
                    "d2h",
                    bytes=float(self.sizes[index] * each),
                    launches=len(bucket) * (2 + self.own_master),
                    duplex=True,
                ),
            )
            free[index % slots] = b.add(f"state {index} down", "d2h", _O, _O, work, deps=(done,))
        b.compute("slots freed", _O, _O, -1, [], *free)
        b.drop("slots")

    def _load(self, index: int, each: int, free: list[int], up: dict[int, int]) -> None:
        if index in up:
            return
        bucket = self.buckets[index]
        work = (
            Work(
                "h2d",
                bytes=float(self.sizes[index] * each),
                launches=len(bucket) * (2 + self.own_master),
                duplex=True,
            ),
        )
        up[index] = self.b.add(f"state {index} up", "h2d", _O, _O, work, deps=(free[index % len(free)],))

    def _by_host(self) -> None:
        """Gradients down one bucket ahead, AdamW on the host, parameters up."""
        b, c = self.b, self.c
        down = [self._send(0)]
        last: int | None = None
        for index, size in enumerate(self.sizes):
            if index + 1 < len(self.sizes):
                down.append(self._send(index + 1, last))
            host = b.add(
                f"host adamw {index}",
                "host",
                _O,
                _O,
                (Work("host_optimizer", params=size, launches=len(self.buckets[index])),),
                deps=(down[index], last),
            )
            work = (Work("h2d", bytes=float(size * c.param), launches=len(self.buckets[index])),)
            last = b.add(f"parameters {index} up", "h2d", _O, _O, work, deps=(host,))
        b.compute("updated", _O, _O, -1, [], last)

    def _send(self, index: int, after: int | None = None) -> int:
        b, size, pieces = self.b, self.sizes[index], len(self.buckets[index])
        piece = max(stop - start for _, start, stop in self.buckets[index])
        b.spike(piece * self.wide * min(2, pieces), "staging")
        work = [Work("memory_bound", bytes=size * (self.c.grad + 3.0 * self.wide), launches=2 * pieces)]
        done = b.compute(f"clip {index}", _O, _O, -1, work, after)
        copy = (Work("d2h", bytes=float(size * self.wide), launches=pieces),)
        return b.add(f"gradients {index} down", "d2h", _O, _O, copy, deps=(done,))
