"""What calibration leaves of its runs in a profile: intervals around what it predicts, narrowed by them."""

import math
import re
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console

import mopsim
from mopsim.calibrate.observed import expected
from mopsim.calibrate.profile import calibrate
from mopsim.commands.calibrate import warnings
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.report.tables import comparison, corrected, plan_line
from mopsim.spec.hardware import Correction, HardwareProfile
from mopsim.spec.observed import Observed
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from tests.sim.test_calibrate import MACHINE, PROFILE, TRUE, measured, simulate


def test_few_runs_narrow_the_interval_and_it_holds_a_run_that_they_lack() -> None:
    truth = {"per_op": 6e-6, "constant": 2e-3}
    unseen, widths = measured("c", MACHINE, **truth), []
    for names in ("", "a", "ab"):
        runs = [measured(name, MACHINE, **truth) for name in names]
        profile = calibrate(PROFILE, runs, simulate).profile if runs else PROFILE
        assert sum(one.runs for one in profile.runs_seen) == len(runs)
        found = simulate(unseen.plan, profile)
        low, high = expected(unseen.plan, profile, found.facts.made).interval(found.step_time)
        widths.append(math.log(high / low))
        assert not runs or low <= unseen.step_time_median <= high
    assert widths == sorted(widths, reverse=True)
    assert widths[2] < 0.8 * widths[0]


def test_an_interval_is_of_the_profile_that_is_written_and_holds_the_runs_it_was_fitted_to() -> None:
    """Two runs of which each predicts the other badly: the profile of both meets both, so its interval lies
    around what it predicts, and is as wide as what was missed."""
    slow = replace(PROFILE, corrections={**TRUE, "matmul": Correction(scale=3.0)})
    near, far = measured("a", MACHINE), measured("b", slow)
    alike = [calibrate(PROFILE, [near, measured("b", MACHINE)], simulate).profile, near, None]
    apart = [calibrate(PROFILE, [near, far], simulate).profile, near, far]
    widths = []
    for profile, *runs in (alike, apart):
        for run in filter(None, runs):
            found = simulate(run.plan_as_routed(), profile)
            predicted = found.step_time
            low, high = expected(run.plan, profile, found.facts.made).interval(predicted)
            assert low < predicted < high
            assert low < run.step_time_median < high
        widths.append(math.log(high / low))
    assert widths[0] < widths[1]


def test_a_disturbed_run_is_observed_for_its_quiet_part() -> None:
    slow = replace(PROFILE, corrections={**TRUE, "matmul": Correction(scale=3.0)})
    loud = measured("b", slow)
    disturbed = replace(loud, steps=loud.steps + 27, disturbed=27, resumed=1)
    (seen,) = calibrate(PROFILE, [disturbed], simulate).profile.runs_seen
    assert seen.runs == disturbed.quiet == 0.25


def test_what_was_observed_goes_through_a_file_and_nothing_else_changes_the_digest(tmp_path: Path) -> None:
    assert "observed" not in io.to_plain(PROFILE)
    result = calibrate(PROFILE, [measured(name, MACHINE) for name in "ab"], simulate)
    path = tmp_path / "profile.yaml"
    io.write_yaml(path, result.profile)
    assert load_profile(path) == result.profile
    bad = path.read_text().replace("runs: 2", "runs: 0")
    assert bad != path.read_text()
    path.write_text(bad)
    with pytest.raises(MopError, match=r"hardware\.observed\[0\]\.runs: 0(\.0)? must lie between 0.001 and"):
        load_profile(path)


@pytest.mark.parametrize("disturbed", [0, 27])
def test_an_interval_holds_what_was_missed_of_the_runs(disturbed: int) -> None:
    """Disturbed runs count for little in the fit, so that it misses both; the next is on the same machine."""
    runs = [measured("a", MACHINE, constant=1.0), measured("b", MACHINE, constant=0.5)]
    loud = [replace(one, steps=one.steps + disturbed, disturbed=disturbed) for one in runs]
    result = calibrate(PROFILE, loud, simulate)
    assert result.miss("held_out") > 1.5
    low, high = result.intervals["mopexec-flat"]
    assert all(low < 1 / (1 + error) < high for error in result.step_errors("held_out"))
    assert any("together count as 0.5" in line for line in warnings(result, "old")) == (disturbed > 0)


@pytest.mark.parametrize(
    "scales",
    [{"a": 1.7, "b": 3, "c": 3}, {"a": 1.7, "b": 10}, {"a": 10, "b": 1.7}],
    ids=lambda scales: ",".join(f"{name} x {scale}" for name, scale in scales.items()),
)
def test_an_interval_holds_misses_on_both_sides_of_a_mean_that_is_not_0(scales: dict[str, float]) -> None:
    """Machines whose products take `scales` as long as those of the profile's curves."""
    runs = [
        measured(name, replace(PROFILE, corrections={**TRUE, "matmul": Correction(scale=scale)}))
        for name, scale in scales.items()
    ]
    result = calibrate(PROFILE, runs, simulate)
    low, high = result.intervals["mopexec-flat"]
    assert all(low < 1 / (1 + error) < high for error in result.step_errors("held_out"))


@pytest.mark.parametrize(
    ("missed", "said"),
    [
        ({"step_time": 0.3, "peak_memory": 0.25}, r": by your runs \S+ m?s a step and \S+ GiB of tensors$"),
        ({"step_time": 0.3}, r": by your runs \S+ m?s a step$"),
        ({"peak_memory": 0.25}, r": by your runs \S+ GiB of tensors$"),
        ({}, r"$"),
    ],
)
def test_what_runs_make_of_a_simulated_step_stands_beside_it(missed: dict[str, float], said: str) -> None:
    """The interval moves to where the runs were, and the simulated point may lie outside of it."""
    job = {"model": "llama3_8b", "nodes": 1, "seq_len": 8192, "global_batch": 8, "strategy": mopsim.fsdp2()}
    bare = mopsim.simulate(hardware="h100-sxm-80g", stack="torchtitan", **job)
    seen = Observed(stack="torchtitan", precision="bf16", network=bare.result.facts.network, runs=4, **missed)
    profile = replace(load_profile("h100-sxm-80g"), observed=(seen,))
    step = mopsim.simulate(hardware=profile, stack="torchtitan", **job)
    assert (step.step_time_s, step.peak_memory_bytes) == (bare.step_time_s, bare.peak_memory_bytes)
    assert (bare.step_time_corrected_s, bare.peak_memory_corrected_bytes) == (None, None)
    for name, point, found, (low, high) in (
        ("step_time", step.step_time_s, step.step_time_corrected_s, step.step_time_interval_s),
        (
            "peak_memory", step.peak_memory_bytes, step.peak_memory_corrected_bytes,
            step.peak_memory_interval_bytes,
        ),
    ):  # fmt: skip
        assert (found is None) == (name not in missed)
        if found is not None:
            assert low < found < high
            assert found > 1.15 * point
    line = plan_line(step.result) + corrected(step.result)
    assert re.search(rf"torchtitan{said}", line)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(comparison([step.result], ""))
    assert line in shown.get()


def test_a_run_that_every_profile_saw_has_no_square_but_its_miss() -> None:
    loud = measured("b", MACHINE, constant=1.0)
    loud = replace(loud, steps=loud.steps + 27, disturbed=27)
    (one,) = calibrate(PROFILE, [loud], simulate).profile.runs_seen
    (two,) = calibrate(PROFILE, [measured("a", MACHINE), loud], simulate).profile.runs_seen
    assert one.step_time_squares == 0
    assert one.step_time_missed > 0.1
    assert two.step_time_squares > 0.1


def test_a_profile_that_is_worse_than_the_old_one_says_so() -> None:
    """Two runs that err in opposite ways: each teaches what is wrong of the other."""
    far = [
        measured(name, replace(PROFILE, corrections=dict.fromkeys(TRUE, Correction(scale=scale))))
        for name, scale in (("a", 2.0), ("b", 0.5))
    ]
    said, *_ = warnings(calibrate(PROFILE, far, simulate), "old")
    assert said.startswith(
        "worse than old: runs are off by a factor of 4.00 where they are held out, by 2.00"
    )
    assert not warnings(calibrate(PROFILE, [measured(name, MACHINE) for name in "ab"], simulate), "old")


TINY = {"model": "tiny", "seq_len": 64, "global_batch": 2}


def seen_on_tiny(stacks: dict[str, dict[str, float]]) -> HardwareProfile:
    """The CPUs of two cores after fifty runs of each stack. stacks: what each was missed by."""
    bare = mopsim.simulate(hardware="cpu-2core", strategy=Strategy(name="mop", world_size=1), **TINY)
    network, made = bare.result.facts.network, bare.result.facts.made
    seen = (
        Observed(stack=stack, precision="bf16", network=network, runs=50, made=made, **missed)
        for stack, missed in stacks.items()
    )
    return replace(load_profile("cpu-2core"), observed=tuple(seen))


def test_who_is_fastest_is_as_the_runs_say() -> None:
    """One plan is simulated as the faster one; the runs of its program took four times as long."""
    plans = {
        "flat": Strategy(name="mop", world_size=1),
        "fsdp2": Strategy(name="fsdp2", stack="mopexec-fsdp2", world_size=1),
    }
    asked = {"strategies": plans, **TINY}
    bare = mopsim.compare(hardware="cpu-2core", **asked)
    quick = min(bare.results, key=lambda name: bare.results[name].step_time)
    (other,) = set(plans) - {quick}
    missed = {
        bare.results[quick].stack.name: {"step_time": math.log(4.0)},
        bare.results[other].stack.name: {"step_time": 0.0},
    }
    assert quick in bare.headline().split(",")[0]
    assert "by your runs" not in bare.headline()
    found = mopsim.compare(hardware=seen_on_tiny(missed), **asked)
    assert found.headline().startswith(f"{other} is fastest, ")
    assert f" as fast as {quick} by your runs" in found.headline()
    lead = found.to_json()["lead"]
    assert lead["ratio"] > 1
    assert lead["p_faster"] > 0.5


def test_a_search_ranks_and_plans_by_the_runs() -> None:
    asked = {"families": ["mop", "fsdp2"], "budget": 4, **TINY}
    bare = mopsim.search(hardware="cpu-2core", **asked)
    best, others = bare.found.best, bare.found.best_by_family
    assert best
    (other,) = (one for one in others.values() if one and one.strategy.name != best.strategy.name)
    assert "your runs" not in bare.headline()
    missed = {best.stack.name: {"step_time": math.log(4.0)}, other.stack.name: {"step_time": 0.0}}
    found = mopsim.search(hardware=seen_on_tiny(missed), **asked)
    assert found.best
    assert found.best.result.strategy.name == other.strategy.name
    assert found.best.plan().strategy.name == other.strategy.name
    steps = [one.result.ranked_time for one in found.top]
    assert steps == sorted(steps)
    assert "ranked by your runs; plans were left out by simulated steps" in found.headline()


def test_a_step_that_the_runs_say_is_out_of_memory_does_not_fit() -> None:
    plan = Strategy(name="mop", world_size=1)
    bare = mopsim.simulate(hardware="cpu-2core", strategy=plan, **TINY)
    assert bare.fits
    times = 1.5 * bare.result.memory_limit / bare.result.peak_memory
    profile = seen_on_tiny({bare.result.stack.name: {"peak_memory": math.log(times)}})
    step = mopsim.simulate(hardware=profile, strategy=plan, **TINY)
    assert step.p_fits < 0.01
    assert (step.fits, step.verdict) == (False, "out of memory")
    assert step.over_bytes == pytest.approx(0.5 * bare.result.memory_limit, rel=0.1)
    assert step.over in step.memory_by_category_bytes
