"""More simulations are never worse; what a search leaves open between machine types is searched, or told."""

import random
from dataclasses import replace
from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopsim.engine import SimResult, simulate
from mopsim.report.sizing import open_rivals
from mopsim.size import Goal, Point, Request, Sizing, assume, size_all
from mopsim.size.ask import Answer, Ask, judged
from mopsim.size.carry import carried
from mopsim.size.decided import Decided
from mopsim.size.figures import DAY
from mopsim.size.rivals import LONGER, SEARCHES
from mopsim.size.rounds import Answered, Queue, doublings
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import STACKS
from tests.sim.test_size_across import MACHINES
from tests.sim.test_size_carry import plan
from tests.sim.test_size_decision import decided
from tests.sim.toys import small

FAMILIES = ("mop", "fsdp2", "megatron")
PER_DEVICE = 50_000.0
"""Tokens/s, about, of a device in a made-up answer."""
DEADLINE, PAID = Goal(10**12, 20 * DAY), Goal(10**12, None, 3000.0)


@cache
def simulated() -> SimResult:
    """A step whose figures made-up answers replace."""
    strategy = msgspec.structs.replace(plan(world=8, stages=1), name="megatron")
    training = TrainSpec(seq_len=512, global_batch=256)
    return simulate(small(), MACHINES[0], 1, strategy, training, load_stack(STACKS["megatron"]))


class Luck:
    """Answers by chance: a longer search of a count may find less than a shorter one, a family may be far
    behind in one and first in the next, and what is carried may be anything. longest: by machine type and
    count the most simulations that were asked for."""

    def __init__(self, seed: int) -> None:
        self.seed, self.longest = seed, dict[tuple[str, int], int]()

    def __call__(self, queue: Queue) -> Answered:
        while queue:
            key, ask = queue.popleft()
            yield key, self.answer(ask)

    def answer(self, ask: Ask) -> Answer:
        training = request(3).training(ask.num_nodes * ask.hardware.devices_per_node)
        found, tried = list[SimResult](), list[Strategy]()
        for one in ask.plans:
            form = next(carried(one.strategy, self.world(ask), training.global_batch), None)
            if form and form not in ask.tried:
                tried.append(form)
                found.append(self.plan(ask, training, form))
        if ask.simulations:
            at = ask.hardware.name, ask.num_nodes
            self.longest[at] = max(self.longest.get(at, 0), ask.simulations)
            for family in ask.families:
                form = msgspec.structs.replace(plan(world=self.world(ask), stages=1), name=family)
                found.append(self.plan(ask, training, form, ask.simulations))
        found.sort(key=lambda one: one.step_time)
        best = {one.strategy.name: one for one in reversed(found)}
        plans = tuple(sorted(best.values(), key=lambda one: one.step_time))
        behind = tuple(one.strategy.name for one in plans if one.step_time > 1.25 * plans[0].step_time)
        gap = 0.15 if ask.simulations else None
        return Answer(plans, len(found), "" if plans else "none", gap, tuple(tried), behind)

    def world(self, ask: Ask) -> int:
        return ask.num_nodes * ask.hardware.devices_per_node

    def plan(self, ask: Ask, training: TrainSpec, form: Strategy, times: int = 0) -> SimResult:
        drawn = random.Random(f"{self.seed} {ask.hardware.name} {ask.num_nodes} {form} {times}")
        rate = PER_DEVICE * drawn.uniform(0.5, 1.0)
        tokens = training.seq_len * training.global_batch
        return replace(
            simulated(), strategy=form, training=training, step_time=tokens / rate / form.world_size,
            tokens_per_second=rate * form.world_size, tokens_per_second_per_device=rate, mfu=rate / 1e5,
        )  # fmt: skip


def request(simulations: int, goal: Goal = DEADLINE) -> Request:
    return Request(
        small(), goal, 512, 2**17, FAMILIES, max_nodes=12, simulations=simulations,
        assumptions=assume({"step_time_spread": 0.1}),
    )  # fmt: skip


def points(sizings: list[Sizing]) -> dict[tuple[str, int], Point]:
    return {(one.hardware.name, point.num_nodes): point for one in sizings for point in one.tried}


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), goal=st.sampled_from([DEADLINE, PAID]))
def test_more_simulations_are_never_worse_at_any_count(seed: int, goal: Goal) -> None:
    """Counts were lost, and their plans with them: 6 nodes took 12.5 days where they had taken 10.8."""
    fewer, more = (points(size_all(request(n, goal), MACHINES, Luck(seed))) for n in (3, 12))
    assert set(fewer) <= set(more)
    for key, point in fewer.items():
        bill = more[key].figures
        assert point.figures is None or (bill and bill.seconds <= point.figures.seconds), key


def test_numbers_between_two_doublings_are_those_of_the_lower() -> None:
    assert [doublings(one) for one in (1, 2, 3, 5)] == [[1], [2], [3], [3]]
    assert doublings(12) == doublings(23) == [3, 6, 12]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), goal=st.sampled_from([DEADLINE, PAID]))
def test_a_cluster_that_is_no_faster_than_a_smaller_one_says_so(seed: int, goal: Goal) -> None:
    for sizing in size_all(request(3, goal), MACHINES, Luck(seed)):
        best = float("inf")
        for point in sizing.tried:
            if point.figures is not None:
                assert point.figures.seconds < best or "no faster than" in point.why
                best = min(best, point.figures.seconds)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), goal=st.sampled_from([DEADLINE, PAID]))
def test_a_rival_is_searched_as_long_as_is_allowed(seed: int, goal: Goal) -> None:
    """What is left undecided was searched LONGER, or as many searches as are allowed were."""
    luck, asked = Luck(seed), request(3, goal)
    left = Decided(asked, size_all(asked, MACHINES, luck)).undecided
    nearest = {one.point.hardware.name: one.point for one in left}
    spent = sum(one >= LONGER * asked.simulations for one in luck.longest.values())
    assert spent >= SEARCHES or all(
        luck.longest.get((name, one.num_nodes), 0) >= LONGER * asked.simulations
        for name, one in nearest.items()
    )


def found_at(cost: float, gap: float | None, place: int = 0) -> Point:
    """A point that costs so many times what the recommended one does."""
    ask = Ask(MACHINES[place], 4, (), FAMILIES, 3)
    point = judged(request(3), ask, Luck(0).answer(ask))
    assert point.figures is not None
    bill = replace(point.figures, seconds=1e5, cost=1000.0 * cost)
    return replace(point, figures=bill, gap=gap)


@pytest.mark.parametrize(("worse", "gap", "told"), [(0.04, 0.1, True), (0.2, 0.1, False), (0.04, 0.03, False),
                                                    (0.04, None, True), (0.2, None, False)])  # fmt: skip
def test_what_is_undecided_is_told_in_a_line(worse: float, gap: float | None, told: bool) -> None:
    chosen, other = found_at(1.0, 0.05), found_at(1 + worse, gap, 1)
    left = decided(request(3), chosen, other).undecided
    assert [one.point for one in left] == [other] * told
    said = open_rivals(left, request(3))
    assert bool(said) == told
    if told:
        assert len(said.splitlines()) == 1
        assert said.startswith(f"{other.hardware.cluster(other.num_nodes)} for 1.2 days, 4 % dearer, where ")
        assert ("at most 10 % faster" if gap else "no search bounds") in said
