"""Context: everything the lowering of one strategy looks up: sizes, groups, units, routing."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from mopsim.layers.shapes import Shapes
from mopsim.lowering.topology import process_groups
from mopsim.lowering.units import Unit, edge_units, layer_units
from mopsim.lowering.workload import Group
from mopsim.spec.layout import num_chunks, offloaded_boundaries, routing_counts
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.spec.units import DTYPE_BYTES


@dataclass(frozen=True)
class Context:
    """One rank's view. b: bytes of the compute dtype; wide: of the dtype of sums (at least fp32)."""

    model: ModelSpec
    strategy: Strategy
    training: TrainSpec
    groups: dict[str, Group]
    shapes: Shapes
    layers: dict[int, list[Unit]]
    edges: dict[str, Unit]
    chunks: int
    b: int
    wide: int
    param: int
    grad: int
    reduce: int

    @property
    def tokens(self) -> int:
        return self.shapes.tokens

    @property
    def hidden(self) -> int:
        """Bytes of one [N, H] tensor in the compute dtype."""
        return self.shapes.tokens * self.model.hidden_size * self.b

    @property
    def offloaded(self) -> int:
        """Boundaries that go to the host, the first ones."""
        activations = self.strategy.activations
        if activations.boundary_tier == "device":
            return 0
        return offloaded_boundaries(self.model.num_hidden_layers, self.hidden, activations.host_budget)

    def units(self) -> list[Unit]:
        """All units of the rank in forward order."""
        first = [self.edges["embedding"]]
        middle = [unit for layer in sorted(self.layers) for unit in self.layers[layer]]
        return first + middle + [self.edges[name] for name in ("final", "head") if name in self.edges]

    def chunk_tokens(self, index: int) -> int:
        """Tokens of strided chunk `index`."""
        return len(range(index, self.tokens, self.chunks))

    def routes(self, index: int) -> tuple[int, ...]:
        """Rows of each expert of the most loaded rank, from chunk `index` of all ranks of its expert
        group."""
        return _routes(
            self.training.routing, self.tokens, self.chunks, index, self.model.num_local_experts,
            self.model.num_experts_per_tok, self.strategy.experts.degree,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _routes(
    routing: str, tokens: int, chunks: int, index: int, experts: int, top_k: int, degree: int
) -> tuple[int, ...]:
    """Every rank of the group sends alike, so the expert's rows are `degree` times one rank's."""
    if routing == "balanced":
        counts = _balanced(len(range(index, tokens, chunks)), index, chunks, experts, top_k)
    else:
        counts = routing_counts(routing, tokens, chunks, index, experts, top_k)
    local = experts // degree
    ranks = [counts[i * local : (i + 1) * local] for i in range(degree)]
    return tuple(degree * count for count in max(ranks, key=sum))


def _balanced(tokens: int, index: int, chunks: int, experts: int, top_k: int) -> tuple[int, ...]:
    """`routing_counts` of the balanced profile in O(E k): position index + i*chunks takes experts (position
    + j) mod E."""
    period = experts // gcd(chunks, experts)
    full, rest = divmod(tokens, period)
    starts = [0] * experts
    for i in range(period):
        starts[(index + i * chunks) % experts] += full + (i < rest)
    return tuple(sum(starts[(e - j) % experts] for j in range(top_k)) for e in range(experts))


def _groups(model: ModelSpec, strategy: Strategy, domain: int) -> dict[str, Group]:
    """Process groups; that of the experts knows how many a token chooses where copies are sent once."""
    found = process_groups(strategy, domain)
    if strategy.experts.dispatch == "deduplicated":
        found["experts"] = replace(found["experts"], choices=model.num_experts_per_tok)
    return found


def make_context(model: ModelSpec, strategy: Strategy, training: TrainSpec, domain: int) -> Context:
    """Raises SpecError where strategy, model and training do not fit together."""
    strategy.check_model(model)
    training.check_strategy(strategy)
    training.check_model(model)
    precision = strategy.precision
    b = int(DTYPE_BYTES[precision.compute])
    dense = strategy.dense
    tokens = training.tokens_per_rank(strategy) // (dense.tensor if dense.sequence_parallel else 1)
    wide = 8 if precision.compute == "float64" else 4
    shapes = Shapes(
        tokens,
        training.seq_len,
        strategy.attention.sequence,
        strategy.dense.tensor,
        strategy.experts.tensor,
        b,
        wide,
        sequence_parallel=dense.sequence_parallel,
    )
    count = model.num_hidden_layers + model.num_nextn_predict_layers
    return Context(
        model,
        strategy,
        training,
        _groups(model, strategy, domain),
        shapes,
        {layer: layer_units(model, strategy, layer) for layer in range(count)},
        edge_units(model, strategy),
        num_chunks(tokens, strategy.experts.chunk_tokens, strategy.experts.max_chunks),
        b,
        wide,
        int(DTYPE_BYTES[precision.param]),
        int(DTYPE_BYTES[precision.grad]),
        int(DTYPE_BYTES[precision.reduce]),
    )
