"""Copies around the collectives of torch's FSDP2, in either lowering
(torch.distributed.fsdp._fully_shard._fsdp_collectives): foreach_all_gather's input, its copy-out, and
foreach_reduce_scatter_copy_in."""

from mopsim.lowering.context import Context
from mopsim.lowering.units import Unit
from mopsim.lowering.workload import Work


def gather_copy(c: Context, unit: Unit) -> Work:
    """Shards cast to the compute dtype and copied into the buffer that is sent."""
    return Work("memory_bound", bytes=float(unit.shard_numel * (c.param + 3 * c.b)), launches=4)


def gathered_copy(c: Context, unit: Unit) -> Work:
    """What has arrived, copied into one tensor for each parameter."""
    return Work("memory_bound", bytes=2.0 * unit.numel * c.b, launches=4)


def reduce_copy(c: Context, unit: Unit) -> Work:
    """Full gradients cast to the reduce dtype and copied into the buffer that is sent."""
    return Work("memory_bound", bytes=float(unit.padded * (c.b + c.reduce)), launches=4)
