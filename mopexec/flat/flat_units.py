"""The flat_units runtime: one rank's training step as an explicit schedule, without an autograd graph.

docs/flat-units.md is this file in words; the simulator lowers the same schedule.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Mesh
from mopexec.distributed.tiers import Platform
from mopexec.flat import state as training_state
from mopexec.flat.layer import LayerSchedule
from mopexec.flat.units import Unit
from mopexec.measure.tracker import category, component, phase
from mopexec.model.routing import balance_step, balance_told
from mopexec.operators.adamw import clip_factor
from mopexec.operators.early_optimizer import EarlyAdamW
from mopexec.operators.kernels import using
from mopexec.operators.layer_inputs import LayerInputs
from mopexec.operators.learned_positions import add_positions, position_ids, positions_backward
from mopexec.operators.loss import Ring, chunked_loss
from mopexec.operators.norms import LayerNorms
from mopexec.operators.optimizer import FlatAdamW
from mopexec.operators.rope import Positions
from mopexec.operators.rows import row_slices
from mopexec.run.runner import Batch, StepResult
from mopexec.run.shards import whole
from mopsim.spec.plan import Plan


@dataclass
class FlatModel:
    """One rank's units and schedules; positions: what its attention shares. balance_bias and load [MoE
    layers, E] float32.
    """

    embedding: Unit
    layers: list[LayerSchedule]
    final: Unit
    head: Unit
    inputs: LayerInputs
    ring: Ring | None
    balance_bias: Tensor
    load: Tensor
    units: list[Unit] = field(init=False)
    positions: Positions = field(init=False)

    def __post_init__(self) -> None:
        inner = [unit for layer in self.layers for unit in layer.units]
        self.units = [self.embedding, *inner, self.final, self.head]
        self.positions = self.layers[0].attention.positions

    @property
    def groups(self) -> list[list[int]]:
        """Places of units whose gradients are summed together, in the order of the backward."""
        backward = ([self.head, self.final], *(layer.units for layer in self.layers[::-1]), [self.embedding])
        places = {id(unit): place for place, unit in enumerate(self.units)}
        return [[places[id(unit)] for unit in units] for units in backward]


class FlatRunner:
    """Runner of the flat_units runtime."""

    def __init__(
        self, plan: Plan, mesh: Mesh, platform: Platform, model: FlatModel, *, learned: bool
    ) -> None:
        self.plan, self.mesh, self.platform, self.model, self.learned = plan, mesh, platform, model, learned
        strategy, training = plan.strategy, plan.training
        given = (strategy.optimizer, strategy.precision, training, platform)
        early = strategy.optimizer.overlap == "backward"
        self.optimizer = (
            EarlyAdamW(model.units, model.groups, *given) if early else FlatAdamW(model.units, *given)
        )
        self.prefetch, self.loss_chunk = strategy.dense.prefetch, strategy.vocabulary.chunk_tokens
        self.num_tokens = self._counted = training.global_batch * training.seq_len
        self._reducing: list[Unit] = []
        self._rows = {layer: row for row, layer in enumerate(plan.model.moe_layers)}

    @torch.no_grad()
    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step; `batches` are this rank's microbatches, `training.num_microbatches` of them."""
        with using(self.plan.stack.kernels):
            return self._step(batches)

    def _step(self, batches: list[Batch]) -> StepResult:
        for unit in self.model.units:
            unit.begin_step()
        loss = torch.zeros((), dtype=self.optimizer.update_dtype, device=self.platform.device)
        self._counted = batches[0].num_targets or self.num_tokens
        for index, batch in enumerate(batches):
            loss.add_(self._microbatch(batch, last=index == len(batches) - 1))
        with component("optimizer"), phase("optimizer"):
            norm = self._finish_gradients(loss)
            self.optimizer.step(clip_factor(norm, self.plan.training.clip_norm))
            told = self._balance()
        found = [loss.double() / self._counted, norm, *([] if told is None else [told])]
        return StepResult.fetched(found, self.num_tokens, self.platform)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """See `Runner.evaluate`. The head's gradients come with its losses; the next step zeroes them."""
        with using(self.plan.stack.kernels):
            return self._evaluate(batches)

    def _evaluate(self, batches: list[Batch]) -> float:
        load = self.model.load.clone()
        self._counted = batches[0].num_targets or self.num_tokens
        total = torch.zeros((), dtype=self.optimizer.update_dtype, device=self.platform.device)
        for batch in batches:
            loss, _ = self._loss(self._forward(batch), batch.targets.flatten())
            self._finish_reducing()
            for unit in (self.model.final, self.model.head):
                unit.forget_grads()
            self.model.inputs.forget()
            for layer in self.model.layers:
                layer.forget()
            total.add_(loss)
        collectives.all_reduce(total, self.mesh.world.handle)
        self.model.load.copy_(load)
        return total.item() / self._counted

    def set_lr(self, lr: float) -> None:
        self.optimizer.learning_rate = lr

    def state_dict(self) -> dict[str, Any]:
        """See `mopexec.run.shards`."""
        return training_state.state_dict(self.optimizer, self.model.balance_bias)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what loading did not fill in place."""
        training_state.load_state_dict(self.optimizer, state)

    def full_parameters(self) -> dict[str, Tensor]:
        self.optimizer.finish()
        return self._whole([unit.params for unit in self.model.units])

    def keep_gradients(self) -> None:
        if isinstance(self.optimizer, EarlyAdamW):
            self.optimizer.keeps = True

    def full_gradients(self) -> dict[str, Tensor]:
        units, optimizer = self.model.units, self.optimizer
        kept = optimizer.given if isinstance(optimizer, EarlyAdamW) else {}
        return self._whole([kept[place] if kept else unit.grads for place, unit in enumerate(units)])

    def _whole(self, flat: list[Tensor]) -> dict[str, Tensor]:
        units = zip(self.model.units, flat, strict=True)
        return whole({k: v for of in units for k, v in training_state.by_parameter(*of).items()})

    def _microbatch(self, batch: Batch, *, last: bool) -> Tensor:
        """Forward, loss, backward; returns the sum of this rank's token losses. last: of the step."""
        x = self._forward(batch)
        if last:
            self.optimizer.begin_backward()
        loss, grad = self._loss(x, batch.targets.flatten())
        del x
        self._backward(grad)
        if last:
            self.optimizer.preload()
        self._embedding_backward(batch, grad)
        return loss

    def _forward(self, batch: Batch) -> Tensor:
        model = self.model
        model.positions.use(batch.documents)
        with component("embedding"):
            weights = model.embedding.weights()
            x = F.embedding(batch.tokens.flatten(), weights["embedding.weight"])
            if "embedding.positions" in weights:
                rows = x.view(*batch.tokens.shape, -1)
                x = add_positions(rows, weights["embedding.positions"], self._ids(batch)).view_as(x)
                del rows
            del weights
            model.embedding.release()
        prefetch = 0 if self.optimizer.held_up else self.prefetch
        for index, layer in enumerate(model.layers):
            for ahead in model.layers[index : index + 1 + prefetch]:
                ahead.gather()
            model.inputs.put(index, x)
            x = layer.forward(x, *self._router_state(index))
        return x

    def _loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of token losses, gradient of x [N, H]); the gradient is of the mean over the global batch."""
        final, head, scale = self.model.final, self.model.head, 1.0 / self._counted
        norms = LayerNorms.of(self.plan.model)
        with component("vocabulary"):
            final.gather()
            weights, rows = final.weights(), head.weights()["head.weight"]
            hidden = norms.forward(x, weights, "final_norm")
            grad_rows = head.open_grads()["head.weight"]
            if self.model.ring is None:
                loss, grad = chunked_loss(hidden, targets, rows, grad_rows, scale, self.loss_chunk)
            else:
                loss, grad = self.model.ring.loss(hidden, targets, rows, grad_rows, scale)
            del hidden, rows, grad_rows
            with phase("backward"):
                head.release()
                head.reduce()
                norms.backward_(grad, x, grad, weights, final.open_grads(), "final_norm", add=False)
                del weights
                final.release()
                final.reduce()
        self._reducing = [head, final]
        return loss, grad

    def _backward(self, grad: Tensor) -> None:
        """grad [N, H] of the last layer's output becomes that of the first layer's input, in place."""
        layers, inputs = self.model.layers, self.model.inputs
        with phase("backward"):
            for index in reversed(range(len(layers))):
                for ahead in layers[max(0, index - self.prefetch) : index + 1][::-1]:
                    ahead.gather()
                x = inputs.take(index)
                prefetch = functools.partial(inputs.prefetch, index - 1)
                layers[index].backward(x, grad, self._finish_reducing, prefetch)
                self._reducing = list(layers[index].units)
                del x

    def _ids(self, batch: Batch) -> Tensor:
        """Of learned positions of this rank's slice."""
        seq = batch.tokens.shape[1]
        start = self.model.layers[0].attention.exchange.group.place * seq
        return position_ids(start, start + seq, self.platform.device, batch.documents)

    def _embedding_backward(self, batch: Batch, grad: Tensor) -> None:
        embedding, tokens = self.model.embedding, batch.tokens.flatten()
        with component("embedding"), phase("backward"):
            self._finish_reducing()
            grads = embedding.open_grads()
            table = grads["embedding.weight"]
            for start, stop in row_slices(grad.shape[0]):
                table.index_put_((tokens[start:stop],), grad[start:stop].to(table.dtype), accumulate=True)
            if "embedding.positions" in grads:
                rows = grad.view(*batch.tokens.shape, -1)
                positions_backward(grads["embedding.positions"], rows, self._ids(batch))
            del table, grads
            embedding.reduce()
        self._reducing = [embedding]
        self._finish_reducing()

    def _finish_reducing(self) -> None:
        """Wait for the gradients on their way, so that no more than one layer's full gradients are alive."""
        if not self._reducing:
            return
        with phase("backward"):
            self.optimizer.room()
            units, self._reducing = self._reducing, []
            for unit in units:
                unit.finish_reduce()
            self.optimizer.summed(units)

    def _finish_gradients(self, loss: Tensor) -> Tensor:
        """Sum gradient shards over replicas and the loss over ranks; returns the global gradient norm
        (0-dim).
        """
        world, square = self.mesh.world, torch.zeros_like(loss)
        for part in self.optimizer.squares():
            square.add_(part)
        if world.size > 1:
            both = torch.stack((square, loss))
            collectives.all_reduce(both, world.handle)
            square = both[0]
            loss.copy_(both[1])
        return square.sqrt_()

    def _router_state(self, index: int) -> tuple[Tensor, Tensor]:
        place = self._rows.get(index, 0)
        return self.model.balance_bias[place], self.model.load[place]

    def _balance(self) -> Tensor | None:
        """Move the routers' biases by the load of the whole global batch; returns `balance_told`, None
        where no router chose."""
        if not self.learned or not self.plan.model.num_moe_layers:
            return None
        with category("activations"):
            if self.mesh.world.size > 1:
                collectives.all_reduce(self.model.load, self.mesh.world.handle)
            told = balance_told(self.model.load, self.plan.strategy.experts.expert_parallel)
            for bias, load in zip(self.model.balance_bias, self.model.load, strict=True):
                balance_step(bias, load, self.plan.training.bias_update_rate)
            self.model.load.zero_()
        return told
