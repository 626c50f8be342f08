"""Data parallelism: gathering parameters, reducing gradients, by unit or all at once."""

from collections.abc import Sequence

from mopsim.program.context import Context
from mopsim.program.units import ShardedUnit
from mopsim.program.workload import CommGroup, Work

Message = tuple[str, float, CommGroup, str, int]
"""(kind, bytes of the full buffer, ranks, component, calls)."""


def reduction(context: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """What sums the gradients of units over all ranks that hold them: scatter over the shard, then the
    replicas; or whole, over all at once."""
    if context.sums_whole:
        return _summed(context, units)
    return _messages(context, units, float(context.reduce), "reduce_scatter", "all_reduce")


def gathering(context: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """What brings the updated parameters of units back from their shards, or from their tensors' owners."""
    if context.owned:
        return _broadcast(context, units)
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
    return [(kind, size, group, component, 1) for (kind, group, component), size in sizes.items()]


def _summed(c: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """Whole gradients over all ranks that hold a copy."""
    sizes: dict[tuple[CommGroup, str], float] = {}
    for unit in units:
        shard, replicas = c.groups[unit.group], c.groups.get(unit.replicas, CommGroup(1, 1))
        block = max(shard.block, replicas.block)
        group = CommGroup(shard.size * replicas.size, shard.intra * replicas.intra, block=block)
        sizes[group, unit.component] = sizes.get((group, unit.component), 0.0) + unit.numel * c.reduce
    found = [("all_reduce", size, group, component, 1) for (group, component), size in sizes.items()]
    return [message for message in found if message[2].size > 1]


def _broadcast(c: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """Each owner's tensors in a broadcast of their own, one after the other. Priced as gathers: over a ring
    all bytes pass each link where those of a gather of n ranks pass (n - 1) / n of them."""
    sizes: dict[tuple[CommGroup, str], list[float]] = {}
    for unit in units:
        found = sizes.setdefault((c.groups[unit.group], unit.component), [0.0, 0])
        found[0] += unit.numel * c.param
        found[1] += unit.tensors
    return [
        ("all_gather", size * group.size / (group.size - 1), group, part, min(group.size, int(tensors)))
        for (group, part), (size, tensors) in sizes.items()
        if group.size > 1
    ]


def message_work(message: Message) -> tuple[Work, ...]:
    """The work of a message."""
    kind, size, group, _, calls = message
    return (Work(kind, bytes=size, group=group, launches=calls),)


def grad_passes(context: Context, units: Sequence[ShardedUnit]) -> tuple[Work, ...]:
    """What is done with whole gradients before they are reduced (see Sharding.grad_passes)."""
    size = context.stack.sharding.grad_passes * sum(unit.numel for unit in units)
    return (Work("memory_bound", bytes=size, launches=2),) if size else ()


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
