"""Process groups of a strategy as sizes and spans over scale-up domains, from the rank lists of layout.py."""

from collections.abc import Sequence

from mopsim.lowering.workload import Group
from mopsim.spec.layout import groups, replica_groups, split
from mopsim.spec.strategy import Strategy


def span(ranks: Sequence[int], domain: int, offset: int = 0) -> Group:
    """The group's size and how many of its ranks share a scale-up domain of `domain` devices (the fullest
    one)."""
    counts: dict[int, int] = {}
    for rank in ranks:
        place = (rank + offset) // domain
        counts[place] = counts.get(place, 0) + 1
    return Group(len(ranks), max(counts.values()))


def process_groups(strategy: Strategy, domain: int) -> dict[str, Group]:
    """Groups by the names that tapes and units use. All groups of a name are alike; rank 0's stands for
    them."""
    ranks, s = strategy.stage_ranks, strategy
    found = {
        "world": span(range(ranks), domain),
        "sequence": span(
            groups(ranks, s.attention.sequence * s.dense.tensor, s.attention.order)[0][:: s.dense.tensor],
            domain,
        ),
        "tensor": span(range(s.dense.tensor), domain),
        "experts": span(
            groups(ranks, s.experts.degree * s.experts.tensor, s.experts.order)[0][:: s.experts.tensor],
            domain,
        ),
        "expert_tensor": span(
            groups(ranks, s.experts.degree * s.experts.tensor, s.experts.order)[0][: s.experts.tensor], domain
        ),
        "vocabulary": span(groups(ranks, s.vocabulary.degree, s.vocabulary.order)[0], domain),
    }
    dense = list(range(0, ranks, s.dense.tensor))
    found["dense_shard"] = span(dense[: s.dense.shard], domain)
    found["dense_replicas"] = span(dense[:: s.dense.shard], domain)
    holders = replica_groups(ranks, s.experts.degree * s.experts.tensor, s.experts.order)[0]
    found["expert_shard"] = span(split(holders, s.experts.shard)[0], domain)
    found["expert_replicas"] = span(holders[:: s.experts.shard], domain)
    holders = replica_groups(ranks, s.vocabulary.degree, s.vocabulary.order)[0]
    found["vocabulary_shard"] = span(holders, domain)
    ring = found["vocabulary"]
    found["ring"] = Group(ring.size, ring.intra)
    found["stage"] = Group(2, 2 if ranks < domain and ranks * s.pipeline.degree <= domain else 1)
    return found
