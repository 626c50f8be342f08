"""What calibration refuses: one line that names the run, the value and the rule."""

from pathlib import Path

import msgspec
import pytest

from mopsim.calibrate.observed import Seen, observed
from mopsim.calibrate.profile import calibrate
from mopsim.calibrate.runs import load_measurement
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from tests.sim.test_calibrate import MACHINE, PROFILE, measured, simulate


def test_refusals(tmp_path: Path) -> None:
    run = measured("a", MACHINE)
    with pytest.raises(MopError, match="at least one run"):
        calibrate(PROFILE, [], simulate)
    with pytest.raises(MopError, match="given twice"):
        calibrate(PROFILE, [run, run], simulate)
    with pytest.raises(MopError, match=r"plan\.hardware\.digest: 'feed' .*other|planned on"):
        calibrate(PROFILE, [measured("a", MACHINE, planned="feed")], simulate)
    with pytest.raises(
        SpecError, match=r"^measurements: peak_memory: 0 of the run of a .* must be at least 1"
    ):
        calibrate(PROFILE, [msgspec.structs.replace(run, peak_memory=0)], simulate)
    with pytest.raises(MopError, match="neither a run directory"):
        load_measurement(tmp_path / "none")
    with pytest.raises(MopError, match=r"no measurement\.yaml"):
        load_measurement(tmp_path)
    (tmp_path / "measurement.yaml").write_text("steps: many\n")
    with pytest.raises(MopError, match="measurement") as refused:
        load_measurement(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_run_that_is_too_far_off_is_named_with_what_was_measured_and_predicted() -> None:
    run = msgspec.structs.replace(measured("a", MACHINE), peak_memory=17)
    line = (
        f"measurements: peak_memory: 17 of the run of a ({io.digest(run)}) must be within a factor of 148 of "
        "the 953.67 MiB predicted"
    )
    for runs in ([run], [measured("b", MACHINE), run]):
        with pytest.raises(SpecError) as refused:
            calibrate(PROFILE, runs, simulate)
        assert str(refused.value) == line
    near, far = (
        Seen(run, name, run.step_time_median * by, 10, ()) for name, by in (("near", 1), ("far", 1e6))
    )
    with pytest.raises(
        SpecError, match=r"step_time_median: .* of the run of a \(far\) must be within .* of the "
    ):
        observed([near, far])


def test_a_run_on_other_nodes_than_its_plans_calibrates_nothing() -> None:
    run = measured("a", MACHINE)  # its plan's two ranks fill a node
    here = msgspec.structs.replace(run, nodes=1)
    assert calibrate(PROFILE, [here], simulate).profile.corrections  # on its own
    assert io.convert(io.to_plain(run), type(run), "run").nodes is msgspec.UNSET  # an older one
    apart = msgspec.structs.replace(run, nodes=2)
    rule = "^measurements: nodes: 2 of the run of a .*: the plan's 2 ranks fill 1 node of .* run on 2 nodes"
    with pytest.raises(MopError, match=rule):
        calibrate(PROFILE, [apart], simulate)
    with pytest.raises(SpecError, match="nodes: 3 must be 1 to 2, the ranks"):
        msgspec.structs.replace(run, nodes=3)


@pytest.mark.parametrize("seconds", [0.0, 1e-300, 1e8])
def test_a_step_of_no_time_or_of_years_is_refused(seconds: float) -> None:
    run = measured("a", MACHINE)
    with pytest.raises(MopError, match=r"step_times\[0\]: .* must be the seconds of a step"):
        msgspec.structs.replace(run, step_times=(seconds,) * len(run.step_times), step_time_median=seconds)


def test_what_no_rank_has_and_no_run_does_is_refused() -> None:
    run, much = measured("a", MACHINE), 10**30
    for wrong in ({"peak_memory": much}, {"host_memory": much}, {"memory_by_category": {"params": much}}):
        with pytest.raises(MopError, match=r"memory.*: 1\d* must be the bytes of a rank, at most 1e\+15"):
            msgspec.structs.replace(run, **wrong)
    with pytest.raises(MopError, match=r"tokens_per_second: 0 must be positive"):
        msgspec.structs.replace(run, tokens_per_second=0)
    for count in (0, much):
        with pytest.raises(MopError, match=r"count: 1?0* must be 1 to 1e\+12, the ops that took"):
            msgspec.structs.replace(run.kinds["matmul"], count=count)
