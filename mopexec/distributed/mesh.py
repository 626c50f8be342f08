"""Strategy to process groups: one mesh of stages, data, context and tensor places, and other views of a
stage's ranks for state, experts and vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

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


Use = Literal["tokens", "state"]
"""What a group carries: what the ranks compute with, or shards of parameters and gradients, which travel
beside it. NCCL runs what a communicator is given one after the other, so that tokens would wait for a unit
that is gathered ahead if both went the same way."""


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
    """All ranks must call this at the same point: it makes the process groups."""
    rank, world, ranks = dist.get_rank(), strategy.world_size, strategy.stage_ranks
    assert dist.get_world_size() == world, f"{dist.get_world_size()} ranks run a plan for {world}"
    groups = _MeshGroups(rank, platform)

    def axis(of_a_stage: Sequence[Sequence[int]], use: Use = "tokens") -> Group:
        """This rank's group, of groups of a stage's ranks (from 0), which every stage has."""
        starts = range(0, world, ranks)
        return groups.find([[start + r for r in one] for start in starts for one in of_a_stage], use)

    tensor, experts, vocabulary = strategy.dense.tensor_parallel, strategy.experts, strategy.vocabulary
    context, split = strategy.attention.context_parallel, experts.expert_tensor_parallel
    sequences = layout.groups(ranks, context * tensor, strategy.attention.rank_placement)
    spread = layout.groups(ranks, experts.expert_parallel * split, experts.rank_placement)
    dense, holders = dense_holders(strategy), expert_holders(strategy)
    ring, order = vocabulary.vocab_parallel, vocabulary.rank_placement
    has_ring, alone = vocabulary.loss == "ring", Group((rank,), 0, None)
    return Mesh(
        place=layout.place(strategy, rank),
        alone=alone,
        world=groups.find([range(world)]),
        stage=axis([range(ranks)]),
        pipeline=groups.find([range(first, world, ranks) for first in range(ranks)]),
        tensor=axis(layout.groups(ranks, tensor)),
        sequence=axis([group[first::tensor] for group in sequences for first in range(tensor)]),
        shared=axis(sequences),
        dense_shard=axis(_shards(dense, strategy.dense.fsdp), "state"),
        dense_replicas=axis(_replicas(dense, strategy.dense.fsdp), "state"),
        experts=axis([group[first::split] for group in spread for first in range(split)]),
        expert_tensor=axis([one for group in spread for one in layout.split(group, split)]),
        expert_shard=axis(_shards(holders, experts.expert_fsdp), "state"),
        expert_replicas=axis(_replicas(holders, experts.expert_fsdp), "state"),
        ring=axis(layout.groups(ranks, ring, order)) if has_ring else alone,
        ring_shard=axis(layout.replica_groups(ranks, ring, order), "state") if has_ring else alone,
    )


def dense_holders(strategy: Strategy) -> list[list[int]]:
    """Ranks of a stage (from 0) that hold the same dense slices."""
    tensor = strategy.dense.tensor_parallel
    return [list(range(first, strategy.stage_ranks, tensor)) for first in range(tensor)]


def expert_holders(strategy: Strategy) -> list[list[int]]:
    """Ranks of a stage (from 0) that hold the same slices of the same experts."""
    how = strategy.experts
    degree = how.expert_parallel * how.expert_tensor_parallel
    return layout.replica_groups(strategy.stage_ranks, degree, how.rank_placement)


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


def lone_group(rank: int, platform: Platform) -> dist.ProcessGroup:
    """The group of this rank alone, for what asks for one; all ranks must call it at the same point."""
    alone = [[one] for one in range(dist.get_world_size())]
    if getattr(dist.group.WORLD, "bound_device_id", None) is not None:
        return cast(dist.ProcessGroup, dist.split_group(split_ranks=alone))
    return [process_group(ranks, platform.backend) for ranks in alone][rank]


class _MeshGroups:
    """Process groups of one mesh. Axes with equal sets of ranks and the same use share one; the set of all
    ranks, for tokens, has the world's; a rank alone needs none.
    """

    def __init__(self, rank: int, platform: Platform) -> None:
        self._rank, self._platform = rank, platform
        self._made: dict[tuple[Use, tuple[tuple[int, ...], ...]], dist.ProcessGroup] = {}

    def find(self, all_groups: Sequence[Sequence[int]], use: Use = "tokens") -> Group:
        """This rank's group of one axis, in which each rank has one place."""
        mine = next(tuple(ranks) for ranks in all_groups if self._rank in ranks)
        return Group(mine, mine.index(self._rank), self._handle(all_groups, use) if len(mine) > 1 else None)

    def _handle(self, all_groups: Sequence[Sequence[int]], use: Use) -> dist.ProcessGroup:
        """Found by the whole axis, not by this rank's own set: every rank must make the same ones."""
        key = use, tuple(sorted(tuple(sorted(ranks)) for ranks in all_groups))
        if key not in self._made:
            whole = dist.group.WORLD if use == "tokens" and len(all_groups) == 1 else None
            made = whole or own_group(all_groups, self._rank, self._platform)
            assert made is not None
            self._made[key] = made
            if not self._platform.fake:
                dist.barrier(group=made)  # all pairs connected before the ring's first point-to-point
        return self._made[key]


def own_group(all_groups: Sequence[Sequence[int]], rank: int, platform: Platform) -> dist.ProcessGroup | None:
    """This rank's group of groups that have each rank of the world once (None where it is alone and not
    made); all ranks must call it at the same point.

    A communicator that is bound to a device is split: one call makes all groups, where `new_group` takes all
    ranks through one split for each. torch names what is split after its ranks and how many groups a rank is
    in, which is the same for all. Elsewhere each group is made by itself, for other ranks a few lines of
    Python; not with `use_local_synchronization`, whose names return with groups that have ended, to gloo's
    stale addresses.
    """
    if getattr(dist.group.WORLD, "bound_device_id", None) is not None:
        found = dist.split_group(split_ranks=[list(ranks) for ranks in all_groups])
        return cast(dist.ProcessGroup, found)
    made = {tuple(r): process_group(r, platform.backend) for r in all_groups if len(r) > 1}
    return next((group for ranks, group in made.items() if rank in ranks), None)


def rounds(pairs: Sequence[tuple[int, int]], world: int) -> list[list[tuple[int, ...]]]:
    """The pairs in as few rounds as come of taking each into the first where both its ranks are free; ranks
    that a round leaves free are in it alone. Each round is as `own_group` wants it.
    """
    found: list[list[tuple[int, ...]]] = []
    taken: list[set[int]] = []
    for pair in pairs:
        at = next((i for i, ranks in enumerate(taken) if ranks.isdisjoint(pair)), len(taken))
        if at == len(taken):
            found.append([])
            taken.append(set())
        found[at].append(pair)
        taken[at].update(pair)
    for groups, ranks in zip(found, taken, strict=True):
        groups += [(rank,) for rank in range(world) if rank not in ranks]
    return found
