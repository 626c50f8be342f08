"""From a simulated step to a bill: days, device hours, money, energy. Pure arithmetic, SI units."""

from dataclasses import dataclass

from mopsim.common.errors import MopError
from mopsim.spec.hardware import HardwareProfile

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class Goal:
    """Train `tokens` within `seconds` of wall clock."""

    tokens: int
    seconds: float

    def __post_init__(self) -> None:
        if self.tokens < 1 or not self.seconds > 0:
            raise MopError("goal: tokens and days must be positive")


@dataclass(frozen=True)
class Assumptions:
    """What no profile knows.

    utilisation: share of the wall clock that trains; the rest is restarts, checkpoints and repairs.
    pue: power of the building over power of the machines in it (power usage effectiveness); new and large
    facilities reach 1.3 (Uptime Institute's survey of 2024, whose mean is 1.56).
    """

    utilisation: float = 0.9
    pue: float = 1.3

    def __post_init__(self) -> None:
        if not 0.001 <= self.utilisation <= 1:
            raise MopError(f"--utilisation: {self.utilisation:g} must lie between 0.001 and 1")
        if not 1 <= self.pue <= 5:
            raise MopError(f"--pue: {self.pue:g} must lie between 1 and 5")


@dataclass(frozen=True)
class Figures:
    """The bill of one training run: seconds, device seconds, dollars, joules; None where the profile does not
    say. tokens: trained on in all."""

    tokens: float
    seconds: float
    device_seconds: float
    cost: float | None
    energy: float | None

    @property
    def days(self) -> float:
        return self.seconds / DAY

    @property
    def device_hours(self) -> float:
        return self.device_seconds / HOUR


def drawn(hardware: HardwareProfile) -> float | None:
    """Rated watts for each device: its share of the node; without node_power its own, hosts not counted."""
    if hardware.node_power is not None:
        return hardware.node_power.si / hardware.devices_per_node
    return hardware.device.power.si if hardware.device.power else None


def figures(
    hardware: HardwareProfile,
    num_nodes: int,
    tokens_per_second: float,
    goal: Goal,
    assumptions: Assumptions = Assumptions(),
) -> Figures:
    """Figures of training `goal.tokens` at `tokens_per_second` of the whole cluster.

    seconds = tokens / (tokens/s x utilisation); cost = price x device hours; energy = power x PUE x device
    seconds: `drawn` throughout. Switches between nodes are not counted.
    """
    seconds = goal.tokens / (tokens_per_second * assumptions.utilisation)
    device_seconds = seconds * num_nodes * hardware.devices_per_node
    price, power = hardware.price_per_device_hour, drawn(hardware)
    return Figures(
        tokens=goal.tokens,
        seconds=seconds,
        device_seconds=device_seconds,
        cost=price.si * device_seconds / HOUR if price else None,
        energy=None if power is None else power * assumptions.pue * device_seconds,
    )
