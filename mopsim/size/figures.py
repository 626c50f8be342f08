"""From a simulated step to a bill: days, money, energy, carbon, and how sure they are. Pure arithmetic, SI
units."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from scipy.special import ndtr, ndtri

from mopsim.common.errors import MopError
from mopsim.intervals.spread import LEVEL
from mopsim.size.assumptions import HERE, Assumptions, Capex, Site, assume, known
from mopsim.size.fabric import Network, network
from mopsim.size.goodput import HOUR, Goodput, goodput, whole_racks
from mopsim.spec.hardware import HardwareProfile

DAY = 86400.0
YEAR_HOURS = 8766.0
WIDE = float(ndtri((1 + LEVEL) / 2))
"""Standard deviations to either end of them."""


@dataclass(frozen=True)
class Goal:
    """Train `tokens` within `seconds` of wall clock and within `budget` dollars; None: no limit."""

    tokens: int
    seconds: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or (self.seconds is not None and not self.seconds > 0):
            raise MopError("goal: tokens and days must be positive")
        if self.budget is not None and not 0 < self.budget < 1e15:
            raise MopError(f"--budget: {self.budget:g} must be positive, and below 1e15 dollars")


@dataclass(frozen=True)
class Price:
    """Dollars of a device and hour as rent, and who says so. own: the user or a site: without spread. tag: of
    the profile's price."""

    dollars: float
    source: str
    own: bool = True
    tag: str = ""


@dataclass(frozen=True)
class Terms:
    """How machines are paid for. buy: as a purchase, written off over `Assumptions.years`; else as rent,
    reserved or on demand. rent: dollars per device and hour by profile, in place of the profile's. capex:
    dollars of a node by profile, where known."""

    buy: bool = False
    reserved: bool = False
    rent: Mapping[str, float] = field(default_factory=dict)
    capex: Mapping[str, Capex] = field(default_factory=dict)

    def price(self, hardware: HardwareProfile, site: Site, a: Assumptions) -> Price | None:
        """None where nobody says. A price that is given is what is paid, reserved or not."""
        for given, source in ((self.rent, "given"), (site.rent, f"site {site.name}")):
            if hardware.name in given:
                return Price(given[hardware.name], source)
        listed = hardware.price_per_device_hour
        if listed is None:
            return None
        source = f"{listed.tag}: {' '.join(listed.source.split())}"
        if self.reserved:
            source = f"{listed.text} x {a.reserved_factor:g} reserved; {source}"
        return Price(listed.si * (a.reserved_factor if self.reserved else 1.0), source, False, listed.tag)


ON_DEMAND = Terms()


@dataclass(frozen=True)
class Figures:
    """The bill of one training run. seconds: wall clock, expected. device_seconds: of all devices that are
    paid for: whole racks, spares too. billed_nodes: those. cost: dollars, None where no price is known;
    parts: of it. capex: dollars that a purchase takes at once. energy: joules, None where the power is not
    known; carbon: kilograms of CO2. deviation: standard, of ln(seconds), whose
    median they are; step_deviation: what of it is the step's. measured_over_predicted: of the step, the
    median, which the seconds contain."""

    tokens: float
    seconds: float
    device_seconds: float
    cost: float | None
    energy: float | None
    billed_nodes: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)
    capex: float | None = None
    carbon: float | None = None
    goodput: Goodput | None = None
    network: Network | None = None
    site: str = ""
    deviation: float = 0.0
    step_deviation: float = 0.0
    measured_over_predicted: float = 1.0

    @property
    def days(self) -> float:
        return self.seconds / DAY

    @property
    def device_hours(self) -> float:
        return self.device_seconds / HOUR

    @property
    def outlay(self) -> float | None:
        """Dollars that a budget must cover: the purchase, or the rent of the run."""
        return self.cost if self.capex is None else self.capex

    def price_for(self, cost: float) -> float | None:
        """Dollars an hour of a device at which the rent of the run comes to this cost; None of a purchase and
        where no price is known."""
        return cost / self.device_hours if set(self.parts) == {"rent"} else None

    def seconds_interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Seconds of wall clock between which the run ends with probability `level`."""
        wide = math.exp(self.deviation * float(ndtri((1 + level) / 2)))
        return self.seconds / wide, self.seconds * wide

    def cost_interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Dollars likewise: the run is paid by the hour; prices are as given."""
        if self.cost is None:
            return None
        low, high = (one / self.seconds for one in self.seconds_interval(level))
        return self.cost * low, self.cost * high

    def p_within(self, seconds: float | None) -> float | None:
        """Probability that the run ends within `seconds`."""
        if seconds is None:
            return None
        if not self.deviation:
            return float(seconds >= self.seconds)
        return float(ndtr(math.log(seconds / self.seconds) / self.deviation))

    def p_budget(self, dollars: float | None) -> float | None:
        """Probability that the rent of the run, which is paid by the hour at the prices as given, stays
        within `dollars`; None of a purchase, which a longer run makes no dearer, and without a price."""
        if dollars is None or not self.cost or set(self.parts) != {"rent"}:
            return None
        return self.p_within(self.seconds * (dollars / self.cost))


def rated(hardware: HardwareProfile, a: Assumptions) -> float | None:
    """Rated watts of a node: the profile's, else its devices' times `Assumptions.node_over_devices`."""
    if hardware.node_power is not None:
        return hardware.node_power.si
    own = hardware.device.power
    return own.si * hardware.devices_per_node * a.node_over_devices if own else None


@dataclass(frozen=True)
class Step:
    """What a run repeats. tokens_per_second: of the whole cluster, while it trains. checkpoint: bytes.
    host_room: bytes that the plan leaves of a rank's host. low, high: factors of the step time between which
    it lies with probability LEVEL; None: by `step_time_spread`.
    """

    tokens_per_second: float
    checkpoint: float = 0.0
    host_room: float = math.inf
    low: float | None = None
    high: float | None = None

    @property
    def middle(self) -> float:
        """Median of measured over predicted step time."""
        return 1.0 if self.low is None or self.high is None else math.sqrt(self.low * self.high)


def figures(
    hardware: HardwareProfile,
    num_nodes: int,
    step: Step,
    goal: Goal,
    assumptions: Assumptions | None = None,
    terms: Terms = ON_DEMAND,
    site: Site = HERE,
) -> Figures:
    """The bill of training `goal.tokens` on `num_nodes` that all train, at a site.

    seconds = tokens / (tokens/s x goodput), times the middle of the step's interval. Paid are the nodes and
    their spares, in whole racks. energy =
    rated power x draw x PUE x seconds of all of them, switches too.
    """
    a = (assumptions or assume()).at(site)
    good = goodput(hardware, num_nodes, step.checkpoint, a, step.host_room)
    billed = whole_racks(hardware, num_nodes + good.spares)
    devices = billed * hardware.devices_per_node
    seconds = goal.tokens / (step.tokens_per_second * good.share) * step.middle
    wires = network(hardware, billed, a)
    node = rated(hardware, a)
    watts = None if node is None else (node * billed * a.draw_share + wires.power) * a.pue
    energy = None if watts is None else watts * seconds
    kwh = None if energy is None else energy / 3.6e6
    capex, parts = None, dict[str, float]()
    if terms.buy:
        capex, parts = _bought(hardware, billed, seconds, kwh, node, wires, a, terms)
    elif (price := terms.price(hardware, site, a)) is not None:
        parts = {"rent": price.dollars * devices * seconds / HOUR}
    deviation, of_step = _spread(hardware, num_nodes, step, seconds, good, a)
    return Figures(
        tokens=goal.tokens,
        seconds=seconds,
        device_seconds=seconds * devices,
        cost=sum(parts.values()) if parts else None,
        energy=energy,
        billed_nodes=billed,
        parts=parts,
        capex=capex,
        carbon=None if kwh is None else kwh * a.carbon / 1e3,
        goodput=good,
        network=wires,
        site=site.name,
        deviation=deviation,
        step_deviation=of_step,
        measured_over_predicted=step.middle,
    )


def _bought(
    hardware: HardwareProfile,
    nodes: int,
    seconds: float,
    kwh: float | None,
    node: float | None,
    wires: Network,
    a: Assumptions,
    terms: Terms,
) -> tuple[float | None, dict[str, float]]:
    """(dollars to buy `nodes` with network and storage, the run's share by part): an annuity over the years,
    less what is left of the machines then, over the hours in use. node: rated watts of one. (None, nothing)
    where no price is known."""
    price = terms.capex.get(hardware.name)
    if price is None:
        return None, {}
    devices = nodes * hardware.devices_per_node
    bought = {
        "machines": nodes * price.value,
        "network": wires.price,
        "storage": devices * a.storage_capacity * a.storage_price,
    }
    left = {"machines": a.residual * bought["machines"] / (1 + a.interest) ** a.years}
    recovery = a.interest / -math.expm1(-a.years * math.log1p(a.interest)) if a.interest else 1 / a.years
    yearly = {name: (value - left.get(name, 0.0)) * recovery for name, value in bought.items()}
    yearly["support"] = a.support_share * bought["machines"]
    yearly["staff"] = a.staff_cost * devices
    yearly["space"] = a.space_price * 12 * ((node or 0.0) * nodes + wires.power) / 1e3
    part = seconds / HOUR / (YEAR_HOURS * a.usage)
    parts = {name: value * part for name, value in yearly.items()}
    parts["energy"] = (kwh or 0.0) * a.power_price
    return sum(bought.values()), parts


def deviation(low: float, high: float) -> float:
    """Of a logarithm whose interval with probability LEVEL this is."""
    return math.log(high / low) / (2 * WIDE)


def _spread(
    hardware: HardwareProfile, nodes: int, step: Step, seconds: float, good: Goodput, a: Assumptions
) -> tuple[float, float]:
    """(deviation of ln(seconds), the step's part of it): the step's own interval, the chance
    of failures, and how well their rate is known; independent, to first order."""
    of_step = a.step_time_spread
    if step.low is not None and step.high is not None:
        of_step = deviation(step.low, step.high)
    of_mean = good.deviation / math.sqrt(seconds)
    rate = 0.0
    if a.utilisation is None and "failure_rate" not in a.given:
        ends = [
            goodput(hardware, nodes, step.checkpoint, a.with_(failure_rate=one), step.host_room).share
            for one in (known()["failure_rate"].low, known()["failure_rate"].high)
        ]
        rate = deviation(ends[1], ends[0])
    chance = math.log1p(of_mean**2)  # variance of the logarithm of a log-normal wall clock
    return math.sqrt(of_step**2 + chance + rate**2), of_step
