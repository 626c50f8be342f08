"""The baseline runtime `fully_shard`: the model under torch FSDP2 with expert parallelism, Ulysses,
recompute and offload.

Gradients are reduce-scattered in every microbatch and accumulated in the sharded gradients: full gradients
of one unit live
at a time, which is what makes long contexts fit (the alternative, reducing once, keeps the whole model's
gradients).
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category
from mopexec.measure.tracker import recategorize
from mopexec.model import Routing
from mopexec.modules.comm import book_gradients, local, place_on_host
from mopexec.modules.fsdp_internals import name_gathers
from mopexec.modules.groups import make_groups
from mopexec.modules.optimizer import Shard, ShardedAdamW
from mopexec.modules.runner import ModuleRunner
from mopexec.modules.wrap import build_model
from mopexec.operators.adamw import decays
from mopexec.run.runner import Batch
from mopexec.run.shards import FlatShards, of_dtensor
from mopexec.weights.source import Source
from mopsim.spec.plan import Plan


class FullyShardRunner(ModuleRunner):
    """See `ModuleRunner`."""

    def __init__(
        self, plan: Plan, platform: Platform, routing: Literal["learned", "profile"], source: Source
    ) -> None:
        profile = Routing.chosen(plan, routing)
        super().__init__(plan, platform, profile)
        with platform.bookkeeping():
            self._groups = make_groups(plan.strategy, platform)
        with category("params"):
            self.model = build_model(plan, self._groups, platform, profile, source)
        self._host = plan.strategy.optimizer.state_tier == "host"
        self._host_grads: dict[str, Tensor] = {}
        if self._host:
            place_on_host(self.model, platform, self._host_grads)
        else:
            book_gradients(self.model)
        for parameter in self.model.parameters():
            recategorize(local(parameter), "params")
        name_gathers(self.model)
        copies = self._groups.world // plan.strategy.dense.fsdp
        shards = [
            Shard(
                name, local(p), self._groups.expert_copies if ".experts." in name else copies,
                () if decays(name) else ((0, local(p).numel()),),
            )
            for name, p in self.model.named_parameters()
        ]  # fmt: skip
        self._optimizer = ShardedAdamW(shards, plan.training, platform, host=self._host)

    def _drop_gradients(self) -> None:
        self._host_grads.clear()
        for parameter in self.model.parameters():
            parameter.grad = None

    def _loss(self, batch: Batch, scale: float) -> Tensor:
        loss: Tensor = self.model(batch.tokens, batch.targets, scale, batch.documents)
        return loss

    def _evaluate(self, batches: list[Batch], scale: float) -> Iterator[Tensor]:
        for loss in super()._evaluate(batches, scale):
            yield loss.double()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _gradients(self) -> dict[str, Tensor]:
        if self._host and not self._platform.is_cuda:
            return dict(self._host_grads)
        return {n: local(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}

    def _pieces(self, shards: Mapping[str, Tensor]) -> dict[str, FlatShards]:
        """A shard that is not there (as of a padded rest) is zero."""
        found = {}
        for name, parameter in self.model.named_parameters():
            value = shards[name] if name in shards else torch.zeros_like(local(parameter))
            found[name] = of_dtensor(self._groups.global_dtensor(name, parameter, value))
        return found
