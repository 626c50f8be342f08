"""The benchmark script itself, small: what it counts and what it calls missed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mopsim.spec.training import TrainSpec
from mopsim.strategies import mop


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "speed.py"
    spec = importlib.util.spec_from_file_location("speed", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["speed"] = module
    spec.loader.exec_module(module)
    return module


def test_a_missed_figure_is_said(speed: ModuleType) -> None:
    good = speed.Figure("rate", "of this", 3e4, "/s", 2e4)
    bad = speed.Figure("memory", "of that", 600.0, "MiB", 500, False)
    free = speed.Figure("time", "of all", 9.0, "s", None, False)
    assert [one.met for one in (good, bad, free)] == [True, False, True]
    text = speed.markdown([good, bad, free], {"cores": "2"})
    assert "Missed: 1 of 3." in text
    assert "| memory | of that | 600 MiB | at most 500 | missed |" in text


def test_events_are_those_of_the_simulation(speed: ModuleType) -> None:
    step = speed.Step(
        "", "tiny", "cpu-2core", 1, mop(2, expert_parallel=2), TrainSpec(seq_len=128, global_batch=4)
    )
    assert speed.simpy_events(step) == speed.simpy_events(step) > 100


def test_its_steps_are_legal(speed: ModuleType) -> None:
    for step in speed.STEPS:
        step.strategy.check_model(speed.load_model(step.model))
        step.training.check_strategy(step.strategy)
