"""The weights that AdamW updates: this rank's parts of the buffers themselves, or masters of their own, on
the device or on the host, where the update then runs too (arXiv 2101.06840).
"""

import torch
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, host_compute
from mopexec.modules.optimizer import Shard
from mopexec.modules.zero1 import Buffer, Buffers
from mopexec.operators.dtypes import of_name
from mopexec.weights.load import matrices
from mopexec.weights.source import Source
from mopsim.spec.strategy import Strategy


class Masters:
    """Masters by buffer."""

    def __init__(self, buffers: Buffers, strategy: Strategy, platform: Platform) -> None:
        self._buffers, self._platform = buffers, platform
        self.host = strategy.optimizer.state_tier == "host"
        self._own = strategy.precision.master != "param"
        self._dtype = of_name(strategy.precision.masters)
        self._down: dict[str, Tensor] = {}
        self._narrow: Tensor | None = None
        self.values: dict[str, Tensor] = {buffer.key: self._make(buffer) for buffer in buffers.all}

    def _make(self, buffer: Buffer) -> Tensor:
        part = buffer.part(buffer.values)
        if self.host:
            with host_compute():
                return self._platform.host_empty(part.shape, self._dtype, "optimizer").zero_()
        if not self._own:
            return part
        with category("optimizer"):
            return torch.zeros_like(part, dtype=self._dtype)

    @torch.no_grad()
    def fill(self, source: Source) -> None:
        """Parameters and masters become the source's values, each in its own dtype: masters are not rounded
        to the parameters'. One matrix at a time.
        """
        for name, buffer in self._buffers.named():
            block, at, master = buffer.blocks[name], 0, self.values[buffer.key]
            for _, values in matrices(name, block.shape, block.start, block.size, source):
                buffer.fill(name, at, values, master)
                at += values.numel()

    def shards(self) -> list[Shard]:
        """What the optimizer has states of: every buffer, trained or not, as checkpoints and predictions have
        it. One without gradients (`gradients`) it leaves as it is; reduced and gathered it is all the same.
        """
        return [Shard(b.key, self.values[b.key], b.copies, b.undecayed) for b in self._buffers.all]

    def gradients(self) -> dict[str, Tensor]:
        """This rank's parts of the reduced gradients of what is trained, where the optimizer works; on the
        host in memory that is kept, for a pinned block takes a system call.
        """
        parts: dict[str, Tensor] = {b.key: b.part(b.grads) for b in self._buffers.all if b.trained}
        if not self.host:
            return parts
        for key, part in parts.items():
            if key not in self._down:
                self._down[key] = self._platform.host_empty(part.shape, part.dtype, "grads")
            self._platform.copy(self._down[key], part)
        self._platform.wait_host(self._platform.record())
        return self._down

    def write_back(self) -> None:
        """Updated masters to the parameters."""
        for buffer in self._buffers.all:
            master, part = self.values[buffer.key], buffer.part(buffer.values)
            if self.host:
                with host_compute():
                    narrow = self._staging(part.dtype).narrow(0, 0, part.numel()).copy_(master)
                self._platform.copy(part, narrow)
                self._platform.wait_host(self._platform.record())  # the next buffer is written there
            elif self._own:
                part.copy_(master)

    def _staging(self, dtype: torch.dtype) -> Tensor:
        """Host memory that holds any buffer's part in the parameters' dtype, kept."""
        if self._narrow is None:
            largest = max(master.numel() for master in self.values.values())
            self._narrow = self._platform.host_empty((largest,), dtype, "params")
        return self._narrow
