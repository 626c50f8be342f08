"""How many process groups a mesh makes, and who is in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mopexec.distributed.mesh import Group, Mesh, build_mesh, rounds
from mopexec.distributed.tiers import Platform
from mopexec.modules.pipeline import Links
from mopsim.spec.strategy import Strategy
from tests import plans
from tests.exec.flat_plans import make_plan
from tests.exec.spawn import pool

PLACED = {"attention": {"context_parallel": 2}, "experts": {"expert_parallel": 2, "expert_fsdp": 2}}
HYBRID = {"dense": {"fsdp": 2}, "experts": {"expert_parallel": 2, "expert_fsdp": 1}}
RING = {"vocabulary": {"loss": "ring", "vocab_parallel": 4}}

SMALL: list[tuple[Strategy, int]] = [  # how many sets of ranks have a group beside the world
    (make_plan(2, {}).strategy, 1),  # state
    (make_plan(2, {"experts": {"expert_parallel": 2}, "attention": {"context_parallel": 2}}).strategy, 1),
    (make_plan(4, {}).strategy, 1),
    (make_plan(4, {"experts": {"expert_parallel": 4}} | RING).strategy, 1),
    (make_plan(4, PLACED).strategy, 1 + 2 + 2),  # state of all; sequences with experts; holders of experts
    (make_plan(4, HYBRID).strategy, 2 + 2 + 2),  # shards; replicas, with those of experts; experts
    (plans.split(4, tensor_parallel=2, expert_parallel=2), 2 + 2),  # tensor with experts; state
    (
        plans.split(4, pipeline_parallel=2, tensor_parallel=2),
        2 + 2 + 2 + 2 * 4,
    ),  # tensor with stage; pipelines; experts' state; pairs
    (plans.split(4, pipeline_parallel=4), 2 * 4),
]


def everything(mesh: Mesh) -> dict[str, Group]:
    return {name: group for name in Mesh.__annotations__ if isinstance(group := getattr(mesh, name), Group)}


def made(platform: Platform, strategy: Strategy) -> int:
    """How many groups of real ranks are made, once each has summed over its own."""
    new_group, count = dist.new_group, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return new_group(*arguments, **options)

    dist.new_group = counted
    try:
        mesh, links = build_mesh(strategy, platform), Links(strategy, platform)
    finally:
        dist.new_group = new_group
    for name, group in everything(mesh).items():
        total = torch.tensor([float(dist.get_rank())])
        if group.size > 1:
            dist.all_reduce(total, group=group.handle)
        assert total.item() == sum(group.ranks), (name, group.ranks)
        assert group.ranks[group.place] == dist.get_rank()
    for link in links.found.values():
        assert dist.get_process_group_ranks(link.group) == sorted((dist.get_rank(), link.rank))
    return count


@pytest.mark.parametrize("place", range(len(SMALL)))
def test_equal_sets_of_ranks_share_a_group(place: int) -> None:
    strategy, expected = SMALL[place]
    assert (
        pool(strategy.world_size).run("tests.exec.test_mesh", "made", strategy)
        == [expected] * strategy.world_size
    )


@contextmanager
def stood_in(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A rank of a cluster: the cuts of all ranks that it asks NCCL for, in order."""
    calls: list[Any] = []

    def split_group(split_ranks: list[list[int]]) -> Any:
        assert sorted(one for ranks in split_ranks for one in ranks) == list(range(world))
        calls.append(split_ranks)
        return next(tuple(ranks) for ranks in split_ranks if rank in ranks)

    with monkeypatch.context() as patch:
        whole = SimpleNamespace(bound_device_id=torch.device("cuda", 0))
        patch.setattr(type(dist.group), "WORLD", whole)
        for name, value in {
            "get_rank": lambda: rank, "get_world_size": lambda: world, "barrier": lambda group: None,
            "split_group": split_group,
        }.items():  # fmt: skip
            patch.setattr(dist, name, value)
        yield calls


def large(world: int, changes: dict[str, dict[str, Any]]) -> Strategy:
    return make_plan(world, changes, training={"global_batch": world}).strategy


LARGE = [
    # state; experts; their holders
    (large(1000, {"experts": {"expert_parallel": 8}}), 3, 0),
    # experts, ring; shards, replicas, rows
    (large(1024, {"dense": {"fsdp": 8}, "experts": {"expert_parallel": 8}} | RING), 5, 0),
    # stage, pipeline, tensor with experts, sequence, tensor and sequence; state; pairs of eight, and of three
    (plans.split(1024, tensor_parallel=8, pipeline_parallel=8, expert_parallel=8, context_parallel=2), 6, 4),
    (plans.split(960, tensor_parallel=8, pipeline_parallel=3, expert_parallel=8), 4, 6),
]


@pytest.mark.parametrize("place", range(len(LARGE)))
def test_a_large_mesh_takes_a_call_for_each_way_to_cut_it(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, of_mesh, of_links = LARGE[place]
    world, seen = strategy.world_size, set()
    for rank in (0, 1, world // 2, world - 1):
        with stood_in(rank, world, monkeypatch) as calls:
            mesh = build_mesh(strategy, Platform(torch.device("cpu")))
            assert len(calls) == of_mesh
            assert len({str(call) for call in calls}) >= len(calls) - 1  # tokens' and state's may be the same
            for group in everything(mesh).values():
                assert group.handle in (None, dist.group.WORLD, tuple(sorted(group.ranks)))
            Links(strategy, Platform(torch.device("cpu")))
            assert len(calls) == of_mesh + of_links
        seen.add(str(calls))
    assert len(seen) == 1


def test_pairs_of_a_ring_take_two_rounds_or_three() -> None:
    assert rounds([(0, 2), (1, 3), (2, 0), (3, 1)], 4) == [[(0, 2), (1, 3)], [(2, 0), (3, 1)]]
    assert rounds([(0, 1), (1, 2), (2, 0)], 3) == [[(0, 1), (2,)], [(1, 2), (0,)], [(2, 0), (1,)]]
