"""The candidates of a family as columns of a table: hundreds of thousands cost milliseconds, none is
built before it is needed."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from mopsim.common.units import DTYPE_BYTES
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.layout import ceil_div
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import CAST, DType, Exchange, MatmulDType, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import STACKS, State, fsdp2, megatron, mop, zero_offload

Column = NDArray[np.int64]
Number = TypeVar("Number", int, Column)
Values = Sequence[int] | Sequence[tuple[int, ...]]
Axes = dict[str | tuple[str, ...], Values]

#: Codes of the `state` column (where the optimizer lives), of the `loss` and of the `exchange` column.
DEVICE, STREAMED, HOST = 0, 1, 2
FULL, CHUNKED, RING = 0, 1, 2
ULYSSES = 0

PARTS = 4
"""`boundary_parts` of so many are the layer inputs that go to the host, where they do."""

STATES: tuple[State, ...] = ("device", "host_streamed", "host")
EXCHANGES: tuple[Exchange, ...] = ("ulysses", "ring", "all_gather")

DEFAULTS = {
    "micro_batch": 1,
    "tensor": 1,
    "pipeline": 1,
    "virtual_stages": 1,
    "sequence": 1,
    "exchange": ULYSSES,
    "experts": 1,
    "expert_tensor": 1,
    "expert_shard": 1,
    "vocabulary": 1,
    "dense_shard": 1,
    "chunks": 0,
    "ffn_slices": 1,
    "loss": FULL,
    "loss_slices": 1,
    "state": DEVICE,
    "bucket": 100_000_000,
    "boundary_host": 0,
    "boundary_parts": PARTS,
    "recompute": 1,
    "reshard": 1,
    "offload": 0,
    "zero": 3,
}


@dataclass(frozen=True)
class Problem:
    """What a strategy is looked for: every input of the search but its options. `total_params` is the
    model's total. precision: what products compute in; of 8 and 4 bits, beside bfloat16.
    stack: the software, where it is not the family's own."""

    model: ModelSpec
    hardware: HardwareProfile
    num_nodes: int
    training: TrainSpec
    total_params: int
    precision: MatmulDType = "bfloat16"
    stack: Stack | None = None

    @property
    def compute(self) -> DType:
        """What is not a product computes in."""
        return "bfloat16" if self.precision in CAST else cast(DType, self.precision)

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.hardware.devices_per_node


@dataclass(frozen=True)
class Space:
    """Candidates of one family: equal columns of integers, one row per candidate; `build(row)` makes the
    Strategy."""

    family: str
    problem: Problem
    columns: dict[str, Column]
    rejected: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.columns["micro_batch"])

    def part(self, start: int, stop: int) -> "Space":
        """Rows start to stop, as views."""
        columns = {name: column[start:stop] for name, column in self.columns.items()}
        return Space(self.family, self.problem, columns)

    def row(self, index: int) -> dict[str, int]:
        return {name: int(column[index]) for name, column in self.columns.items()}

    def build(self, index: int) -> Strategy:
        """The Strategy of one row. Raises SpecError where a relation that the columns do not hold breaks."""
        row = self.row(index)
        strategy = BUILDERS[self.family](self.problem, row)
        if self.problem.precision in CAST:
            precision = replace(strategy.precision, matmul=self.problem.precision)
            strategy = replace(strategy, precision=precision)
        if self.problem.stack:
            strategy = replace(strategy, stack=self.problem.stack.name)
        return _within_host(self.problem, row, strategy)

    @cached_property
    def stack(self) -> Stack:
        """The software that the candidates run on."""
        return self.problem.stack or load_stack(STACKS[self.family])

    def tokens(self) -> Column:
        """N of every row: tokens per rank and microbatch."""
        return _tokens(self.problem, self.columns)


def divisors(value: int) -> list[int]:
    return [d for d in range(1, value + 1) if value % d == 0]


def generate(problem: Problem, family: str, change: Callable[[Problem, Axes], Axes] | None = None) -> Space:
    """All legal candidates of a family: the product of its axes (as `change` leaves them), less the rows that
    break a relation between two."""
    axes = AXES[family](problem)
    columns = _product(change(problem, axes) if change else axes)
    rejected: Counter[str] = Counter()
    keep = np.ones(len(columns["micro_batch"]), dtype=np.bool_)
    for reason, legal in _relations(problem, columns):
        broken = keep & ~legal(columns)
        if broken.any():
            rejected[reason] += int(broken.sum())
            keep &= ~broken
    count = int(keep.sum())
    if count < len(keep):
        columns = {
            name: column[keep] if column.strides[0] else np.broadcast_to(column[:1], count)
            for name, column in columns.items()
        }
    return Space(family, problem, columns, rejected)


def _product(axes: Axes) -> dict[str, Column]:
    """Columns of the Cartesian product, the last axis fastest. A key that is a tuple of names takes tuples of
    values that go together. A column of one value takes no memory (a stride of 0)."""
    size = math.prod(len(values) for values in axes.values())
    columns: dict[str, Column] = {
        name: np.broadcast_to(np.int64(value), size) for name, value in DEFAULTS.items()
    }
    inner = size
    for key, values in axes.items():
        table = np.array(values, dtype=np.int64).reshape(len(values), -1)
        outer, inner = size // inner, inner // len(values)
        for position, name in enumerate((key,) if isinstance(key, str) else key):
            columns[name] = np.tile(np.repeat(table[:, position], inner), outer)
    return columns


def _relations(
    problem: Problem, columns: dict[str, Column]
) -> Iterable[tuple[str, Callable[[dict[str, Column]], NDArray[np.bool_]]]]:
    world, model, training = problem.world_size, problem.model, problem.training
    batch = training.global_batch
    experts = max(model.num_local_experts, 1)

    def stage(c: dict[str, Column]) -> Column:
        return world // c["pipeline"]

    def groups(c: dict[str, Column]) -> Column:
        return np.asarray(stage(c) // np.maximum(c["tensor"] * c["sequence"], 1))

    yield (
        "tensor x sequence does not divide the ranks of a stage",
        lambda c: stage(c) % (c["tensor"] * c["sequence"]) == 0,
    )
    yield (
        "experts x expert_tensor does not divide the ranks of a stage",
        lambda c: stage(c) % (c["experts"] * c["expert_tensor"]) == 0,
    )
    yield (
        "tensor x sequence does not divide num_attention_heads, which Ulysses splits",
        lambda c: (
            (c["exchange"] != ULYSSES) | (model.num_attention_heads % (c["tensor"] * c["sequence"]) == 0)
        ),
    )
    yield "expert degree does not divide num_local_experts", lambda c: experts % c["experts"] == 0
    yield (
        "expert shard does not divide the expert replicas",
        lambda c: stage(c) // (c["experts"] * c["expert_tensor"]) % c["expert_shard"] == 0,
    )
    yield (
        "global batch is not a multiple of micro_batch x data groups",
        lambda c: batch % (c["micro_batch"] * np.maximum(groups(c), 1)) == 0,
    )
    yield (
        "seq_len is not a multiple of the sequence split",
        lambda c: training.seq_len % (c["sequence"] * c["tensor"]) == 0,
    )
    yield (
        "more chunks than tokens",
        lambda c: np.maximum.reduce([c["chunks"], c["ffn_slices"], c["loss_slices"]]) <= _tokens(problem, c),
    )


def _micro_batches(problem: Problem) -> list[int]:
    return [size for size in (1, 2, 4, 8) if problem.training.global_batch % size == 0]


def _sequences(problem: Problem) -> list[int]:
    heads, length = problem.model.num_attention_heads, problem.training.seq_len
    return [d for d in divisors(problem.world_size) if heads % d == 0 and length % d == 0]


def _expert_degrees(problem: Problem) -> list[int]:
    experts = max(problem.model.num_local_experts, 1)
    return [d for d in divisors(problem.world_size) if experts % d == 0]


def _dense_shards(problem: Problem) -> list[int]:
    """All ranks, one node (the copies replicated over nodes), or none where the model is small."""
    world, node = problem.world_size, problem.hardware.devices_per_node
    small = problem.total_params <= 2e9
    return sorted({world, node if world % node == 0 else world, 1 if small else world}, reverse=True)


def _expert_pairs(problem: Problem) -> list[tuple[int, ...]]:
    """(degree, shard): the replicas of an expert share its state, or each holds all of it."""
    world = problem.world_size
    return sorted({pair for d in _expert_degrees(problem) for pair in ((d, world // d), (d, 1))})


def _states(problem: Problem) -> list[tuple[int, ...]]:
    """(state, bucket): on the device; streamed in buckets; updated by the host."""
    per_rank = ceil_div(problem.total_params, problem.world_size)
    whole = DEFAULTS["bucket"]
    buckets = [25_000_000, whole] if per_rank > 50_000_000 else sorted({max(1, ceil_div(per_rank, 4)), whole})
    return [(DEVICE, whole), *((STREAMED, bucket) for bucket in buckets), (HOST, whole)]


def _boundaries(problem: Problem) -> list[tuple[int, ...]]:
    """(on the host, parts of them): none or all; parts of them too where even the shortest piece of a
    sequence could fill the host, whose pinned blocks may be twice as large, and which has state to hold."""
    piece = problem.training.seq_len // max(_sequences(problem))
    each = piece * problem.model.hidden_size * int(DTYPE_BYTES[problem.compute])
    least = problem.model.num_hidden_layers * each
    some = range(1, PARTS) if 4 * least > problem.hardware.host_limit() else range(0)
    return [(0, PARTS), *((1, parts) for parts in (*some, PARTS))]


def offloaded(layers: int, parts: Column | int) -> Column:
    """Layers whose inputs go to the host, of `parts` of PARTS: rounded down, at least one."""
    return np.maximum(layers * np.asarray(parts, dtype=np.int64) // PARTS, 1)


def _within_host(problem: Problem, row: dict[str, int], strategy: Strategy) -> Strategy:
    """The strategy with a budget of the host for a part of the layer inputs."""
    if not row["boundary_host"] or row["boundary_parts"] == PARTS:
        return strategy
    each = _tokens(problem, row) * problem.model.hidden_size * int(DTYPE_BYTES[strategy.precision.compute])
    budget = int(offloaded(problem.model.num_hidden_layers, row["boundary_parts"])) * each
    return replace(strategy, activations=replace(strategy.activations, host_budget=budget))


def _slices(used: bool) -> list[int]:
    return [1, 8] if used else [1]


def _mop_axes(problem: Problem) -> Axes:
    model = problem.model
    return {
        "micro_batch": _micro_batches(problem),
        "sequence": _sequences(problem),
        ("experts", "expert_shard"): _expert_pairs(problem),
        "vocabulary": [d for d in divisors(problem.world_size) if d <= model.vocab_size],
        "dense_shard": _dense_shards(problem),
        "chunks": [1, 2, 4, 8] if model.num_local_experts else [1],
        "ffn_slices": _slices(model.num_dense_layers > 0 or model.shared_expert_intermediate_size > 0),
        "loss": [RING],
        "loss_slices": _slices(True),
        ("state", "bucket"): _states(problem),
        ("boundary_host", "boundary_parts"): _boundaries(problem),
    }


def _fsdp2_axes(problem: Problem) -> Axes:
    world = problem.world_size
    return {
        "micro_batch": _micro_batches(problem),
        "sequence": _sequences(problem),
        ("experts", "expert_shard"): [(d, world // d) for d in _expert_degrees(problem)],
        "dense_shard": [shard for shard in _dense_shards(problem) if shard > 1 or world == 1],
        ("loss", "loss_slices"): [(FULL, 1), (CHUNKED, 8), (CHUNKED, 32)],
        ("offload", "state"): [(0, DEVICE), (1, HOST)],
        "recompute": [0, 1],
        "reshard": [0, 1],
    }


def _zero_offload_axes(problem: Problem) -> Axes:
    return {
        "micro_batch": _micro_batches(problem),
        "sequence": _sequences(problem),
        ("experts", "expert_shard"): _expert_pairs(problem),
        "dense_shard": _dense_shards(problem),
        ("loss", "loss_slices"): [(FULL, 1), (CHUNKED, 8)],
        "state": [HOST],
        ("boundary_host", "boundary_parts"): _boundaries(problem),
    }


def _megatron_axes(problem: Problem) -> Axes:
    model, world, node = problem.model, problem.world_size, problem.hardware.devices_per_node
    tensor = [d for d in divisors(world) if d <= node and model.num_attention_heads % d == 0]
    expert = sorted(
        {(d, t) for d in _expert_degrees(problem) for t in (1, *(t for t in tensor if world % (d * t) == 0))}
    )
    return {
        "micro_batch": _micro_batches(problem),
        "tensor": tensor,
        "pipeline": [d for d in divisors(world) if d <= model.num_hidden_layers],
        "sequence": [d for d in divisors(world) if problem.training.seq_len % d == 0 and d <= 64],
        "exchange": [EXCHANGES.index("ring")],
        ("experts", "expert_tensor"): expert,
        "recompute": [0, 1],
        "boundary_host": [0, 1],
        "zero": [1],
        "reshard": [0],
    }


AXES = {
    "mop": _mop_axes,
    "fsdp2": _fsdp2_axes,
    "zero_offload": _zero_offload_axes,
    "megatron": _megatron_axes,
}


def _chunk(tokens: int, slices: int) -> int:
    """Tokens per slice; 0 (= all at once) for one slice."""
    return 0 if slices <= 1 else ceil_div(tokens, slices)


def _tokens(problem: Problem, row: Mapping[str, Number]) -> Number:
    """N, of a row or of a column of them: tokens per rank and microbatch."""
    return problem.training.seq_len * row["micro_batch"] // row["sequence"]


def _build_mop(problem: Problem, row: dict[str, int]) -> Strategy:
    tokens = _tokens(problem, row)
    return mop(
        problem.world_size,
        sequence=row["sequence"],
        experts=row["experts"],
        vocabulary=row["vocabulary"],
        micro_batch=row["micro_batch"],
        dense_shard=row["dense_shard"],
        expert_shard=row["expert_shard"],
        chunk_tokens=ceil_div(tokens, max(row["chunks"], 1)),
        ffn_chunk_tokens=_chunk(tokens, row["ffn_slices"]),
        loss_chunk_tokens=_chunk(tokens, row["loss_slices"]),
        state=STATES[row["state"]],
        bucket_params=row["bucket"],
        boundary_tier="host" if row["boundary_host"] else "device",
        precision=problem.compute,
    )


def _build_fsdp2(problem: Problem, row: dict[str, int]) -> Strategy:
    tokens = _tokens(problem, row)
    return fsdp2(
        problem.world_size,
        tensor=row["tensor"],
        sequence=row["sequence"],
        exchange=EXCHANGES[row["exchange"]],
        experts=row["experts"],
        micro_batch=row["micro_batch"],
        dense_shard=row["dense_shard"],
        recompute="full" if row["recompute"] else "none",
        loss="chunked" if row["loss"] == CHUNKED else "full",
        loss_chunk_tokens=ceil_div(tokens, row["loss_slices"]),
        offload=bool(row["offload"]),
        reshard=bool(row["reshard"]),
        precision=problem.compute,
    )


def _build_zero_offload(problem: Problem, row: dict[str, int]) -> Strategy:
    tokens = _tokens(problem, row)
    return zero_offload(
        problem.world_size,
        sequence=row["sequence"],
        experts=row["experts"],
        micro_batch=row["micro_batch"],
        dense_shard=row["dense_shard"],
        expert_shard=row["expert_shard"],
        loss="chunked" if row["loss"] == CHUNKED else "full",
        loss_chunk_tokens=ceil_div(tokens, row["loss_slices"]),
        boundary_tier="host" if row["boundary_host"] else "device",
        precision=problem.compute,
    )


def _build_megatron(problem: Problem, row: dict[str, int]) -> Strategy:
    return megatron(
        problem.world_size,
        tensor=row["tensor"],
        pipeline=row["pipeline"],
        virtual_stages=row["virtual_stages"],
        sequence=row["sequence"],
        experts=row["experts"],
        expert_tensor=row["expert_tensor"],
        micro_batch=row["micro_batch"],
        recompute="full" if row["recompute"] else "none",
        boundary_tier="host" if row["boundary_host"] else "device",
        precision=problem.compute,
    )


IN_8_BITS = ("fsdp2", "megatron")
"""Families whose products may be cast (CAST)."""
BUILDERS: dict[str, Callable[[Problem, dict[str, int]], Strategy]] = {
    "mop": _build_mop,
    "fsdp2": _build_fsdp2,
    "zero_offload": _build_zero_offload,
    "megatron": _build_megatron,
}
