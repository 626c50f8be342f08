"""What a candidate keeps in memory at least, for a whole space at once: no transients but those that any
schedule needs."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mopsim.common.units import DTYPE_BYTES
from mopsim.search.facts import SpaceFacts
from mopsim.search.layer import Layer, recomputed
from mopsim.search.problem import DEVICE, HOST, PARTS, RING, STREAMED, UNDER_BACKWARD, Column, offloaded
from mopsim.search.space import Space
from mopsim.search.stages import IDEAL, kinds, of_stage, under_way
from mopsim.search.wires import Reals, Wires
from mopsim.spec.capability.expressions import holds
from mopsim.spec.capability.job import Job
from mopsim.spec.sharding import during
from mopsim.spec.strategy import Optimizer

SLOTS = Optimizer().slots
"""Staging buffers of an update beside the next forward."""
LAST = -1
"""The last stage of a pipeline, as an index."""


class Footprint:
    """Bytes per rank of each row of a space, at least; given: of it, or of one with all its shapes."""

    def __init__(self, space: Space, given: SpaceFacts) -> None:
        self.space, self.problem, self.given = space, space.problem, given
        self.sizes, self.hardware = given.sizes, given.hardware
        self.c = {name: _reals(column) for name, column in space.columns.items()}
        self.model = self.problem.model
        first = space.build(0)
        precision = first.precision
        self.hides = space.stack.resolve(first).overlap
        self.prefetch = first.dense.prefetch
        self.copied_masters = space.stack.sharding.host_masters == "copied"
        self.flat = holds("pairs")(Job(self.model, first, self.problem.training, space.stack))
        """Whether the program is that of flat units (mopsim.program.pairs)."""
        self.compute = DTYPE_BYTES[precision.compute]
        self.sent = space.stack.gathered(precision)
        self.by_layer = space.stack.sharding.groups != "each"
        self.param, self.grad = DTYPE_BYTES[precision.param], DTYPE_BYTES[precision.grad]
        self.reduce = DTYPE_BYTES[precision.reduce]
        self.sent_updated = np.where(self.c["zero"] == 0, self.param, space.stack.updated(precision, 1))
        """Bytes of an updated parameter of a layer that ranks gather, below ZeRO-3, at least."""
        self.moments = 2 * DTYPE_BYTES[precision.moments]
        self.wide = DTYPE_BYTES[precision.moments]
        self.streamed = self.wide + self.moments
        """Bytes of state that go each way for a parameter whose update is streamed."""
        self.dtype = precision.products
        self.wires = Wires(self.hardware, self.problem.world_size)
        self.tokens = space.tokens().astype(np.float64)
        c = self.c
        plain, lacking = (float(space.stack.own_master(precision, 1, side)) for side in ("host", "device"))
        self.own_master = np.where((c["zero"] >= 1) & (c["state"] != HOST), lacking, plain)
        """Bytes of a master weight beside the parameter."""
        self.weight = np.where(c["zero"] == 3, self.param, space.stack.held_weight(precision))
        """Bytes of a weight on the device, at least."""
        self.stage = self.problem.world_size / c["pipeline"]
        self.microbatches = space.microbatches()
        self.ring = c["loss"] == RING
        layers = self.model.num_hidden_layers
        self.again = recomputed(space.columns)
        self.away = c["boundary_host"] * offloaded(layers, space.columns["boundary_parts"]) / layers
        """Share of the layer inputs that goes to the host."""
        self.state_away = np.where(c["state"] == DEVICE, 0.0, c["state_parts"] / PARTS)
        """Share of the optimizer state that is on the host."""

    @property
    def layer(self) -> Layer:
        """What a layer takes at least."""
        return self.given.layer

    @cached_property
    def states(self) -> tuple[Reals, Reals]:
        """Parameters per rank that the optimizer state takes: (of all but experts, of experts). Ceilings left
        out."""
        c, split, zero3 = self.c, self.c["pipeline"] * self.c["tensor"], self.c["zero"] == 3
        dense_shard = np.where(zero3, c["dense_shard"], self.stage / c["tensor"])
        replicas = self.stage / (c["experts"] * c["expert_tensor"])
        sizes = self.sizes
        sharded = (sizes.dense + sizes.head - sizes.rows) / (split * dense_shard)
        sharded = sharded + sizes.rows / np.where(self.ring, self.stage, split * dense_shard)
        experts = self.sizes.experts / (c["pipeline"] * c["experts"] * c["expert_tensor"])
        return np.asarray(sharded), np.asarray(experts / np.where(zero3, c["expert_shard"], replicas))

    @cached_property
    def held(self) -> tuple[Reals, Reals]:
        """Parameters per rank: (that the weights take, that the optimizer state takes)."""
        c, state = self.c, sum(self.states)
        experts = self.sizes.experts / (c["pipeline"] * c["experts"] * c["expert_tensor"])
        whole = (self.sizes.dense + self.sizes.head) / (c["pipeline"] * c["tensor"]) + experts
        return np.asarray(np.where(c["zero"] == 3, state, whole)), np.asarray(state)

    @cached_property
    def master(self) -> Reals:
        """Bytes of master weights per parameter: none where the parameter shard is the master."""
        streamed = self.c["state"] == STREAMED
        return np.asarray(np.where(streamed & (self.own_master == 0), self.wide, self.own_master))

    @cached_property
    def optimizer_here(self) -> Reals:
        """Bytes of optimizer state per parameter that are on the device."""
        stays = self.state_away * self.master * self.copied_masters
        return np.asarray((1 - self.state_away) * (self.master + self.moments) + stays)

    def inputs(self) -> Reals:
        """Bytes of the layer inputs that wait for the backward."""
        rows = self.model.num_hidden_layers / self.c["pipeline"] * self.tokens / self.c["tensor"]
        return np.asarray(rows * self.model.hidden_size * self.compute)

    @cached_property
    def left(self) -> Reals:
        """Bytes that a layer's forward leaves, by row and kind of layer."""
        each = self.layer.kept[self.again] + self.model.hidden_size * self.compute
        return np.asarray((self.tokens / self.c["tensor"])[:, None] * each)

    @cached_property
    def in_backward(self) -> Reals:
        """Bytes that the backward of a layer takes above its start."""
        return np.asarray(self.tokens / self.c["tensor"] * self.layer.height[self.again])

    @cached_property
    def in_loss(self) -> Reals:
        """Bytes that the loss takes: its logits, of a ring those of flat units."""
        vocabulary = self.model.vocab_size / np.maximum(self.c["vocabulary"], self.c["tensor"])
        logits = self.tokens / self.c["loss_slices"] * vocabulary * self.compute
        return np.asarray(np.where(self.ring, self.flat * logits, logits))

    def moved(self) -> Reals:
        """Bytes of the layer inputs of a microbatch that go to the host: of all programs but flat units not
        the last layer's, whose backward may come next."""
        layers = self.model.num_hidden_layers / self.c["pipeline"]
        last = 0.0 if self.flat else np.minimum(1 / layers, 1)
        return np.asarray(self.away * self.inputs() * (1 - last))

    def device_memory(self) -> tuple[Reals, dict[str, Reals]]:
        """What the mean stage holds, or one of the first or the last, when its first backward, or the first
        loss, is at its height."""
        c = self.c
        weights, state = self.held
        params = np.where(c["offload"] == 1, 0, weights * self.weight)
        grads = np.where(c["offload"] == 1, 0, weights * self.grad)
        each = self.master + self.moments
        optimizer = state * self.optimizer_here
        groups = self.model.num_hidden_layers + 2  # of which the largest is not below the mean
        together = np.where(self.early, state / groups, state)
        staged = np.minimum(SLOTS * np.minimum(c["bucket"], together), state) * each
        optimizer = optimizer + (c["beside"] > 0) * (c["state"] == STREAMED) * staged
        grads = grads * np.where(self.early & (self.microbatches == 1), 1 / groups, 1.0)
        one = c["pipeline"] == 1
        resident = params + optimizer + grads * self.summed
        peak = params + optimizer + grads + self.of_replicas
        for stage in (0, 1, 2, LAST):
            held = self.of_stage(resident, stage) + self.above(stage)
            there = c["pipeline"] > (max(stage, 1) if stage else 0)
            peak = np.maximum(peak, np.where(there, held, 0.0))
        parts = {
            "params": params,
            "grads": grads,
            "optimizer": optimizer,
            "boundaries": self.kept(0),
            "logits": np.where(one, self.in_loss, 0.0),
        }
        return peak, parts

    @cached_property
    def of_replicas(self) -> Reals:
        """Bytes that torch's FSDP2 holds when a backward ends, of shards that it sums over replicas too
        (mopsim.program.replicated)."""
        c, sharding = self.c, self.space.stack.sharding
        sums = np.logical_not(during(sharding.whole_sums, c["pipeline"])) & (self.microbatches > 1)
        beside = sums | (c["offload"] == 1) | (self.reduce != self.grad)
        dense, experts = self.states
        spread = c["experts"] * c["expert_tensor"]
        plain = (c["experts"] > 1) & (not sharding.experts or sharding.experts == "shared")
        dense = np.where(self.stage > c["tensor"] * c["dense_shard"], dense, 0.0)
        experts = np.where(~plain & (self.stage > spread * c["expert_shard"]), experts, 0.0)
        held = (dense + experts) / np.maximum(c["virtual_stages"], 1) * self.reduce
        return np.asarray(np.where(sharding.copies & (c["zero"] == 3) & beside, held, 0.0))

    @cached_property
    def summed(self) -> NDArray[np.bool_]:
        """Whether all gradients are there in a backward with as many microbatches under way as in the first:
        from the start, or those of earlier ones. In pipelines twice as many as stages are enough, however
        they interleave; where the last backward frees them, one before it."""
        freed = np.array([self.space.stack.sharding.frees(zero) for zero in range(4)])
        enough = 2 * self.c["pipeline"] + self.early
        freed = freed[self.c["zero"].astype(int)] | self.early
        return np.asarray(~freed | (self.microbatches >= enough))

    @property
    def early(self) -> NDArray[np.bool_]:
        """Whether units are updated under the backward, and their gradients freed."""
        return np.asarray(self.c["beside"] == UNDER_BACKWARD)

    def above(self, stage: int) -> Reals:
        """Bytes of activations that a stage has when its first backward, or the first loss, is at its
        height."""
        loss, height = self.in_loss, self.in_backward
        alone = np.where(self.c["pipeline"] == 1, loss, 0.0)
        return np.asarray(self.kept(stage) + (loss if stage == LAST else np.maximum(alone, height)))

    @cached_property
    def layouts(self) -> tuple[list[tuple[int, int, int, int, int]], Column]:
        """(every pipeline, virtual stages, layout, microbatches, overlap; that of each row)."""
        names = ("pipeline", "virtual_stages", "layout", "overlap")
        columns = [self.space.columns[name] for name in names] + [self.microbatches.astype(np.int64)]
        codes = np.zeros(len(self.space), dtype=np.int64)
        for column in columns:
            codes = codes * (int(column.max()) + 1) + column
        _, first, places = np.unique(codes, return_index=True, return_inverse=True)
        pipeline, virtual, layout, overlap, count = ([*map(int, column[first])] for column in columns)
        return [*zip(pipeline, virtual, layout, count, overlap, strict=True)], places.reshape(-1)

    def laid(self, find: Callable[[tuple[int, int, int], int, int], NDArray[np.float64]]) -> Reals:
        """What is found for the layout of each row: (pipeline, virtual stages, layout), microbatches,
        overlap."""
        values, places = self.layouts
        return np.array([find(one[:3], *one[3:]) for one in values])[places]

    def kept(self, stage: int) -> Reals:
        """Bytes on the device of a stage that the forwards before its first backward leave."""
        model, c = self.model, self.c
        many = self.laid(lambda laid, count, ahead: under_way(model, *laid, count, stage % laid[0], ahead))
        row = self.tokens / c["tensor"] * model.hidden_size * self.compute
        return np.asarray((many * self.left).sum(axis=1) - self.away * many.sum(axis=1) * row)

    def of_stage(self, resident: Reals, stage: int) -> Reals:
        """Bytes of weights, gradients and optimizer state of a stage, and of all weights that stay gathered
        until the backward. resident: of the mean stage."""
        c, sizes = self.c, self.sizes
        dense, routed = (np.array([sizes.layers[kind][at] for kind in kinds(self.model)]) for at in (0, 1))
        count = self.laid(lambda laid, *_: of_stage(self.model, *laid, stage % laid[0]))
        edge = {0: sizes.embedding, LAST: sizes.head}.get(stage, 0)
        below = self.replicated(count @ dense + edge, count @ routed)
        spread = c["experts"] * c["expert_tensor"]
        kept = np.where(c["dense_shard"] > 1, count @ dense / c["tensor"], 0.0)
        kept = kept + np.where(c["expert_shard"] > 1, count @ routed / spread, 0.0)
        gathered = np.where(c["reshard"] == 0, kept, 0.0) * self.sent
        shards = (count @ dense + edge) / (c["tensor"] * c["dense_shard"])
        shards = shards + count @ routed / spread / c["expert_shard"]
        here = c["offload"] == 0
        grads = shards * np.where(here, self.grad * self.summed, 0.0)
        mine = shards * (np.where(here, self.weight, 0.0) + self.optimizer_here)
        mine = mine + np.where(self.gathers_parts, np.maximum(gathered, grads), gathered + grads)
        mine = np.where(c["pipeline"] == 1, resident + gathered, mine)
        return np.asarray(np.where(c["zero"] == 3, mine, below))

    @property
    def gathers_parts(self) -> NDArray[np.bool_]:
        """Whether a backward frees what other parts of its stage had gathered: later ones have gradients of
        all parts, and weights of few."""
        stays = during(self.space.stack.sharding.stays, self.c["pipeline"])
        parts = (self.c["virtual_stages"] > 1) | (self.c["layout"] == IDEAL)
        return np.asarray(parts & np.logical_not(stays))

    def replicated(self, dense: Reals | float, routed: Reals | float) -> Reals:
        """Bytes of weights and gradients, and the share of optimizer state on the device, below ZeRO-3, of
        parameters of one stage that ranks of `tensor`, or of experts, split."""
        c = self.c
        each = self.optimizer_here
        whole = dense / c["tensor"] + routed / (c["experts"] * c["expert_tensor"])
        held = self.weight + self.grad * self.summed
        return np.asarray(whole * held + (dense + routed) / self.stage * each)

    def host_memory(self) -> Reals:
        """What lives there, and what an update on the host has there of what lives on the device: gradients,
        and parameters of the experts or the others at a time (mopsim.program.update)."""
        c, (_, state), states = self.c, self.held, self.states
        visits = state * self.grad + np.maximum(*states) * self.param * (not self.copied_masters)
        updated = (c["state"] == HOST) & (c["offload"] == 0) & (not self.flat)
        return np.asarray(sum(self.on_host()) + np.where(updated, self.state_away * visits, 0.0))

    def on_host(self) -> tuple[Reals, Reals, Reals]:
        """What lives there: (optimizer state, weights and gradients, layer inputs)."""
        weights, state = self.held
        off = self.state_away * state * (self.master + self.moments)
        return off, np.where(self.c["offload"] == 1, weights * (self.param + self.grad), 0.0), self.moved()

    def gathered(self) -> Reals:
        """Bytes of weights gathered for a layer and the next, or of all that stay until the backward."""
        c, layers = self.c, float(self.model.num_hidden_layers)
        experts = self.sizes.experts / (c["experts"] * c["expert_tensor"])
        whole = (self.sizes.dense / c["tensor"] + experts) * self.sent
        each = np.minimum(whole / c["pipeline"], 2 * whole / layers) * self.by_layer
        whole = whole / c["pipeline"]
        held = np.where(c["reshard"] == 1, each, whole)
        return np.asarray(np.where(c["zero"] == 3, held, 0.0))


def _reals(column: Column) -> Reals:
    """A column of one value stays one."""
    if column.strides[0]:
        return column.astype(np.float64)
    return np.broadcast_to(column[:1].astype(np.float64), len(column))
