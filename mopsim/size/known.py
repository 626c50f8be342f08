"""What is known of one machine type while it is sized: answers by node count, and what to ask next of one."""

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

from mopsim.engine import SimResult
from mopsim.size.ask import Answer, Ask, judged, merged
from mopsim.size.points import Point, Request, quantile
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.strategy import Strategy

AROUND = 4
"""How far, as a factor, a faster plan is handed on to other counts."""


@dataclass
class KnownSteps:
    """What was found of one machine type so far. By count: given, the plans that it was asked with; tried,
    their forms that were played there; searched, families that were; behind, those of them that are slower by
    far; longest, the most simulations of a family."""

    request: Request
    hardware: HardwareProfile
    answers: dict[int, Answer] = field(default_factory=dict)
    points: dict[int, Point] = field(default_factory=dict)
    given: dict[int, list[Strategy]] = field(default_factory=lambda: defaultdict(list))
    tried: dict[int, list[Strategy]] = field(default_factory=lambda: defaultdict(list))
    searched: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    behind: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    longest: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    simulated: int = 0

    def again(self, simulations: int) -> None:
        """Search anew with so many simulations: all that was found stays, and which families are slower by
        far is found again."""
        self.request = replace(self.request, simulations=simulations)
        self.searched.clear()
        self.behind.clear()

    def note(self, ask: Ask, found: Answer) -> None:
        """Keep an answer; of each family the faster plan, where the count was asked before."""
        self.simulated += found.simulated
        self.given[ask.num_nodes] += [plan.strategy for plan in ask.plans]
        self.tried[ask.num_nodes] += found.tried
        if ask.simulations:
            self.searched[ask.num_nodes].update(ask.families)
            self.behind[ask.num_nodes].update(found.behind)
            self.longest[ask.num_nodes] = max(self.longest[ask.num_nodes], ask.simulations)
        before = self.answers.get(ask.num_nodes)
        if before is not None:
            found = merged(before, found)
        self.answers[ask.num_nodes] = found
        self.points[ask.num_nodes] = judged(self.request, ask, found)

    def told(self, ask: Ask) -> Ask:
        """A question with what is known of its count: nothing is played there twice."""
        plans = self.answers[ask.num_nodes].plans if ask.num_nodes in self.answers else ()
        tried = (*self.tried[ask.num_nodes], *(one.strategy for one in plans))
        rate = max((one.tokens_per_second_per_device for one in plans), default=0.0)
        fastest = tuple((one.strategy.name, one.step_time) for one in plans)
        return replace(ask, tried=tried, rate=rate, fastest=fastest)

    def search(self, count: int, families: tuple[str, ...] = (), times: int = 1) -> Ask:
        families, budget = families or self.hopeful(count), self.request.simulations * times
        return Ask(self.hardware, count, self.near(count), families, budget)

    def hopeful(self, count: int) -> tuple[str, ...]:
        """Families that are not slower by far at a count around, and those of the fastest plans nearby; all,
        where each is slower by far at one of them."""
        around = [found for one, found in self.behind.items() if count / AROUND <= one <= count * AROUND]
        every = self.request.families
        behind = set().union(*around) - {one.strategy.name for one in self.near(count)}
        return tuple(one for one in every if one not in behind) or every

    def search_led(self, count: int) -> Ask:
        """A search of the families of the fastest plans of the nearest counts."""
        return self.search(count, tuple({one.strategy.name: None for one in self.near(count)}))

    def unsearched(self, count: int) -> bool:
        """Whether families were left out at a count: another than those of its neighbours may be the best."""
        return not self.searched[count].issuperset(self.hopeful(count))

    def carry(self, count: int, *others: int) -> Ask:
        """The plans of the nearest counts, and of others."""
        plans = (*(self.answers[one].plans[0] for one in others), *self.near(count))
        return Ask(self.hardware, count, tuple({id(plan): plan for plan in plans}.values()))

    def new(self, ask: Ask) -> bool:
        """Whether a count was not asked, or not with all these plans."""
        return ask.num_nodes not in self.answers or any(
            plan.strategy not in self.given[ask.num_nodes] for plan in ask.plans
        )

    def work(self, count: int) -> float:
        """Seconds within which the run ends as surely as asked, times nodes; infinite where not known."""
        point = self.points.get(count)
        bill = point.figures if point else None
        return count * quantile(bill, self.request.confidence) if bill else math.inf

    def least_work(self, count: int, *, above: bool = False) -> int:
        """The count around `count` (or above it) that takes the least work, or `count`."""
        low = count if above else count / AROUND
        return min((one for one in self.points if low <= one <= count * AROUND), key=self.work, default=count)

    def near(self, count: int) -> tuple[SimResult, ...]:
        """The fastest plan of the nearest counts that have one, below and above."""
        ready = sorted(n for n, found in self.answers.items() if found.plans and n != count)
        below = [n for n in ready if n < count][-1:]
        above = [n for n in ready if n > count][:1]
        return tuple(self.answers[n].plans[0] for n in (*below, *above))
