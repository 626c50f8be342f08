"""The runtime `split_modules`: whole parameters on the ranks that need them, as Megatron-LM trains: tensor
(with sequence), expert and expert-tensor parallelism, optimizer states sharded over the data ranks.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import NOW, component, phase
from mopexec.model import Routing
from mopexec.model.moe import kept_loads
from mopexec.modules.masters import Masters, whole
from mopexec.modules.optimizer import ShardedAdamW
from mopexec.modules.split_model import SplitModel
from mopexec.modules.stage_groups import make_groups
from mopexec.operators.kernels import using
from mopexec.run.runner import Batch, StepResult
from mopexec.run.shards import STEP
from mopexec.weights.source import Source
from mopsim.spec.plan import Plan


class SplitRunner:
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
        self.model = SplitModel(plan, self._groups, platform, profile, source)
        self._masters = Masters(self.model.buffers, strategy, platform)
        self._optimizer = ShardedAdamW(
            self._masters.shards(), plan.training, platform, host=self._masters.host
        )
        self._last_grads: dict[str, Tensor] = {}

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step: forward and backward of each microbatch, then clip and update."""
        with using(self._plan.stack.kernels):
            return self._step(batches)

    def _step(self, batches: list[Batch]) -> StepResult:
        self._last_grads = {}
        buffers = self.model.buffers
        for buffer in buffers.all:
            buffer.grads.zero_()
        training, strategy = self._plan.training, self._plan.strategy
        tokens = training.global_batch * training.seq_len
        counted = batches[0].num_targets or tokens
        total = self.model.forward_backward(batches, 1.0 / counted)
        collectives.all_reduce(total)
        NOW.component = "other"
        with phase("optimizer"), component("optimizer"):
            buffers.reduce()
            grads = self._masters.gradients()
            norm = self._optimizer.step(grads)
            self._masters.write_back()
            buffers.gather()
            self._last_grads = grads
            found = [total / strategy.dense.tensor_parallel, norm]
            if self._learned and self._plan.model.num_moe_layers:
                found.append(self._balanced())
        return StepResult.fetched(found, tokens, self._platform)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """See `Runner.evaluate`."""
        training = self._plan.training
        counted = batches[0].num_targets or training.global_batch * training.seq_len
        with kept_loads(self.model.network), using(self._plan.stack.kernels):
            total = self.model.evaluate(batches, 1.0 / counted)
        collectives.all_reduce(total)
        return float(total.item()) / self._plan.strategy.dense.tensor_parallel

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on."""
        self._optimizer.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """See `mopexec.run.shards`; shares the live memory."""
        moments = self._optimizer.state()
        steps = next(iter(moments["step"].values()))
        state: dict[str, Any] = {STEP: steps.detach().clone().to("cpu", torch.int64)}
        kinds: dict[str, dict[str, Tensor]] = {
            "value": self._masters.values,
            **{k: moments[k] for k in ("exp_avg", "exp_avg_sq")},
        }
        for name, buffer in self.model.buffers.named():
            for kind, parts in kinds.items():
                state[f"{name}.{kind}"] = buffer.pieces(name, parts[buffer.kind])
        for name, value in self.model.network.named_buffers():
            state[name] = value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what loading did not fill in place: the step count; parameters follow their masters."""
        for step in self._optimizer.state()["step"].values():
            step.fill_(int(state[STEP]))
        self._masters.write_back()
        self.model.buffers.gather()

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter by its single-device name, whole, on every rank."""
        buffers = self.model.buffers
        return whole(buffers, {b.kind: b.part(b.values) for b in buffers.all})

    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient of the last step before clipping, by its single-device name, whole, on every
        rank."""
        full = whole(self.model.buffers, self._last_grads)
        return {name: grad / self._optimizer.coefficient for name, grad in full.items()}

    def _balanced(self) -> Tensor:
        """Move the routers' biases; `balance_told` of the routes."""
        stage, training = self._groups.stage, self._plan.training

        def over_stage(load: Tensor) -> None:
            if stage.size > 1:
                collectives.all_reduce(load, stage.handle)

        degree = self._plan.strategy.experts.expert_parallel
        network, pipeline = self.model.network, self._groups.pipeline
        told: Tensor = network.update_balance(training.bias_update_rate, over_stage, degree)
        if pipeline.size == 1:
            return told
        layers = sum(layer.is_moe for layer in network.blocks())
        told[0] = told[0].nan_to_num() * layers
        both = torch.cat((told, told.new_full((1,), layers)))
        collectives.all_reduce(both, pipeline.handle)
        both[0] /= both[-1]
        return both[:-1]
