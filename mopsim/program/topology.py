"""Process groups of a strategy as sizes and spans over scale-up domains, from the rank lists of layout.py."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from msgspec.structs import replace

from mopsim.program.row_chunks import row_chunks
from mopsim.program.workload import CommGroup
from mopsim.spec.layout import groups, replica_groups, split
from mopsim.spec.model import ModelSpec
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Order, Strategy


def span(ranks: Sequence[int], domain: int) -> CommGroup:
    """The group's size and how many of its ranks share a scale-up domain of `domain` devices: in the domain
    with the fewest, whose ranks have the most to send outside."""
    places: dict[int, list[int]] = {}
    for rank in ranks:
        places.setdefault(rank // domain, []).append(rank % domain)
    apart = max((min(inside) ^ max(inside)).bit_length() for inside in places.values())
    block = 1 << apart  # the smallest aligned one of a power of two that holds the places
    return CommGroup(len(ranks), min(len(inside) for inside in places.values()), block=block)


def worst(all_groups: Iterable[Sequence[int]], domain: int) -> CommGroup:
    """The group that the others wait for, of groups of one size whose ranks are as far apart in each: the one
    spread most over the domains. Those that begin at the same place of a domain are spread alike."""
    places = {ranks[0] % domain: ranks for ranks in all_groups}
    return min((span(one, domain) for one in places.values()), key=lambda group: (group.intra, -group.block))


def devices_taken(world_size: int, domain: int) -> int:
    """Of each domain: a job larger than one takes as many devices of each, as schedulers place it (64 of 72
    for 256 ranks)."""
    return next(size for size in range(min(domain, world_size), 0, -1) if world_size % size == 0)


def process_groups(strategy: Strategy, domain: int) -> dict[str, CommGroup]:
    """Groups by the names that tapes and units use; of each name the one spread most over the domains."""
    ranks, s = strategy.stage_ranks, strategy
    domain = devices_taken(s.world_size, domain)
    tensor, split_by = s.dense.tensor_parallel, s.experts.expert_tensor_parallel
    ring = _worst("whole", ranks, domain, s.vocabulary.vocab_parallel, 1, s.vocabulary.rank_placement)
    sequence = (s.attention.context_parallel * tensor, tensor, s.attention.rank_placement)
    experts = (s.experts.expert_parallel * split_by, split_by, s.experts.rank_placement)
    copies = (experts[0], s.experts.expert_fsdp, s.experts.rank_placement)
    return {
        "world": _worst("whole", ranks, domain, ranks, 1, "contiguous"),
        "sequence": _worst("every", ranks, domain, *sequence),
        "tensor": _worst("whole", ranks, domain, tensor, 1, "contiguous"),
        "experts": _worst("every", ranks, domain, *experts),
        "expert_ranks": _worst("whole", ranks, domain, experts[0], 1, experts[2]),
        "expert_tensor": _worst("first", ranks, domain, *experts),
        "vocabulary": ring,
        "ring": ring,
        "vocabulary_shard": _worst(
            "holders", ranks, domain, s.vocabulary.vocab_parallel, ranks, s.vocabulary.rank_placement
        ),
        "dense_shard": _worst("dense", ranks, domain, tensor, s.dense.fsdp, "contiguous"),
        "dense_replicas": _worst("dense copies", ranks, domain, tensor, s.dense.fsdp, "contiguous"),
        "expert_shard": _worst("holders", ranks, domain, *copies),
        "expert_replicas": _worst("same", ranks, domain, *copies),
        "stage": CommGroup(2, 2 if ranks < domain and ranks * s.pipeline.pipeline_parallel <= domain else 1),
    }


@lru_cache(maxsize=65536)
def _worst(kind: str, ranks: int, domain: int, degree: int, by: int, order: Order) -> CommGroup:
    """The worst group of a kind. `by`: the ranks of a group that belong to one slice (`every`: one rank of
    each, `first`: those of one), or that share a copy."""
    if kind in ("dense", "dense copies"):
        dense = range(0, ranks, degree)
        if kind == "dense":
            return worst(split(dense, by), domain)
        return worst((dense[i::by] for i in range(min(by, len(dense)))), domain)
    if kind in ("holders", "same"):
        holders = replica_groups(ranks, degree, order)
        if kind == "holders":
            return worst((copy for group in holders for copy in split(group, by)), domain)
        return worst((group[place::by] for group in holders for place in range(by)), domain)
    found = groups(ranks, degree, order)
    taken = {"whole": slice(None), "every": slice(None, None, by), "first": slice(by)}[kind]
    return worst((group[taken] for group in found), domain)


def all_groups(
    model: ModelSpec, strategy: Strategy, domain: int, stack: Stack, routing: RoutingProfile
) -> dict[str, CommGroup]:
    """Process groups; that of the experts knows how many a token chooses, of how many, where copies are sent
    once."""
    found = process_groups(strategy, domain)
    if strategy.experts.sends_once:
        deepep, group = strategy.experts.token_dispatcher == "deepep", found["experts"]
        found["experts"] = replace(
            group, choices=model.num_experts_per_tok, experts=model.num_local_experts,
            limit=(model.n_group, model.topk_group), consecutive=stack.forces_consecutive(routing),
            **(row_chunks(model, stack, group.size) if deepep else {}),
        )  # fmt: skip
    return found
