"""From a simulated step to a bill: days, device hours, money, energy. Pure arithmetic, SI units."""

from dataclasses import dataclass

from mopsim.spec.errors import MopError
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
    pue: power of the building over power of the devices (power usage effectiveness).
    """

    utilisation: float = 0.9
    pue: float = 1.3

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise MopError(f"--utilisation: {self.utilisation:g} must lie in (0, 1]")
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


def figures(
    hardware: HardwareProfile,
    num_nodes: int,
    tokens_per_second: float,
    goal: Goal,
    assumptions: Assumptions = Assumptions(),
) -> Figures:
    """Figures of training `goal.tokens` at `tokens_per_second` of the whole cluster.

    seconds = tokens / (tokens/s x utilisation); cost = price x device hours; energy = device power x PUE x
    device seconds: the devices draw their rated power throughout, hosts and network are inside the PUE.
    """
    seconds = goal.tokens / (tokens_per_second * assumptions.utilisation)
    device_seconds = seconds * num_nodes * hardware.devices_per_node
    price, power = hardware.price_per_device_hour, hardware.device.power
    return Figures(
        tokens=goal.tokens,
        seconds=seconds,
        device_seconds=device_seconds,
        cost=price.si * device_seconds / HOUR if price else None,
        energy=power.si * assumptions.pue * device_seconds if power else None,
    )
