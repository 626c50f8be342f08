"""What one pipeline stage holds: layers by model chunk, edges, units, and what is resident."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

from mopsim.common.units import DTYPE_BYTES
from mopsim.graph.tape import Step
from mopsim.program.composed import Gap, alike, composable, compose
from mopsim.program.context import Context
from mopsim.program.loss import logit_elements
from mopsim.program.reuse import near
from mopsim.program.units import ShardedUnit, looked_up, owned_numels
from mopsim.spec.layout import part_of, stage_layers


@dataclass(frozen=True)
class Stage:
    """Stage `index` of `degree`. Its model chunks are parts of the network (`part`).

    alike: equal for layers that run alike; without it every layer is played."""

    context: Context
    index: int
    alike: Callable[[int], Hashable] | None = None

    @property
    def degree(self) -> int:
        return self.context.strategy.pipeline.pipeline_parallel

    @property
    def virtual(self) -> int:
        return self.context.strategy.pipeline.virtual_stages

    @cached_property
    def played(self) -> tuple[list[list[int]], tuple[Gap, ...]]:
        """Layers of each model chunk that are played, and the gaps between them."""
        if self.alike is None or not composable(self.context):
            return self.every, ()
        (layers,) = self.every
        kinds = [(alike(self.context, layer, self.alike(layer)), layer in self.near) for layer in layers]
        shown, gaps = compose(layers, kinds, max(1, self.context.strategy.dense.prefetch))
        return [shown], gaps

    @cached_property
    def near(self) -> frozenset[int | str]:
        """Layers, and units beside them, that stay gathered from the forward to the backward."""
        return near(self.context)

    @property
    def chunks(self) -> list[list[int]]:
        """Decoder layers of each model chunk that are played."""
        return self.played[0]

    @property
    def gaps(self) -> tuple[Gap, ...]:
        return self.played[1]

    @cached_property
    def every(self) -> list[list[int]]:
        """Decoder layers of each model chunk."""
        layers, pipeline = self.context.model.num_hidden_layers, self.context.strategy.pipeline
        return stage_layers(layers, self.degree, self.virtual, self.index, pipeline.layers, pipeline.folded)

    @property
    def extra(self) -> range:
        """MTP layers, which live beside the loss."""
        model = self.context.model
        first = model.num_hidden_layers
        return range(first, first + model.num_nextn_predict_layers) if self.is_last else range(0)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.part(self.virtual - 1) == self.parts - 1

    def part(self, chunk: int) -> int:
        """Place of a model chunk in the network."""
        return part_of(self.index, chunk, self.degree, self.context.strategy.pipeline.folded)

    @property
    def parts(self) -> int:
        return self.degree * self.virtual

    @cached_property
    def shares_embedding(self) -> bool:
        """Whether first and last stage each hold the embedding: tied to the head, or looked up by MTP
        layers."""
        return not (self.is_first and self.is_last) and (
            "head" not in self.context.edges or self.context.model.num_nextn_predict_layers > 0
        )

    @cached_property
    def units(self) -> list[ShardedUnit]:
        """Units in forward order."""
        edges, found = self.context.edges, []
        if self.is_first:
            found += looked_up(edges)
        for layer in (*(layer for chunk in self.every for layer in chunk), *self.extra):
            found += self.context.layers[layer]
        if self.is_last:
            found.append(edges["final"])
            if "head" in edges:
                found.append(edges["head"])
            if self.shares_embedding:
                found.append(edges["embedding"])
        return found

    @cached_property
    def updated(self) -> list[int]:
        """Parameters of each unit that one rank updates."""
        if self.context.owned:
            return owned_numels(self.units)
        return [u.shard_numel if self.context.strategy.dense.zero >= 1 else u.padded for u in self.units]

    @property
    def frees_gradients(self) -> bool:
        """Whether gradients live from the first backward to the end of the step only (zero_grad to None), or
        to their update."""
        strategy, sharding = self.context.strategy, self.context.stack.sharding
        freed = sharding.frees(strategy.dense.zero) or strategy.optimizer.overlap == "backward"
        return freed and strategy.dense.grad_tier == "device"

    def resident(self) -> tuple[Step, ...]:
        """Parameters, gradients and optimizer state of one rank; batches, rotary tables, balancing biases, a
        buffer of reductions."""
        c, strategy = self.context, self.context.strategy
        precision, zero = strategy.precision, strategy.dense.zero
        found: list[Step] = []
        for unit, state in zip(self.units, self.updated, strict=True):
            place = strategy.experts if unit.component == "experts" else strategy.dense
            full, shard = unit.padded, unit.shard_numel
            found.append((_at(place.param_tier, "params"), (shard if c.shards_params else full) * c.param))
            buckets = c.stack.sharding.bucketed and unit.copies > 1 and zero < 2
            held = full * buckets + (0 if self.frees_gradients else shard if zero >= 2 else full)
            if unit.layer >= 0:
                found.append(("params", int(c.stack.sharding.loop_copies * shard * c.param)))
            found.append((_at(place.grad_tier, "grads"), held * c.grad))
            each = 2 * int(DTYPE_BYTES[precision.moments]) + c.master_of(c.precision(unit.layer))
            away = int(state * each * self.away)
            stays = int(state * c.masters_stay * self.away)
            found += [("optimizer", state * each - away + stays), ("host/optimizer", away)]
        model = c.model
        batches = 2 * 8 * c.shapes.region_tokens * c.training.num_microbatches(strategy)
        rows = c.training.seq_len // strategy.attention.context_parallel
        each = c.shapes.packed and c.stack.kernels.rotary_tables == "sequences"
        tables = rows * model.rotary_dim * c.wide * (strategy.micro_batch if each else 1)
        found.append(("activations", (batches if self.is_first or self.is_last else 0) + tables))
        found.append(("params", 8 * max(1, model.num_routers) * max(1, model.num_local_experts)))
        found.append(("framework", int(self._reduce_buffers * c.stack.sharding.reduce_buffer)))
        found.append(("framework", int(self._host_room)))
        return tuple(step for step in found if step[1])

    @property
    def _reduce_buffers(self) -> int:
        """Buffers of reductions (see Sharding.reduce_buffer)."""
        strategy = self.context.strategy
        return int(strategy.dense.zero >= 2) + int(strategy.fills_while_reducing)

    @property
    def _host_room(self) -> float:
        """Bytes of the buffer through which gradients go to the host (see Sharding.host_room)."""
        dense = self.context.strategy.dense
        goes = dense.grad_tier == "host" and dense.zero in (1, 2)
        return goes * self.context.stack.sharding.host_room * self.largest

    @property
    def largest(self) -> int:
        """Numbers of its largest tensor; of a stage without layers 0."""
        return max((unit.largest for unit in self.units), default=0)

    @property
    def flat_bytes(self) -> int:
        """Bytes of flat tensors that only the end of a step has, in blocks of the caching allocator of their
        own: those of the reductions or of the update, whichever are more (see Sharding.update_copies); none
        where the last stage's logits in fp32 have left blocks as large."""
        c, sharding = self.context, self.context.stack.sharding
        if c.strategy.dense.zero != 1:
            return 0
        summed = any(unit.copies > 1 for unit in self.units)
        found = sharding.reduce_copies * summed * sum(unit.padded for unit in self.units)
        if c.grad < c.wide:
            here = sum(self.updated) * (1 - self.away)
            found = max(found, sharding.buckets * summed, sharding.update_copies * here)
        largest = logit_elements(c) * c.wide if self.is_last else 0
        return int(found) if found > largest else 0

    @property
    def away(self) -> float:
        """Part of the optimizer state that is on the host."""
        optimizer = self.context.strategy.optimizer
        return optimizer.host_fraction if optimizer.state_tier == "host" else 0.0


def _at(tier: str, category: str) -> str:
    return f"host/{category}" if tier == "host" else category
