"""Copies around the collectives of torch's FSDP2
(torch.distributed.fsdp._fully_shard._fsdp_collectives): foreach_all_gather's input, its copy-out, and
foreach_reduce_scatter_copy_in. What its Python does around them is the host's time of the copies in."""

from mopsim.graph.host_costs import GATHER, REST
from mopsim.program.context import Context
from mopsim.program.units import ShardedUnit
from mopsim.program.workload import Work, memory_work, shared


def bytes_sent(param: float, compute: float) -> float:
    """Bytes moved for each parameter of a shard that is cast to the compute dtype, if it is another, and
    copied into the buffer that is sent; param, compute: of an element."""
    return 2 * compute + (param + compute) * (param != compute)


def bytes_arrived(compute: float) -> float:
    """For each gathered parameter that is copied into a tensor of its own."""
    return 2 * compute


def bytes_reduced(compute: float, reduce: float) -> float:
    """For each full gradient that is cast to the reduce dtype and copied into the buffer that is sent."""
    return compute + reduce


def bytes_cast(c: Context, unit: ShardedUnit, *, away: bool) -> int:
    """Bytes on the device beside a sharded unit's buffer while it is filled: the shards in the compute dtype,
    or those that came from the host (`away`), one by one, if that is theirs (FSDPParam.all_gather_inputs)."""
    if c.param != c.b:
        return unit.shard_numel * c.b
    return unit.shard_numel * c.param * away


def bytes_whole(c: Context, unit: ShardedUnit, *, away: bool) -> int:
    """Highest bytes while the parameters of a unit that is whole are made one by one, of what came from the
    host (`away`) or is cast. Until the next is, each of these stays (FSDPParamGroup.wait_for_unshard)."""
    cast = c.param != c.b
    made = held = high = 0
    for size in unit.sizes:
        arrived, filled = size * c.param * away, size * c.b
        high = max(high, made + held + arrived + filled * cast)
        held = filled if cast else arrived
        made += filled
        high = max(high, made + held)
    return high


def gather_copy(c: Context, unit: ShardedUnit) -> Work:
    """Shards cast to the compute dtype and copied into the buffer that is sent."""
    size = float(unit.shard_numel * bytes_sent(c.param, c.gathered(unit)))
    return shared(Work("memory_bound", bytes=size, launches=4, host=_host(unit, GATHER, 9)))


def gathered_copy(c: Context, unit: ShardedUnit) -> Work:
    """What has arrived, copied into one tensor for each parameter, and again where that is not in order
    (Sharding.expert_dim)."""
    copied = float((unit.numel + sum(unit.across)) * bytes_arrived(c.gathered(unit)))
    return memory_work(copied, 4 + len(unit.across))


def bytes_gathered(c: Context, unit: ShardedUnit) -> tuple[int, int, int]:
    """What a copy-out takes on the device: all parameters, and until it ends a copy of those out of order."""
    aside = int(sum(unit.across) * c.gathered(unit))
    return c.whole(unit), aside, -aside


def reduce_copy(c: Context, unit: ShardedUnit, width: int) -> Work:
    """Full gradients, of elements so wide, cast to the reduce dtype and copied into the buffer that is
    sent; first put in order (Sharding.expert_dim)."""
    size, copied = float(unit.padded * bytes_reduced(width, c.reduce)), float(unit.padded)
    size, launches = size + sum(unit.across) * bytes_reduced(width, width), 4 + len(unit.across)
    host = _host(unit, REST, 6)
    return shared(Work("memory_bound", bytes=size, chunked=copied, launches=launches, host=host))


def bytes_reordered(unit: ShardedUnit, width: int) -> tuple[int, int]:
    """What a loop takes beside the full gradients, of elements so wide, that it puts in order one by one: at
    most, and for the last one, which it holds."""
    across = unit.across or (0,)
    return max(across) * width, across[-1] * width


def summed(c: Context, unit: ShardedUnit, *, first: bool) -> Work:
    """A microbatch's full gradients cast to the sums' dtype, or added to the sums of those before
    (_fsdp_param: to_accumulated_grad_if_needed, accumulate_unsharded_grad_if_needed): one kernel for each,
    none where the first ones' dtype is that of the sums (one of no bytes stands for what the host does). Its
    hooks are taken to cost the host what they do where they reduce."""
    moved = (c.b + c.reduce) * (c.b != c.reduce) if first else c.b + 2 * c.reduce
    started = unit.tensors if moved else 1
    host = _host(unit, REST, started)
    return Work("memory_bound", bytes=float(unit.numel * moved), launches=started, host=host)


def _host(unit: ShardedUnit, cost: tuple[float, float], started: int) -> float:
    """What a group of parameters takes of the host beside the copies and collectives that it starts."""
    alone, each = cost
    return max(0.0, alone + each * unit.tensors - started)
