"""Which node counts are worth asking about, and the global batch that suits each."""

from math import lcm

from mopsim.cost.compute import matmul_curve
from mopsim.graph.flops import flops_per_token
from mopsim.search.problem import divisors
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import MatmulDType


def node_counts(most: int, rack: int = 1) -> list[int]:
    """Node counts up to `most`: 4, 5, 6, 7 or 8 times a power of two (and 1, 2, 3), and as many racks of
    `rack` nodes, which are paid for whole; ascending.

    Degrees must divide the ranks, so a count with few factors (37, 101) leaves hardly a strategy.
    """
    counts = set(range(1, min(most, 8) + 1))
    power = 1
    while 4 * power <= most:
        counts.update(part * power for part in (4, 5, 6, 7, 8) if part * power <= most)
        power *= 2
    if rack > 1:
        counts.update(rack * racks for racks in node_counts(most // rack))
    return sorted(counts)


def global_batch(world_size: int, wanted: float, least: int = 1) -> int:
    """Sequences per step, near those `wanted`, that divide over data groups of `world_size` ranks. least: a
    step has a whole multiple of so many.

    Where each rank can have a sequence to itself: the nearest multiple of the ranks times the largest of 8,
    4, 2 that stays within an eighth of what is wanted (so that microbatches of as many sequences divide it
    too), else of the ranks. Where not: the divisor of the ranks nearest by ratio (the data groups are then
    that many, and ranks share a sequence). The ranks are here their least common multiple with `least`.
    """
    wanted, whole = max(wanted, 1.0), lcm(world_size, least)
    if wanted < whole:
        parts = [one for one in divisors(whole) if one % least == 0]
        return min(parts, key=lambda one: (max(one / wanted, wanted / one), one))
    for micro_batch in (8, 4, 2):
        unit = whole * micro_batch
        batch = unit * round(wanted / unit)
        if abs(batch - wanted) <= wanted / 8:
            return batch
    return whole * round(wanted / whole)


def least_nodes(
    model: ModelSpec,
    hardware: HardwareProfile,
    seq_len: int,
    tokens: int,
    seconds: float,
    share: float = 1.0,
    precision: MatmulDType = "bfloat16",
    documents: int = 0,
) -> int:
    """Nodes below which arithmetic alone takes longer than `share` of `seconds`: three times the forward's
    FLOP at the peak rate of the products."""
    flops = 3 * sum(flops_per_token(model, seq_len, documents).values()) * tokens
    rate = matmul_curve(hardware, precision).peak.si * hardware.devices_per_node
    return max(1, int(-(-flops // (rate * seconds * share))))
