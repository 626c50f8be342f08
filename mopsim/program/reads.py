"""What the host reads to stop where a loss or gradients are no numbers (HostCosts.loss_read, grads_read)."""

from collections.abc import Sequence
from dataclasses import dataclass

from mopsim.program.context import Context
from mopsim.program.units import ShardedUnit
from mopsim.program.update_host import BUCKET, BUCKET_EACH
from mopsim.program.workload import Work

_ANSWERS = 5
"""Kernels and copies: isnan and isinf (of a magnitude) of one number, and their answers."""
LOSS = (Work("memory_bound", launches=_ANSWERS),)


@dataclass
class GradNorms:
    """Norms of gradients before they are reduced: of all at once, or, while the backward goes on, of buckets.
    first: of a first stage, whose buckets are of some size (BUCKET). left: of a bucket."""

    context: Context
    first: bool
    left: float = 0.0

    def work(self, units: Sequence[ShardedUnit]) -> tuple[Work, ...]:
        """Norms of these units' gradients, and answers of buckets that are full."""
        c = self.context
        if not c.stack.host.grads_read or not units:
            return ()
        size, buckets = sum(unit.numel for unit in units), 1
        if c.strategy.overlap.grad_reduce:
            ranks = max(c.groups[unit.group].size for unit in units)
            self.left += size / max(BUCKET, BUCKET_EACH * ranks) if self.first else 0.0
            buckets = int(self.left)
            self.left -= buckets
        launches = max(1, buckets) + _ANSWERS * buckets
        return (Work("memory_bound", bytes=float(size * c.grad), launches=launches),)
