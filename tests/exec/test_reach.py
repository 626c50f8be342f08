"""How far a context reaches: bisected by dry run; a plan that fits nowhere is a row like another."""

import json
from contextlib import suppress

from mopexec.cli import main
from mopsim.common import io
from tests.exec.train_plans import small_plan


def test_a_plan_that_fits_nowhere_does_not_end_the_others(tmp_path):
    io.write_yaml(tmp_path / "plan.yaml", small_plan())
    rows = {}
    for limit in ("700KiB", "8KiB"):
        out = tmp_path / limit
        limits = ["--device-limit", limit, "--host-limit", "1MB", "--quantum", "64", "--no-confirm"]
        with suppress(SystemExit):
            main(["reach", "--plan", str(tmp_path / "plan.yaml"), *limits, "--out", str(out)])
        (rows[limit],) = json.loads((out / "reach.json").read_text())["reaches"]
    assert rows["700KiB"]["longest"] >= 64
    assert rows["700KiB"]["peak_memory"] <= 700 * 1024
    assert (rows["8KiB"]["longest"], rows["8KiB"]["first_failing"]) == (0, 64)
    assert rows["8KiB"]["stopped_by"].startswith("device params")
