"""What the report of the closed loop says of a machine that other programs use."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mopexec.measure.quiet import loaded
from mopsim.loop import BESIDE, Loop
from mopsim.report.demo import _caveat
from mopsim.report.demo_results import AGREES, OVERLAP, DemoContender, DemoReport


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
    assert "while it was probed other programs had 1.0 of the 2 cores. " in said


def contender(name: str, *steps: float) -> DemoContender:
    """The contender with these steps, of which the second is the median; predicted alike by all."""
    none: Any = None
    one: Any = SimpleNamespace(step_times=steps, step_time_median=steps[1], others=0.0)
    found = DemoContender(name, none, one, none, [])
    predicted: Any = SimpleNamespace(step_time=steps[1])
    found.probed = found.piloted = found.calibrated = predicted
    return found


@pytest.mark.parametrize(
    ("other", "apart"),
    [
        ((1.11, 1.12, 1.2), True),
        ((1.05, 1.12, 1.2), False),
        ((1.02, 1.08, 1.1), False),
        ((1.5, 2.0, 3.0), True),
    ],
)
def test_two_are_too_close_to_tell_where_the_spreads_shown_overlap(
    other: tuple[float, ...], apart: bool
) -> None:
    """1.00 to 1.10 s and 1.11 to 1.20 s were within their spread: 0.2 s between medians, which is wide."""
    none: Any = None
    pair = [contender("mop", 1.0, 1.05, 1.1), contender("fsdp2", *other)]
    found = DemoReport(pair, [], none, none, none, 0, 1, [], {}, "", none, 0)
    ((*_, verdict),) = found.orders()
    assert verdict == (AGREES[True, True] if apart else f"too close to tell: {OVERLAP}")
    won = "Fastest in these runs, " if found.busy() else "Winner: mop"
    assert found.verdict().startswith(won if apart else "A tie on this machine: mop")
    assert found.verdict().endswith(OVERLAP) is not apart
    found.probed_beside = loaded(0.5, 2, "the profile is")
    assert found.verdict().startswith("Fastest in these runs, " if apart else "A tie on this machine: mop")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.5, 2.0, "agrees after the pilot runs, not before"),
        (2.0, 0.5, "agreed before calibration, not after the pilot runs"),
        (0.5, 0.5, "disagrees, before and after the pilot runs"),
    ],
)
def test_a_verdict_tells_both_predictions(before: float, after: float, said: str) -> None:
    """fsdp2 takes twice as long as mop; so many times by the probed profile, and by that of the pilots."""
    none: Any = None
    pair = [contender("mop", 1.0, 1.0, 1.0), contender("fsdp2", 2.0, 2.0, 2.0)]
    other: Any = pair[1]
    steps = pair[0].probed.step_time
    other.probed, other.piloted = (SimpleNamespace(step_time=times * steps) for times in (before, after))
    found = DemoReport(pair, [], none, none, none, 0, 1, [], {}, "", none, 0)
    ((order, first, later, verdict),) = found.orders()
    assert order == "mop before fsdp2"
    said_first = ["mop" if one > 1 else "fsdp2" for one in (before, after)]
    assert [first.split()[0], later.split()[0]] == said_first
    assert verdict == said


def test_a_stage_that_takes_long_is_said_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mopsim.loop.LOOK", 0.02)
    monkeypatch.setattr("mopsim.commands.progress.EVERY", 0.1)
    loop = Loop(tmp_path, tmp_path, 0, 1, Console())
    with loop.stage("list the stacks"):
        loop.run("mopsim", "list", "stacks")
    said = capsys.readouterr()
    assert re.search(r"^mopsim: list the stacks, running for \d+ s$", said.err, re.MULTILINE)
    assert "  list the stacks: " in said.out


def test_a_picture_of_a_disturbed_run_says_so() -> None:
    """predicted.png had no word of it."""
    quiet, busy = report(0.1, 0.05), report(0.02, 0.45)
    for one in (quiet, busy):
        one.contenders[0].measured.disturbed = 0
    assert _caveat(quiet) == ""
    assert _caveat(busy).startswith("\nThe machine was not quiet: ")
    quiet.contenders[0].measured.disturbed = 3
    assert _caveat(quiet) == "\nOther programs were running: 3 steps of mop left out"
