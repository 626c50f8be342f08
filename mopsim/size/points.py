"""What is asked of a sizing and what it answers: requests, points, the recommendation, near misses."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mopsim.engine import SimResult
from mopsim.intervals import spread
from mopsim.intervals.spread import LEVEL
from mopsim.search.problem import Problem
from mopsim.search.result import TIE
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
SURE, LITTLE = 0.95, 1.1
"""Probability of the deadline from which a cluster is called sure, and how many times the recommended one's
cost it may be for it to be named beside that."""
FEW_TOKENS = 8192
"""Tokens of a device and step below which gathering weights and reducing gradients outlast the arithmetic:
the roofline of ZeRO-3 in bf16 on one 400 Gbit/s NIC a device is of this order."""
MOST_NODES = 512
"""Of a cluster, where nothing is said of its size."""
UNBOUNDED = 0.1
"""How much worse than the recommended cluster one may be that no search bounds, and still be told."""
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
        return self.best or next(_by_cost(point for point in self.tried if point.in_time), None)

    @property
    def bill(self) -> Figures | None:
        """Of the rival; where there is none, of the largest cluster that fits."""
        points = [self.rival] if self.rival else self.tried[::-1]
        return next((point.figures for point in points if point.figures), None)


def _by_cost(points: Iterable[Point]) -> Iterator[Point]:
    """The points that have a price, cheapest first."""
    priced = [
        (bill.cost, bill.seconds, point.num_nodes, point)
        for point in points
        if (bill := point.figures) and bill.cost is not None
    ]
    return (point for *_, point in sorted(priced, key=lambda one: one[:3]))


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in cost and time, cheapest first; those without a price left out."""
    front: list[Point] = []
    fastest = float("inf")
    for point in _by_cost(points):
        if point.figures and point.figures.seconds < fastest:
            front.append(point)
            fastest = point.figures.seconds
    return front


def recommend(points: Sequence[Point], max_cost: float | None = None) -> tuple[Point | None, Point | None]:
    """(cheapest, fastest within `max_cost` dollars of outlay) of the points that do; a machine without a
    price is never the cheapest, nor within a budget."""
    done = [(point, point.figures) for point in points if point.does and point.figures]
    affordable = [(bill.seconds, point.num_nodes, point) for point, bill in done if _within(bill, max_cost)]
    cheapest = next(_by_cost(point for point, _ in done), None)
    fastest = min(affordable, key=lambda one: one[:2])[2] if affordable else None
    return cheapest, fastest


def choose(points: Sequence[Point], request: Request) -> Point | None:
    """The recommended cluster: the cheapest that does; of a budget alone the fastest; without a price that of
    the fewest devices."""
    cheapest, fastest = recommend(points, request.max_cost)
    return fastest if request.goal.seconds is None else cheapest or fewest(points)


def fewest(points: Sequence[Point]) -> Point | None:
    """The point of the fewest devices that does, the first of these; None where none does."""
    done = [point for point in points if point.does]
    return min(done, key=lambda one: one.num_devices, default=None)


def ties(points: Sequence[Point], chosen: Point | None, goal: Goal, max_cost: float | None) -> list[Point]:
    """The other points that do and are as good as the chosen one, within TIE of what it was chosen by:
    without a deadline its seconds (those within `max_cost` dollars of outlay), else its dollars, without a
    price its devices. The fastest first."""
    if chosen is None or chosen.figures is None:
        return []
    by_time, priced = goal.seconds is None, chosen.figures.cost is not None

    def measure(point: Point, bill: Figures) -> float:
        if by_time or not priced:
            return bill.seconds if by_time else point.num_devices
        return math.inf if bill.cost is None else bill.cost

    most = (1 + TIE) * measure(chosen, chosen.figures)
    found = [
        (bill.seconds, point.num_nodes, point)
        for point in points
        if point is not chosen and point.does and (bill := point.figures) and measure(point, bill) <= most
        if not by_time or _within(bill, max_cost)
    ]
    return [point for *_, point in sorted(found, key=lambda one: one[:2])]


@dataclass(frozen=True)
class Rival:
    """A cluster of another machine type that may be better than the recommended one. worse: by how much it is
    dearer (of a budget alone: slower), as a fraction; slack: how much faster a plan left out may be at most,
    None where its number of nodes was not searched, so that nothing bounds it."""

    point: Point
    worse: float
    slack: float | None


def undecided(points: Sequence[Point], chosen: Point | None, request: Request) -> list[Rival]:
    """The clusters of other machine types that would be better than the chosen one if they were as fast as
    their search leaves open, and UNBOUNDED of those that no search bounds; the nearest first."""
    mine = _measure(chosen, request) if chosen else None
    if chosen is None or mine is None:
        return []
    found = []
    for point in points:
        theirs = _measure(point, request)
        if theirs is None or point.hardware.name == chosen.hardware.name:
            continue
        worse, open_to = theirs / mine - 1, UNBOUNDED if point.gap is None else point.gap
        if worse < open_to and _missed_by(point, request) <= 1 + open_to:
            found.append(Rival(point, worse, point.gap))
    return sorted(found, key=lambda one: (one.worse, one.point.num_nodes))


def _measure(point: Point, request: Request) -> float | None:
    """What is to be least: of a budget alone seconds, else dollars; None where it is not known."""
    bill = point.figures
    if bill is None:
        return None
    return bill.seconds if request.goal.seconds is None else bill.cost


def _missed_by(point: Point, request: Request) -> float:
    """How many times its limits a point needs, of the worse one; what it takes at once is not less where it
    is faster, if it is bought."""
    bill, goal = point.figures, request.goal
    if bill is None or (request.terms.buy and not point.affordable):
        return math.inf
    late = quantile(bill, request.confidence) / goal.seconds if goal.seconds else 0.0
    limits = [goal.budget] if goal.seconds else [goal.budget, request.max_cost]
    most = min((one for one in limits if one), default=math.inf)
    return max(late, (math.inf if bill.outlay is None else bill.outlay) / most if most < math.inf else 0.0)


def _within(bill: Figures, max_cost: float | None) -> bool:
    return max_cost is None or (bill.outlay is not None and bill.outlay <= max_cost)


def surer(points: Sequence[Point], chosen: Point | None, goal: Goal) -> Point | None:
    """The cheapest point that does, is in time with probability SURE or more and costs at most LITTLE times
    the chosen one; None where that is as sure itself, or has no deadline or price."""
    bill = chosen.figures if chosen else None
    certain = bill.p_within(goal.seconds) if bill else None
    if bill is None or bill.cost is None or certain is None or certain >= SURE:
        return None
    most = LITTLE * bill.cost
    for point in _by_cost(point for point in points if point.does):
        one = point.figures
        if one and (one.cost or 0.0) <= most and (one.p_within(goal.seconds) or 0.0) >= SURE:
            return point
    return None


def surer_to_fit(points: Sequence[Point], chosen: Point | None) -> Point | None:
    """The cheapest point that does and fits as surely as plans are asked to, even if its program keeps more
    than its stack says; else the surest of those that fit more surely than the chosen one. Of each number of
    nodes its fastest plan, and its surer one. None where the chosen one is as sure itself."""
    plan = chosen.result if chosen else None
    if plan is None or plan.p_fits >= spread.SURE:
        return None
    found = [
        (
            -min(one.p_fits, spread.SURE),
            math.inf if bill.cost is None else bill.cost,
            point.num_devices,
            point,
        )
        for point in (*points, *(one.surer for one in points if one.surer))
        if point.does and (one := point.result) and (bill := point.figures) and one.p_fits > plan.p_fits
    ]
    return min(found, key=lambda one: one[:3])[3] if found else None


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
