"""Pinned host memory: what a program's host allocator takes for the blocks that a strategy keeps there."""

from collections.abc import Iterable

from mopsim.program.context import Context
from mopsim.spec.layout import ceil_div
from mopsim.spec.tensors import tensors


def power_of_two(size: int) -> int:
    """Bytes (or elements) that a pinned block of `size` takes: the next power of two
    (github.com/pytorch/pytorch issue 150517). arXiv 2609.14306, table 12: 21 boundaries of 7.83 GiB pin 10.5.
    """
    return 1 << (size - 1).bit_length() if size > 0 else 0


def rounding(context: Context) -> dict[str, float]:
    """Pinned bytes over the tensors' bytes, by category; `other`: of the categories that are not named.

    A boundary is one block. Shards are pinned unit by unit, under FSDP2 tensor by tensor, where the moments
    are pageable memory.
    """
    strategy = context.strategy
    if context.stack.pinned_blocks == "as_asked":
        return {"other": 1.0}
    found = {"boundaries": _ratio([context.hidden]), "other": _ratio(_shards(context))}
    if context.stack.sharding.fsdp:
        return {**found, "optimizer": 1.0}
    total = sum(unit.shard_numel for unit in context.units())
    return {**found, "staging": _ratio([min(strategy.optimizer.bucket_params, total)])}


def _shards(context: Context) -> Iterable[int]:
    """Elements of each block of a sharded state; widths are powers of two, so they change no ratio."""
    strategy = context.strategy
    if not context.stack.sharding.fsdp:
        return [unit.shard_numel for unit in context.units()]
    how = strategy.experts
    experts = how.expert_parallel * how.expert_tensor_parallel * how.expert_fsdp
    dense = strategy.dense.tensor_parallel * strategy.dense.fsdp
    return [ceil_div(tensor.numel, experts if tensor.routed else dense) for tensor in tensors(context.model)]


def _ratio(blocks: Iterable[int]) -> float:
    sizes = [size for size in blocks if size]
    return sum(map(power_of_two, sizes)) / sum(sizes) if sizes else 1.0
