"""Data parallelism: gathering parameters, reducing gradients, by unit or all at once."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from mopsim.graph.host_costs import FLAT
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.template import Memory
from mopsim.program.units import ShardedUnit
from mopsim.program.workload import CommGroup, Work

Message = tuple[str, Work]
"""(component, collective over the full buffer)."""
Sizes = dict[tuple[str, CommGroup, str], float]
"""Bytes by kind, ranks and component."""


def reduction(context: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """What sums the gradients of units over all ranks that hold them: scatter over the shard, then the
    replicas; or whole, over all at once."""
    if context.sums_whole:
        return _summed(context, units)
    return _messages(context, units, lambda _: float(context.reduce), "reduce_scatter", "all_reduce")


def gathering(context: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """What brings the updated parameters of units back from their shards, or from their tensors' owners."""
    if context.owned:
        return _broadcast(context, units)
    stack, zero = context.stack, context.strategy.dense.zero

    def width(unit: ShardedUnit) -> float:
        if unit.layer < 0 or unit.component in stack.kernels.exact:
            return float(context.param)
        return stack.updated(context.precision(unit.layer), zero)

    return _messages(context, units, width, "all_gather", "")


def _messages(
    c: Context, units: Sequence[ShardedUnit], width: Callable[[ShardedUnit], float], first: str, second: str
) -> list[Message]:
    sizes: Sizes = defaultdict(float)
    split = c.strategy.dense.zero >= 1
    for unit in units:
        shard, replicas = c.groups[unit.group], c.groups.get(unit.replicas, CommGroup(1, 1))
        size = unit.padded * width(unit)
        if split or second:
            sizes[first if split else second, shard, unit.component] += size
        if second:
            sizes[second, replicas, unit.component] += size / shard.size if split else size
    return _collectives(c, sizes)


def _summed(c: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """Whole gradients over all ranks that hold a copy."""
    sizes: Sizes = defaultdict(float)
    for unit in units:
        shard, replicas = c.groups[unit.group], c.groups.get(unit.replicas, CommGroup(1, 1))
        block = max(shard.block, replicas.block)
        group = CommGroup(shard.size * replicas.size, shard.intra * replicas.intra, block=block)
        sizes["all_reduce", group, unit.component] += unit.numel * c.reduce
    return _collectives(c, sizes)


def _collectives(c: Context, sizes: Sizes) -> list[Message]:
    """Those of several ranks."""
    channels = c.stack.sharding.channels
    return [
        (part, Work(kind, bytes=size, group=group, channels=channels))
        for (kind, group, part), size in sizes.items()
        if group.size > 1
    ]


def _broadcast(c: Context, units: Sequence[ShardedUnit]) -> list[Message]:
    """Each owner's tensors in a broadcast of their own, one after the other. Priced as gathers: over a ring
    all bytes pass each link where those of a gather of n ranks pass (n - 1) / n of them."""
    groups: dict[tuple[CommGroup, str], list[ShardedUnit]] = defaultdict(list)
    for unit in units:
        groups[c.groups[unit.group], unit.component].append(unit)
    found = []
    for (group, part), mine in groups.items():
        size, calls = (sum(unit.numel * c.param for unit in mine), sum(unit.tensors for unit in mine))
        if group.size > 1:
            whole, launches = float(size) * group.size / (group.size - 1), min(group.size, calls)
            found.append((part, Work("all_gather", bytes=whole, group=group, launches=launches)))
    return found


def grad_passes(context: Context, units: Sequence[ShardedUnit]) -> tuple[Work, ...]:
    """What is done with whole gradients before they are reduced (see Sharding.grad_passes)."""
    sharding, read_and_written = context.stack.sharding, 2.0 * context.b
    room = sharding.reduce_buffer or math.inf
    whole = [unit.numel for unit in units if unit.largest * context.b > room] if sharding.grad_passes else []
    others = sum(unit.numel for unit in units) - sum(whole)
    size = sharding.grad_passes * others + read_and_written * sum(whole)
    return (Work("memory_bound", bytes=size, launches=2),) if size else ()


def scaled(context: Context, units: Sequence[ShardedUnit], *, summed: bool = False) -> tuple[Work, ...]:
    """Multiplies whole gradients of units, before they are summed or after (see Sharding.scaled)."""
    way, strategy = context.stack.sharding.scaled, context.strategy
    ranks = strategy.dense_replicas
    if way == "none" or strategy.dense.zero >= 2 or summed != (way == "tokens"):
        return ()
    if way == "experts":
        units = [one for one in units if one.component == "experts" and one.copies != ranks]
    elements = sum(unit.padded for unit in units) if summed or ranks > 1 else 0
    return (Work("memory_bound", bytes=2.0 * elements * context.grad),) if elements else ()


def flat_host(context: Context, unit: ShardedUnit, part: str, started: int = 0) -> float:
    """What a unit of FSDP1 takes of the host beside the copies and collectives that it starts. The root is
    one unit, whose time lies on the embedding, unless stages of a pipeline share it."""
    alone, each = FLAT.get(context.stack.sharding.flat, {}).get(part, (0.0, 0.0))
    root = unit.layer < 0 and context.strategy.pipeline.pipeline_parallel == 1
    if root and unit.name != "embedding":
        return 0.0
    mine = context.edges.values() if root else (unit,)
    count = sum(one.tensors for one in mine)
    wrapped = count if context.stack.sharding.groups == "each" else 1
    return max(0.0, alone * wrapped + each * count - started)


def prepared(context: Context, unit: ShardedUnit) -> tuple[tuple[Work, ...], Memory, tuple[Work, ...]]:
    """What is done with a unit's whole gradient before it is reduced, what that takes for a moment, and what
    is done with the reduction."""
    if context.stack.sharding.flat:
        return (put_together(context, unit),), (), (divided(context, unit),)
    dense = context.strategy.dense
    size = int(unit.largest * checked(context, sent=True)) if dense.grad_tier == "host" else 0
    return grad_passes(context, [unit]), (("framework", size), ("framework", -size)) if size else (), ()


def checked(context: Context, *, sent: bool) -> float:
    """Bytes for each number of a gradient at most while the device checks it (Sharding.check_copies): as it
    goes to the host (`sent`), or before an update."""
    sharding, strategy = context.stack.sharding, context.strategy
    if strategy.dense.zero not in (1, 2) or context.keeps_grads:
        return 0.0
    wide = context.wide if context.grad < context.wide else 0
    scaled = strategy.precision.compute == "float16"
    searched = bool(sharding.search_copies) and (sent or scaled or sharding.searched == "always")
    return max(sharding.check_copies, searched * (wide + sharding.search_copies))


def put_together(context: Context, unit: ShardedUnit) -> Work:
    """The gradient of a unit's flat parameter, of those of its views (autograd's backward of torch.split, in
    torch.distributed.fsdp._flat_param: _get_unflat_views)."""
    size, host = 2.0 * unit.numel * context.b, flat_host(context, unit, "rest", 4)
    return Work("memory_bound", bytes=size, host=host)


def divided(context: Context, unit: ShardedUnit) -> Work:
    """A flat gradient cast to the reduce dtype and divided before it is sent
    (torch.distributed.fsdp._runtime_utils: _post_backward_hook, _div_if_needed)."""
    cast = context.b + context.reduce if context.reduce != context.b else 0
    size = float(unit.padded * (cast + 2 * context.reduce))
    return Work("memory_bound", bytes=size, launches=1 + bool(cast))


def shared_embedding(context: Context, issue: Builder, reductions: Sequence[int]) -> int:
    """The first and the last stage add up what each found for an embedding of which both have a copy."""
    size = float(context.edges["embedding"].padded * context.reduce)
    work = (Work("all_reduce", bytes=size, group=context.groups["stage"]),)
    name = "shared embedding"
    return issue.add(name, "stage scale_out", "embedding", "backward", work, tuple(reductions), (), name)
