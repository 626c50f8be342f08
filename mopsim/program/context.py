"""Context: everything that a program of one strategy looks up: sizes, groups, units, routing."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from typing import Literal

from mopsim.common.units import DTYPE_BYTES
from mopsim.graph.rewrites.masked import Rooms
from mopsim.graph.rewrites.migration import Migration, host_work
from mopsim.graph.shapes import Shapes
from mopsim.program.topology import all_groups
from mopsim.program.units import ShardedUnit, all_layer_units, edge_units, looked_up
from mopsim.program.workload import CommGroup
from mopsim.spec.capability import Job, holds, refusals
from mopsim.spec.layout import not_recomputed, num_chunks, offloaded_boundaries
from mopsim.spec.model import ModelSpec
from mopsim.spec.placement import Placement, at_home, least_loaded
from mopsim.spec.routing import RoutingProfile, routing_counts
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Experts, Precision, Strategy
from mopsim.spec.training import TrainSpec


@dataclass(frozen=True)
class Context:
    """One rank's view. b: bytes of the compute dtype; wide: of the dtype of sums (at least fp32)."""

    model: ModelSpec
    strategy: Strategy
    training: TrainSpec
    stack: Stack
    groups: dict[str, CommGroup]
    shapes: Shapes
    edges: dict[str, ShardedUnit]
    chunks: int
    b: int
    wide: int
    param: int
    grad: int
    reduce: int

    @cached_property
    def layers(self) -> dict[int, list[ShardedUnit]]:
        """Units of every layer."""
        apart = max(1, self.expert_modules)
        return all_layer_units(self.model, self.strategy, self.stack.sharding, apart=apart)

    @property
    def tokens(self) -> int:
        return self.shapes.tokens

    @property
    def shards_params(self) -> bool:
        """Whether parameters live in shards between microbatches: ZeRO-3, and all that torch's FSDP2 does
        (with zero 2 it keeps them gathered from the forward to the backward)."""
        return self.strategy.dense.zero == 3 or self.stack.sharding.fsdp

    @property
    def reshards(self) -> bool:
        """Whether FSDP2 frees a group's parameters after its forward (mopexec.modules.wrap)."""
        return self.strategy.dense.zero == 3 and self.strategy.dense.reshard_after_forward

    @cached_property
    def weaves(self) -> bool:
        """Whether passes run as weaving has it, also beside none (Megatron-Core's combined_1f1b.py)."""
        s = self.strategy
        whole = s.dense.zero < 2 or holds("kept_whole")(Job(self.model, s, self.training, self.stack))
        return bool(s.overlap.experts) and whole and s.pipeline.schedule != "zero_bubble"

    @property
    def owned(self) -> bool:
        """Whether each tensor's optimizer state is with one rank, whole."""
        return self.stack.sharding.owners and self.strategy.dense.zero == 1

    @property
    def sums_whole(self) -> bool:
        """Whether all ranks sum the gradients whole although each updates a part."""
        return self.stack.sharding.sums == "whole" and self.strategy.dense.zero in (1, 2)

    @property
    def masters_stay(self) -> int:
        """Bytes of a master weight that stay on the device though the host updates it (a copy)."""
        copied = self.stack.sharding.host_masters == "copied" and self.strategy.optimizer.update_on == "host"
        return self.own_master if copied else 0

    @property
    def own_master(self) -> int:
        """Bytes of a master weight beside the parameter, in layers that have the recipe."""
        return self.master_of(self.strategy.precision)

    def master_of(self, precision: Precision) -> int:
        """Bytes of a master weight beside the parameter, of layers in a precision."""
        s = self.strategy
        return self.stack.own_master(precision, s.dense.zero, s.optimizer.update_on)

    @property
    def widens(self) -> bool:
        """Whether moments are copied wider to be updated."""
        s = self.strategy
        return self.stack.widens(s.precision, s.dense.zero, s.optimizer.update_on)

    @property
    def logits_held(self) -> bool | Literal["copy"]:
        """What of the logits is held while the loss works on a copy (Kernels.logits_held)."""
        held = self.stack.kernels.logits_held
        return self.strategy.pipeline.pipeline_parallel > 1 if held == "pipelines" else held

    @property
    def keeps_grads(self) -> bool:
        """Whether the gradients of a microbatch stay beside their wider sums (Sharding.microbatch_grads)."""
        kept = self.stack.sharding.microbatch_grads == "kept"
        return kept and self.strategy.dense.zero <= 1 and self.grad > self.b

    @property
    def makes_grads(self) -> bool:
        """Whether a backward's gradients are fresh tensors that are added to none: shards' sums are, and a
        step's only ones where none is there before."""
        sharding = self.stack.sharding
        once = self.training.num_microbatches(self.strategy) == 1
        return sharding.fsdp or (sharding.zero_grad == "frees" and once)

    @property
    def rows_room(self) -> float:
        """Of the busiest rank's rows, how many there is room for (Kernels.expert_room and expert_buffers);
        0: for these."""
        how, model, run = self.strategy.experts, self.model, self.stack.kernels
        if how.expert_parallel == 1 or not model.num_local_experts:
            return 0.0
        room = run.expert_room * (how.token_dispatcher == "hybridep")
        if self.moves_room:
            room = min(how.expert_parallel, model.num_local_experts / model.num_experts_per_tok)
        balanced = self.tokens * self.model.num_experts_per_tok
        return room * balanced / sum(self.routes()) if room else 0.0

    @property
    def moves_room(self) -> bool:
        """Whether tensors of rows have room for all that may come, all of which is moved."""
        return self.stack.kernels.expert_buffers == "worst" and not self.stack.kernels.expert_capacity

    @property
    def beside_rows(self) -> tuple[str, ...]:
        """What travels beside rows: nothing where kernels of their own send them, no counts that the host
        never reads (Kernels.beside_rows)."""
        if self.strategy.experts.sends_once:
            return ()
        never = self.stack.host.counts_read == "never"
        return tuple(one for one in self.stack.kernels.beside_rows if not (never and one == "counts"))

    @property
    def casts_experts(self) -> bool:
        """Whether products of routed experts are in 8 or 4 bits."""
        return self.strategy.precision.is_cast and "experts" not in self.stack.kernels.exact

    @property
    def aligns_rows(self) -> bool:
        """Whether rows of experts are padded for products in 8 or 4 bits. HybridEP's kernels bring them so;
        those of a capacity are as many as it says, and a graph of the whole step has no host that knows
        them."""
        host = self.stack.host
        known = host.counts_read != "never" and not {"step", "experts"} & set(host.graphs)
        padded = self.stack.kernels.expert_padding == "aligned" and self.casts_experts
        return padded and known and self.strategy.experts.token_dispatcher != "hybridep"

    @property
    def looped(self) -> bool:
        """Whether the host starts products and casts of routed experts one by one."""
        alone = self.stack.kernels.expert_products in ("looped", "modules")
        return bool(self.model.num_local_experts) and alone

    @property
    def own_experts(self) -> int:
        """Routed experts of a rank."""
        return self.model.num_local_experts // self.strategy.experts.expert_parallel

    @property
    def expert_modules(self) -> int:
        """Experts of a rank that are modules of their own."""
        return self.own_experts if self.stack.kernels.expert_products == "modules" else 0

    def exchanges(self, unit: ShardedUnit, *, reduced: bool = False) -> int:
        """Collectives of a unit: one, or one of each module that is wrapped, or hooked, by itself."""
        if self.stack.sharding.groups == "each":
            return unit.tensors
        hooked = self.stack.host.hooks and unit.component == "experts" and not reduced
        return max(1, self.expert_modules if hooked else 0)

    @property
    def hidden(self) -> int:
        """Bytes of the residual stream, [N, H]."""
        return self.shapes.tokens * self.model.hidden_size * self.stream

    @property
    def rows(self) -> int:
        """Bytes of [N, H] in the compute dtype, as experts exchange them."""
        return self.shapes.tokens * self.model.hidden_size * self.b

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream."""
        return self.wide if self.stack.wide_stream(self.param > self.b) else self.b

    @property
    def held_output(self) -> int:
        """Bytes of a stage's output that stay there until its backward is over (Stack.stage_outputs)."""
        held = {"held": self.hidden, "parts": self.hidden // self.strategy.dense.tensor_parallel}
        return held.get(self.stack.stage_outputs, 0)

    @property
    def offloaded(self) -> int:
        """Boundaries that go to the host, the first ones."""
        activations = self.strategy.activations
        if activations.layer_inputs == "device":
            return 0
        return offloaded_boundaries(self.model.num_hidden_layers, self.hidden, activations.host_budget)

    def units(self) -> list[ShardedUnit]:
        """All units of the rank in forward order."""
        first = looked_up(self.edges)
        middle = [unit for layer in sorted(self.layers) for unit in self.layers[layer]]
        return first + middle + [self.edges[name] for name in ("final", "head") if name in self.edges]

    def chunk_tokens(self, index: int) -> int:
        """Tokens of strided chunk `index`."""
        return len(range(index, self.tokens, self.chunks))

    def gathered(self, unit: ShardedUnit) -> float:
        """Bytes of a parameter of a unit that is gathered (see Sharding.gathers)."""
        if self.stack.sharding.gathers == "param":
            return self.param
        return self.stack.gathered(self.precision(unit.layer)) if unit.layer >= 0 else self.b

    def precision(self, layer: int) -> Precision:
        """That of a layer."""
        return self.strategy.precision.of_layer(layer, self.model.num_hidden_layers)

    def recomputes(self, layer: int) -> bool:
        """Whether a layer, or what it stands for, runs again whole."""
        return self.strategy.activations.recompute == "full" and layer not in self.not_recomputed

    @cached_property
    def not_recomputed(self) -> frozenset[int]:
        """Layers that keep everything though others run again."""
        return not_recomputed(self.strategy, self.model)

    @property
    def one_weight(self) -> bool:
        """Whether embedding and head of a stage share a weight, and its gradients a sum (Sharding.tied)."""
        one = self.stack.sharding.tied == "one" and self.strategy.pipeline.pipeline_parallel == 1
        return one and self.model.tie_word_embeddings

    @property
    def one_by_one(self) -> bool:
        """Whether parameters are gathered, used and freed one after the other (Sharding.groups)."""
        return self.stack.sharding.groups == "each" and self.reshards

    def whole(self, unit: ShardedUnit) -> int:
        """Bytes of a unit's gathered parameters that are there at a time."""
        return int((unit.largest if self.one_by_one else unit.padded) * self.gathered(unit))

    @property
    def shares(self) -> list[float]:
        """Of the tokens, by chunk."""
        return [self.chunk_tokens(index) / self.tokens for index in range(self.chunks)]

    @property
    def rooms(self) -> Rooms | None:
        """Room of experts in each sequence (Kernels.expert_capacity): that of a balanced load is a whole
        number of rows of each (MaxText, layers/moe.py, generate_masks); None where all rows that come are
        computed."""
        capacity, model = self.stack.kernels.expert_capacity, self.model
        if not capacity or not model.num_local_experts:
            return None
        sequences = self.strategy.micro_batch
        tokens, experts = self.tokens / sequences, model.num_local_experts
        each = max(1, int(max(1, ceil(tokens * model.num_experts_per_tok / experts)) * capacity))
        return Rooms(sequences, tokens, each * experts, model.expert_width)

    def routes(self, index: int | None = None) -> tuple[int, ...]:
        """Rows of each expert that the most loaded rank computes, from chunk `index` (or all) of all ranks of
        its expert group; as many as there is room for, where that is fixed."""
        model, how = self.model, self.strategy.experts
        if rooms := self.rooms:
            share = 1.0 if index is None else self.shares[index]
            each = rooms.rows * share * how.expert_parallel / model.num_local_experts
            return (round(each),) * self.own_experts
        chunks = 1 if index is None else self.chunks
        return _routes(
            self.training.routing, self.tokens, chunks, index or 0, model.num_local_experts,
            model.num_experts_per_tok, how.expert_parallel, how, self._row,
        )  # fmt: skip

    @property
    def _row(self) -> float:
        """What products expert by expert hold for a row of the largest one (six inner widths in the
        backward), in experts' weights with their gradients. mopexec's own runs moved experts so."""
        if not (self.looped or self.stack.explicit):
            return 0.0
        return 6 * self.b / (self.model.ffn_matrices * self.model.expert_width * (self.b + self.reduce))

    @property
    def migration(self) -> Migration | None:
        """What least-loaded placement moves in a layer, None where experts stay at home."""
        model, how = self.model, self.strategy.experts
        if how.balance == "none" or not model.num_local_experts:
            return None
        place, busiest = _placement(
            self.training.routing, self.tokens, model.num_local_experts, model.num_experts_per_tok,
            how.expert_parallel, how, self._row,
        )  # fmt: skip
        weights = model.ffn_matrices * model.expert_width * model.moe_intermediate_size
        each = weights // how.expert_tensor_parallel * self.b
        most = max(max(place.received(rank), place.sent(rank)) for rank in range(how.expert_parallel))
        host = host_work(model.num_local_experts, how.expert_parallel, *place.divided())
        sent = place.sent(busiest) * each
        return Migration(
            place.received(busiest) * each, self.own_experts * each, most * each, *host, sent=sent
        )


@lru_cache(maxsize=1024)
def _placement(
    routing: RoutingProfile, tokens: int, experts: int, top_k: int, degree: int, how: Experts, row: float
) -> tuple[Placement, int]:
    """Where the rows of a layer are computed, and the rank that holds most: rows first, then the weights of
    others, and what a row of its largest expert holds in them (`row`). Every rank of the group sends alike,
    so an expert's rows are `degree` times one rank's.
    """
    counts = [degree * count for count in routing_counts(routing, tokens, 1, 0, experts, top_k)]
    if how.balance == "least_loaded":
        place = least_loaded(counts, degree, how.capacity, how.min_rows, how.threshold)
    else:
        place = at_home(counts, degree)
    loads = [sum(rows.values()) for rows in place.rows]
    near = [rank for rank in range(degree) if loads[rank] >= max(loads) - degree]

    def held(rank: int) -> tuple[float, int]:
        largest = max(place.rows[rank].values(), default=0)
        return place.received(rank) + row * largest, loads[rank]

    return place, max(near, key=held)


@lru_cache(maxsize=4096)
def _routes(
    routing: RoutingProfile, tokens: int, chunks: int, index: int, experts: int, top_k: int, degree: int,
    how: Experts, row: float,
) -> tuple[int, ...]:  # fmt: skip
    """Rows of each expert that the busiest rank computes in a chunk: of a moved expert the same part of every
    chunk, as strided chunks are alike."""
    counts = [degree * count for count in routing_counts(routing, tokens, chunks, index, experts, top_k)]
    if how.balance == "none":
        return max(
            (tuple(counts[i : i + experts // degree]) for i in range(0, experts, experts // degree)), key=sum
        )
    place, busiest = _placement(routing, tokens, experts, top_k, degree, how, row)
    whole = [sum(rows.get(e, 0) for rows in place.rows) for e in range(experts)]
    return tuple(counts[e] * rows // whole[e] for e, rows in place.rows[busiest].items())


def make_context(
    model: ModelSpec, strategy: Strategy, training: TrainSpec, domain: int, stack: Stack | None = None,
    architecture: str = "",
) -> Context:  # fmt: skip
    """stack: that of the strategy where none is given. architecture: of the devices. Raises SpecError where
    they do not fit together, or are not simulated."""
    stack = (stack or load_stack(strategy.stack, "strategy.stack")).under(strategy.dense.zero)
    strategy = stack.resolve(strategy)
    strategy.check_model(model)
    stack.check_strategy(strategy)
    training.check_strategy(strategy)
    training.check_model(model)
    job = Job(model, strategy, training, stack)
    for refused in refusals(job, by="simulator"):
        raise refused
    running = stack.running(model, strategy, architecture)
    precision, dense = strategy.precision, strategy.dense
    b = int(DTYPE_BYTES[precision.compute])
    tokens = training.tokens_per_rank(strategy) // (dense.tensor_parallel if dense.sequence_parallel else 1)
    wide = 8 if precision.compute == "float64" else 4
    shapes = Shapes(
        tokens, training.seq_len, strategy.attention.context_parallel, strategy.dense.tensor_parallel,
        strategy.experts.expert_tensor_parallel, b, wide, sequence_parallel=dense.sequence_parallel,
        documents=training.own_document, packed=training.attention_mask == "document",
        accumulates=b <= 2 and stack.attention != "cpu", by_rows=running.attention == "rows",
        unfused=running.attention == "unfused", rotates_apart=running.kernels.rotations == "apart",
    )  # fmt: skip
    return Context(
        model, strategy, training, running,
        all_groups(model, strategy, domain, stack, training.routing), shapes,
        edge_units(model, strategy, whole=stack.sharding.embedding == "whole", apart=holds("pairs")(job)),
        num_chunks(tokens, strategy.experts.chunk_tokens, strategy.experts.max_chunks), b, wide,
        int(DTYPE_BYTES[precision.param]), int(DTYPE_BYTES[precision.grad]),
        int(DTYPE_BYTES[precision.reduce]),
    )  # fmt: skip
