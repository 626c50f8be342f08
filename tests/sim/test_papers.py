"""The papers' own runs in their stated layouts: the shape of the speed, and where memory ends."""

import pytest

from reports.papers.make import model_flops, resident_bytes, shape_errors, simulated
from reports.papers.published import POINTS

FIRST = POINTS[0].source
BASELINE = [p for p in POINTS if (p.source, p.model, p.program) == (FIRST, "mop_120b", "fsdp2")]


def of(source, model, program):
    points = [p for p in POINTS if (p.source, p.model, p.program) == (source, model, program)]
    return [(point, simulated(point)) for point in points]


def test_the_companion_prints_the_flops_of_the_network():
    """arXiv 2609.14306 prints 91 and 221 TFLOP/s beside its tokens per second of MoP."""
    printed = [point for point in POINTS if point.source != FIRST and point.program == "mop"]
    assert [model_flops(point) / 1e12 for point in printed] == pytest.approx([91, 221], rel=0.02)


def test_mops_shape_over_context_comes_out_once_one_point_is_fixed():
    assert all(abs(error) < 0.25 for error in shape_errors(of(FIRST, "mop_120b", "mop")))


@pytest.mark.parametrize("place", range(len(BASELINE)))
def test_the_baseline_ends_where_it_is_printed_to_end(place: int):
    """Which is said by whether it rather fits: torchtitan deletes logits (2024-06), whose block stays."""
    point = BASELINE[place]
    assert (simulated(point).p_fits > 0.5) == (point.tokens_per_s is not None)


def test_the_offloaded_baseline_ends_where_it_is_printed_to_end():
    """Which is said by the limit of the memory to 2 %, with what its program does not offload: a context
    twice as long needs far more."""
    for point, one in of(FIRST, "mop_1t", "fsdp2"):
        part = (one.peak_memory_bytes + resident_bytes(point)) / one.memory_limit_bytes
        assert part < 0.92 if point.tokens_per_s else part > 0.98
