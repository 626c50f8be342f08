"""What the host does for the end of a step, by part (mopsim.graph.host_costs)."""

import math
from dataclasses import dataclass, field

from mopsim.graph import host_costs
from mopsim.program.context import Context
from mopsim.program.stage import Stage
from mopsim.program.units import ShardedUnit, module_tensors

BUCKET, BUCKET_EACH = 40e6, 1e6
"""Parameters of a bucket, at least, and for each rank (bucket_size in megatron/core/distributed/
distributed_data_parallel.py, infinite where reductions are not overlapped and on later stages). A rank's
share of one begins and ends within tensors."""


@dataclass(frozen=True)
class UpdateHost:
    """Linears of the host, the kernels that it starts included. norm: before the norm is known. clip: between
    it and AdamW. update: of AdamW. parameters: after it. zero: what a step ends with, which is for the next
    one. logs: of what is read for a log. tensors: kernels of a pass that has one for each. waits: the
    host reads something at the end."""

    norm: float = 0.0
    clip: float = 0.0
    update: float = 0.0
    parameters: float = 0.0
    zero: float = 0.0
    logs: dict[str, float] = field(default_factory=dict)
    tensors: int = 0
    waits: bool = False

    @classmethod
    def of(cls, c: Context, stage: Stage) -> "UpdateHost":
        """Of a stage. What torch's optimizer takes lies on the update."""
        host, sharding = c.stack.host, c.stack.sharding
        if host.layers in host_costs.UPDATES and not sharding.fsdp:
            return cls._one_by_one(c, stage)
        each = host_costs.UPDATE_SHARDED if sharding.copies else host_costs.UPDATE if host.modules else 0.0
        flat = sharding.flat
        alone, each = host_costs.FLAT[flat]["update"] if flat and c.strategy.dense.zero >= 2 else (0.0, each)
        together = {(unit.layer, unit.copies, c.groups[unit.group]) for unit in stage.units}
        return cls(update=alone * len(together) + each * sum(unit.tensors for unit in stage.units))

    @classmethod
    def _one_by_one(cls, c: Context, stage: Stage) -> "UpdateHost":
        whole = [_tensors(c, unit) for unit in stage.units]
        groups: dict[int, tuple[float, float]] = {}
        for unit, tensors in zip(stage.units, whole, strict=True):
            shard = unit.shard if c.strategy.dense.zero else 1
            count, size = groups.get(shard, (0.0, 0.0))
            groups[shard] = count + tensors, size + unit.numel
        bucketed = stage.is_first and bool(c.strategy.overlap.grad_reduce)
        mine = sum(
            min(
                tensors,
                tensors / shard + (size / max(BUCKET, BUCKET_EACH * shard) if bucketed else 1) * (shard > 1),
            )
            for shard, (tensors, size) in groups.items()
        )
        if not c.stack.host.modules:
            return cls(tensors=math.ceil(mine), waits=True)
        kind = "aware" if c.widens else "wide" if c.grad >= c.wide else "narrow"
        cost = host_costs.UPDATES[c.stack.host.layers][kind]
        zero = mine * cost["zero"] + sum(whole) * host_costs.UPDATE_MODEL + host_costs.UPDATE_STEP
        parts = {part: mine * cost[part] for part in ("norm", "clip", "update", "parameters")}
        logs = {name: step + mine * each for name, (step, each) in host_costs.UPDATE_LOGS.items()}
        return cls(**parts, zero=zero, logs=logs, tensors=math.ceil(mine), waits=True)


def _tensors(c: Context, unit: ShardedUnit) -> int:
    """Parameters of a unit in modules of Transformer Engine: joined projections, experts each."""
    if unit.layer < 0:
        return unit.tensors
    routed = unit.component == "experts"
    return module_tensors(c.model, unit.layer, routed) * (c.own_experts if routed else 1)
