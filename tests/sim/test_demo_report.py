"""What the report of the closed loop says of a machine that other programs use."""

from types import SimpleNamespace
from typing import Any

from mopexec.measure.quiet import loaded
from mopsim.loop import BESIDE
from mopsim.report.demo_results import DemoReport


def run(name: str, others: float) -> Any:
    steps = (1.0, 1.01, 1.02)
    plan = SimpleNamespace(strategy=SimpleNamespace(name=name))
    return SimpleNamespace(plan=plan, others=others, step_times=steps, step_time_median=steps[1])


def report(mop: float, pilot: float, probed_beside: str = "") -> DemoReport:
    """others: of a contender's run and of a pilot's."""
    none: Any = None
    contender: Any = SimpleNamespace(name="mop", measured=run("mop", mop))
    return DemoReport(
        [contender], [run("pilot-mop", pilot)], none, none, none, 0, 1, [], {}, "", none, 0, probed_beside
    )


def test_a_quiet_machine_is_not_spoken_of() -> None:
    assert report(0.1, 0.05).warning() == ""


def test_others_beside_a_pilot_are_told_though_its_steps_are_alike() -> None:
    """Pilots calibrate every prediction: on a busy machine all were 47 to 84 % off, without a word."""
    said = report(0.02, 0.45).warning()
    beside = "of the cores other programs had 45 % in the run of pilot-mop"
    assert said.startswith(f"The machine was not quiet: {beside}. ")
    assert "Neither these times nor what was calibrated from them are to be trusted" in said
    assert "scatter" not in said


def test_others_beside_the_probe_are_told_in_its_words() -> None:
    line = loaded(0.5, 2, "the profile is")
    assert line.startswith(BESIDE)
    said = report(0.0, 0.0, line).warning()
    assert "while it was probed other programs have 1.0 of the 2 cores. " in said
