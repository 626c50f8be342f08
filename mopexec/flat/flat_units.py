"""The flat_units runtime: one rank's training step as an explicit schedule, without an autograd graph.

docs/flat-units.md is this file in words; the simulator lowers the same schedule.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Mesh
from mopexec.distributed.tiers import Platform
from mopexec.flat import state as training_state
from mopexec.flat.layer import LayerSchedule
from mopexec.flat.mtp import MtpSchedule
from mopexec.flat.token_rows import TokenRows
from mopexec.flat.units import Unit
from mopexec.measure.tracker import category, component, phase
from mopexec.model.following import next_tokens, with_following
from mopexec.model.routing import balance_step, balance_told
from mopexec.operators.adamw import clip_factor
from mopexec.operators.early_optimizer import EarlyAdamW
from mopexec.operators.kernels import using
from mopexec.operators.layer_inputs import LayerInputs
from mopexec.operators.learned_positions import position_ids
from mopexec.operators.loss import Ring, chunked_loss
from mopexec.operators.norms import LayerNorms, Weights
from mopexec.operators.optimizer import FlatAdamW
from mopexec.operators.rope import Positions
from mopexec.run.runner import Batch, StepResult
from mopexec.run.shards import whole
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan


@dataclass
class FlatModel:
    """One rank's units and schedules; positions: what its attention shares. balance_bias and load [MoE
    layers, E] float32, those of MTP modules last. head: the embedding where they share a weight.
    """

    rows: TokenRows
    layers: list[LayerSchedule]
    final: Unit
    head: Unit
    inputs: LayerInputs
    ring: Ring | None
    balance_bias: Tensor
    load: Tensor
    modules: list[MtpSchedule]
    units: list[Unit] = field(init=False)
    positions: Positions = field(init=False)

    def __post_init__(self) -> None:
        inner = [unit for layer in (*self.layers, *self.modules) for unit in layer.units]
        self.units = [*self.rows.units, *inner, self.final, *self.apart]
        self.positions = self.layers[0].attention.positions

    @property
    def apart(self) -> list[Unit]:
        """The head, where it is a unit of its own."""
        return [] if self.rows.shared else [self.head]

    @property
    def projection(self) -> str:
        """The name of what projects on the vocabulary."""
        return self.head.contents.names[0][0]

    @property
    def groups(self) -> list[list[int]]:
        """Places of units whose gradients are summed together, in the order of the backward."""
        inner = (layer.units for layer in self.layers[::-1])
        backward = ([*self.apart, self.final], *inner, self.rows.units)
        places = {id(unit): place for place, unit in enumerate(self.units)}
        return [[places[id(unit)] for unit in units] for units in backward]


def routed_layers(spec: ModelSpec) -> list[int]:
    """Layers with a router, those of MTP modules last."""
    return list(filter(spec.is_moe_layer, range(spec.num_hidden_layers + spec.num_nextn_predict_layers)))


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
        self._rows = {layer: row for row, layer in enumerate(routed_layers(plan.model))}
        self._trained: list[LayerSchedule] = list(model.layers)
        if training.mtp_loss_coef:
            self._trained += model.modules

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
        return StepResult.fetched(found, self.platform)

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
            loss, _ = self._loss(self._forward(batch, self.model.layers), batch.targets.flatten())
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
        x = self._forward(batch, self._trained)
        if last:
            self.optimizer.begin_backward()
        if len(self._trained) > len(self.model.layers):
            loss, grad = self._losses(x, batch)
        else:
            loss, grad = self._loss(x, batch.targets.flatten())
        del x
        self._backward(grad)
        if last:
            self.optimizer.preload()
        self._embedding_backward(batch.tokens, grad, self._ids(batch))
        self._finish_reducing()
        return loss

    def _forward(self, batch: Batch, trained: Sequence[LayerSchedule]) -> Tensor:
        """trained: layers and modules, of which the layers run here."""
        model = self.model
        model.positions.use(batch.documents)
        x = model.rows.forward(batch.tokens, self._ids(batch))
        for index, layer in enumerate(model.layers):
            self._gather(trained[index : index + 1 + self._ahead])
            model.inputs.put(index, x)
            x = layer.forward(x, *self._router_state(index))
        return x

    @property
    def _ahead(self) -> int:
        """Layers that are gathered ahead in a forward."""
        return 0 if self.optimizer.held_up else self.prefetch

    @staticmethod
    def _gather(layers: Sequence[LayerSchedule]) -> None:
        for layer in layers:
            layer.gather()

    def _ids(self, batch: Batch) -> Tensor | None:
        """Of learned positions of this rank's slice, None where there are none."""
        if not self.plan.model.learned_positions:
            return None
        seq = batch.tokens.shape[1]
        start = self.model.layers[0].attention.exchange.group.place * seq
        return position_ids(start, start + seq, self.platform.device, batch.documents)

    def _loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of token losses, gradient of x [N, H]); the gradient is of the mean over the global batch."""
        final, head, norms = self.model.final, self.model.head, LayerNorms.of(self.plan.model)
        name = self.model.projection
        with component("vocabulary"):
            final.gather()
            weights, rows = final.weights(), head.weights()[name]
            hidden = norms.forward(x, weights, "final_norm")
            grad_rows = head.open_grads()[name]
            loss, grad = self._term(hidden, targets, rows, grad_rows, 1.0)
            del hidden, rows, grad_rows
            with phase("backward"):
                self._head_done()
                norms.backward_(grad, x, grad, weights, final.open_grads(), "final_norm", add=False)
                del weights
                final.release()
                final.reduce()
        self._reducing = [*self.model.apart, final]
        return loss, grad

    def _head_done(self) -> None:
        """All losses are; the gradient of a head that is the embedding too is not."""
        self.model.head.release()
        for unit in self.model.apart:
            unit.reduce()

    def _term(
        self, hidden: Tensor, targets: Tensor, rows: Tensor, grad_rows: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """One cross entropy of the objective and the gradient of its normed hidden [N, H]."""
        scale = weight / self._counted
        if self.model.ring is None:
            return chunked_loss(hidden, targets, rows, grad_rows, scale, self.loss_chunk)
        return self.model.ring.loss(hidden, targets, rows, grad_rows, scale)

    def _losses(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `_loss`, with MTP modules: their forward, all losses, their backward."""
        model, final, seq = self.model, self.model.final, batch.tokens.shape[1]
        count, layers = len(model.modules), len(model.layers)
        ids, targets = with_following(batch.tokens, batch.targets, count, self.mesh.sequence)
        following = next_tokens(ids, targets).unfold(1, seq, 1).unbind(1)
        final.gather()
        outputs, norms = [x], [final.weights()]
        for depth, module in enumerate(model.modules):
            self._gather(self._trained[layers + depth : layers + depth + 1 + self._ahead])
            given = module.join(outputs[-1], norms[-1], model.rows.forward(following[depth]))
            model.inputs.put(layers + depth, given)
            outputs.append(module.forward(given, *self._router_state(layers + depth)))
            norms.append(module.norm)
            del given
        wanted = [part.flatten() for part in targets.unfold(1, seq, 1).unbind(1)]
        loss, grads = self._terms(outputs, norms, wanted)
        for depth in reversed(range(count)):
            self._module_backward(depth, outputs, norms, grads, following[depth])
        with component("vocabulary"), phase("backward"):
            (grad,), norm = grads, LayerNorms.of(self.plan.model)
            norm.backward_(grad, x, grad, norms[0], final.open_grads(), "final_norm", add=False)
            del norms
            final.release()
            final.reduce()
        self._reducing.append(final)
        return loss, grad

    def _terms(
        self, outputs: list[Tensor], norms: list[Weights], targets: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The model's loss, and the gradient of each normed output."""
        head, norm, name = self.model.head, LayerNorms.of(self.plan.model), self.model.projection
        weight, found = self.plan.training.mtp_loss_coef / max(1, len(outputs) - 1), []
        with component("vocabulary"):
            rows, grad_rows = head.weights()[name], head.open_grads()[name]
            for place, (x, weights) in enumerate(zip(outputs, norms, strict=True)):
                hidden = norm.forward(x, weights, "final_norm")
                found.append(self._term(hidden, targets[place], rows, grad_rows, weight if place else 1.0))
                del hidden
            del rows, grad_rows
            with phase("backward"):
                self._head_done()
        self._reducing = list(self.model.apart)
        return found[0][0], [grad for _, grad in found]

    def _module_backward(
        self, depth: int, outputs: list[Tensor], norms: list[Weights], grads: list[Tensor], ids: Tensor
    ) -> None:
        """Of the last module that is left, whose output and gradient are the last ones."""
        module, place, grad = self.model.modules[depth], len(self.model.layers) + depth, grads.pop()
        with phase("backward"):
            module.final_backward(grad, outputs.pop())
            self._gather(self._trained[max(0, place - self.prefetch) : place + 1][::-1])
            x, before = self.model.inputs.take(place), (outputs[-1], norms[depth], grads[-1])
            module.module_backward(x, grad, *before, self._finish_reducing)
            self._reducing = list(module.units)
            del x, before
        self._embedding_backward(ids, grad, last=False)

    def _backward(self, grad: Tensor) -> None:
        """grad [N, H] of the last layer's output becomes that of the first layer's input, in place."""
        layers, inputs = self.model.layers, self.model.inputs  # modules, which come after, are done
        with phase("backward"):
            for index in reversed(range(len(layers))):
                self._gather(layers[max(0, index - self.prefetch) : index + 1][::-1])
                x = inputs.take(index)
                prefetch = functools.partial(inputs.prefetch, index - 1)
                layers[index].backward(x, grad, self._finish_reducing, prefetch)
                self._reducing = list(layers[index].units)
                del x

    def _embedding_backward(
        self, tokens: Tensor, grad: Tensor, ids: Tensor | None = None, *, last: bool = True
    ) -> None:
        """See `TokenRows.backward`."""
        self._finish_reducing()
        self._reducing = self.model.rows.backward(tokens, grad, ids, last=last)

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
