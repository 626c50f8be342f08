"""The closed loop, for real but short: every command of both packages, two ranks, a report with its
pictures. One calibration is a process of its own, as `tests/exec/test_train.py` starts a training; what else
runs, runs in this one, and its ranks are forked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mopexec.cli import app as executor
from mopsim import loop
from mopsim.cli import app
from tests.exec.spawn import probe_ranks_forked, run_command

ROOT = Path(__file__).parents[2]


SMALLER = {
    "SEQ_LEN": 128, "PILOT_STEPS": 3, "PILOT_SKIPPED": 1, "PROFILE_STEPS": 1, "TRACKED_STEPS": 2,
    "TIMED_STEPS": 3, "BUDGET": 6,
}  # fmt: skip
QUICKLY = ("--budget", "0.05")
"""Options of the probe here beside the loop's."""


def forked(run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loop.run that starts a process for the first calibration; other commands run in this process, and the
    ranks of trainings and of the probe are forked."""
    apart = {"calibrate"}

    def either(self: loop.Loop, package: str, *arguments: str) -> None:
        if arguments[0] in apart:
            apart.remove(arguments[0])
            return run(self, package, *arguments)
        self.commands.append(" ".join([package, *arguments]))
        if arguments[0] != "train":
            with monkeypatch.context() as changed:
                probe_ranks_forked(changed)
                given = [*arguments, *(QUICKLY if arguments[0] == "probe" else ())]
                done = CliRunner().invoke(executor if package == "mopexec" else app, given)
            assert done.exit_code == 0, done.output
            return None
        output = self.work / f"{len(self.commands):02d}-output"
        output.mkdir()
        code, out, err = run_command(list(arguments), loop.RANKS, output)
        assert code == 0, f"{out}\n{err}"
        return None

    return either


@pytest.mark.slow
def test_the_loop_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in SMALLER.items():
        monkeypatch.setattr(loop, name, value)
    monkeypatch.setattr(loop.Loop, "run", forked(loop.Loop.run, monkeypatch))
    loop.run("reports/demo", seed=0, steps=6, json="demo.json")
    shown = capsys.readouterr().out
    assert any(said in shown for said in ("Winner:", "Fastest in these runs, ", "A tie on this machine:"))
    report = tmp_path / "reports" / "demo"
    pictures = {
        "memory.png",
        "time.png",
        "loss.png",
        "predicted.png",
        "timeline-mop.png",
        "timeline-held-out.png",
    }
    assert pictures | {"index.md", "index.html"} <= {path.name for path in report.iterdir()}
    found = json.loads((tmp_path / "demo.json").read_text())
    assert [one["name"] for one in found["contenders"]] == ["mop", "fsdp2", "held-out"]
    for one in found["contenders"]:
        measured = one["measured_step_time_s"]
        for name, predicted in one["predicted_step_time_s"].items():
            assert one["step_time_s_error"][name] == pytest.approx(predicted / measured - 1)
    losses = {}
    for name in ("mop", "fsdp2"):
        lines = (tmp_path / "runs" / "demo" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["mop"][-1] < losses["mop"][0]
    assert losses["mop"] == pytest.approx(losses["fsdp2"], rel=1e-4)


def test_a_file_in_the_way_stops_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mopsim.cli", "demo", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "out is a file" in done.stderr
    assert not (tmp_path / "runs").exists()
