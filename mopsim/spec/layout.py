"""Sharding arithmetic that both packages use, once: groups, shards, chunks, buckets, offloading."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mopsim.common.errors import require
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Order, Strategy, even_parts

MOST_MICROBATCHES, MOST_CHUNKS, MOST_BUCKETS = 2**14, 2**12, 2**12
"""Pieces that a batch, the tokens of a rank or its parameters may be cut into: more is a slip of the pen, and
would take forever."""
PACK_BYTES = 16
"""What a route's weight takes beside its row: kernels want rows of whole 16 bytes."""
SLICE_ROWS = 2048
"""Rows of one slice of element-wise work in a wide dtype: few kernels to launch, and small beside N."""
ATTENTION_ROWS = 128
"""Query rows of a block of attention without a fused kernel: scores are as large as queries of this width."""
FUSED_ROWS = 16384
"""Of work whose passes are fused: what is left of temporaries is no wider than a row."""


def ceil_div(value: int, divisor: int) -> int:
    """Smallest integer >= value / divisor."""
    return -(-value // divisor)


def even_dim(shape: Sequence[int], degree: int) -> int:
    """The first dimension that so many ranks divide evenly; the first one where none is."""
    return next((dim for dim, size in enumerate(shape) if size % degree == 0), 0)


def groups(num_ranks: int, degree: int, order: Order = "contiguous") -> list[list[int]]:
    """Rank groups of size `degree`, in ring order. Contiguous: 0..d-1, d..2d-1; strided: 0, n/d, 2n/d, ..."""
    count = num_ranks // degree
    if order == "contiguous":
        return [list(range(i * degree, (i + 1) * degree)) for i in range(count)]
    return [list(range(i, num_ranks, count)) for i in range(count)]


def replica_groups(num_ranks: int, degree: int, order: Order = "contiguous") -> list[list[int]]:
    """The groups of ranks at the same place in their `groups(...)` group: they hold the same slice."""
    return [list(place) for place in zip(*groups(num_ranks, degree, order), strict=True)]


def split(ranks: Sequence[int], size: int) -> list[list[int]]:
    """`ranks` cut into consecutive runs of `size` (shards of one copy inside a replica group)."""
    return [list(ranks[i : i + size]) for i in range(0, len(ranks), size)]


@dataclass(frozen=True)
class Place:
    """Where a rank works: stage of the pipeline, data group of the stage, part of its sequences, and place
    among the ranks that split a tensor.
    """

    stage: int
    data: int
    context: int
    tensor: int


def place(strategy: Strategy, rank: int) -> Place:
    """The rank's place: stages are runs of ranks; in a stage the ranks of a sequence form groups as
    `attention.rank_placement` says, in which those that split a tensor are neighbours.
    """
    stage, inside = divmod(rank, strategy.stage_ranks)
    tensor, order = strategy.dense.tensor_parallel, strategy.attention.rank_placement
    sequences = groups(strategy.stage_ranks, strategy.attention.context_parallel * tensor, order)
    data, members = next((i, group) for i, group in enumerate(sequences) if inside in group)
    context, split_at = divmod(members.index(inside), tensor)
    return Place(stage, data, context, split_at)


def interval(total: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of part `index` of `total` cut into runs of ceil(total/parts); the last may be short."""
    size = ceil_div(total, parts)
    return min(index * size, total), min((index + 1) * size, total)


def shard_numel(numel: int, degree: int) -> int:
    """Elements of one rank's shard of a flat unit: padded so that all shards are equal."""
    return ceil_div(numel, degree)


def num_chunks(num_tokens: int, chunk_tokens: int, max_chunks: int) -> int:
    """K = min(ceil(N / c), Kmax); 1 where c is 0 (arXiv 2609.14306, PipelinedLLEP)."""
    return 1 if chunk_tokens == 0 else max(1, min(ceil_div(num_tokens, chunk_tokens), max_chunks))


def token_slices(num_tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Consecutive [start, stop) slices of at most `chunk_tokens` tokens (0 = one slice)."""
    size = chunk_tokens or num_tokens
    return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def ring_moves_weights(num_tokens: int, vocab_size: int, degree: int) -> bool:
    """Ring-DTP sends the weight block around where tokens outnumber its rows (N > V/P), else activations."""
    return num_tokens > ceil_div(vocab_size, degree)


def check_buckets(params: int, bucket_params: int) -> None:
    """Raise SpecError where buckets of `bucket_params` cut the `params` of a rank into more than
    MOST_BUCKETS."""
    rule = (
        f"cuts the {params} parameters of a rank into more than {MOST_BUCKETS} buckets; "
        f"{ceil_div(params, MOST_BUCKETS)} or more will do"
    )
    require(params <= bucket_params * MOST_BUCKETS, "strategy.optimizer.bucket_params", bucket_params, rule)


Slice = tuple[int, int, int]
"""(unit, start, stop) of a unit's shard."""
Bucket = list[Slice]


def numel(bucket: Sequence[Slice]) -> int:
    """Parameters of a bucket."""
    return sum(stop - start for _, start, stop in bucket)


def optimizer_buckets(shard_numels: Sequence[int], bucket_params: int) -> list[Bucket]:
    """Buckets of at most `bucket_params` parameters, slices of the shards in order.

    Raises SpecError where there would be more than MOST_BUCKETS.
    """
    check_buckets(sum(shard_numels), bucket_params)
    buckets: list[Bucket] = []
    room = 0
    for unit, size in enumerate(shard_numels):
        start = 0
        while start < size:
            if room == 0:
                buckets.append([])
                room = bucket_params
            stop = min(size, start + room)
            buckets[-1].append((unit, start, stop))
            room -= stop - start
            start = stop
    return buckets


def early_buckets(
    groups: Sequence[Sequence[int]], shard_numels: Sequence[int], bucket_params: int
) -> list[list[Bucket]]:
    """The same of each group of units (places in `shard_numels`), in the groups' order: none has slices of
    two groups, which are not updated together. Raises SpecError where `optimizer_buckets` of all would."""
    check_buckets(sum(shard_numels), bucket_params)
    found = []
    for group in groups:
        own = optimizer_buckets([shard_numels[place] for place in group], bucket_params)
        found.append([[(group[unit], start, stop) for unit, start, stop in bucket] for bucket in own])
    return found


def offloaded_boundaries(num_boundaries: int, boundary_bytes: int, host_budget: int) -> int:
    """How many boundaries, in forward order, fit the host budget (0 = no cap)."""
    return num_boundaries if host_budget == 0 else min(num_boundaries, host_budget // max(boundary_bytes, 1))


def full_parts(layers: int, parts: int, first: int, last: int) -> tuple[int, ...]:
    """Layers of each part of a pipeline, as many in all but the last as fit: what lies before the first and
    after the last layer counts as `first` and `last` layers."""
    full = ceil_div(layers + first + last, parts)
    found, left = [], layers
    for part in range(parts):
        found.append(min(left, full - first if part == 0 else full))
        left -= found[-1]
    return tuple(found)


def not_recomputed(strategy: Strategy, model: ModelSpec) -> frozenset[int]:
    """Layers that keep everything for their backward though a full recomputation runs others again
    (`activations.recompute_num_layers`)."""
    again, pipeline = strategy.activations.recompute_num_layers, strategy.pipeline
    if not again:
        return frozenset()
    layers, degree, virtual = model.num_hidden_layers, pipeline.pipeline_parallel, pipeline.virtual_stages
    chunks = (
        chunk
        for stage in range(degree)
        for chunk in stage_layers(layers, degree, virtual, stage, pipeline.layers, pipeline.folded)
    )
    mtp = range(layers, layers + model.num_nextn_predict_layers)
    return frozenset({*mtp, *(layer for chunk in chunks for layer in chunk[again:])})


def part_of(stage: int, chunk: int, degree: int, folded: bool = False) -> int:
    """Place in the network of a model chunk of pipeline stage `stage`: round and round the stages, or,
    folded, down to the last stage and up again (a V)."""
    return chunk * degree + (degree - 1 - stage if folded and chunk % 2 else stage)


def stage_layers(
    num_layers: int, degree: int, virtual_stages: int, stage: int, given: Sequence[int] = (),
    folded: bool = False,
) -> list[list[int]]:  # fmt: skip
    """Layers of each model chunk of pipeline stage `stage` (a list per virtual stage), as even as can be.

    given: layers of each of the degree x virtual_stages parts instead (`Pipeline.layers`). folded: see
    part_of.
    """
    starts = [0, *accumulate(given or even_parts(num_layers, degree * virtual_stages))]
    places = [part_of(stage, chunk, degree, folded) for chunk in range(virtual_stages)]
    return [list(range(starts[place], starts[place + 1])) for place in places]


def packed_row(size: int) -> int:
    """Bytes of `size` bytes of routed rows and the route's weight beside them, in whole 16 bytes each."""
    return -(-size // PACK_BYTES) * PACK_BYTES + PACK_BYTES
