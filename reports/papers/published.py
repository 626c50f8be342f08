"""What the two papers print of their networks on H200, with the layouts that they state."""

from dataclasses import dataclass

K = 1024
FIRST, COMPANION = "arXiv 2607.01844", "arXiv 2609.14306"


@dataclass(frozen=True)
class Point:
    """One printed figure. program: "mop" or "fsdp2" (the best of a sweep). tokens_per_s: per GPU; None = out
    of memory there.
    """

    source: str
    model: str
    nodes: int
    program: str
    seq_len: int
    tokens_per_s: float | None


def _curve(
    source: str, model: str, nodes: int, program: str, *points: tuple[int, float | None]
) -> list[Point]:
    return [Point(source, model, nodes, program, length * K, rate) for length, rate in points]


POINTS = [
    *_curve(FIRST, "mop_120b", 2, "mop", (128, 1043), (256, 681), (512, 424), (1024, 393)),
    *_curve(FIRST, "mop_120b", 2, "fsdp2", (128, 223), (256, None)),
    *_curve(FIRST, "mop_1t", 12, "mop", (128, 166), (256, 140), (512, 108), (1024, 100)),
    *_curve(FIRST, "mop_1t", 12, "fsdp2", (128, 25), (256, 17), (512, None)),
    *_curve(COMPANION, "mop_120b", 2, "mop", (128, 1355), (1024, 642)),
    *_curve(COMPANION, "mop_120b", 2, "fsdp2", (128, 178.3)),
]
"""178.3 is the printed 1355 over the printed ratio, 7.6x."""
DEGREES = {128 * K: 2, 256 * K: 4, 512 * K: 8, 1024 * K: 16}
"""MoP's D by context: 2 and 16 are stated, between them the same 65,536 tokens a rank."""
