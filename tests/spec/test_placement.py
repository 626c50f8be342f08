"""Least-loaded placement: every row is computed once, and no rank gets more than its room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopsim.spec.placement import at_home, least_loaded
from mopsim.spec.routing import routing_counts


@given(
    st.lists(st.integers(0, 5000), min_size=16, max_size=16), st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1.0, 1.1, 1.5]), st.sampled_from([1, 256]), st.sampled_from([1.0, 1.3]),
)  # fmt: skip
def test_rows_are_kept_and_room_is_kept_to(
    counts: list[int], degree: int, capacity: float, min_rows: int, threshold: float
) -> None:
    place = least_loaded(counts, degree, capacity, min_rows, threshold)
    assert [sum(rows.get(e, 0) for rows in place.rows) for e in range(16)] == counts
    for expert, source, target in place.moves:
        assert source == expert // (16 // degree) != target
        assert place.rows[target][expert] > 0
    loads = [sum(rows.values()) for rows in place.rows]
    if max(sum(rows.values()) for rows in at_home(counts, degree).rows) < threshold * sum(counts) / degree:
        assert place == at_home(counts, degree)
    elif min_rows == 1:  # smaller pieces than min_rows are left where they are
        assert max(loads) <= max(1, capacity * (sum(counts) // degree)) + degree


@pytest.mark.parametrize(
    ("routing", "received", "sent"),
    [
        ("balanced", 0, 0),
        ("30/16", 2, 9),
        ("50/16", 2, 9),
        ("80/16", 3, 10),
        ("95/16", 3, 10),
        ("30/4", 3, 10),
    ],
)
def test_the_published_profiles(routing: str, received: int, sent: int) -> None:
    """128 experts on 8 ranks, 32,768 tokens a rank, top-4 (arXiv 2609.14306, table 6): the memory measured
    there grows by twice `received` experts over the balanced profile."""
    counts = [8 * count for count in routing_counts(routing, 32768, 1, 0, 128, 4)]
    place = least_loaded(counts, 8, 1.0, 1024, 1.0)
    assert max(place.received(rank) for rank in range(8)) == received
    assert max(place.sent(rank) for rank in range(8)) == sent
    assert {sum(rows.values()) for rows in place.rows} == {131072}
