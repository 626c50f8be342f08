"""Process groups of a strategy as sizes and spans over scale-up domains, from the rank lists of layout.py."""

from collections.abc import Iterable, Sequence

from mopsim.program.workload import Group
from mopsim.spec.layout import groups, replica_groups, split
from mopsim.spec.strategy import Strategy


def span(ranks: Sequence[int], domain: int, offset: int = 0) -> Group:
    """The group's size and how many of its ranks share a scale-up domain of `domain` devices: in the domain
    with the fewest, whose ranks have the most to send outside."""
    places: dict[int, list[int]] = {}
    for rank in ranks:
        places.setdefault((rank + offset) // domain, []).append((rank + offset) % domain)
    block = max(_block(min(inside), max(inside)) for inside in places.values())
    return Group(len(ranks), min(len(inside) for inside in places.values()), block=block)


def _block(first: int, last: int) -> int:
    """Size of the smallest aligned block of a power of two that holds both places."""
    return 1 << (first ^ last).bit_length()


def worst(all_groups: Iterable[Sequence[int]], domain: int) -> Group:
    """The group that the others wait for, of groups of one size: the one spread most over the domains."""
    return min((span(ranks, domain) for ranks in all_groups), key=lambda group: (group.intra, -group.block))


def process_groups(strategy: Strategy, domain: int) -> dict[str, Group]:
    """Groups by the names that tapes and units use; of each name the one spread most over the domains.

    A job larger than a domain takes as many devices of each, as schedulers place it (64 of 72 for 256 ranks).
    """
    ranks, s = strategy.stage_ranks, strategy
    domain = next(size for size in range(min(domain, s.world_size), 0, -1) if s.world_size % size == 0)
    tensor, expert_tensor = s.dense.tensor_parallel, s.experts.expert_tensor_parallel
    sequences = groups(ranks, s.attention.context_parallel * tensor, s.attention.rank_placement)
    experts = groups(ranks, s.experts.expert_parallel * expert_tensor, s.experts.rank_placement)
    holders = replica_groups(ranks, s.experts.expert_parallel * expert_tensor, s.experts.rank_placement)
    dense = range(0, ranks, tensor)
    expert_copies = [copy for group in holders for copy in split(group, s.experts.expert_fsdp)]
    expert_same = [
        group[place :: s.experts.expert_fsdp] for group in holders for place in range(s.experts.expert_fsdp)
    ]
    ring = worst(groups(ranks, s.vocabulary.vocab_parallel, s.vocabulary.rank_placement), domain)
    found = {
        "world": span(range(ranks), domain),
        "sequence": worst((group[::tensor] for group in sequences), domain),
        "tensor": worst(split(range(ranks), tensor), domain),
        "experts": worst((group[::expert_tensor] for group in experts), domain),
        "expert_tensor": worst((group[:expert_tensor] for group in experts), domain),
        "vocabulary": ring,
        "ring": ring,
        "vocabulary_shard": worst(
            replica_groups(ranks, s.vocabulary.vocab_parallel, s.vocabulary.rank_placement), domain
        ),
        "dense_shard": worst(split(dense, s.dense.fsdp), domain),
        "dense_replicas": worst(
            (dense[i :: s.dense.fsdp] for i in range(min(s.dense.fsdp, len(dense)))), domain
        ),
        "expert_shard": worst(expert_copies, domain),
        "expert_replicas": worst(expert_same, domain),
    }
    found["stage"] = Group(2, 2 if ranks < domain and ranks * s.pipeline.pipeline_parallel <= domain else 1)
    return found
