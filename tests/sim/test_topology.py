"""The worst of many groups is found among those that begin at different places of a domain."""

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopsim.program import topology
from mopsim.program.workload import CommGroup
from mopsim.spec.strategy import Order

SPLIT_BY_ONE = ("dense", "dense copies", "holders", "same")
"""Kinds whose `by` divides the groups, that of the others divides the ranks of one."""


def _divisors(value: int) -> st.SearchStrategy[int]:
    return st.sampled_from([one for one in range(1, value + 1) if value % one == 0])


@given(
    st.sampled_from(("whole", "every", "first", *SPLIT_BY_ONE)), st.sampled_from((8, 24, 36, 64, 72, 96)),
    st.sampled_from((4, 6, 8, 9, 36, 64, 72)), st.sampled_from(("contiguous", "strided")), st.data(),
)  # fmt: skip
def test_the_worst_group_is_that_of_all(
    kind: str, ranks: int, domain: int, order: Order, data: st.DataObject
) -> None:
    def every(groups: Iterable[Sequence[int]], domain: int) -> CommGroup:
        found = [topology.span(one, domain) for one in groups]
        return min(found, key=lambda group: (group.intra, -group.block))

    degree = data.draw(_divisors(ranks))
    by = data.draw(_divisors(ranks // degree if kind in SPLIT_BY_ONE else degree))
    found = topology._worst.__wrapped__(kind, ranks, domain, degree, by, order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topology, "worst", every)
        assert found == topology._worst.__wrapped__(kind, ranks, domain, degree, by, order)
