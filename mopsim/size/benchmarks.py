"""Micro-benchmarks as data, and how far a profile's curves are to be trusted before one was run."""

from functools import cache

from mopsim.common.io import Spec, convert
from mopsim.common.shipped import shipped
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
