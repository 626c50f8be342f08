"""The groups of ranks of the `split_modules` runtime, from the layout: one mesh of stages, data, context and
tensor places, and another view of a stage's ranks for the experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from mopexec.distributed.mesh import Group, make_group
from mopexec.distributed.tiers import Platform
from mopsim.spec import layout
from mopsim.spec.layout import Place
from mopsim.spec.strategy import Strategy


@dataclass(frozen=True)
class StageGroups:
    """This rank's groups. place: its coordinates.

    stage: all ranks of its pipeline stage. pipeline: those at its place of every stage, in order. tensor:
    those that split its tensors; sequence: those that share its sequences, at its tensor place; shared: those
    of all tensor places too. dense_shard: ranks that share one copy of the optimizer state of its dense
    slices; dense_replicas: ranks with the same part of it. experts: ranks that whole experts are spread over;
    expert_tensor: ranks that split its experts; expert_shard, expert_replicas as for dense.
    """

    place: Place
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


def make_groups(strategy: Strategy, platform: Platform) -> StageGroups:
    """Collective over all ranks: every rank makes the same groups in the same order."""
    rank, world, ranks = dist.get_rank(), strategy.world_size, strategy.stage_ranks
    assert dist.get_world_size() == world, f"{dist.get_world_size()} ranks run a plan for {world}"

    def axis(of_a_stage: Sequence[Sequence[int]]) -> Group:
        """This rank's group, of groups of a stage's ranks (from 0), which every stage has."""
        starts = range(0, world, ranks)
        return make_group(
            [[start + r for r in one] for start in starts for one in of_a_stage], rank, platform
        )

    tensor, context = strategy.dense.tensor_parallel, strategy.attention.context_parallel
    sequences = layout.groups(ranks, context * tensor, strategy.attention.rank_placement)
    experts, split = strategy.experts, strategy.experts.expert_tensor_parallel
    spread = layout.groups(ranks, experts.expert_parallel * split, experts.rank_placement)
    holders = layout.replica_groups(ranks, experts.expert_parallel * split, experts.rank_placement)
    dense = [range(first, ranks, tensor) for first in range(tensor)]
    whole = Group(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)
    return StageGroups(
        place=layout.place(strategy, rank),
        world=whole,
        stage=axis([range(ranks)]) if ranks < world else whole,
        pipeline=make_group([range(first, world, ranks) for first in range(ranks)], rank, platform),
        tensor=axis(layout.groups(ranks, tensor)),
        sequence=axis([group[first::tensor] for group in sequences for first in range(tensor)]),
        shared=axis(sequences),
        dense_shard=axis(_shards(dense, strategy.dense.fsdp)),
        dense_replicas=axis(_replicas(dense, strategy.dense.fsdp)),
        experts=axis([group[first::split] for group in spread for first in range(split)]),
        expert_tensor=axis([one for group in spread for one in layout.split(group, split)]),
        expert_shard=axis(_shards(holders, experts.expert_fsdp)),
        expert_replicas=axis(_replicas(holders, experts.expert_fsdp)),
    )


def _shards(holders: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Of ranks that hold the same slice, those that share one copy of its state."""
    return [copy for ranks in holders for copy in layout.split(ranks, size)]


def _replicas(holders: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Of ranks that hold the same slice, those with the same part of its state."""
    return [list(ranks[first::size]) for ranks in holders for first in range(size)]
