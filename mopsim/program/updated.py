"""Gathers of updated parameters that arrive beside the first forward, in the order in which they are asked
for."""

from collections.abc import Iterable, Mapping
from itertools import groupby

from mopsim.program.builder import Builder, state_stream
from mopsim.program.context import Context
from mopsim.program.data_parallel import gathering
from mopsim.program.stage import Stage
from mopsim.program.template import Ops
from mopsim.program.units import ShardedUnit, looked_up

Bucket = list[ShardedUnit]


class UpdatedParameters:
    """Parameters that the last step updated, gathered in buckets, each in the order of compute.

    A bucket is asked for once the forward waits for the one before it (Megatron-Core d98e8a64,
    core/distributed/param_and_grad_buffer.py: finish_param_sync). Those of a layer are one; later stages'
    and all but the first model chunk are one each (distributed_data_parallel.py: disable_bucketing). Where a
    stage has several chunks, those of the next chunk are all asked for as one begins, of the first two at
    the start (training/training.py: align_param_gather; core/pipeline_parallel/schedules.py). A later stage
    of one chunk, which would ask when its first input is there, asks at the start too: docs/adr/0093.
    """

    def __init__(self, context: Context, issue: Builder, stage: Stage) -> None:
        self.c, self.issue, self.stage = context, issue, stage
        hidden = context.strategy.overlap.param_gather and context.strategy.dense.zero > 0
        self.buckets = self._buckets() if hidden and not context.shards_params else []
        self.places = {unit.name: place for place, (_, units) in enumerate(self.buckets) for unit in units}
        self.asked: list[Ops] = []
        if stage.virtual > 1 or stage.index > 0:
            self._ask(1, ())

    def before(self, names: Iterable[str], ready: Ops) -> Ops:
        """What the first users of these units wait for; they run after `ready`. The next bucket is asked
        for."""
        places = sorted({self.places.pop(name) for name in names if name in self.places})
        found: Ops = ()
        for place in places:
            while len(self.asked) <= place:
                self._next(ready)
            found += self.asked[place]
            if self.stage.virtual > 1:
                self._ask(self.buckets[place][0] + 1, ready)
            elif len(self.asked) == place + 1 < len(self.buckets):
                self._next((*ready, *found))
        return found

    def issued(self, moved: Mapping[int, int]) -> None:
        """Ops have other places now."""
        self.asked = [tuple(moved.get(op, op) for op in ops) for ops in self.asked]

    def _ask(self, chunk: int, ready: Ops) -> None:
        """For all buckets up to those of a model chunk."""
        while len(self.asked) < len(self.buckets) and self.buckets[len(self.asked)][0] <= chunk:
            self._next(ready)

    def _next(self, ready: Ops) -> None:
        place, add = len(self.asked), self.issue.add
        deps = (*self.issue.so_far(), *ready)
        self.asked.append(
            tuple(
                add("gather parameters", state_stream(sent), part, "forward", (sent,), deps, layer=place)
                for part, sent in gathering(self.c, self.buckets[place][1])
            )
        )

    def _buckets(self) -> list[tuple[int, Bucket]]:
        """(model chunk, units) of each, in the order of use."""
        chunks = {layer: place for place, layers in enumerate(self.stage.every) for layer in layers}
        first = {unit.name for unit in looked_up(self.c.edges)} if self.stage.is_first else set()

        def which(unit: ShardedUnit) -> tuple[int, int]:
            last = len(self.stage.every) - 1
            chunk = chunks.get(unit.layer, 0 if unit.name in first else last)
            return chunk, unit.layer if self.stage.index == chunk == 0 else 0

        return [(chunk, list(units)) for (chunk, _), units in groupby(self.stage.units, which)]
