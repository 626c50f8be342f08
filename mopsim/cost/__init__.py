"""Op -> seconds on a hardware profile. Pure functions; efficiency is a curve over size."""

from mopsim.cost.communication import collective, transfer
from mopsim.cost.compute import attention, host_memory, host_optimizer, matmul, memory_bound, optimizer
from mopsim.program.workload import Work
from mopsim.spec.hardware import HardwareProfile

_BY_KIND = {
    "matmul": matmul,
    "grouped_matmul": matmul,
    "attention": attention,
    "memory_bound": memory_bound,
    "optimizer": optimizer,
    "host_optimizer": host_optimizer,
    "host_memory": host_memory,
    "h2d": transfer,
    "d2h": transfer,
    "all_gather": collective,
    "reduce_scatter": collective,
    "all_reduce": collective,
    "all_to_all": collective,
    "send_recv": collective,
}


def raw_seconds(work: Work, profile: HardwareProfile) -> float:
    """Seconds by the profile's curves, uncorrected."""
    return _BY_KIND[work.kind](work, profile)


def seconds(work: Work, profile: HardwareProfile) -> float:
    """Seconds of one piece of work: scale * curve + overhead per op (the profile's correction of its
    kind)."""
    time = raw_seconds(work, profile)
    correction = profile.corrections.get(work.kind)
    if correction is None:
        return time
    return max(0.0, correction.scale * time + correction.overhead * work.issued)
