"""The runtime `split_modules`: whole parameters on the ranks that need them, as Megatron-LM trains: tensor
(with sequence), expert and expert-tensor parallelism, optimizer states sharded over the data ranks.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import build_mesh
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import uncounted
from mopexec.model import Routing
from mopexec.modules.masters import Masters
from mopexec.modules.optimizer import ShardedAdamW
from mopexec.modules.runner import ModuleRunner
from mopexec.modules.split_model import SplitModel
from mopexec.run.runner import Batch
from mopexec.run.shards import FlatShards
from mopexec.weights.source import Source
from mopsim.spec.plan import Plan


class SplitRunner(ModuleRunner):
    """See `ModuleRunner`. A shard is this rank's part of a buffer."""

    def __init__(
        self, plan: Plan, platform: Platform, routing: Literal["learned", "profile"], source: Source
    ) -> None:
        profile = Routing.chosen(plan, routing)
        super().__init__(plan, platform, profile)
        with platform.bookkeeping():
            self._groups = build_mesh(plan.strategy, platform)
        self._split = SplitModel(plan, self._groups, platform, profile, source)
        self.model, self._buffers = self._split.network, self._split.buffers
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

    def _train(self, batches: list[Batch], scale: float) -> Iterator[Tensor]:
        if (pipeline := self._split.pipeline) is None:
            return super()._train(batches, scale)
        return pipeline.step(len(batches), self._split.part(batches, scale))

    def _evaluate(self, batches: list[Batch], scale: float) -> Iterator[Tensor]:
        if (pipeline := self._split.pipeline) is None:
            return super()._evaluate(batches, scale)
        return pipeline.evaluate(len(batches), self._split.part(batches, scale))

    def _loss(self, batch: Batch, scale: float) -> Tensor:
        return self._split.loss(batch, scale)

    def _gradients(self) -> dict[str, Tensor]:
        self._buffers.reduce()
        return self._masters.gradients()

    def _updated(self) -> None:
        self._masters.write_back()
        self._buffers.gather()

    def _balanced(self) -> Tensor:
        told, pipeline = super()._balanced(), self._groups.pipeline
        if pipeline.size == 1:
            return told
        layers = sum(layer.is_moe for layer in self.model.blocks())
        told[0] = told[0].nan_to_num() * layers
        both = torch.cat((told, told.new_full((1,), layers)))
        collectives.all_reduce(both, pipeline.handle)
        both[0] /= both[-1]
        return both[:-1]

    def _sum_loads(self, load: Tensor) -> None:
        if self._groups.stage.size > 1:
            collectives.all_reduce(load, self._groups.stage.handle)

    def _parameters(self) -> dict[str, Tensor]:
        return {buffer.key: buffer.part(buffer.values) for buffer in self._buffers.all}

    def _pieces(self, shards: Mapping[str, Tensor]) -> dict[str, FlatShards]:
        """A shard that is not there (of what is not trained) is zero."""
        found = {}
        for name, buffer in self._buffers.named():
            part = shards[buffer.key] if buffer.key in shards else torch.zeros_like(buffer.part(buffer.grads))
            found[name] = buffer.pieces(name, part)
        return found
