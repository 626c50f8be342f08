"""Sealed predictions: written before a run, refused where a byte was changed, scored by the run."""

import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from typer.testing import CliRunner

import mopsim
from mopsim.api.results import Simulation
from mopsim.cli import app
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.spec.plan import Measurement
from mopsim.validate.sealed import _text, open_sealed, outcomes


def predicted(**changes: int) -> Simulation:
    job = {"seq_len": 256, "global_batch": 4, **changes}
    return mopsim.simulate("tiny", "cpu-2core", strategy=mopsim.fsdp2(), interval=0.8, **job)


def measured(step: Simulation, folder: Path, seconds: float, peak: int = 0) -> Path:
    run = Measurement(
        plan=step.plan(), world_size=2, steps=2, warmup=1, step_times=(seconds,), step_time_median=seconds,
        tokens_per_second=1.0, kinds={}, peak_memory=peak, memory_by_category={}, host_memory=0,
        first_loss=1.0, last_loss=1.0, environment={},
    )  # fmt: skip
    io.write_yaml(folder / "measurement.yaml", run)
    return folder


def scored(
    sealed: Path, run: Path | None, tmp_path: Path, *others: str
) -> tuple[int, str, dict[str, object]]:
    out = tmp_path / "scored.json"
    command = ["validate", "--sealed", str(sealed), "--json", str(out), *others]
    done = CliRunner().invoke(app, command + (["--measurements", str(run)] if run else []))
    text = done.output if done.exception is None else f"{done.output}{done.exception}"
    return done.exit_code, text, json.loads(out.read_text()) if out.exists() else {}


def test_a_sealed_prediction_is_scored_by_its_run(tmp_path: Path) -> None:
    step, path = predicted(), tmp_path / "sealed.json"
    assert len(step.seal(path)) == 64
    low, high = step.result.step_time_interval(0.8)
    run = measured(step, tmp_path / "run", 0.99 * high, 2 * step.peak_memory_bytes)
    code, text, found = scored(path, run, tmp_path)
    assert code == 0, text
    time, memory = found["outcomes"]
    assert (time["quantity"], time["within"], memory["within"]) == ("step_time_s", True, False)
    assert time["interval"] == [low, high]
    assert memory["error"] == pytest.approx(-0.5)
    assert found["sealed"]["p_fits"] == step.p_fits
    assert set(found["sealed"]["versions"]) == {"mopsim", "python", "errors"}


def test_a_disturbed_run_is_said_to_be(tmp_path: Path) -> None:
    step, path = predicted(), tmp_path / "sealed.json"
    step.seal(path)
    run = measured(step, tmp_path / "run", 1.0)
    assert scored(path, run, tmp_path)[2]["disturbances"] == []
    quiet = io.load(run / "measurement.yaml", Measurement, "measurement")
    busy = msgspec.structs.replace(quiet, steps=5, disturbed=3, others=0.25)
    io.write_yaml(run / "measurement.yaml", busy)
    _, text, found = scored(path, run, tmp_path)
    said = "3 of 4 steps were disturbed by other programs and are left out"
    assert found["disturbances"] == ["other programs had 25% of the cores", said]
    told = " ".join(text.split())
    assert "note: the run was disturbed, its step is no fair test: other programs had 25%" in told
    assert said in told


@pytest.mark.parametrize("number", ['"interval": 0.8', '"seq_len": 256', '"hidden_size": 256'])
def test_a_changed_byte_is_seen(tmp_path: Path, number: str) -> None:
    step, path = predicted(), tmp_path / "sealed.json"
    step.seal(path)
    text = path.read_text()
    assert number in text
    path.write_text(text.replace(number, f"{number}1", 1))
    with pytest.raises(
        MopError, match=r"altered after it was sealed: sha256 [0-9a-f]{12} is not that of its"
    ):
        open_sealed(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"interval": 0.8', '"interval": 8e-1'), ('"interval": 0.8', '"interval":  0.8'), ("\n", "\n\n"),
        ('"sealed":', '"note": "x",\n "sealed":'), ('"sealed":', '# x\n "sealed":'),
        ('"interval": 0.8', '"interval": 0.5,\n  "interval": 0.8'),
    ],
)  # fmt: skip
def test_a_byte_beside_the_content_is_seen(tmp_path: Path, before: str, after: str) -> None:
    """Blanks, another spelling of a number, a comment, a key beside it or twice."""
    step, path = predicted(), tmp_path / "sealed.json"
    step.seal(path)
    sealed = open_sealed(path)
    text = path.read_text()
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(MopError, match=r"altered after it was sealed|is not a sealed prediction"):
        open_sealed(path)
    path.write_bytes(text.replace("\n", "\r\n").encode())  # as git may check it out elsewhere
    assert open_sealed(path) == sealed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval", 0), ("p_fits", 7), ("step_time_s", 1e308), ("peak_memory_bytes", -1), ("made", "\x1b"),
        ("step_time_interval_s", [2, 1]), ("peak_memory_interval_bytes", [-1, 1]),
        ("versions", {"mopsim": ""}),
    ],
)  # fmt: skip
def test_what_no_prediction_says_is_refused_under_any_hash(tmp_path: Path, field: str, value: object) -> None:
    step, path = predicted(), tmp_path / "sealed.json"
    step.seal(path)
    content = json.loads(path.read_text())["sealed"] | {field: value}
    path.write_text(_text(content))
    with pytest.raises(MopError, match=rf"sealed\.({field}|mopsim): "):
        open_sealed(path)


def test_a_run_of_another_network_is_told_by_its_name(tmp_path: Path) -> None:
    step, path = predicted(), tmp_path / "sealed.json"
    step.seal(path)
    sealed = open_sealed(path)
    other = msgspec.structs.replace(sealed.plan.model, name="another", vocab_size=77)
    run = SimpleNamespace(plan=msgspec.structs.replace(sealed.plan, model=other))
    said = r"plan\.model: {} \(digest \w+\) is not what was sealed, {} \(digest \w+\)$"
    with pytest.raises(MopError, match=said.format("another", sealed.plan.model.name)):
        outcomes(sealed, run)  # type: ignore[arg-type]
    where = msgspec.structs.replace(sealed.plan.hardware, digest="0" * 12)
    run = SimpleNamespace(plan=msgspec.structs.replace(sealed.plan, hardware=where))
    with pytest.raises(MopError, match=said.replace("model", "hardware").format(where.name, where.name)):
        outcomes(sealed, run)  # type: ignore[arg-type]


def test_another_run_does_not_score_it(tmp_path: Path) -> None:
    step, path = predicted(), tmp_path / "sealed.json"
    step.seal(path)
    other = measured(predicted(global_batch=8), tmp_path / "run", 1.0)
    code, text, _ = scored(path, other, tmp_path)
    assert code
    assert "plan.training" in text
    assert "is not what was sealed" in text
    assert "--measurements: not given" in scored(path, None, tmp_path)[1]
    for option, value in (("--runs", "runs.csv"), ("--format", "svg"), ("--interval", "0.5")):
        assert f"{option}: {value}" in scored(path, other, tmp_path, option, value)[1].replace("'", "")
    with pytest.raises(MopError, match="is not a sealed prediction"):
        open_sealed(other / "measurement.yaml")
