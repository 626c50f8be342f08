"""What if: every input moved to its low and its high value, alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec.structs import replace as altered

from mopsim.engine import SimResult
from mopsim.intervals.spread import LEVEL
from mopsim.size.ask import billed
from mopsim.size.assumptions import known
from mopsim.size.benchmarks import measurements, of_machine, spreads, tag_of
from mopsim.size.carry import played
from mopsim.size.figures import WIDE, Figures, deviation
from mopsim.size.points import Point, Request
from mopsim.spec.hardware import Correction, HardwareProfile
from mopsim.spec.training import TrainSpec

LEAST = 0.002
"""Changes of days and cost (relative) below which an input is left out."""
SEEN = 0.02
"""Share of a step that a kind of work takes, below which its speed is left alone."""


@dataclass(frozen=True)
class End:
    """What one end of an input gives. value: of the input, in its unit."""

    value: float
    days: float
    cost: float | None
    p_deadline: float | None


@dataclass(frozen=True)
class Swing:
    """One input, alone at its low and its high value; the others stay. says: what it is. source: of the
    range."""

    name: str
    says: str
    unit: str
    low: End
    high: End
    source: str

    def share(self, bill: Figures) -> float:
        """The change between the ends, of cost or of days, over that of a bill, whichever is more."""
        days = abs(self.high.days - self.low.days) / bill.days
        if not bill.cost or self.low.cost is None or self.high.cost is None:
            return days
        return max(days, abs(self.high.cost - self.low.cost) / bill.cost)


def what_if(request: Request, point: Point, neighbours: Sequence[Point] = ()) -> list[Swing]:
    """Every input of a point's bill at its two ends: assumptions by their range, the step time by its
    interval, the speed of each kind of work (the plan simulated again), prices, the batch. neighbours: other
    node counts of the machine. Largest change of cost (of days, where no price is known) first."""
    request = request.at(point.figures)
    swings = [
        *_assumptions(request, point),
        *_step_time(request, point),
        *_prices(request, point),
        *_speeds(request, point),
        *_batches(request, point),
        *_nodes(request, point, neighbours),
    ]
    _, bill = point.step_and_bill
    shown = [one for one in swings if one.share(bill) > LEAST]
    return sorted(shown, key=lambda one: -one.share(bill))


def _end(value: float, request: Request, bill: Figures) -> End:
    return End(value, bill.days, bill.cost, bill.p_within(request.goal.seconds))


def _bill(request: Request, point: Point, result: SimResult | None = None) -> Figures:
    """The bill of another result or with another request."""
    chosen = result or point.step_and_bill[0]
    return billed(request, point.hardware, point.num_nodes, chosen.training, chosen).step_and_bill[1]


def _assumptions(request: Request, point: Point) -> list[Swing]:
    """Those that the user did not give, nor the site."""
    given, found = request.assumptions.given, []
    for name, one in known().items():
        if name not in given and name != "step_time_spread":
            ends = [
                _end(value, request, _bill(_with(request, **{name: value}), point))
                for value in (one.low, one.high)
            ]
            found.append(Swing(name, one.says, one.unit, ends[0], ends[1], one.source))
    return found


def _with(request: Request, **values: float) -> Request:
    return replace(request, assumptions=request.assumptions.with_(**values))


def _step_time(request: Request, point: Point) -> list[Swing]:
    """The whole step at the ends of its own interval."""
    result, bill = point.step_and_bill
    ends = []
    for wide in (-WIDE, WIDE):
        factor = math.exp(wide * bill.step_deviation)
        slower = replace(result, tokens_per_second=result.tokens_per_second / factor)
        seconds = result.step_time * bill.measured_over_predicted * factor
        ends.append(_end(seconds, request, _bill(request, point, slower)))
    says = "measured step time, between the ends of the prediction's interval"
    return [Swing("step_time", says, "s", ends[0], ends[1], f"{LEVEL:.0%} interval of the prediction")]


def _prices(request: Request, point: Point) -> list[Swing]:
    """The price of a device-hour, or of a node, that is not the user's own."""
    terms, name = request.terms, point.hardware.name
    if terms.buy:
        price = terms.capex[name]
        values, unit, source = (price.low, price.high), "USD/node", price.source
        requests = [
            replace(request, terms=replace(terms, capex={**terms.capex, name: altered(price, value=value)}))
            for value in values
        ]
    else:
        paid = terms.price(point.hardware, request.sites[0], request.assumptions)
        if paid is None or paid.own:
            return []
        spread, unit = known()["rent_spread"], "USD/h"
        values, source = (paid.dollars / (1 + spread.value), paid.dollars * (1 + spread.value)), spread.source
        requests = [
            replace(request, terms=replace(terms, rent={**terms.rent, name: value})) for value in values
        ]
    ends = [_end(v, request, _bill(one, point)) for v, one in zip(values, requests, strict=True)]
    return [Swing("price", "price of the machine", unit, ends[0], ends[1], source)]


def _speeds(request: Request, point: Point) -> list[Swing]:
    """Each kind of work that takes a share of the step, faster and slower by what is open of it; by less
    where together they would move the days by more than measurements of a machine can settle, as kinds do
    that others wait for."""
    result, bill = point.step_and_bill
    open_ = spreads(point.hardware, point.num_devices, bill, result)

    def found(part: float) -> list[Swing]:
        ends = (_speed(request, point, kind, part * open_[kind]) for kind in _kinds(point))
        return [swing for swing in ends if swing is not None]

    whole, most = found(1.0), of_machine(bill, result)
    moved = sum(deviation(one.low.days, one.high.days) ** 2 for one in whole)
    return found(math.sqrt(most / moved)) if moved > most else whole


def _kinds(point: Point) -> list[str]:
    result, _ = point.step_and_bill
    known_kinds = {kind for one in measurements().benchmarks for kind in one.kinds}
    return [
        kind for kind, busy in result.busy.items() if kind in known_kinds and busy > SEEN * result.step_time
    ]


def _speed(request: Request, point: Point, kind: str, spread: float) -> Swing | None:
    """spread: standard deviation of ln(its seconds)."""
    tag = tag_of(point.hardware, kind, point.num_devices)
    ends = []
    for factor in (math.exp(-WIDE * spread), math.exp(WIDE * spread)):
        result = _replayed(request, point, _slowed(point.hardware, kind, factor))
        if result is None:
            return None
        ends.append(_end(factor, request, _bill(request, point, result)))
    says = f"seconds of {kind.replace('_', ' ')} over the profile's ({tag})"
    return Swing(kind, says, "x", ends[0], ends[1], measurements().spread_source)


def _slowed(hardware: HardwareProfile, kind: str, factor: float) -> HardwareProfile:
    own = hardware.corrections.get(kind, Correction())
    scale = min(max(own.scale * factor, 0.02), 50.0)
    return altered(hardware, corrections={**hardware.corrections, kind: altered(own, scale=scale)})


def _replayed(
    request: Request, point: Point, hardware: HardwareProfile, training: TrainSpec | None = None
) -> SimResult | None:
    plan, _ = point.step_and_bill
    problem = request.problem(hardware, point.num_nodes, training or point.training)
    return played(problem, plan.strategy, plan.stack)


def _batches(request: Request, point: Point) -> list[Swing]:
    """Half and twice the tokens of a step, by the same plan."""
    ends = []
    for factor in (0.5, 2.0):
        batch = point.training.global_batch * factor
        if batch % 1:
            return []
        training = altered(point.training, global_batch=int(batch))
        result = _replayed(request, point, point.hardware, training)
        if result is None or not result.fits:
            return []
        ends.append(_end(batch * training.seq_len, request, _bill(request, point, result)))
    says = "tokens of a step, by the same plan"
    return [Swing("global_batch_tokens", says, "tokens", ends[0], ends[1], "half and twice what was asked")]


def _nodes(request: Request, point: Point, neighbours: Sequence[Point]) -> list[Swing]:
    """The next smaller and larger cluster that was searched: one whose plan was carried is slower for want of
    a search."""
    here, name = point.num_nodes, point.hardware.name
    mine = [one for one in neighbours if one.gap is not None and one.hardware.name == name]
    bills = {one.num_nodes: one.figures for one in (*mine, point) if one.figures}
    below = max((count for count in bills if count < here), default=here)
    above = min((count for count in bills if count > here), default=here)
    low, high = (_end(count, request, bills[count]) for count in (below, above))
    says = "nodes: the next smaller and larger cluster that was searched"
    return [Swing("nodes", says, "nodes", low, high, "a choice")]
