"""Collectives in flight: those of different communicators share the links that they use at the same time."""

from collections.abc import Mapping
from typing import NamedTuple

from mopsim.cost.communication import use
from mopsim.engine.account import Prices
from mopsim.engine.clock import Clock, Wake
from mopsim.program.workload import TALKS, Program
from mopsim.spec.hardware import HardwareProfile

Use = Mapping[int, tuple[float, float]]
"""What a collective, by its op, takes of the rate of (scale-up, scale-out) while it runs alone, where that is
not all of one."""
ALONE = {"scale_up": (1.0, 0.0), "scale_out": (0.0, 1.0)}


class Share(NamedTuple):
    """From a time on: what a collective gets of its rate alone, and the ops that have the rest."""

    since: float
    rate: float
    others: tuple[int, ...]


class Flight:
    """A collective that runs. left: of its seconds alone; rate: of these in a second, since `since`; timer:
    the event at which `wake` is woken; past: how it went on, once others slowed it."""

    __slots__ = ("left", "out", "past", "rate", "since", "timer", "up", "wake")

    def __init__(self, left: float, since: float, wake: Wake, uses: tuple[float, float]) -> None:
        self.left, self.since, self.wake, (self.up, self.out) = left, since, wake, uses
        self.rate, self.timer = 0.0, -1
        self.past: list[Share] = []


class SharedLinks:
    """The fabrics of a rank. Of a fabric that is asked for more than its rate, every collective gets as large
    a part of what it uses alone; one over two fabrics goes on as the slower of them lets it."""

    def __init__(self, clock: Clock, program: Program, uses: Use) -> None:
        self.clock, self.ops, self.uses = clock, program.ops, uses
        self.flights: dict[int, Flight] = {}

    def begin(self, index: int, seconds: float, wake: Wake) -> None:
        """Op `index`, of `seconds` alone, begins; `wake` when it is over."""
        uses = self.uses.get(index) or ALONE[TALKS[self.ops[index].stream]]
        alone, flight = not self.flights, Flight(seconds, self.clock.now, wake, uses)
        self.flights[index] = flight
        if alone and max(uses) <= 1.0:
            flight.rate, flight.timer = 1.0, self.clock.at(self.clock.now + seconds, wake)
        else:
            self._share()

    def end(self, index: int) -> list[Share]:
        """It is over. Returns what it got, where it was slowed."""
        flight = self.flights.pop(index)
        if self.flights:
            self._share()
        return flight.past

    def _share(self) -> None:
        """Go on at the rates that those in flight leave each other."""
        clock, flights, now = self.clock, self.flights, self.clock.now
        up = max(1.0, sum([one.up for one in flights.values()]))
        out = max(1.0, sum([one.out for one in flights.values()]))
        for index, one in flights.items():
            rate = 1.0 / max(up if one.up else 1.0, out if one.out else 1.0)
            if rate < 1.0 or one.past:
                within = one.up > 0.0 and (up >= out or not one.out)
                one.past.append(Share(now, rate, self._others(index, within=within)))
            if rate == one.rate:
                continue
            if one.timer >= 0:
                clock.overtake(one.timer)
                one.left = max(0.0, one.left - (now - one.since) * one.rate)
            one.rate, one.since = rate, now
            one.timer = clock.at(now + one.left / rate, one.wake)

    def _others(self, index: int, *, within: bool) -> tuple[int, ...]:
        """Those that use the same fabric."""
        used = ((other, one.up if within else one.out) for other, one in self.flights.items())
        return tuple(other for other, use in used if use and other != index)


def uses(program: Program, hardware: HardwareProfile, prices: Prices) -> Use:
    """What collectives use. prices: of all work of the program."""
    found: dict[int, tuple[float, float]] = {}
    for kind, op in enumerate(program.alike.firsts):
        fabric = TALKS.get(op.stream)
        if fabric is None:
            continue
        each = [(prices[id(work)][1], *use(work, hardware)) for work in op.work]
        total = sum(seconds for seconds, *_ in each) or 1.0
        up, out = (sum(part[0] * part[place] for part in each) / total for place in (1, 2))
        if (up, out) != ALONE[fabric]:
            found[kind] = up, out
    return program.alike.some(found)
