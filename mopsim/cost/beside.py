"""What kernels lose to a collective that runs beside them."""

from collections.abc import Iterable

from mopsim.program.workload import Work
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.stack import Stack

IN_ONE_WAVE = ("torch", "modules", "batched")
"""Grouped products (`Kernels.expert_products`) that run as others do: one kernel after the other, with a
block for each SM. Those of Transformer Engine's GroupedLinear lie on four streams, where the next ones fill
what a second wave leaves idle (common/util/multi_stream.cpp, num_compute_streams)."""


def lost(priced: Iterable[tuple[Work, float]], hardware: HardwareProfile, stack: Stack) -> float:
    """The part of its throughput that compute loses. priced: its work, one after the other, and the seconds
    of each alone."""
    share = hardware.communication_share
    products = max(share, hardware.product_share)
    alone = slowed = 0.0
    for work, seconds in priced:
        grouped = work.kind == "grouped_matmul" and stack.kernels.expert_products in IN_ONE_WAVE
        rate = 1.0 - (products if grouped or work.kind == "matmul" else share)
        if seconds > 0.0 and rate <= 0.0:
            return 1.0
        alone, slowed = alone + seconds, slowed + (seconds / rate if seconds > 0.0 else 0.0)
    return 1.0 - alone / slowed if slowed else share
