"""What the runtimes of torch modules under autograd have in common: step, evaluation, state by parameter."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import build_mesh
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import NOW, component, phase
from mopexec.model import Routing
from mopexec.model.moe import kept_loads
from mopexec.modules.network import RankNetwork
from mopexec.modules.optimizer import ShardedAdamW
from mopexec.operators.dtypes import of_name, wide
from mopexec.operators.kernels import using
from mopexec.run.runner import Batch, StepResult
from mopexec.run.shards import STEP, ParameterPieces, whole
from mopexec.weights.source import Source
from mopsim.spec.plan import Plan


class ModuleRunner(ABC):
    """See `mopexec.run.runner.Runner`. What is abstract is the runtime's own."""

    _optimizer: ShardedAdamW

    def __init__(
        self, plan: Plan, platform: Platform, routing: Literal["learned", "profile"], source: Source
    ) -> None:
        self._plan, self._platform, self._learned = plan, platform, routing == "learned"
        self._tokens = plan.training.global_batch * plan.training.seq_len
        self._copies = plan.strategy.dense.tensor_parallel
        """Ranks that have the loss of the same tokens."""
        self._last_grads: Mapping[str, Tensor] = {}
        with platform.bookkeeping():
            self._mesh = build_mesh(plan.strategy, platform)
        self._network = RankNetwork(plan, self._mesh, platform, Routing.chosen(plan, routing))
        self.model: Any = self._network.model
        self._store(source)

    @abstractmethod
    def _store(self, source: Source) -> None:
        """Give the model's parameters their storage and the source's values; make the optimizer."""

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step: forward and backward of each microbatch, then clip and update."""
        with using(self._plan.stack.kernels):
            return self._step(batches)

    def _step(self, batches: list[Batch]) -> StepResult:
        self._last_grads = {}
        self._drop_gradients()
        total = torch.zeros((), dtype=self._wide(), device=self._platform.device)
        for loss in self._train(batches, self._scale(batches)):
            total += loss
        collectives.all_reduce(total)
        NOW.component = "other"
        with phase("optimizer"), component("optimizer"):
            grads = self._gradients()
            norm = self._optimizer.step(grads)
            self._updated()
            self._last_grads = grads
            found = [total / self._copies if self._copies > 1 else total, norm]
            if self._learned and self._plan.model.num_moe_layers:
                found.append(self._balanced())
        return StepResult.fetched(found, self._platform)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """See `Runner.evaluate`."""
        total = torch.zeros((), dtype=self._wide(), device=self._platform.device)
        with kept_loads(self.model), using(self._plan.stack.kernels):
            for loss in self._evaluate(batches, self._scale(batches)):
                total = total + loss
        collectives.all_reduce(total)
        return float(total.item()) / self._copies

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on."""
        self._optimizer.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """See `mopexec.run.shards`; shares the live memory."""
        moments = self._optimizer.state()
        steps = next(iter(moments["step"].values()), torch.zeros(()))
        state: dict[str, Any] = {STEP: steps.detach().clone().to("cpu", torch.int64)}
        values = {shard.name: shard.value for shard in self._optimizer.shards}
        for kind, parts in (("value", values), *((k, moments[k]) for k in ("exp_avg", "exp_avg_sq"))):
            state |= {f"{name}.{kind}": pieces for name, pieces in self._pieces(parts).items()}
        return state | dict(self.model.named_buffers())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what loading did not fill in place: the step count."""
        for step in self._optimizer.state()["step"].values():
            step.fill_(int(state[STEP]))

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter by its single-device name, whole, on every rank."""
        return whole(self._pieces(self._parameters()))

    def keep_gradients(self) -> None:  # noqa: B027
        """They do."""

    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient of the last step before clipping, by its single-device name, whole, on every
        rank."""
        factor = self._optimizer.coefficient.cpu()
        return {name: grad / factor for name, grad in whole(self._pieces(self._last_grads)).items()}

    def _wide(self) -> torch.dtype:
        return wide(of_name(self._plan.strategy.precision.compute))

    def _scale(self, batches: list[Batch]) -> float:
        """1 / the targets of the global batch that count."""
        return 1.0 / (batches[0].num_targets or self._tokens)

    def _train(self, batches: list[Batch], scale: float) -> Iterator[Tensor]:
        """Forward and backward of each microbatch; its loss on this rank."""
        if (pipeline := self._network.pipeline) is not None:
            yield from pipeline.step(len(batches), self._network.part(batches, scale))
            return
        for batch in batches:
            with phase("forward"):
                loss = self._loss(batch, scale)
            with phase("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            NOW.component = "other"
            value = loss.detach()
            del loss
            yield value

    def _evaluate(self, batches: list[Batch], scale: float) -> Iterator[Tensor]:
        """The loss of each microbatch on this rank, without gradients."""
        if (pipeline := self._network.pipeline) is not None:
            return pipeline.evaluate(len(batches), self._network.part(batches, scale))
        return (self._loss(batch, scale) for batch in batches)

    def _loss(self, batch: Batch, scale: float) -> Tensor:
        """scale * the loss of a microbatch on this rank."""
        loss: Tensor = self.model(batch.tokens, batch.targets, scale, batch.documents)
        return loss

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Begin a step: forget the last one's gradients."""

    @abstractmethod
    def _gradients(self) -> dict[str, Tensor]:
        """This rank's reduced gradients by shard name, where the optimizer works."""

    def _updated(self) -> None:
        """The optimizer's shards have changed: bring them where the model reads them, if that is
        elsewhere."""
        return

    def _balanced(self) -> Tensor:
        """Move the routers' biases; `balance_told` of the routes."""
        degree = self._plan.strategy.experts.expert_parallel
        told: Tensor = self.model.update_balance(
            self._plan.training.bias_update_rate, self._sum_loads, degree
        )
        pipeline = self._mesh.pipeline
        if pipeline.size == 1:
            return told
        layers = sum(layer.is_moe for layer in self.model.blocks())
        told[0] = told[0].nan_to_num() * layers
        both = torch.cat((told, told.new_full((1,), layers)))
        collectives.all_reduce(both, pipeline.handle)
        both[0] /= both[-1]
        return both[:-1]

    def _sum_loads(self, load: Tensor) -> None:
        """Sum a router's load over the ranks that share it, in place."""
        if self._mesh.stage.size > 1:
            collectives.all_reduce(load, self._mesh.stage.handle)

    def _parameters(self) -> dict[str, Tensor]:
        """This rank's parameters by shard name."""
        return {shard.name: shard.value for shard in self._optimizer.shards}

    @abstractmethod
    def _pieces(self, shards: Mapping[str, Tensor]) -> dict[str, ParameterPieces]:
        """What this rank's `shards` have of each parameter."""
