"""The command line: exit codes, one-line refusals, JSON keys, and what is not imported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.spec.plan import Plan
from tests.called import SIMULATE_KEYS, call

JOB = ["--model", "tiny", "--hardware", "cpu-2core", "--seq-len", "256", "--global-batch", "4",
       "--precision", "float32"]  # fmt: skip


def test_simulate_writes_json_and_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, trace = tmp_path / "r.json", tmp_path / "t.json"
    assert (
        call(monkeypatch, "simulate", *JOB, "--strategy", "fsdp2", "--json", str(out), "--trace", str(trace))
        == 0
    )
    assert set(json.loads(out.read_text())) >= SIMULATE_KEYS
    assert json.loads(trace.read_text())["traceEvents"]


def test_json_on_standard_output_is_nothing_but_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "simulate", *JOB, "--strategy", "fsdp2", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_search_writes_a_plan_that_reads_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its name is printed as it is, and quoted in the command that is suggested."""
    monkeypatch.chdir(tmp_path)
    out, plan = Path("s.json"), Path("my [red]:car: plan.yaml")
    options = ["--family", "mop,fsdp2", "--budget", "4", "--top", "3"]
    assert call(monkeypatch, "search", *JOB, *options, "--json", str(out), "--plan", str(plan)) == 0
    said = capsys.readouterr().out
    odds = "P(fits) >0.99"
    assert f"Written: {plan}: plan 1, fsdp2, {odds} (mopexec train --plan '{plan}')" in said
    assert "tokens/s per rank" in said, "of a CPU"
    assert "GPU" not in said
    found = json.loads(out.read_text())
    assert "tokens/s per rank" in found["verdict"]
    assert {"candidates", "bounded", "simulated", "rejected", "seconds", "best", "top"} <= set(found)
    assert len(found["top"]) <= 3
    read = io.load(plan, Plan, "plan")
    assert read.prediction.step_time == found["best"]["step_time_s"]
    assert call(monkeypatch, "simulate", *JOB, "--strategy", str(plan)) == 0


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        (
            "models",
            "gpt_oss_120b",
            "5.712 B active (stated 5.13 B, without the input embedding); openai/gpt-oss",
        ),
        (
            "hardware",
            "h200-sxm-141g",
            "140.4  4.13           989       8             450               50; nvidia-smi",
        ),
        ("stacks", "torchtitan-compile", "simulated, extends torchtitan; 2025, torch 2.8"),
    ],
)
def test_names_are_listed_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, name: str, says: str
) -> None:
    assert call(monkeypatch, "list", kind) == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines.pop(0) if kind == "hardware" else ""
    assert head.split()[:1] == ["machine"] * (kind == "hardware")
    (line,) = [line for line in lines if line.split()[0] == name]
    assert says in line
    assert call(monkeypatch, "list", kind, "--json", "-") == 0
    assert list(json.loads(capsys.readouterr().out)) == [line.split()[0] for line in lines]


def test_a_report_that_cannot_be_written_leaves_no_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A full disk stops the folder, or the JSON: then neither is there."""

    def full(*args: object) -> list[Path]:
        raise MopError(f"{tmp_path / 'report'}: cannot be written: No space left on device")

    monkeypatch.setattr("mopsim.api.compare.Comparison.write", full)
    asked = ["compare", *JOB, "--strategy", "fsdp2", "--budget", "1", "--out", str(tmp_path / "report")]
    assert call(monkeypatch, *asked, "--json", str(tmp_path / "c.json")) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_compare_without_a_report_prints_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "compare", *JOB, "--strategy", "fsdp2", "--budget", "1", "--json", "c.json") == 0
    assert "Written" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_compare_writes_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    strategies = ["--strategy", "mop", "--strategy", "fsdp2", "--budget", "1", "--sweep", "seq-len=128,256"]
    options = ["--format", "png,svg", "--json", str(tmp_path / "c.json")]
    assert call(monkeypatch, "compare", *JOB, *strategies, "--out", str(folder), *options) == 0
    assert {"index.md", "index.html", "memory.png", "time.png", "sweep.png", "sweep.svg"} <= {
        path.name for path in folder.iterdir()
    }
    data = json.loads((tmp_path / "c.json").read_text())
    swept = data["sweep"]
    assert data["facts"]["command"].startswith(f"mopsim compare {JOB[0]} ")
    assert data["facts"]["command"] in (folder / "index.md").read_text()
    assert (swept["values"], swept["global_batch"], swept["hold"]) == ([128, 256], [8, 4], "tokens_per_step")
    said = " ".join(capsys.readouterr().out.split())
    assert "held constant: tokens per step (1,024)" in said
    assert re.search(r"Over seq-len: \S+ is fastest at 128.* At 256 tokens: ", said)
    assert data["finding"].startswith("Over seq-len: ")
    assert all(f"{length} {label}" in said for length in (128, 256) for label in ("mop", "fsdp2"))


CONTEXT = ("context", "--model", "tiny", "--nodes", "1", "--hardware", "cpu-2core", "--out", "x")
EXPORT = ["export", "--plan"]
MISTAKES = [
    (["simulate", *JOB, "--strategy", "nope"], "strategy: 'nope'"),
    (["search", *JOB, "--budget", "10M"], "--budget: '10M' is not a number of simulations"),
    (["search", *JOB, "--budget", "10M"], "dollars are --budget of size"),
    (["simulate", *JOB, "--strategy", "missing.yaml"], "missing.yaml: no such file"),
    (["search", *JOB, "--family", "mop,zero"], "family: 'zero' is not one of"),
    (["search", *JOB[2:], "--model", "tinny"], "model: 'tinny'"),
    (["search", *JOB[:2], "--hardware", "h900", *JOB[4:]], "hardware: 'h900'"),
    (["search", *JOB[:4], "--seq-len", "12x", "--global-batch", "4"], "seq-len: '12x'"),
    (["search", *JOB[:6], "--global-batch", "many"], "--global-batch"),
    (["search", *JOB, "--nodes", "0"], "--nodes"),
    (["search", *JOB, "--routing", "often"], "routing: 'often'"),
    (["compare", *JOB, "--strategy", "mop", "--out", __file__], "is a file"),
    (["compare", *JOB, "--strategy", "mop", "--out", "x", "--hold", "tokens-per-step"], "without --sweep"),
    (
        ["compare", *JOB, "--strategy", "a.yaml", "--out", "x", "--budget", "4"],
        "--budget: 4 is for the search",
    ),
    (["explore", "r.json", "--out", "x", "--timelines", "0", "--model", "tiny"], "beside --timelines 0"),
    (["validate", "--cases", "x.yaml", "--measurements", "y"], "--measurements: 'y' has no use without"),
    (["validate", "--cases", "x.yaml", "--models", "y"], "--models: 'y' has no use without --runs"),
    (["compare", *JOB, "--strategy", "mop", "--out", "x", "--sweep", "batch=1"], "sweep: 'batch=1'"),
    (["compare", *JOB, "--strategy", "mop", "--out", "x", "--format", "gif"], "format: 'gif' is not one of"),
    (["compare", *JOB, "--strategy", "mop", "--out", "x", "--sweep", "nodes=1,,2"], "has an empty value"),
    (["compare", *JOB, "--strategy", "mop", "--out", "x", "--format", "png,png"], "'png,png' has png twice"),
    (["search", *JOB, "--family", "mop,mop"], "family: 'mop,mop' has mop twice"),
    (
        ["compare", *JOB, "--strategy", "mop", "--strategy", "mop", "--out", "x"],
        "strategies: 'mop' is given twice",
    ),
    (
        ["compare", *JOB, "--strategy", "a.yaml", "--strategy", "./a.yaml", "--out", "x"],
        "strategies: 'a.yaml' is given twice",
    ),
    ([*CONTEXT, "--seq-len", "4096,,8192"], "--seq-len: '4096,,8192' has an empty value"),
    ([*CONTEXT, "--seq-len", "4K", "--contender", "mop,mop"], "--contender: 'mop,mop' has mop twice"),
    (["list", "presets"], "'presets'"),
    ([*EXPORT, "missing.yaml", "--to", "deepspeed", "--out", "x"], "missing.yaml: no such file"),
    ([*EXPORT, "missing.yaml", "--to", "nemo", "--out", "x"], "nemo"),
    (
        [*EXPORT, "x.yaml", "--to", "deepspeed", "--out", "-", "--json", "-"],
        "--json: - is where --out goes too",
    ),
    (["export", "--to", "deepspeed"], "Missing option"),
    (["frobnicate"], "No such command"),
    (["search"], "Missing option"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert call(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_nothing_fits_is_told_by_the_exit_code_and_a_plan_of_nothing_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, plan = tmp_path / "s.json", tmp_path / "plan.yaml"
    job = ["--model", "mixtral_8x7b", "--hardware", "cpu-2core", "--seq-len", "256", "--global-batch", "2"]
    options = ["--family", "fsdp2", "--budget", "2", "--plan", str(plan), "--json", str(out)]
    assert call(monkeypatch, "search", *job, *options) == 3
    found = json.loads(out.read_text())
    assert found["best"] is None
    assert found["why"]
    assert "nothing fits" in found["verdict"]
    assert not plan.exists()


def test_cli_imports_neither_torch_nor_matplotlib() -> None:
    """And a simulation none of what takes as long to import as all of mopsim."""
    heavy, further = ("torch", "matplotlib", "simpy", "numpy"), ("pandas", "scipy.stats", "scipy.optimize")
    code = (
        f"import mopsim, mopsim.cli, sys; heavy = any(m in sys.modules for m in {heavy}); "
        f"mopsim.simulate; sys.exit(heavy or any(m in sys.modules for m in {further}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", ["search", "simulate"])
def test_help_names_the_families_of_the_table(command: str) -> None:
    """A fifth one, which no command knows by name."""
    code = (
        "import mopsim.spec.categories as table; table.FAMILIES = ('fourth', 'fifth'); import sys; "
        f"sys.argv = ['mopsim', '{command}', '--help']; from mopsim.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = " ".join(done.stdout.replace("│", " ").split())
    assert re.search(r"fourth, ?fifth", said)
    assert "zero_offload" not in said
