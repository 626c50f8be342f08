"""Micro-benchmarks as data, and how far a profile's curves are to be trusted before one was run."""

import math
from functools import cache

from mopsim.common.io import Spec, convert
from mopsim.common.shipped import shipped
from mopsim.engine import SimResult
from mopsim.intervals.spread import machines_share
from mopsim.size.figures import Figures
from mopsim.spec.hardware import COLLECTIVES, HardwareProfile, Tag


class Benchmark(Spec, frozen=True, kw_only=True):
    """A measurement on rented nodes. kinds: of work whose seconds it settles."""

    name: str
    kinds: tuple[str, ...]
    nodes: int
    how: str


class Measurements(Spec, frozen=True, kw_only=True):
    """The measurements that are known; standard deviations of ln(seconds): `spread` of a kind before it is
    measured, by the tag of its curve, `after` it is, and `calibrated` of a whole step after short runs."""

    spread: dict[Tag, float]
    spread_source: str
    after: float
    after_source: str
    calibrated: float
    calibrated_source: str
    benchmarks: tuple[Benchmark, ...]


@cache
def measurements() -> Measurements:
    """measurements.yaml."""
    return convert(shipped("mopsim.size", "measurements.yaml"), Measurements, "measurements")


def tag_of(hardware: HardwareProfile, kind: str, devices: int) -> Tag:
    """How far to trust the profile's curve of a kind of work; of collectives that of the network, where
    `devices` are more than a scale-up domain has."""
    device, host = hardware.device, hardware.host
    if kind in COLLECTIVES:
        fabric = hardware.scale_up if devices <= hardware.scale_up_size else hardware.scale_out
        return fabric.collectives[kind].bandwidth.tag
    tags: dict[str, Tag] = {
        "matmul": device.matmul[0].tag,
        "grouped_matmul": (device.grouped_matmul or device.matmul)[0].tag,
        "attention": device.attention.tag,
        "memory_bound": device.memory_bandwidth.tag,
        "optimizer": device.adam_rate.tag,
        "h2d": host.link_h2d.tag,
        "d2h": host.link_d2h.tag,
        "host_optimizer": host.adam_rate.tag,
        "host_memory": host.memory_bandwidth.tag,
    }
    return tags[kind]


def settled_by_plan(bill: Figures) -> float:
    """Variance of ln(days) that is left once the plan itself was run."""
    of_step = bill.step_deviation**2
    return min(measurements().calibrated ** 2, of_step) + max(bill.deviation**2 - of_step, 0.0)


def of_machine(bill: Figures, result: SimResult) -> float:
    """Variance of ln(days) that measurements of a machine can settle: its part of the step's, and no more
    than the plan itself settles. What is of the program, of the source and of the run no measurement of a
    part tells."""
    settled = bill.deviation**2 - settled_by_plan(bill)
    return max(0.0, min(machines_share(result.facts) * bill.step_deviation**2, settled))


def spreads(hardware: HardwareProfile, devices: int, bill: Figures, result: SimResult) -> dict[str, float]:
    """Of each kind of work that a benchmark measures, the standard deviation of ln(seconds) before it does:
    by the tag of its curve, all narrowed alike where together they would move the step by more than machines
    like this one did."""
    known = measurements()
    found = {
        kind: known.spread[tag_of(hardware, kind, devices)]
        for one in known.benchmarks
        for kind in one.kinds
        if kind in result.busy
    }
    together = sum((spread * result.busy[kind] / result.step_time) ** 2 for kind, spread in found.items())
    narrowed = min(1.0, math.sqrt(of_machine(bill, result) / together)) if together else 1.0
    return {kind: spread * narrowed for kind, spread in found.items()}
