"""The smallest number of nodes of one machine type that trains in time: a search at each count it asks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mopsim.common.errors import MopError
from mopsim.common.units import format_bytes
from mopsim.engine import SimResult
from mopsim.search import Options, SearchResult, search
from mopsim.search.coarse import coarse
from mopsim.size.counts import global_batch, least_nodes, node_counts
from mopsim.size.figures import Assumptions, Figures, Goal, figures
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES

FEW_TOKENS = 8192
"""Tokens of a device and step below which gathering weights and reducing gradients outlast the arithmetic:
the roofline of ZeRO-3 in bf16 on one 400 Gbit/s NIC a device is of this order."""


@dataclass(frozen=True)
class Request:
    """What is to be trained, and how the answer is looked for. batch_tokens: wanted tokens per step.

    budget: simulations per node count and family. runnable: only what mopexec runs.
    """

    model: ModelSpec
    goal: Goal
    seq_len: int
    batch_tokens: int
    families: tuple[str, ...] = FAMILIES
    max_nodes: int = 512
    budget: int = 40
    runnable: bool = False
    assumptions: Assumptions = field(default_factory=Assumptions)
    precision: MatmulDType = "bfloat16"
    routing: RoutingProfile = "balanced"
    stack: Stack | None = None

    def training(self, world_size: int) -> TrainSpec:
        """The training at `world_size` ranks: the global batch is fitted to them."""
        batch = global_batch(world_size, self.seq_len, self.batch_tokens)
        return TrainSpec(seq_len=self.seq_len, global_batch=batch, routing=self.routing)


@dataclass(frozen=True)
class Point:
    """One node count of one machine type. result: the fastest strategy that fits with room to spare, if one
    was found; `why` says what is wrong with a point that does not do."""

    hardware: HardwareProfile
    num_nodes: int
    training: TrainSpec
    result: SimResult | None
    figures: Figures | None
    in_time: bool
    why: str
    gap: float | None = None

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.hardware.devices_per_node

    @property
    def num_steps(self) -> float:
        """Optimizer steps of the whole training, from its figures; 0 where nothing fits."""
        tokens = self.training.seq_len * self.training.global_batch
        return self.figures.tokens / tokens if self.figures else 0.0


@dataclass(frozen=True)
class Sizing:
    """The answer for one machine type. best: the smallest cluster found that trains in time; tried: every
    node count asked, ascending; why: the reason where there is none."""

    hardware: HardwareProfile
    best: Point | None
    tried: list[Point]
    why: str = ""
    simulated: int = 0


@dataclass
class _Asker:
    """Searches at node counts, each once."""

    request: Request
    hardware: HardwareProfile
    progress: Callable[[int, str], None] | None
    points: dict[int, Point] = field(default_factory=dict)
    simulated: int = 0

    def at(self, num_nodes: int) -> Point:
        if num_nodes not in self.points:
            if self.progress:
                self.progress(num_nodes, self.hardware.name)
            self.points[num_nodes] = self._ask(num_nodes)
        return self.points[num_nodes]

    def _ask(self, num_nodes: int) -> Point:
        request = self.request
        training = request.training(num_nodes * self.hardware.devices_per_node)
        options = Options(
            request.families, 1, request.budget, request.runnable, precision=request.precision, axes=coarse,
            stack=request.stack,
        )  # fmt: skip
        found = search(request.model, self.hardware, num_nodes, training, options)
        self.simulated += found.simulated
        best = found.best
        if best is None or best.verdict != "fits":
            return Point(self.hardware, num_nodes, training, None, None, False, _memory_reason(found))
        bill = figures(self.hardware, num_nodes, best.tokens_per_second, request.goal, request.assumptions)
        in_time = bill.seconds <= request.goal.seconds
        why = "" if in_time else f"too slow: {bill.days:,.1f} days{_small_batch(training, best)}"
        return Point(self.hardware, num_nodes, training, best, bill, in_time, why, found.gap)


def size(
    request: Request, hardware: HardwareProfile, progress: Callable[[int, str], None] | None = None
) -> Sizing:
    """The smallest cluster of `hardware` that does it, or why there is none.

    Time falls and memory eases as nodes are added, so a count that fails rules out those below it. Starts
    where arithmetic alone could do, then jumps to what the measured rate asks for, then closes in between
    the largest count that failed and the smallest that did, over `node_counts`. `progress(nodes, machine)`
    is called before each search.
    """
    least = least_nodes(
        request.model, hardware, request.seq_len, request.goal, request.assumptions, request.precision
    )
    counts = [count for count in node_counts(request.max_nodes) if count >= least]
    if not counts:
        why = f"not fast enough: {least} nodes at the peak rate of products, {request.max_nodes} allowed"
        return Sizing(hardware, None, [], why)
    asker = _Asker(request, hardware, progress)
    best = _close_in(asker, counts, request.goal)
    tried = [asker.points[count] for count in sorted(asker.points)]
    if best is None:
        worst = asker.at(counts[-1])
        why = f"{worst.why}, with {worst.num_nodes} nodes" if worst.why else "nothing fits"
        return Sizing(hardware, None, tried, why, asker.simulated)
    return Sizing(hardware, best, tried, "", asker.simulated)


def _close_in(asker: _Asker, counts: Sequence[int], goal: Goal) -> Point | None:
    """Bisection over the places of `counts`, guided by the rate of the last count that fits."""
    low, high = -1, len(counts)
    place = 0
    while high - low > 1:
        point = asker.at(counts[place])
        if point.in_time:
            high = place
        else:
            low = place
        place = _next(point, counts, low, high, goal)
    return asker.at(counts[high]) if high < len(counts) else None


def _next(point: Point, counts: Sequence[int], low: int, high: int, goal: Goal) -> int:
    """The place to ask next, strictly between `low` and `high`: the count that the rate per node of `point`
    asks for (twice the nodes where nothing fits), else the middle."""
    if point.figures:
        wanted = point.num_nodes * point.figures.seconds / goal.seconds
    elif high == len(counts):
        wanted = 2.0 * point.num_nodes
    else:
        return (low + high) // 2
    guess = next((place for place, count in enumerate(counts) if count >= wanted), len(counts) - 1)
    return min(max(guess, low + 1), max(high - 1, low + 1))


def _small_batch(training: TrainSpec, result: SimResult) -> str:
    """A hint where a device has so few tokens in a step that it waits for weights and gradients."""
    tokens = training.seq_len * training.global_batch // result.strategy.world_size
    if tokens >= FEW_TOKENS:
        return ""
    return f" ({tokens:,} tokens a device and step: a larger global batch is faster)"


def _memory_reason(found: SearchResult) -> str:
    """What stops a search that found nothing with room to spare."""
    if found.best:
        return "fits only at risk: the upper bound of its memory is beyond the limit"
    least = found.closest
    if least:
        by = format_bytes(least.over_bytes)
        return f"does not fit: {least.over or 'memory'} is {by} over in the closest strategy"
    return found.verdict()


def recommend(points: Sequence[Point], max_cost: float | None = None) -> tuple[Point | None, Point | None]:
    """(cheapest, fastest within `max_cost` dollars) of the points that train in time; a machine without a
    price is never the cheapest, nor within a budget. Raises MopError for a budget that is not positive."""
    if max_cost is not None and not 0 < max_cost < 1e15:
        raise MopError(f"--max-cost: {max_cost:g} must be positive, and below 1e15 dollars")
    done = [(point, point.figures) for point in points if point.in_time and point.figures]
    priced = [(bill.cost, point.num_nodes, point) for point, bill in done if bill.cost is not None]
    affordable = [
        (bill.seconds, point.num_nodes, point)
        for point, bill in done
        if max_cost is None or (bill.cost is not None and bill.cost <= max_cost)
    ]
    cheapest = min(priced, key=lambda one: one[:2])[2] if priced else None
    fastest = min(affordable, key=lambda one: one[:2])[2] if affordable else None
    return cheapest, fastest
