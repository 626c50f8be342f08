"""AdamW under the backward of a step's last microbatch: groups of units are updated once their gradients are
summed, which are freed then (mopexec.operators.early_optimizer)."""

from collections import deque
from collections.abc import Sequence

from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.pairs.flat_update import PairUpdate
from mopsim.program.stage import Stage
from mopsim.program.units import ShardedUnit, looked_up
from mopsim.program.workload import Work
from mopsim.spec.layout import Bucket, early_buckets

_O = "optimizer"


def sum_of(unit: ShardedUnit) -> str:
    """The buffer of its gradient shard."""
    return f"sum {unit.name}"


class EarlyUpdate(PairUpdate):
    """Of one step. The units of a layer are a group; head and final norm before, the embedding after them.

    live: whether the last microbatch's loss has begun. ops: updates.
    """

    def __init__(self, context: Context, builder: Builder, stage: Stage) -> None:
        super().__init__(context, builder, stage)
        edges, layers = context.edges, [layer for chunk in stage.every for layer in chunk]
        first = [edges[name] for name in ("head", "final") if name in edges]
        places = {unit.name: place for place, unit in enumerate(stage.units)}
        inner = (context.layers[layer] for layer in layers[::-1])
        self.groups = [[places[u.name] for u in units] for units in (first, *inner, looked_up(edges))]
        found = early_buckets(self.groups, self.numels, self.optimizer.bucket_params)
        self.buckets = [bucket for buckets in found for bucket in buckets]
        self._left = deque(len(buckets) for buckets in found)
        self.streams = self.optimizer.state_tier == "host"
        self.live, self.ops = False, list[int]()
        self._coming = deque(self.groups)
        self._replicating: deque[tuple[list[int], list[int | None]]] = deque()
        self._updating: list[tuple[list[int], int]] = []
        self._there: dict[int, int] = {}
        self._free: dict[int, int] = {}
        self._next = 0

    def run(self, reductions: Sequence[int]) -> None:
        """The norm over ranks; the last group's update is over."""
        agreed = self._agreed_norm()
        self.b.drop(*(name for name in self.b.alive if name.startswith("sum ")))
        self.b.compute("updated", _O, _O, -1, [], *agreed, *reductions)

    def beside(self) -> dict[str, int]:
        """State of the last step's last buckets is still on its way down: by slot, the op."""
        count, found = len(self.buckets), {}
        for index in range(count - self.slots, count) if self.streams else ():
            work = self._state("d2h", self.buckets[index])
            found[f"slot {index % self.slots}"] = self.b.add(f"state {index} down", "d2h", _O, _O, work)
        return found

    @property
    def staging(self) -> int:
        """Bytes of the staging buffers; and of the largest slice's gradient where its dtype is not the
        update's."""
        sizes = [[stop - start for _, start, stop in bucket] for bucket in self.buckets]
        each = (2 * self.moment + self.own_master) * self.slots * self.streams
        return max(map(sum, sizes)) * each + self._widened_grad * max(map(max, sizes))

    def begin(self, free: Sequence[int | None], ready: Sequence[int]) -> None:
        """The last loss begins, after `ready`: the state of the first buckets goes up. free: by slot, the op
        after which it is."""
        self.live = True
        for index in range(self.slots * self.streams):
            self._there[index] = self._up(index, *ready, free[index])

    def room(self) -> None:
        """The update before is over: its gradients are freed."""
        for group, op in self._updating:
            self.b.drop(*(sum_of(self.stage.units[place]) for place in group))
            self.b.compute("gradients freed", _O, "backward", -1, [], op)
        self._updating.clear()

    def summed(self) -> None:
        """The next group is, over its shards' ranks: updated now or, where it has replicas, with the next."""
        group = self._coming.popleft()
        units, c, waiting = [self.stage.units[place] for place in group], self.c, len(self._replicating)
        arrived = [
            self.b.issue(
                f"replicate {u.name}", "all_reduce", u.shard_numel * c.grad, u.replicas, _O, _O, u.layer
            )
            for u in units
            if u.replicas
        ]
        self._replicating.append((group, arrived))
        replicated = any(u.replicas and c.groups[u.replicas].size > 1 for u in units)
        for _ in range(waiting + (not replicated or not self._coming)):
            self._update(*self._replicating.popleft())

    def _update(self, group: list[int], arrived: Sequence[int | None]) -> None:
        b, total = self.b, sum(self.numels[place] for place in group)
        work = [Work("memory_bound", bytes=float(total * self.c.grad), launches=4 * len(group))]
        ready = b.compute("norm", _O, _O, -1, work, *arrived)
        for _ in range(self._left.popleft()):
            ready = self._bucket(self._next, ready)
            self._next += 1
        self.ops.append(ready)
        if self.streams:
            self._updating.append((group, ready))
        else:
            b.drop(*(sum_of(self.stage.units[place]) for place in group))

    def _bucket(self, index: int, ready: int) -> int:
        """Update one, beside the step where its state is streamed: the next one's takes its place then."""
        b, bucket, ahead = self.b, self.buckets[index], index + self.slots
        wide = max(stop - start for _, start, stop in bucket) * self.wide * self.casts
        memory = (("staging", wide), ("staging", -wide)) if wide else ()
        if self.slots > 1:
            self._load(index + 1)
        stream, deps = "update" if self.streams else "compute", (ready, self._there.get(index))
        done = b.add(f"adamw {index}", stream, _O, _O, self._works([bucket]), deps, memory)
        if self.streams and ahead < len(self.buckets):  # the others go down beside the next step
            work = self._state("d2h", bucket)
            self._free[ahead] = b.add(f"state {index} down", "d2h", _O, _O, work, (done,))
        if self.slots == 1:
            self._load(index + 1)
        return done

    def _load(self, index: int) -> None:
        """Issued when the bucket before is about to be updated, so that layer inputs on their way up are not
        held up behind it: the executor's copies of state have streams of their own."""
        if index in self._free:
            self._there[index] = self._up(index, self._free.pop(index))

    @property
    def _widened_grad(self) -> int:
        """Bytes of a gradient in the update's dtype, where it has another."""
        return self.wide if self.c.grad != self.wide else 0

    def _works(self, buckets: list[Bucket]) -> list[Work]:
        """Cast where that is needed, the fused update, the refresh of the parameter shard."""
        lengths = [stop - start for bucket in buckets for _, start, stop in bucket]
        params, pieces = sum(lengths), len(lengths)
        casts, refresh = bool(self._widened_grad), bool(self.own_master)
        each = casts * (self.c.grad + self.wide) + refresh * (self.wide + self.c.param)
        work = Work("memory_bound", bytes=float(params * each), launches=(casts + refresh) * pieces)
        return [work, Work("optimizer", params=params, launches=pieces)]
