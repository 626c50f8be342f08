"""The closed loop, for real but short: every command of both packages, two ranks, a report with its
pictures. The launcher starts the ranks of one training; those of the others are forked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mopsim import loop
from tests.exec.spawn import run_command

ROOT = Path(__file__).parents[2]


SMALLER = {"SEQ_LEN": 128, "PILOT_STEPS": 6, "TRACKED_STEPS": 4, "PROFILE_STEPS": 1, "BUDGET": 20}


def forked(run: Any) -> Any:
    """Loop._run that forks the ranks of `mopexec train`, but of the first."""
    launched = []

    def either(self: loop.Loop, package: str, arguments: tuple[str, ...]) -> None:
        if arguments[0] != "train" or not launched:
            launched.extend(arguments[:1] if arguments[0] == "train" else [])
            return run(self, package, arguments)
        self.commands.append(" ".join([package, *arguments]))
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
    monkeypatch.setattr(loop.Loop, "_run", forked(loop.Loop._run))
    loop.run("reports/demo", seed=0, steps=10)
    shown = capsys.readouterr().out
    assert "Winner:" in shown or "A tie on this machine:" in shown
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
