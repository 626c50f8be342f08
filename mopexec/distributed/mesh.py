"""Strategy to process groups: one mesh of stages, data, context and tensor places, and other views of a
stage's ranks for state, experts and vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch.distributed as dist

from mopexec.distributed.tiers import Platform
from mopsim.spec import layout
from mopsim.spec.layout import Place
from mopsim.spec.strategy import Strategy


@dataclass(frozen=True)
class Group:
    """Ranks that work together, in ring order; `place` is this rank's. handle is None for a group of one."""

    ranks: tuple[int, ...]
    place: int
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def next(self) -> int:
        """Global rank after this one in the ring."""
        return self.ranks[(self.place + 1) % self.size]

    @property
    def previous(self) -> int:
        """Global rank before this one in the ring."""
        return self.ranks[(self.place - 1) % self.size]


@dataclass(frozen=True)
class Mesh:
    """This rank's groups. place: its coordinates; alone: itself.

    stage: all ranks of its pipeline stage. pipeline: those at its place of every stage, in order. tensor:
    those that split its tensors; sequence: those that share its sequences, at its tensor place; shared: those
    of all tensor places too. dense_shard: ranks that share one copy of the state of its dense slices;
    dense_replicas: ranks with the same part of it. experts: ranks that whole experts are spread over;
    expert_tensor: ranks that split its experts; expert_shard, expert_replicas as for dense. ring: the
    vocabulary ring; ring_shard: the ranks that hold the same vocabulary rows.
    """

    place: Place
    alone: Group
    world: Group
    stage: Group
    pipeline: Group
    tensor: Group
    sequence: Group
    shared: Group
    dense_shard: Group
    dense_replicas: Group
    experts: Group
    expert_tensor: Group
    expert_shard: Group
    expert_replicas: Group
    ring: Group
    ring_shard: Group


def build_mesh(strategy: Strategy, platform: Platform) -> Mesh:
    """All ranks must call this at the same point: it makes the process groups, each axis its own
    communicators.
    """
    rank, world, ranks = dist.get_rank(), strategy.world_size, strategy.stage_ranks
    assert dist.get_world_size() == world, f"{dist.get_world_size()} ranks run a plan for {world}"

    def axis(of_a_stage: Sequence[Sequence[int]]) -> Group:
        """This rank's group, of groups of a stage's ranks (from 0), which every stage has."""
        starts = range(0, world, ranks)
        return make_group(
            [[start + r for r in one] for start in starts for one in of_a_stage], rank, platform
        )

    tensor, experts, vocabulary = strategy.dense.tensor_parallel, strategy.experts, strategy.vocabulary
    context, split = strategy.attention.context_parallel, experts.expert_tensor_parallel
    sequences = layout.groups(ranks, context * tensor, strategy.attention.rank_placement)
    spread = layout.groups(ranks, experts.expert_parallel * split, experts.rank_placement)
    holders = layout.replica_groups(ranks, experts.expert_parallel * split, experts.rank_placement)
    dense = [range(first, ranks, tensor) for first in range(tensor)]
    ring, order = vocabulary.vocab_parallel, vocabulary.rank_placement
    has_ring, alone = vocabulary.loss == "ring", Group((rank,), 0, None)
    whole = Group(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)
    sequence = axis([group[first::tensor] for group in sequences for first in range(tensor)])
    return Mesh(
        place=layout.place(strategy, rank),
        alone=alone,
        world=whole,
        stage=axis([range(ranks)]) if ranks < world else whole,
        pipeline=make_group([range(first, world, ranks) for first in range(ranks)], rank, platform),
        tensor=axis(layout.groups(ranks, tensor)),
        sequence=sequence,
        shared=axis(sequences) if tensor > 1 else sequence,
        dense_shard=axis(_shards(dense, strategy.dense.fsdp)),
        dense_replicas=axis(_replicas(dense, strategy.dense.fsdp)),
        experts=axis([group[first::split] for group in spread for first in range(split)]),
        expert_tensor=axis([one for group in spread for one in layout.split(group, split)]),
        expert_shard=axis(_shards(holders, experts.expert_fsdp)),
        expert_replicas=axis(_replicas(holders, experts.expert_fsdp)),
        ring=axis(layout.groups(ranks, ring, order)) if has_ring else alone,
        ring_shard=axis(layout.replica_groups(ranks, ring, order)) if has_ring else alone,
    )


def _shards(holders: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Of ranks that hold the same slice, those that share one copy of its state."""
    return [copy for ranks in holders for copy in layout.split(ranks, size)]


def _replicas(holders: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Of ranks that hold the same slice, those with the same part of its state."""
    return [list(ranks[first::size]) for ranks in holders for first in range(size)]


def process_group(ranks: Sequence[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
    """The group of these ranks (None: of all); every rank makes it, those outside keep a handle of no use,
    which torch's types have told from a group since 2.15.
    """
    group = dist.new_group(None if ranks is None else list(ranks), backend=backend)
    return cast(dist.ProcessGroup, group)


def make_group(all_groups: Sequence[Sequence[int]], rank: int, platform: Platform) -> Group:
    """This rank's group of one axis; every rank makes every group, as torch.distributed asks."""
    mine: Group | None = None
    for ranks in all_groups:
        handle = process_group(ranks, platform.backend) if len(ranks) > 1 else None
        if rank in ranks:
            if handle is not None and not platform.fake:
                dist.barrier(group=handle)  # all pairs connected before the first point-to-point of the ring
            mine = Group(tuple(ranks), list(ranks).index(rank), handle)
    assert mine is not None, f"rank {rank} is in no group of {all_groups}"
    return mine
