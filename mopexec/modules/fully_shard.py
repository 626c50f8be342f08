"""The runtime `fully_shard`: parameters, gradients and optimizer states under torch FSDP2.

Gradients are reduce-scattered in every microbatch and accumulated in the sharded gradients: full gradients
of one unit live at a time, which is what makes long contexts fit (the alternative, reducing once, keeps the
whole model's gradients).
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mopexec.distributed import collectives
from mopexec.measure.scope import category
from mopexec.measure.tracker import recategorize
from mopexec.modules.comm import book_gradients, local, place_on_host
from mopexec.modules.fsdp_internals import name_gathers, put_off_reductions
from mopexec.modules.optimizer import Shard, ShardedAdamW
from mopexec.modules.runner import ModuleRunner
from mopexec.modules.slices import pieces
from mopexec.modules.wrap import store
from mopexec.operators.adamw import decays
from mopexec.run.runner import Batch
from mopexec.run.shards import ParameterPieces
from mopexec.weights.source import Source


class FullyShardRunner(ModuleRunner):
    """See `ModuleRunner`. A shard is this rank's of a parameter."""

    def _store(self, source: Source) -> None:
        plan, platform, model = self._plan, self._platform, self.model
        with category("params"):
            self._parts = store(self._network, plan.strategy, self._mesh, platform, source)
            self._network.reset_routers(source)
        self._host = plan.strategy.optimizer.state_tier == "host"
        self._host_grads: dict[str, Tensor] = {}
        if self._host:
            place_on_host(model, platform, self._host_grads)
        else:
            book_gradients(model)
        for parameter in model.parameters():
            recategorize(local(parameter), "params")
        name_gathers(model)
        if plan.strategy.pipeline.splits:
            put_off_reductions(model)
        shards = [
            Shard(
                name, local(p), self._network.copies(name),
                () if decays(name) else ((0, local(p).numel()),),
            )
            for name, p in model.named_parameters()
        ]  # fmt: skip
        self._optimizer = ShardedAdamW(shards, plan.training, platform, host=self._host)

    def _drop_gradients(self) -> None:
        self._host_grads.clear()
        for parameter in self.model.parameters():
            parameter.grad = None

    def _evaluate(self, batches: list[Batch], scale: float) -> Iterator[Tensor]:
        for loss in super()._evaluate(batches, scale):
            yield loss.double()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _gradients(self) -> dict[str, Tensor]:
        if self._host and not self._platform.is_cuda:
            found = dict(self._host_grads)
        else:
            found = {n: local(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}
        self._sum_whole([grad for name, grad in found.items() if self._parts[name].kind == "whole"])
        return found

    def _sum_whole(self, grads: list[Tensor]) -> None:
        """Sum what the ranks of a tensor group found for parameters that each has whole, all at once, on the
        device."""
        tensor, platform = self._mesh.tensor, self._platform
        if tensor.size == 1 or not grads:
            return
        sizes = list(map(Tensor.numel, grads))
        with category("grads"):
            flat = grads[0].new_empty(sum(sizes), device=platform.device)
        parts = [part.view_as(grad) for part, grad in zip(torch.split(flat, sizes), grads, strict=True)]
        for part, grad in zip(parts, grads, strict=True):
            platform.copy(part, grad)
        collectives.all_reduce(flat, tensor.handle)
        for part, grad in zip(parts, grads, strict=True):
            platform.copy(grad, part)
        if self._host:
            platform.wait_host(platform.record())

    def _pieces(self, shards: Mapping[str, Tensor]) -> dict[str, ParameterPieces]:
        """A shard that is not there (as of a padded rest) is zero."""
        found = {}
        for name, parameter in self.model.named_parameters():
            value = shards[name] if name in shards else torch.zeros_like(local(parameter))
            found[name] = pieces(self._parts[name], value)
        return found
