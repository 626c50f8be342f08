"""The axes of the families' spaces: what is decided, which values it may take, in which families."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from mopsim.common.units import DTYPE_BYTES
from mopsim.search.problem import (
    ALL_GATHER,
    CHUNKED,
    DEFAULTS,
    DEVICE,
    DISPATCHERS,
    EXCHANGES,
    FULL,
    HOST,
    LEANEST,
    PARTS,
    RECOMPUTED,
    RING,
    RINGS,
    SAVED,
    STREAMED,
    ULYSSES,
    UNDER_BACKWARD,
    Axes,
    Problem,
    Values,
    divisors,
)
from mopsim.search.stages import ENDS, EVEN, IDEAL, RULES, VIRTUAL, can_lay
from mopsim.spec.capability.expressions import holds
from mopsim.spec.capability.job import Job
from mopsim.spec.layout import ceil_div
from mopsim.strategies import CHUNK_TOKENS, mop

MOP, FSDP2, ZERO, MEGATRON = ("mop",), ("fsdp2",), ("zero_offload",), ("megatron",)
FLAT = (*MOP, *ZERO)
SPLIT = (*FSDP2, *MEGATRON)
"""Families whose tensors and layers may be split over ranks."""
ALL = (*FLAT, *SPLIT)
MOST_CONTEXT = 64
"""Ranks of a context-parallel group that exchanges blocks of keys, at most."""


@dataclass(frozen=True)
class Axis:
    """columns: that are set together, by one decision. values: of them, of a problem; an axis without values
    is left out. families: that have it.

    A minor axis moves a step less than those that it depends on: a large space is cut down before these are
    multiplied out. fast: values of it, one of which bounds the time from below whatever the axis is; lean:
    those that bound the device memory. traded: the fastest needs the most memory, so that both are bounded
    value by value.
    """

    columns: tuple[str, ...]
    values: Callable[[Problem], Values]
    families: tuple[str, ...]
    fast: tuple[tuple[int, ...], ...] = ()
    lean: tuple[int, ...] = ()
    traded: bool = False

    @property
    def key(self) -> str | tuple[str, ...]:
        """Its name in `Axes`."""
        return self.columns if len(self.columns) > 1 else self.columns[0]


def every_axis(problem: Problem, family: str) -> Axes:
    """The axes of a family and their values, whether its program has them or not, the last one fastest."""
    found: Axes = {}
    for axis in AXES:
        if family in axis.families and len(values := axis.values(problem)):
            found[axis.key] = values
    return found


SMALL = 8
"""Micro-batches of which every one that divides the batch is tried."""


def _micro_batches(problem: Problem) -> list[int]:
    """Up to the whole global batch: powers of two, those times its odd part, and all that divide it up to
    SMALL: with 3 or 6 sequences a rank a power of two leaves many microbatches."""
    batch = problem.training.global_batch
    twos = batch & -batch
    powers = [1 << i for i in range(twos.bit_length())]
    small = {one for one in range(1, SMALL + 1) if batch % one == 0}
    return sorted(small | {part * power for part in (1, batch // twos) for power in powers})


def _sequences(problem: Problem) -> list[int]:
    heads, length = problem.model.num_split_heads, problem.training.seq_len
    return [d for d in divisors(problem.world_size) if heads % d == 0 and length % d == 0]


def _exchanged(problem: Problem) -> list[tuple[int, ...]]:
    """(degree, exchange): what is alone on its sequence exchanges nothing; Ulysses splits the heads."""
    others = [way for way in range(len(EXCHANGES)) if way != ULYSSES]
    blocks = ((d, way) for d in _contexts(problem) for way in others if d > 1)
    return sorted([*((d, ULYSSES) for d in _sequences(problem)), *blocks])


def _contexts(problem: Problem) -> list[int]:
    length = problem.training.seq_len
    return [d for d in divisors(problem.world_size) if length % d == 0 and d <= MOST_CONTEXT]


def _expert_degrees(problem: Problem) -> list[int]:
    experts = max(problem.model.num_local_experts, 1)
    return [d for d in divisors(problem.world_size) if experts % d == 0]


def _dense_shards(problem: Problem) -> list[int]:
    """All ranks, one node (the copies replicated over nodes), or none where the model is small."""
    world, node = problem.world_size, problem.hardware.devices_per_node
    small = problem.total_params <= 2e9
    return sorted({world, node if world % node == 0 else world, 1 if small else world}, reverse=True)


def _copies(problem: Problem) -> list[int]:
    """One copy of the state for all ranks that may share it, or one in each node."""
    return [0, 1] if problem.num_nodes > 1 else [0]


def _expert_pairs(problem: Problem) -> list[tuple[int, ...]]:
    """(degree, shard): the replicas of an expert share its state, or each holds all of it."""
    world = problem.world_size
    return sorted({pair for d in _expert_degrees(problem) for pair in ((d, world // d), (d, 1))})


def _apart(values: Callable[[Problem], Values]) -> Callable[[Problem], Values]:
    """Of experts or of the rest, where each has its own shards."""
    return lambda problem: [] if one_mesh(problem) else values(problem)


def _of_a_mesh(shards: Callable[[Problem], list[int]]) -> Callable[[Problem], Values]:
    """(degree, shard, ranks that share one copy of the rest), where experts have as many copies."""

    def values(problem: Problem) -> list[tuple[int, ...]]:
        pairs = product(_expert_degrees(problem), shards(problem) if one_mesh(problem) else ())
        return [(degree, shard // degree, shard) for degree, shard in pairs if shard % degree == 0]

    return values


def one_mesh(problem: Problem) -> bool:
    """Whether one degree replicates experts and the rest, or there are none to shard in another way."""
    return not problem.model.num_local_experts or bool(problem.stack and problem.stack.sharding.one_mesh)


def _tensor(problem: Problem) -> list[int]:
    node, heads = problem.hardware.devices_per_node, problem.model.num_split_heads
    return [d for d in divisors(problem.world_size) if d <= node and heads % d == 0]


def _split_experts(problem: Problem) -> list[tuple[int, ...]]:
    """(degree, ranks that split an expert, within a node)."""
    world = problem.world_size
    tensor = {1, *(_tensor(problem) if problem.model.num_local_experts else ())}
    return sorted((d, t) for d in _expert_degrees(problem) for t in tensor if world % (d * t) == 0)


def _pipelines(problem: Problem) -> list[int]:
    return [d for d in divisors(problem.world_size) if can_lay(problem.model, d)]


def _stages(problem: Problem) -> list[tuple[int, ...]]:
    """(virtual stages, layout of the layers)."""
    return [(virtual, layout) for virtual in VIRTUAL for layout in RULES]


def _few_stages(problem: Problem) -> list[tuple[int, ...]]:
    """The same of published recipes of FSDP2."""
    return [(virtual, layout) for virtual in (1, 2) for layout in (EVEN, ENDS)]


def _modules(problem: Problem) -> list[int]:
    """Sets of modules that the network has, as Megatron's recipes choose them."""
    return [code for code in _there(problem) if not {"mlp", "moe"} <= {*RECOMPUTED[code]}]


def _wrapped(problem: Problem) -> list[int]:
    """None, attention's core, and all that is beside attention: torch's checkpoint stands around modules."""
    model = problem.model
    ffn = tuple(
        name for name, count in (("mlp", model.num_dense_layers), ("moe", model.num_local_experts)) if count
    )
    return sorted(RECOMPUTED.index(one) for one in ((), ("core_attn",), ffn))


def _saved(problem: Problem) -> list[int]:
    """Sets of kernels that the network has."""
    routed = problem.model.num_local_experts > 0
    return [code for code, names in enumerate(SAVED) if routed or set(names) <= {"attention_core"}]


def _there(problem: Problem) -> list[int]:
    model = problem.model
    has = {
        "mla_up_proj": model.attention == "mla", "moe": model.num_local_experts > 0,
        "moe_act": model.num_local_experts > 0, "mlp": model.num_dense_layers > 0,
    }  # fmt: skip
    return [code for code, names in enumerate(RECOMPUTED) if all(has.get(name, True) for name in names)]


def _dispatchers(problem: Problem) -> list[int]:
    """DeepEP copies within a node; HybridEP over the whole of a scale-up domain beyond one."""
    if not problem.model.num_local_experts:
        return []
    hardware = problem.hardware
    once = "hybridep" if hardware.scale_up_size > hardware.devices_per_node else "deepep"
    return [0, DISPATCHERS.index(once)]


def _overlaps(problem: Problem) -> list[int]:
    return [0, 1] if problem.model.num_local_experts else []


def _states(problem: Problem) -> list[tuple[int, ...]]:
    """(state, bucket, beside): on the device; streamed in buckets, at the end of a step or beside the next
    forward, where the program can; updated by the host. Where nothing is clipped, under the backward too."""
    per_rank = ceil_div(problem.total_params, problem.world_size)
    whole = DEFAULTS["bucket"]
    buckets = [25_000_000, whole] if per_rank > 50_000_000 else sorted({max(1, ceil_div(per_rank, 4)), whole})
    beside = _updates_beside(problem)
    early = [UNDER_BACKWARD] * (beside and problem.training.clip_norm == 0)
    streamed = [(STREAMED, bucket, way) for way in (0, *[1] * beside, *early) for bucket in buckets]
    return [*((DEVICE, whole, way) for way in (0, *early)), *streamed, (HOST, whole, 0)]


def _updates_beside(problem: Problem) -> bool:
    """Whether the program can update beside the next forward; on a CPU its cores would be the forward's."""
    job = Job(problem.model, mop(problem.world_size), problem.training, problem.software("mop"))
    return problem.hardware.device_kind != "cpu" and holds("pairs")(job)


def _host_states(problem: Problem) -> list[tuple[int, ...]]:
    """(state, parts of it on the host): off the device only where it takes much of it, spread over all; three
    quarters too where all could fill the host, whose pinned blocks may be twice as large."""
    each = 12 * problem.total_params / problem.world_size
    if each < problem.hardware.memory_limit() / 4:
        return []
    most = [PARTS * 3 // 4] if 2 * each > problem.hardware.host_limit() else []
    return [(DEVICE, PARTS), *((HOST, parts) for parts in (PARTS // 2, *most, PARTS))]


def _boundaries(problem: Problem) -> list[tuple[int, ...]]:
    """(on the host, parts of them): none or all; parts of them too where even the shortest piece of a
    sequence could fill the host, whose pinned blocks may be twice as large, and which has state to hold."""
    each = _shortest(problem) * problem.model.hidden_size * int(DTYPE_BYTES[problem.compute])
    least = problem.model.num_hidden_layers * each
    some = range(1, PARTS) if 4 * least > problem.hardware.host_limit() else range(0)
    return [(0, PARTS), *((1, parts) for parts in (*some, PARTS))]


def _rings(problem: Problem) -> list[int]:
    """Ranks of a vocabulary ring: within a node, or all: a ring over some nodes is as slow as over all."""
    rings = {*divisors(problem.hardware.devices_per_node), problem.world_size}
    most = problem.model.vocab_size
    return sorted(d for d in rings if problem.world_size % d == 0 and d <= most)


def _shortest(problem: Problem) -> int:
    """Tokens of a sequence that a rank has where most ranks share it."""
    return problem.training.seq_len // max(_sequences(problem))


def _chunks(problem: Problem) -> list[int]:
    if not problem.model.num_local_experts:
        return [1]
    return [2**power for power in range(most_chunks(problem).bit_length())]


def most_chunks(problem: Problem) -> int:
    """Chunks in which a rank's tokens are dispatched at most: those of what `mop` takes unless told."""
    return max(_shortest(problem) // CHUNK_TOKENS, 8)


def _ffn_slices(problem: Problem) -> list[int]:
    model = problem.model
    return [1, 8] if model.num_dense_layers > 0 or model.shared_expert_intermediate_size > 0 else []


def _placements(problem: Problem) -> list[int]:
    """Experts on neighbours, or on every n-th rank, so that the replicas of one are in a node."""
    return [0, 1] if problem.model.num_local_experts and problem.num_nodes > 1 else []


def _just(*values: int | tuple[int, ...]) -> Callable[[Problem], Values]:
    return lambda problem: list(values)  # type: ignore[return-value]


AXES: tuple[Axis, ...] = (
    Axis(("micro_batch",), _micro_batches, ALL),
    Axis(("tensor",), _tensor, SPLIT),
    Axis(("pipeline",), _pipelines, SPLIT),
    Axis(("sequence",), _sequences, FLAT),
    Axis(("sequence", "exchange"), _exchanged, FSDP2),
    Axis(("sequence",), _contexts, MEGATRON),
    Axis(("experts", "expert_shard"), _apart(_expert_pairs), FLAT),
    Axis(("experts", "expert_shard", "dense_shard"), _of_a_mesh(_dense_shards), FLAT),
    Axis(("experts", "expert_tensor"), _split_experts, SPLIT),
    Axis(("in_node",), _copies, FSDP2),
    Axis(("vocabulary",), _rings, MOP),
    Axis(("dense_shard",), _apart(_dense_shards), FLAT),
    Axis(("chunks",), _chunks, MOP),
    Axis(("loss",), _just(RING), MOP),
    Axis(("loss", "loss_slices"), _just((FULL, 1), (CHUNKED, 8), (CHUNKED, 32)), FSDP2),
    Axis(("loss", "loss_slices"), _just((FULL, 1), (CHUNKED, 8)), ZERO),
    Axis(("state", "bucket", "beside"), _states, MOP),
    Axis(("state",), _just(HOST), ZERO),
    Axis(("offload", "state"), _just((0, DEVICE), (1, HOST)), FSDP2),
    Axis(("boundary_host", "boundary_parts"), _boundaries, FLAT),
    Axis(("boundary_host",), _just(0, 1), MEGATRON),
    Axis(("recompute",), _just(0, 1), SPLIT),
    Axis(("reshard",), _just(0, 1), FSDP2),
    Axis(("zero",), _just(1), MEGATRON),
    Axis(("reshard",), _just(0), MEGATRON),
    Axis(("virtual_stages", "layout"), _stages, MEGATRON, ((1, IDEAL),), (1, IDEAL)),
    Axis(("virtual_stages", "layout"), _few_stages, FSDP2, ((1, IDEAL),), (1, IDEAL)),
    Axis(("modules",), _modules, MEGATRON, ((0,),), (LEANEST,), traded=True),
    Axis(("modules",), _wrapped, FSDP2, ((0,),), (LEANEST,), traded=True),
    Axis(("saved",), _saved, FSDP2, ((0,),), (0,), traded=True),
    Axis(("dispatcher",), _dispatchers, MEGATRON, ((1,),), (1,)),
    Axis(("overlap",), _overlaps, MEGATRON, ((1,),), (0,)),
    Axis(("exchange",), _just(RINGS, ALL_GATHER, ULYSSES), MEGATRON, ((RINGS,),), (RINGS,)),
    Axis(("state", "state_parts"), _host_states, MEGATRON, ((DEVICE, PARTS),), (HOST, PARTS), traded=True),
    Axis(("strided",), _placements, MOP, ((0,), (1,)), (0,)),
    Axis(("ffn_slices",), _ffn_slices, MOP, ((1,),), (8,)),
    Axis(("loss_slices",), _just(1, 8), MOP, ((1,),), (8,)),
)
"""In order of effect."""


@dataclass(frozen=True)
class Follower:
    """Of a column that no axis sets in these families: it follows from the others."""

    families: tuple[str, ...]
    of: Callable[[Problem, Mapping[str, Any]], Any]


def _copy(problem: Problem, c: Mapping[str, Any]) -> Any:
    """Ranks of a copy of the state: of a stage, or those of them in a node."""
    stage = problem.world_size // c["pipeline"]
    return stage + c["in_node"] * (problem.hardware.devices_per_node - stage)


def _dense_ranks(problem: Problem, c: Mapping[str, Any]) -> Any:
    return np.maximum(_copy(problem, c) // c["tensor"], 1)


def _expert_ranks(problem: Problem, c: Mapping[str, Any]) -> Any:
    """The replicas of an expert share its state, where programs shard it; where one mesh has all weights,
    those in a copy; without experts as many as of the rest."""
    if not problem.model.num_local_experts:
        return _dense_ranks(problem, c)
    if problem.stack and not problem.stack.sharding.experts:
        return np.ones_like(c["experts"])
    ranks = _copy(problem, c) if one_mesh(problem) else problem.world_size // c["pipeline"]
    return np.maximum(ranks // (c["experts"] * c["expert_tensor"]), 1)


FOLLOWERS = {
    "dense_shard": Follower(FSDP2, _dense_ranks),
    "expert_shard": Follower(FSDP2, _expert_ranks),
}


def followed(problem: Problem, family: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns, or a row, of a family with those that follow from the others."""
    mine = {name: one.of(problem, columns) for name, one in FOLLOWERS.items() if family in one.families}
    return {**columns, **mine}


MINOR = {axis.key: axis for axis in AXES if axis.fast}

FIRST = {
    family: {"tensor": 1, "pipeline": 1, "expert_tensor": 1, "modules": 0, "saved": 0} for family in FSDP2
}
"""Values of columns that make a part of a family's space, hunted before all else as if it were alone: more
axes are never worse than none."""


def within(axes: Axes, only: Mapping[str, int]) -> Axes:
    """Axes with those of their values that some columns have."""

    def has(key: str | tuple[str, ...], value: Any) -> bool:
        names, parts = ((key,), (value,)) if isinstance(key, str) else (key, value)
        return all(only.get(name, part) == part for name, part in zip(names, parts, strict=True))

    return {key: [one for one in values if has(key, one)] for key, values in axes.items()}  # type: ignore[misc]
