"""Strategy to process groups: every degree but the pipeline's is its own view of the same ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from mopexec.distributed.tiers import Platform
from mopsim.spec import layout
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
    """This rank's groups.

    dense_shard: ranks that share one copy of the dense state; dense_replicas: ranks that hold the same dense
    shard. sequence: ranks that share sequences; experts: ranks over which the experts are spread;
    expert_shard and expert_replicas as for dense, among the ranks that hold the same experts. ring: the
    vocabulary ring; ring_shard: the ranks that hold the same vocabulary rows. data_index: which sequences
    this rank works on.
    """

    rank: int
    world: Group
    dense_shard: Group
    dense_replicas: Group
    sequence: Group
    experts: Group
    expert_shard: Group
    expert_replicas: Group
    ring: Group
    ring_shard: Group
    data_index: int


def build_mesh(strategy: Strategy, platform: Platform) -> Mesh:
    """All ranks must call this at the same point: it makes the process groups, each axis its own
    communicators.
    """
    rank, size = dist.get_rank(), strategy.world_size
    assert dist.get_world_size() == size, f"{dist.get_world_size()} ranks run a plan for {size}"
    everyone = list(range(size))
    dense_copies = layout.split(everyone, strategy.dense.fsdp)
    expert_groups = layout.groups(size, strategy.experts.expert_parallel, strategy.experts.rank_placement)
    holders = layout.replica_groups(size, strategy.experts.expert_parallel, strategy.experts.rank_placement)
    expert_copies = [copy for group in holders for copy in layout.split(group, strategy.experts.expert_fsdp)]
    expert_same = [
        same for group in holders for same in _across(layout.split(group, strategy.experts.expert_fsdp))
    ]
    sequences = layout.groups(size, strategy.attention.context_parallel, strategy.attention.rank_placement)
    degree, order = strategy.vocabulary.vocab_parallel, strategy.vocabulary.rank_placement

    def axis(all_groups: Sequence[Sequence[int]]) -> Group:
        return make_group(all_groups, rank, platform)

    return Mesh(
        rank=rank,
        world=Group(tuple(everyone), rank, dist.group.WORLD if size > 1 else None),
        dense_shard=axis(dense_copies),
        dense_replicas=axis(_across(dense_copies)),
        sequence=axis(sequences),
        experts=axis(expert_groups),
        expert_shard=axis(expert_copies),
        expert_replicas=axis(expert_same),
        ring=axis(layout.groups(size, degree, order)),
        ring_shard=axis(layout.replica_groups(size, degree, order)),
        data_index=next(i for i, group in enumerate(sequences) if rank in group),
    )


def _across(copies: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranks at the same place of each copy."""
    return [list(place) for place in zip(*copies, strict=True)]


def make_group(all_groups: Sequence[Sequence[int]], rank: int, platform: Platform) -> Group:
    """This rank's group of one axis; every rank makes every group, as torch.distributed asks."""
    mine: Group | None = None
    for ranks in all_groups:
        handle = dist.new_group(list(ranks), backend=platform.backend) if len(ranks) > 1 else None
        if rank in ranks:
            if handle is not None and not platform.fake:
                dist.barrier(group=handle)  # all pairs connected before the first point-to-point of the ring
            mine = Group(tuple(ranks), list(ranks).index(rank), handle)
    assert mine is not None, f"rank {rank} is in no group of {all_groups}"
    return mine
