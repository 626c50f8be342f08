"""What it costs that devices of one type are not equally fast: a step waits for the slowest of them."""

from msgspec.structs import replace
from scipy.special import ndtri

from mopsim.spec.hardware import Correction, HardwareProfile

BY_POWER = ("matmul", "grouped_matmul", "attention")
"""Work whose speed differs between devices, by the clock that each one's power and temperature leave it; that
of kernels which memory bounds hardly does (arXiv 2208.11035)."""


def slowest(count: int, spread: float) -> float:
    """Expected time of the slowest of `count` devices over the mean one's.

    Speeds are normal with deviation `spread`; the largest of n is expected at the quantile (n - 0.375) / (n +
    0.25) (Blom 1958).
    """
    return 1 + spread * max(0.0, float(ndtri((count - 0.375) / (count + 0.25))))


def speed_spread(hardware: HardwareProfile) -> float:
    """Of the speeds of its devices; 0 where the profile has none."""
    return hardware.device.speed_spread.si if hardware.device.speed_spread else 0.0


def waiting(hardware: HardwareProfile, devices: int) -> HardwareProfile:
    """The profile as a step sees it that waits for the slowest of `devices` of it."""
    factor = slowest(devices, speed_spread(hardware))
    if factor == 1.0:
        return hardware
    corrections = dict(hardware.corrections)
    for kind in BY_POWER:
        own = corrections.get(kind, Correction())
        corrections[kind] = replace(own, scale=own.scale * factor)
    return replace(hardware, corrections=corrections)
