"""Data parallelism: gathering parameters, reducing gradients, by unit or all at once."""

from collections.abc import Sequence

from mopsim.program.context import Context
from mopsim.program.units import ShardedUnit
from mopsim.program.workload import CommGroup, Work

Message = tuple[str, float, CommGroup, str]
"""(kind, bytes of the full buffer, ranks, component)."""


def reduction(context: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """What sums the gradients of units over all ranks that hold them: scatter over the shard, then the
    replicas."""
    return _messages(context, units, float(context.reduce), "reduce_scatter", "all_reduce")


def gathering(context: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """What brings the updated parameters of units back from their shards."""
    return _messages(context, units, float(context.param), "all_gather", "")


def _messages(
    c: Context, units: Sequence[ShardedUnit], width: float, first: str, second: str
) -> list[Message]:
    sizes: dict[tuple[str, CommGroup, str], float] = {}
    zero = c.strategy.dense.zero
    for unit in units:
        shard, replicas = c.groups[unit.group], c.groups.get(unit.replicas, CommGroup(1, 1))
        size = unit.padded * width
        if shard.size > 1 and (zero >= 1 or second):
            kind = first if zero >= 1 else second
            sizes[kind, shard, unit.component] = sizes.get((kind, shard, unit.component), 0.0) + size
        if second and replicas.size > 1:
            part = size / shard.size if zero >= 1 else size
            sizes[second, replicas, unit.component] = (
                sizes.get((second, replicas, unit.component), 0.0) + part
            )
    return [(kind, size, group, component) for (kind, group, component), size in sizes.items()]


def message_work(message: Message) -> tuple[Work, ...]:
    """The work of a message."""
    kind, size, group, _ = message
    return (Work(kind, bytes=size, group=group),)


def put_together(context: Context, unit: ShardedUnit) -> Work:
    """The gradient of a unit's flat parameter, of those of its views (autograd's backward of torch.split, in
    torch.distributed.fsdp._flat_param: _get_unflat_views)."""
    return Work("memory_bound", bytes=2.0 * unit.numel * context.b)


def divided(context: Context, unit: ShardedUnit) -> Work:
    """A flat gradient cast to the reduce dtype and divided before it is sent
    (torch.distributed.fsdp._runtime_utils: _post_backward_hook, _div_if_needed)."""
    cast = context.b + context.reduce if context.reduce != context.b else 0
    size = float(unit.padded * (cast + 2 * context.reduce))
    return Work("memory_bound", bytes=size, launches=1 + bool(cast))
