"""Pipeline schedules are valid orders, never deadlock, and have the bubbles that their papers state."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopsim.spec.pipeline_order import Slot, order, turns

Key = tuple[str, int, int]
unhurried = settings(deadline=None)  # a busy machine is no failure
COST = {"forward": 1, "backward": 2, "input_grad": 1, "weight_grad": 1}


def run(schedule: str, stages: int, virtual: int, microbatches: int) -> tuple[int, list[int]]:
    """Play every stage's order with unit forwards (a chunk each): (end of the last slot, busy time of
    each stage).

    Asserts that no stage waits for ever, and that a slot starts only after what it depends on.
    """
    orders = [order(schedule, stages, virtual, microbatches, s) for s in range(stages)]
    ends: dict[Key, int] = {}
    at, clock = [0] * stages, [0] * stages
    moved = True
    while moved:
        moved = False
        for stage in range(stages):
            while at[stage] < len(orders[stage]):
                slot = orders[stage][at[stage]]
                needs = needed(slot, stage, stages, virtual)
                if any(key not in ends for key in needs):
                    break
                start = max([clock[stage], *(ends[key] for key in needs)])
                clock[stage] = start + COST[slot[0]]
                ends[kind(slot[0]), slot[1], slot[2] * stages + stage] = clock[stage]
                at[stage] += 1
                moved = True
    assert all(at[s] == len(orders[s]) for s in range(stages)), "a stage waits for ever"
    return max(clock), [sum(COST[slot[0]] for slot in one) for one in orders]


def kind(phase: str) -> str:
    return "backward" if phase == "input_grad" else phase


def needed(slot: Slot, stage: int, stages: int, virtual: int) -> list[Key]:
    phase, microbatch, chunk = slot
    part = chunk * stages + stage
    if phase == "forward":
        return [("forward", microbatch, part - 1)] if part else []
    if phase == "weight_grad":
        return [("backward", microbatch, part)]
    found = [("forward", microbatch, part)]
    return found + ([("backward", microbatch, part + 1)] if part < stages * virtual - 1 else [])


@unhurried
@given(
    schedule=st.sampled_from(["1f1b", "interleaved", "zero_bubble"]), stages=st.integers(1, 9),
    virtual=st.integers(1, 4), rounds=st.integers(1, 12),
)  # fmt: skip
def test_every_slot_once_and_no_deadlock(schedule: str, stages: int, virtual: int, rounds: int) -> None:
    virtual = virtual if schedule == "interleaved" and stages > 1 else 1
    microbatches = rounds * (stages if virtual > 1 else 1)
    run(schedule, stages, virtual, microbatches)
    for stage in range(stages):
        slots = order(schedule, stages, virtual, microbatches, stage)
        assert len(set(slots)) == len(slots)
        phases = 3 if schedule == "zero_bubble" and stages > 1 else 2
        assert len(slots) == phases * microbatches * virtual
        seen: set[tuple[str, int, int]] = set()
        for phase, microbatch, chunk in slots:
            if phase in ("backward", "input_grad"):
                assert ("forward", microbatch, chunk) in seen
            if phase == "weight_grad":
                assert ("input_grad", microbatch, chunk) in seen
            seen.add((phase, microbatch, chunk))


@unhurried
@given(stages=st.integers(1, 8), microbatches=st.integers(1, 32))
def test_1f1b_bubble_is_p_minus_1_over_m(stages: int, microbatches: int) -> None:
    """arXiv 2104.04473 2.2.1: bubble time over ideal time (p - 1) / m."""
    end, busy = run("1f1b", stages, 1, microbatches)
    assert Fraction(end - busy[0], busy[0]) == Fraction(stages - 1, microbatches)


@unhurried
@given(stages=st.integers(2, 6), virtual=st.integers(2, 4), rounds=st.integers(1, 5))
def test_interleaving_divides_the_bubble_by_v(stages: int, virtual: int, rounds: int) -> None:
    """arXiv 2104.04473 2.2.2: (p - 1) / (m v)."""
    microbatches = stages * rounds
    end, busy = run("interleaved", stages, virtual, microbatches)
    assert Fraction(end - busy[0], busy[0]) == Fraction(stages - 1, microbatches * virtual)


@unhurried
@given(stages=st.integers(2, 6), rounds=st.integers(2, 5))
def test_zero_bubble_has_a_third_of_the_bubble(stages: int, rounds: int) -> None:
    """arXiv 2401.10241 table 2: ZB-H1 idles (p - 1)(F + B - W) where 1F1B idles (p - 1)(F + B + W)."""
    microbatches = stages * rounds
    end, busy = run("zero_bubble", stages, 1, microbatches)
    plain, _ = run("1f1b", stages, 1, microbatches)
    assert end - busy[0] == stages - 1
    assert plain - busy[0] == 3 * (stages - 1)


@pytest.mark.parametrize("stage", range(4))
def test_in_flight_microbatches(stage: int) -> None:
    """1F1B holds p - stage microbatches at most; ZB-H1 no more input gradients than that."""
    for schedule in ("1f1b", "zero_bubble"):
        alive = top = 0
        for phase, _, _ in order(schedule, 4, 1, 16, stage):
            alive += (phase == "forward") - (phase in ("backward", "input_grad"))
            top = max(top, alive)
        assert top == 4 - stage


def _runs(stages: int, virtual: int, microbatches: int) -> bool:
    """Whether stages that receive, wait until what they sent before is received, compute and send, turn by
    turn, all come to their end. What crosses is taken in the order in which it was sent."""
    schedule, last = ("interleaved" if virtual > 1 else "1f1b"), stages * virtual - 1
    left = [turns(schedule, stages, virtual, microbatches, stage) for stage in range(stages)]
    sent, taken = Counter[tuple[str, int]](), Counter[tuple[str, int]]()  # by direction and sender
    begun = [0] * stages  # what of its turn a stage has received
    moved = True
    while moved:
        moved = False
        for stage in range(stages):
            if not left[stage]:
                continue
            needs, makes = [], []
            for way, _, chunk in left[stage][0]:
                part, step = chunk * stages + stage, 1 if way == "forward" else -1
                needs += [(way, (stage - step) % stages)] if 0 <= part - step <= last else []
                makes += [(way, stage)] if 0 <= part + step <= last else []
            while begun[stage] < len(needs) and taken[needs[begun[stage]]] < sent[needs[begun[stage]]]:
                taken[needs[begun[stage]]] += 1
                begun[stage] += 1
                moved = True
            waits = any(taken[way, stage] < sent[way, stage] for way in ("forward", "backward"))
            if begun[stage] < len(needs) or waits:
                continue
            sent.update(makes)
            begun[stage] = 0
            left[stage].pop(0)
            moved = True
    return not any(left)


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_no_turn_waits_forever(stages: int, virtual: int) -> None:
    for microbatches in (stages, 2 * stages, 5 * stages, *((1, 3, 7) if virtual == 1 else ())):
        assert _runs(stages, virtual, microbatches), microbatches
