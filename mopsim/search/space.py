"""The candidates of a family as columns of a table: hundreds of thousands cost milliseconds, none is
built before it is needed."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mopsim.common.units import DTYPE_BYTES
from mopsim.search.build import build
from mopsim.search.problem import (
    CHUNKED,
    DEFAULTS,
    DEVICE,
    EXCHANGES,
    FULL,
    HOST,
    PARTS,
    RING,
    STREAMED,
    ULYSSES,
    Axes,
    Column,
    Problem,
    divisors,
    tokens,
)
from mopsim.spec.layout import ceil_div
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.strategies import STACKS

IN_8_BITS = ("fsdp2", "megatron")
"""Families whose products may be cast (CAST)."""


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

    def take(self, rows: Column) -> "Space":
        """The rows of these places, in their order."""
        columns = {
            name: column[rows] if column.strides[0] else np.broadcast_to(column[:1], len(rows))
            for name, column in self.columns.items()
        }
        return Space(self.family, self.problem, columns)

    def row(self, index: int) -> dict[str, int]:
        return {name: int(column[index]) for name, column in self.columns.items()}

    def build(self, index: int) -> Strategy:
        """The Strategy of one row. Raises SpecError where a relation that the columns do not hold breaks."""
        return build(self.family, self.problem, self.row(index))

    @cached_property
    def stack(self) -> Stack:
        """The software that the candidates run on."""
        return self.problem.stack or load_stack(STACKS[self.family])

    def tokens(self) -> Column:
        """N of every row: tokens per rank and microbatch."""
        return tokens(self.problem, self.columns)


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
        lambda c: np.maximum.reduce([c["chunks"], c["ffn_slices"], c["loss_slices"]]) <= tokens(problem, c),
    )


def _micro_batches(problem: Problem) -> list[int]:
    """Up to the whole global batch: powers of two, and those times its odd part."""
    batch = problem.training.global_batch
    twos = batch & -batch
    powers = [1 << i for i in range(twos.bit_length())]
    return sorted({part * power for part in (1, batch // twos) for power in powers})


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


def _slices(used: bool) -> list[int]:
    return [1, 8] if used else [1]


def _rings(problem: Problem) -> list[int]:
    """Ranks of a vocabulary ring: within a node, or all: a ring over some nodes is as slow as over all."""
    rings = {*divisors(problem.hardware.devices_per_node), problem.world_size}
    most = problem.model.vocab_size
    return sorted(d for d in rings if problem.world_size % d == 0 and d <= most)


def _mop_axes(problem: Problem) -> Axes:
    model = problem.model
    return {
        "micro_batch": _micro_batches(problem),
        "sequence": _sequences(problem),
        ("experts", "expert_shard"): _expert_pairs(problem),
        "vocabulary": _rings(problem),
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
