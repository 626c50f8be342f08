"""The engine's clock wakes as SimPy's processes are woken: at the same times, in the same order."""

from collections.abc import Generator
from typing import Any

import simpy
from hypothesis import given
from hypothesis import strategies as st

from mopsim.engine.clock import Clock, Process, Wake

Script = list[tuple[str, float]]
"""Steps of a process: `pass` so many seconds, `tell` others of a number, or `hear` it."""
Log = list[tuple[float, int, int]]
"""(time, process, step) as each step is over."""

steps = st.one_of(
    st.tuples(st.just("pass"), st.sampled_from((0.0, 0.1, 0.2, 0.3, 1.0))),
    st.tuples(st.sampled_from(("tell", "hear")), st.sampled_from((0.0, 1.0, 2.0))),
)


def _by_clock(scripts: list[Script]) -> Log:
    clock, log, told = Clock(), Log(), set[float]()
    waiting: dict[float, list[Wake]] = {}

    def process(number: int) -> Process:
        wake = yield
        for place, (what, value) in enumerate(scripts[number]):
            if what == "pass":
                if not clock.passes(clock.now + value):
                    clock.at(clock.now + value, wake)
                    yield
            elif what == "tell":
                told.add(value)
                for one in waiting.pop(value, ()):
                    clock.wake(one)
            elif value not in told:
                waiting.setdefault(value, []).append(wake)
                yield
            log.append((clock.now, number, place))

    for number in range(len(scripts)):
        clock.start(process(number))
    clock.play()
    return log


def _by_simpy(scripts: list[Script]) -> Log:
    env, log, told = simpy.Environment(), Log(), set[float]()
    events: dict[float, simpy.Event] = {}

    def process(number: int) -> Generator[simpy.Event, Any, None]:
        for place, (what, value) in enumerate(scripts[number]):
            if what == "pass":
                yield env.timeout(value)
            elif what == "tell":
                told.add(value)
                if value in events:
                    events.pop(value).succeed()
            elif value not in told:
                yield events.setdefault(value, env.event())
            log.append((env.now, number, place))

    for number in range(len(scripts)):
        env.process(process(number))
    env.run()
    return log


@given(st.lists(st.lists(steps, max_size=8), max_size=6))
def test_it_wakes_as_processes_of_simpy_are_woken(scripts: list[Script]) -> None:
    assert _by_clock(scripts) == _by_simpy(scripts)


def test_who_is_overtaken_is_not_woken() -> None:
    clock, woken = Clock(), []
    first = clock.at(1.0, Wake(lambda now: woken.append("first")))
    clock.at(1.0, Wake(lambda now: woken.append("second")))
    clock.overtake(first)
    clock.play()
    assert woken == ["second"]
