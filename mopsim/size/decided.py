"""What the sizings of a request recommend, and the clusters that a buyer may prefer to that."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mopsim.intervals import spread
from mopsim.search.result import TIE
from mopsim.size.figures import Figures
from mopsim.size.points import Miss, Point, Request, Sizing, by_cost, nearest_miss, quantile

SURE, LITTLE = 0.95, 1.1
"""Probability of the deadline from which a cluster is called sure, and how many times the recommended one's
cost it may be for it to be named beside that."""
NEAR = 0.02
"""Part of the recommended cluster's cost that another may be dearer by to be a near tie: less than the steps
of two machine types are known to."""
UNBOUNDED = 0.1
"""How much worse than the recommended cluster one may be that no search bounds, and still be told."""


@dataclass(frozen=True)
class Rival:
    """A cluster of another machine type that may be better than the recommended one. worse: by how much it is
    dearer (of a budget alone: slower), as a fraction; slack: how much faster a plan left out may be at most,
    None where its number of nodes was not searched, so that nothing bounds it."""

    point: Point
    worse: float
    slack: float | None


class Decided:
    """The sizings of a request. points: their clusters that fit. Of those that meet the limits: cheapest,
    None where no price is known; fastest, within max_cost; chosen, the recommended one: the cheapest, of a
    budget alone the fastest, without a price that of the fewest devices."""

    def __init__(self, request: Request, sizings: Sequence[Sizing]) -> None:
        self.request, self.sizings = request, list(sizings)
        self.points = [point for sizing in sizings for point in sizing.tried if point.figures]
        done = [point for point, _ in self._done()]
        self.cheapest = next(by_cost(done), None)
        paid = [(bill.seconds, one.num_nodes, one) for one, bill in self._done() if request.pays(bill)]
        self.fastest = min(paid, key=lambda one: one[:2])[2] if paid else None
        fewest = min(done, key=lambda one: one.num_devices, default=None)
        self.chosen = self.fastest if self._by_time else self.cheapest or fewest

    def _done(self) -> Iterator[tuple[Point, Figures]]:
        """The clusters that meet the limits, with their bills."""
        return ((point, point.figures) for point in self.points if point.does and point.figures)

    @property
    def _by_time(self) -> bool:
        """Whether clusters are compared by their time: of a budget alone; else by their cost."""
        return self.request.goal.seconds is None

    @property
    def miss(self) -> Miss | None:
        """The nearest miss, if no cluster meets the limits."""
        goal = self.request.goal
        return None if self.chosen else nearest_miss(self.points, goal, self.request.confidence)

    @property
    def ties(self) -> list[Point]:
        """The other clusters that are as good as the recommended one within 0.5 % of what it was chosen by:
        cost, days or, without a price, devices; the fastest first."""
        bill = self.chosen.figures if self.chosen else None
        if self.chosen is None or bill is None:
            return []

        def measure(point: Point, one: Figures) -> float:
            if self._by_time:
                return one.seconds if self.request.pays(one) else math.inf
            return point.num_devices if bill.cost is None else math.inf if one.cost is None else one.cost

        most = (1 + TIE) * measure(self.chosen, bill)
        found = [
            (one.seconds, point.num_nodes, point)
            for point, one in self._done()
            if point is not self.chosen and measure(point, one) <= most
        ]
        return [point for *_, point in sorted(found, key=lambda one: one[:2])]

    def _odds(self, bill: Figures) -> float:
        """Probability of the deadline."""
        return bill.p_within(self.request.goal.seconds) or 0.0

    def _dearer(self, most: float) -> list[tuple[float, Point, Figures]]:
        """(how many times the recommended cluster's cost, cluster, bill) of those that meet the limits at
        `most` times it, cheapest first; none without a deadline or a price."""
        bill = self.chosen.figures if self.chosen else None
        if bill is None or not bill.cost or self._by_time:
            return []
        found = [
            (one.cost / bill.cost, point, one)
            for point in by_cost(point for point, _ in self._done())
            if (one := point.figures) and one.cost is not None
        ]
        return [one for one in found if one[0] <= most]

    @property
    def surer(self) -> Point | None:
        """A cluster that is little dearer than the recommended one and far likelier to be in time, if any."""
        bill = self.chosen.figures if self.chosen else None
        if bill is None or self._odds(bill) >= SURE:
            return None
        found = (point for _, point, one in self._dearer(LITTLE) if self._odds(one) >= SURE)
        return next(found, None)

    @property
    def near(self) -> Point | None:
        """A cluster that is likelier to be in time and to fit than the recommended one, for at most 2 % more
        of the cost, if any."""
        plan, bill = (self.chosen.result, self.chosen.figures) if self.chosen else (None, None)
        found = (
            point
            for times, point, one in self._dearer(1 + NEAR)
            if times > 1 + TIE and plan and bill and point.result
            if self._odds(one) > self._odds(bill) and point.result.p_fits > plan.p_fits
        )
        return next(found, None)

    @property
    def fitter(self) -> Point | None:
        """A cluster whose plan is more likely to fit than the recommended one's, where that is not sure: the
        cheapest that is sure to, even if its program keeps more than its stack says, else the surest. Of each
        number of nodes its fastest plan, and its surer one."""
        plan = self.chosen.result if self.chosen else None
        if plan is None or plan.p_fits >= spread.SURE:
            return None
        found = [
            (
                -min(one.p_fits, spread.SURE), math.inf if bill.cost is None else bill.cost,
                point.num_devices, point,
            )
            for point in (*self.points, *(one.surer for one in self.points if one.surer))
            if point.does and (one := point.result) and (bill := point.figures) and one.p_fits > plan.p_fits
        ]  # fmt: skip
        return min(found, key=lambda one: one[:3])[3] if found else None

    @property
    def undecided(self) -> list[Rival]:
        """Clusters of other machine types that a plan which no search tried may make better than the
        recommended one, of each machine type the nearest; the nearest first."""
        found = self.rivals()
        nearest = {one.point.hardware.name: one for one in reversed(found)}
        return [one for one in found if one is nearest[one.point.hardware.name]]

    def rivals(self) -> list[Rival]:
        """All clusters of other machine types that would be better than the recommended one if they were as
        fast as their search leaves open (10 % faster, where none bounds it); the nearest first."""
        mine = self._measure(self.chosen) if self.chosen else None
        found = []
        for point in self.points:
            theirs = self._measure(point)
            if not self.chosen or not mine or not theirs or point.hardware.name == self.chosen.hardware.name:
                continue
            worse, open_to = theirs / mine - 1, UNBOUNDED if point.gap is None else point.gap
            if worse < open_to and self._missed_by(point) <= 1 + open_to:
                found.append(Rival(point, worse, point.gap))
        return sorted(found, key=lambda one: (one.worse, one.point.num_nodes))

    def _measure(self, point: Point) -> float | None:
        """What is to be least: of a budget alone seconds, else dollars; None where it is not known."""
        bill = point.figures
        if bill is None:
            return None
        return bill.seconds if self._by_time else bill.cost

    def _missed_by(self, point: Point) -> float:
        """How many times its limits a point needs, of the worse one; what it takes at once is not less where
        it is faster, if it is bought."""
        bill, request, goal = point.figures, self.request, self.request.goal
        if bill is None or (request.terms.buy and not point.affordable):
            return math.inf
        late = quantile(bill, request.confidence) / goal.seconds if goal.seconds else 0.0
        limits = [goal.budget] if goal.seconds else [goal.budget, request.max_cost]
        most = min((one for one in limits if one), default=math.inf)
        return max(
            late, (math.inf if bill.outlay is None else bill.outlay) / most if most < math.inf else 0.0
        )

    @property
    def subject(self) -> Point | None:
        """The recommended cluster, or the nearest miss."""
        return self.chosen or (self.miss.point if self.miss else None)

    @property
    def front(self) -> list[Point]:
        """The Pareto front of cost and time, cheapest first."""
        front: list[Point] = []
        fastest = math.inf
        for point in by_cost(self.points):
            if point.figures and point.figures.seconds < fastest:
                front.append(point)
                fastest = point.figures.seconds
        return front
