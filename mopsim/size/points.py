"""What is asked of a sizing and what it answers: requests, points, near misses."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mopsim.engine import SimResult
from mopsim.intervals.spread import LEVEL
from mopsim.search.problem import Problem
from mopsim.size.assumptions import HERE, Assumptions, Site, assume, known
from mopsim.size.counts import global_batch
from mopsim.size.figures import DAY, ON_DEMAND, Figures, Goal, Terms
from mopsim.spec.documents import Documents, training_fields
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES

DEFAULT_SIMULATIONS = 3
FEW_TOKENS = 8192
"""Tokens of a device and step below which gathering weights and reducing gradients outlast the arithmetic:
the roofline of ZeRO-3 in bf16 on one 400 Gbit/s NIC a device is of this order."""
MOST_NODES = 512
"""Of a cluster, where nothing is said of its size."""
NEAR = 2.0
"""How many times a point's nodes its speed is still said to grow with them."""


@dataclass(frozen=True)
class Request:
    """What is to be trained, and how the answer is looked for. batch_tokens: wanted tokens per step.

    simulations: of each family, where a node count is searched; twice as many where the answer is.
    runnable: only what mopexec runs. confidence: probability of meeting the deadline that will do.
    interval: that of the intervals of days and cost. max_nodes, max_devices: of a cluster; MOST_NODES
    without both.
    max_cost: dollars of outlay within which the fastest is wanted too. documents: of packed sequences, where
    attention does not cross them.
    """

    model: ModelSpec
    goal: Goal
    seq_len: int
    batch_tokens: int
    families: tuple[str, ...] = FAMILIES
    max_nodes: int | None = None
    simulations: int = DEFAULT_SIMULATIONS
    runnable: bool = False
    assumptions: Assumptions = field(default_factory=assume)
    terms: Terms = ON_DEMAND
    sites: tuple[Site, ...] = (HERE,)
    confidence: float = 0.5
    precision: MatmulDType = "bfloat16"
    routing: RoutingProfile = "balanced"
    stack: Stack | None = None
    interval: float = LEVEL
    max_cost: float | None = None
    max_devices: int | None = None
    documents: Documents = 0

    @property
    def limit(self) -> str:
        """How large a cluster may be."""
        limits = {"node": self.max_nodes, "device": self.max_devices}
        if not any(limits.values()):
            limits["node"] = MOST_NODES
        return " and ".join(f"{n:,} {what}{'s' * (n > 1)}" for what, n in limits.items() if n)

    def most_nodes(self, hardware: HardwareProfile) -> int:
        """Of this machine type, at most."""
        if self.max_devices is None:
            return self.max_nodes or MOST_NODES
        nodes = self.max_devices // hardware.devices_per_node
        return min(self.max_nodes or nodes, nodes)

    def pays(self, bill: Figures | None) -> bool:
        """Whether a bill is within max_cost."""
        outlay = bill.outlay if bill else None
        return self.max_cost is None or (outlay is not None and outlay <= self.max_cost)

    @property
    def flag(self) -> str:
        """The option that allows a larger cluster."""
        return "--max-nodes" if self.max_devices is None else "--max-devices"

    def training(self, world_size: int) -> TrainSpec:
        """The training at `world_size` ranks: the global batch is fitted to them."""
        batch = global_batch(world_size, self.batch_tokens / self.seq_len)
        apart = training_fields(self.documents)
        return TrainSpec(seq_len=self.seq_len, global_batch=batch, routing=self.routing, **apart)

    def problem(self, hardware: HardwareProfile, num_nodes: int, training: TrainSpec) -> Problem:
        """What a search is asked about one cluster."""
        return Problem(self.model, hardware, num_nodes, training, self.precision, self.stack, self.runnable)

    def at(self, bill: Figures | None) -> "Request":
        """This request as it was billed: at the site of `bill` alone (without one, at the first), by the
        assumptions there."""
        site = next((one for one in self.sites if bill and one.name == bill.site), self.sites[0])
        return replace(self, sites=(site,), assumptions=self.assumptions.at(site))

    def source(self, name: str) -> str:
        """Who says the value of an assumption, of a request at one site."""
        (site,), found = self.sites, known()[name]
        if getattr(site, name, None) is not None:
            return ": ".join(filter(None, (f"site {site.name}", site.source)))
        return "given" if name in self.assumptions.given else f"{found.tag}: {found.source}"


@dataclass(frozen=True)
class Point:
    """One node count of one machine type. result: the fastest strategy that fits with room to spare, if one
    was found; figures: of its cheapest site; sites: of each. in_time: soon enough with the confidence asked;
    affordable: within the budget. `why` says what is wrong with a point that does not do. gap: as a
    search's, None where its strategy is of another cluster and its number of nodes was not searched. surer:
    the same cluster with a slower plan that fits more surely, where one was simulated."""

    hardware: HardwareProfile
    num_nodes: int
    training: TrainSpec
    result: SimResult | None
    figures: Figures | None
    in_time: bool
    why: str
    gap: float | None = None
    affordable: bool = True
    sites: tuple[Figures, ...] = ()
    surer: "Point | None" = None

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.hardware.devices_per_node

    @property
    def step_and_bill(self) -> tuple[SimResult, Figures]:
        """Those of a point that fits."""
        assert self.result is not None
        assert self.figures is not None
        return self.result, self.figures

    @property
    def does(self) -> bool:
        """Whether it is in time and within the budget."""
        return self.figures is not None and self.in_time and self.affordable

    @property
    def num_steps(self) -> float:
        """Optimizer steps of the whole training, from its figures; 0 where nothing fits."""
        tokens = self.training.seq_len * self.training.global_batch
        return self.figures.tokens / tokens if self.figures else 0.0


@dataclass(frozen=True)
class Sizing:
    """The answer for one machine type. best: the cheapest cluster found that does (of a budget alone, the
    fastest); tried: every node count asked, ascending; why: the reason where there is none, of the nearest
    miss."""

    hardware: HardwareProfile
    best: Point | None
    tried: list[Point]
    why: str = ""
    simulated: int = 0

    @property
    def rival(self) -> Point | None:
        """What is compared with other machine types by its cost: the best; where there is none, the cheapest
        cluster that fits and is in time."""
        return self.best or next(by_cost(point for point in self.tried if point.in_time), None)

    @property
    def bill(self) -> Figures | None:
        """Of the rival; where there is none, of the largest cluster that fits."""
        points = [self.rival] if self.rival else self.tried[::-1]
        return next((point.figures for point in points if point.figures), None)


def by_cost(points: Iterable[Point]) -> Iterator[Point]:
    """The points that have a price, cheapest first."""
    priced = [
        (bill.cost, bill.seconds, point.num_nodes, point)
        for point in points
        if (bill := point.figures) and bill.cost is not None
    ]
    return (point for *_, point in sorted(priced, key=lambda one: one[:3]))


@dataclass(frozen=True)
class Miss:
    """The point that misses by least, and what would make it do. over: how many times the limit it needs.
    days, dollars: limits that would do; None where it keeps that one, or has no price. Of a point that is
    late and within the budget, if every node added as much: nodes that would be in time, None where those are
    not NEAR; thin: tokens of a device and step on them, None where a device has FEW_TOKENS, so that more
    nodes are enough."""

    point: Point
    over: float
    days: float | None
    dollars: float | None
    nodes: int | None
    thin: float | None = None


def nearest_miss(points: Sequence[Point], goal: Goal, confidence: float) -> Miss | None:
    """Of the points that fit and do not do: the one whose worse limit is missed by the smallest factor."""
    found: list[tuple[float, float, Miss]] = []
    for point in points:
        bill = point.figures
        if bill is None or point.does:
            continue
        needed = quantile(bill, confidence)
        late = needed / goal.seconds if goal.seconds else 0.0
        outlay = bill.outlay if bill.outlay is not None else float("inf")
        dear = outlay / goal.budget if goal.budget else 0.0
        nodes, thin = _enough_nodes(point, late) if late > 1 >= dear else (None, None)
        days, dollars = needed / DAY if late > 1 else None, bill.outlay if dear > 1 else None
        miss = Miss(point, max(late, dear), days, dollars, nodes, thin)
        found.append((miss.over, outlay, miss))
    return min(found, key=lambda one: one[:2])[2] if found else None


def _enough_nodes(point: Point, late: float) -> tuple[int | None, float | None]:
    """`Miss.nodes` and `Miss.thin` of a point that takes `late` times as long as it may."""
    nodes = math.ceil(point.num_nodes * late)
    tokens = point.training.seq_len * point.training.global_batch
    each = tokens / (nodes * point.hardware.devices_per_node)
    if each < FEW_TOKENS:
        return None, each
    return (nodes if late <= NEAR else None), None


def quantile(bill: Figures, probability: float) -> float:
    """Seconds within which the run ends with `probability`."""
    if probability == 0.5:
        return bill.seconds
    low, high = bill.seconds_interval(abs(2 * probability - 1))
    return high if probability > 0.5 else low
