"""Evaluation on held-out data: its loss falls, and training goes on as if it had not been asked."""

import json

import pytest

from mopsim.common import io
from tests.exec.test_other_strategy import fsdp2_plan, in_float64
from tests.exec.train_plans import small_plan
from tests.exec.train_runs import UNTIMED, losses, train_as_ranks, write_inputs


@pytest.mark.parametrize("runtime", ["flat_units", "fully_shard"])
def test_evaluation_disturbs_nothing(runtime, tmp_path):
    inputs = write_inputs(tmp_path)
    (inputs / "held.txt").write_text("a line of other text, some 12 words long, 1 of many\n" * 200)
    plan = in_float64(small_plan(2)) if runtime == "flat_units" else fsdp2_plan(2, recompute="full")
    io.write_yaml(inputs / "plan.yaml", plan)
    asked = ["--eval-data", str(inputs / "held.txt"), "--eval-every", "1", "--eval-batches", "2"]
    for name, arguments in (("plain", []), ("asked", asked)):
        done = train_as_ranks(inputs, tmp_path / name, "--steps", "3", *UNTIMED, *arguments)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "asked") == losses(tmp_path / "plain")
    lines = [json.loads(line) for line in (tmp_path / "asked" / "metrics.jsonl").read_text().splitlines()]
    found = [line["eval_loss"] for line in lines]
    assert found[0] > found[1] > found[2] > 0
    assert "eval_loss:" in done.stdout
