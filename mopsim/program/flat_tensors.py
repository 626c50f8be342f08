"""Flat tensors that only the end of a step has, in blocks of the caching allocator of their own."""

from mopsim.program.context import Context
from mopsim.program.loss import logit_elements
from mopsim.program.stage import Stage


def flat_bytes(context: Context, stage: Stage) -> int:
    """Bytes of those of the reductions or of the update, whichever are more (see Sharding.update_copies);
    none where the last stage's logits in fp32 have left blocks as large."""
    c, sharding = context, context.stack.sharding
    if c.strategy.dense.zero != 1:
        return 0
    summed = any(unit.copies > 1 for unit in stage.units)
    found = sharding.reduce_copies * summed * sum(unit.padded for unit in stage.units)
    if c.grad < c.wide:
        here = sum(stage.updated) * (1 - stage.away)
        found = max(found, sharding.buckets * summed, sharding.update_copies * here)
    largest = logit_elements(c) * c.wide if stage.is_last else 0
    return int(found) if found > largest else 0
