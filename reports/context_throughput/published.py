"""What the sources print of such runs (arXiv 2609.14306, figures 6 and 7a, appendix A). Context lengths are
printed as 128K and 1M; tokens of the step at those points are not stated."""

from dataclasses import dataclass

SOURCE = "arXiv 2609.14306, figures 6 and 7a"


@dataclass(frozen=True)
class Published:
    """Tokens per second and device of one point of the figure; contender as in contenders.yaml."""

    model: str
    devices: int
    contender: str
    seq_len: int
    throughput: float
    note: str


K = 1024
POINTS = (
    Published("mop_120b", 16, "mop", 128 * K, 1355.0, "printed"),
    Published("mop_120b", 16, "mop", 1024 * K, 642.0, "printed"),
    Published(
        "mop_120b", 16, "fsdp2_full", 128 * K, 178.3, "from the printed ratio, 7.6x; its longest context"
    ),
)
PRINTED_END = 128 * K
"""The longest context of FSDP2: 128K at 120B; at about 600B and 1T out of memory beyond 64 to 128K."""
LARGEST_STEP = {"mop": 1_500_000, "fsdp2_full": 128_000}
"""Figure 7a: the most tokens of one forward and backward, of all 16 devices, by contender."""
