"""The baseline runtime `fully_shard`: the model under torch FSDP2 with expert parallelism, Ulysses,
recompute and offload.

Gradients are reduce-scattered in every microbatch and accumulated in the sharded gradients: full gradients
of one unit live
at a time, which is what makes long contexts fit (the alternative, reducing once, keeps the whole model's
gradients).
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mopexec.distributed import collectives
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import NOW, category, component, phase
from mopexec.measure.tracker import recategorize
from mopexec.model import Routing
from mopexec.model.moe import kept_loads
from mopexec.modules.comm import book_gradients, local, place_on_host
from mopexec.modules.gather import Gathered, global_dtensor
from mopexec.modules.groups import make_groups
from mopexec.modules.hooks import name_gathers
from mopexec.modules.optimizer import Shard, ShardedAdamW
from mopexec.modules.wrap import build_model
from mopexec.operators.dtypes import wide
from mopexec.operators.kernels import using
from mopexec.run.runner import Batch, StepResult
from mopexec.run.shards import STEP, of_dtensor
from mopexec.weights.source import Source
from mopsim.spec.plan import Plan


class FullyShardRunner:
    """See `mopexec.run.runner.Runner`."""

    def __init__(
        self, plan: Plan, platform: Platform, routing: Literal["learned", "profile"], source: Source
    ) -> None:
        strategy = plan.strategy
        self._plan, self._platform = plan, platform
        with platform.bookkeeping():
            self._groups = make_groups(strategy, platform)
        profile = Routing.chosen(plan, routing)
        self._learned = profile.learned
        with category("params"):
            self.model: Any = build_model(plan, self._groups, platform, profile, source)
        self._host = strategy.optimizer.state_tier == "host"
        self._host_grads: dict[str, Tensor] = {}
        if self._host:
            place_on_host(self.model, platform, self._host_grads)
        else:
            book_gradients(self.model)
        for parameter in self.model.parameters():
            recategorize(local(parameter), "params")
        name_gathers(self.model)
        self._optimizer = ShardedAdamW(self._shards(), plan.training, platform, host=self._host)
        self._last_grads: dict[str, Tensor] = {}

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step: forward and backward of each microbatch, then clip and update."""
        with using(self._plan.stack.kernels):
            return self._step(batches)

    def _step(self, batches: list[Batch]) -> StepResult:
        self._host_grads.clear()
        self._last_grads = {}
        for parameter in self.model.parameters():
            parameter.grad = None
        tokens = self._plan.training.global_batch * self._plan.training.seq_len
        dtype = wide(getattr(torch, self._plan.strategy.precision.compute))
        total = torch.zeros((), dtype=dtype, device=self._platform.device)
        counted = batches[0].num_targets or tokens
        for batch in batches:
            total += self._forward_backward(batch, 1.0 / counted)
        collectives.all_reduce(total)
        with phase("optimizer"), component("optimizer"):
            grads = self._gradients()
            norm = self._optimizer.step(grads)
            self._last_grads = grads
            found = [total, norm]
            if self._learned and self._plan.model.num_moe_layers:
                found.append(
                    self.model.update_balance(
                        self._plan.training.bias_update_rate,
                        collectives.all_reduce,
                        self._plan.strategy.experts.expert_parallel,
                    )
                )
        return StepResult.fetched(found, tokens, self._platform)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """See `Runner.evaluate`."""
        training = self._plan.training
        counted = batches[0].num_targets or training.global_batch * training.seq_len
        total = torch.zeros((), dtype=torch.float64, device=self._platform.device)
        with kept_loads(self.model), using(self._plan.stack.kernels):
            for batch in batches:
                total += self.model(batch.tokens, batch.targets, 1.0 / counted, batch.documents)
        collectives.all_reduce(total)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return total.item()

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on."""
        self._optimizer.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """See `mopexec.run.shards`; shares the live memory."""
        moments = self._optimizer.state()
        steps = next(iter(moments["step"].values()), torch.zeros(()))
        state: dict[str, Any] = {STEP: steps.detach().clone().to("cpu", torch.int64)}
        for name, parameter in self.model.named_parameters():
            values = {"value": local(parameter)} | {
                kind: moments[kind].get(name, torch.empty_like(local(parameter)))
                for kind in ("exp_avg", "exp_avg_sq")
            }
            for kind, value in values.items():
                state[f"{name}.{kind}"] = of_dtensor(self._global(name, parameter, value))
        for name, buffer in self.model.named_buffers():
            state[name] = buffer
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what loading did not fill in place: the step count."""
        for step in self._optimizer.state()["step"].values():
            step.fill_(int(state[STEP]))

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter by its single-device name, whole, on every rank."""
        return self._gather({name: local(p) for name, p in self.model.named_parameters()})

    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient of the last step before clipping, by its single-device name, whole, on every
        rank."""
        full = self._gather(self._last_grads)
        return {name: grad / self._optimizer.coefficient for name, grad in full.items()}

    def _forward_backward(self, batch: Batch, scale: float) -> Tensor:
        with phase("forward"):
            loss: Tensor = self.model(batch.tokens, batch.targets, scale, batch.documents)
        with phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        NOW.component = "other"
        return loss.detach()

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's gradient shards by parameter name, where the optimizer works."""
        if self._host and not self._platform.is_cuda:
            return dict(self._host_grads)
        return {n: local(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}

    def _shards(self) -> list[Shard]:
        copies = self._groups.world // self._plan.strategy.dense.fsdp
        return [
            Shard(name, local(p), self._groups.expert_copies if ".experts." in name else copies)
            for name, p in self.model.named_parameters()
        ]

    def _global(self, name: str, parameter: DTensor, value: Tensor) -> DTensor:
        return global_dtensor(parameter, value, self._groups.experts_whole if ".experts." in name else None)

    def _gather(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        gathered = Gathered(self._plan.strategy, self._platform)
        parameters = dict(self.model.named_parameters())
        return {name: gathered.whole(name, parameters[name], shards.get(name)) for name in parameters}
