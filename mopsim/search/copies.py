"""What torch's FSDP2, or flat units, copy between shards and the buffers of collectives, for a whole space at
once."""

import numpy as np

from mopsim.cost.compute import chunk_cat
from mopsim.program.fsdp2_copies import bytes_arrived, bytes_reduced, bytes_sent
from mopsim.program.pairs.flat_units import bytes_added, bytes_cast, bytes_first
from mopsim.search.footprint import Footprint
from mopsim.search.wires import Reals
from mopsim.spec.sharding import during


class Copies(Footprint):
    """Of each row of a space, at least."""

    def scale(self, kind: str) -> float:
        return self.wires.scale(kind)

    def gathers(self) -> Reals:
        """How often a layer's weights are gathered for a microbatch: for its forward and, freed after that,
        its backward, if no pass before has left them there."""
        reshard, many = self.c["reshard"], self.microbatches
        stays = during(self.space.stack.sharding.stays, self.c["pipeline"])
        return np.asarray(np.where(stays, reshard + 1 / many, reshard + 1))

    def reductions(self) -> Reals:
        """How often a layer's gradients are reduced for a microbatch."""
        once = during(self.space.stack.sharding.whole_sums, self.c["pipeline"])
        return np.asarray(np.where(once, 1 / self.microbatches, 1.0))

    def _reduced(self) -> Reals:
        """Bytes moved for each gradient of a microbatch that torch's FSDP2 copies to be reduced, or adds to
        the sum of those before, which is copied once."""

        def copied(width: float) -> float:
            moved = bytes_reduced(width, self.reduce)
            return max(moved, self.scale("memory_bound") * chunk_cat(moved) / self.traffic)

        many, wider = self.microbatches, self.compute != self.reduce
        sums = (self.compute + self.reduce) * wider + (many - 1) * (self.compute + 2 * self.reduce)
        once = (sums + copied(self.reduce)) / many
        apart = (self.reductions() == 1) | (many == 1)
        return np.asarray(np.where(apart, copied(self.compute), once))

    @property
    def layers_dense(self) -> float:
        """Parameters of all but the experts, the embedding and the head."""
        return float(self.sizes.dense - self.model.vocab_size * self.model.hidden_size)

    @property
    def copied_shards(self) -> bool:
        """Whether torch's FSDP2, or flat units, copy what they gather and reduce."""
        copies = self.flat or self.space.stack.sharding.copies
        return bool(copies and (self.c["zero"] == 3).all())

    def copies(self, dense: Reals | float, routed: Reals | float) -> Reals:
        """Seconds in which torch's FSDP2, or flat units, cast, zero, copy and add on the compute stream what
        they gather and reduce of so many parameters (of all but experts, of experts) on the ranks that have
        them."""
        c, found = self.c, np.zeros(len(self.space))
        flat = self.flat
        if not self.copied_shards:
            return found
        dense, routed = dense / c["tensor"], routed / (c["experts"] * c["expert_tensor"])
        for params, shard in ((dense, c["dense_shard"]), (routed, c["expert_shard"])):
            if flat:
                gathered = bytes_cast(self.param, self.compute) / shard
                added, first = (one(self.reduce, self.grad) for one in (bytes_added, bytes_first))
                summed = added - self.early * (added - first) / self.microbatches
                reduced = summed / shard + self.reduce
            else:
                gathered = bytes_sent(self.param, self.sent) / shard + bytes_arrived(self.sent)
                reduced = self._reduced()
            each = self.gathers() * gathered + reduced
            found = found + np.where(shard > 1, params * each, 0.0)
        return np.asarray(found * self.microbatches * self.traffic)

    @property
    def traffic(self) -> float:
        """Seconds of a byte of memory traffic."""
        return self.scale("memory_bound") / self.hardware.device.memory_bandwidth.si
