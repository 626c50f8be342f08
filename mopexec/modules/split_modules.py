"""The runtime `split_modules`: whole parameters on the ranks that need them in flat buffers, optimizer states
sharded over the data ranks (ZeRO-1), as Megatron-LM trains.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mopexec.measure.scope import category, uncounted
from mopexec.modules.masters import Masters
from mopexec.modules.optimizer import ShardedAdamW
from mopexec.modules.runner import ModuleRunner
from mopexec.modules.zero1 import adopt, buffers_of
from mopexec.run.shards import ParameterPieces
from mopexec.weights.source import Source


class SplitRunner(ModuleRunner):
    """See `ModuleRunner`. A shard is this rank's part of a buffer."""

    def _store(self, source: Source) -> None:
        plan, network, platform = self._plan, self._network, self._platform
        self._buffers = buffers_of(network, plan.strategy.precision, self._mesh, platform)
        with category("params"):
            adopt(self.model, self._buffers.all)
            network.tie()
            network.reset_routers(source)
        self._masters = Masters(self._buffers, plan.strategy, platform)
        if not platform.fake:
            with uncounted():
                self._masters.fill(source)
        self._optimizer = ShardedAdamW(
            self._masters.shards(), plan.training, platform, host=self._masters.host
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what loading did not fill in place: the step count; parameters follow their masters."""
        super().load_state_dict(state)
        self._updated()

    def _drop_gradients(self) -> None:
        for buffer in self._buffers.all:
            buffer.grads.zero_()

    def _gradients(self) -> dict[str, Tensor]:
        self._buffers.reduce()
        return self._masters.gradients()

    def _updated(self) -> None:
        self._masters.write_back()
        self._buffers.gather()

    def _parameters(self) -> dict[str, Tensor]:
        return {buffer.key: buffer.part(buffer.values) for buffer in self._buffers.all}

    def _pieces(self, shards: Mapping[str, Tensor]) -> dict[str, ParameterPieces]:
        """A shard that is not there (of what is not trained) is zero."""
        found = {}
        for name, buffer in self._buffers.named():
            part = shards[buffer.key] if buffer.key in shards else torch.zeros_like(buffer.part(buffer.grads))
            found[name] = buffer.pieces(name, part)
        return found
