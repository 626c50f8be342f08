"""Validation: what rows become, what is refused by name, and that no row scores its own calibration."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mopsim.cli import app
from mopsim.common.errors import MopError
from mopsim.common.units import UNITS
from mopsim.cost import seconds
from mopsim.cost.stack import SCORE_BYTES, as_used
from mopsim.program.workload import CommGroup, Work
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.profiles import load_profile
from mopsim.validate import calibration
from mopsim.validate.calibration import Fit, PacedRun
from mopsim.validate.case import write_cases
from mopsim.validate.components import predict_components
from mopsim.validate.output import to_json
from mopsim.validate.rows import read_case
from mopsim.validate.run import Validation, cases_of, validate
from mopsim.validate.scoring import capacity, errors, over_sources, regrets
from mopsim.validate.simulated import simulate_case
from mopsim.validate.tables import Row

MODELS: dict[str, dict[str, str]] = {}
BASE = {
    "source": "mine",
    "num_layers": "32",
    "gpu": "h100-sxm-80g",
    "num_gpus": "8",
    "gpus_per_node": "8",
    "precision": "bf16",
    "seq_len": "4096",
    "micro_batch": "1",
    "global_batch": "16",
    "tp": "1",
    "pp": "1",
    "vp": "1",
    "cp": "1",
    "ep": "1",
    "etp": "1",
    "dp": "8",
    "sharding": "zero3",
    "recompute": "full",
    "optimizer_offload": "0",
    "activation_offload": "none",
    "loss": "full",
    "dispatcher": "none",
    "overlap": "unknown",
    "routing": "dense",
    "tokens_per_s_per_gpu": "",
    "step_time_s": "3.0",
    "peak_memory_gib": "40",
    "fits": "",
    "quality": "A",
    "notes": "",
}


def validate_runs(rows: list[Row]) -> Validation:
    """Rows of a table, in this process."""
    cases, refused = cases_of(rows, MODELS)
    return validate(cases, 1, refused=refused)


def row(run_id: str = "r", model: str = "llama3_8b", **changes: str) -> dict[str, str]:
    return {"run_id": run_id, "model": model, **BASE, **changes}


def test_a_row_becomes_the_strategy_it_describes() -> None:
    found = read_case(row(cp="2", dp="4", micro_batch="2", recompute="none"), MODELS)
    assert found.family == "fsdp"
    assert found.program().sharding.fsdp
    assert found.stack == "generic-eager"
    assert "none is known of the source 'mine'" in found.assumptions[0]
    assert (found.strategy.attention.context_parallel, found.strategy.data_groups) == (2, 4)
    assert (found.strategy.dense.zero, found.strategy.dense.fsdp) == (3, 8)
    assert found.strategy.activations.recompute == "none"
    assert found.training.num_microbatches(found.strategy) == 2
    assert found.measured.peak_memory == 40 * UNITS["GiB"]


@pytest.mark.parametrize(
    ("stack", "tp", "loss"),
    [("torchtitan", "2", "vocab_parallel"), ("torchtitan", "1", "full"), ("generic-eager", "2", "full"),
     ("kempnerforge", "2", "full")],
)  # fmt: skip
def test_whole_rows_of_logits_are_split_where_the_program_does(stack: str, tp: str, loss: str) -> None:
    """A described program that splits them, unless its ranks gather them (kempnerforge)."""
    cells = row(tp=tp, dp=str(8 // int(tp)), loss="full", recompute="none", stack=stack)
    found = read_case(cells, MODELS).strategy.vocabulary
    assert (found.loss, found.vocab_parallel) == (loss, int(tp) if loss == "vocab_parallel" else 1)


def test_megatron_degrees_and_padded_vocabulary() -> None:
    found = read_case(
        row(tp="2", pp="2", vp="2", dp="2", sharding="zero1", precision="fp8", stack="megatron-bridge"),
        MODELS,
    )
    assert found.family == "megatron"
    assert found.strategy.pipeline.schedule == "interleaved"
    assert (found.strategy.dense.tensor_parallel, found.strategy.dense.fsdp, found.strategy.dense.zero) == (
        2,
        2,
        1,
    )
    assert found.strategy.precision.matmul == "fp8"
    assert found.resolved().precision.grad == "bfloat16"
    assert found.network().vocab_size % 256 == 0


def test_a_cut_network_keeps_its_leading_dense_layers() -> None:
    model = read_case(
        row(model="deepseek_v3", num_layers="2", ep="8", routing="balanced", sharding="zero1"), MODELS
    ).network()
    assert (model.num_hidden_layers, model.first_k_dense_replace) == (2, 2)


def test_a_run_about_capacity_needs_no_batch() -> None:
    found = read_case(row(global_batch="", step_time_s="", fits="oom"), MODELS)
    assert found.training.global_batch == found.strategy.data_groups
    assert found.measured.fits is False


def test_a_host_that_has_nothing_of_the_optimizer_is_none() -> None:
    assert read_case(row(optimizer_offload="0.0"), MODELS) == read_case(row(optimizer_offload="0"), MODELS)


def _paced(device: float, launches: float) -> PacedRun:
    """A step that takes the device `device` seconds, and the host what `launches` cost."""
    paces = tuple((cost, max(device, launches * cost)) for cost in (0.0, 1e-5, 2e-5, 4e-5, 1e-4))
    return PacedRun(device, paces, 0.0, "")


def test_calibration_finds_the_scale_and_what_a_launch_costs() -> None:
    true = Fit(1.3, 18e-6, 0.0, runs=1)
    sizes = [(0.1, 9000), (0.2, 9000), (0.5, 9000), (1.0, 9000), (2.0, 9000), (0.05, 9000), (3, 100), (1, 9)]
    points = [
        replace(_paced(s, n), measured=true.apply(_paced(s, n)), model=f"m{i % 4}{again}")
        for i, (s, n) in enumerate(sizes)
        for again in range(20)
    ]
    found = calibration.fit(points)
    assert found.scale == pytest.approx(1.3, rel=0.02)
    assert found.launch == pytest.approx(18e-6, rel=0.02)


def test_a_few_runs_move_the_scale_as_far_as_published_ones_say() -> None:
    """One run 20 % slower than simulated says less of the stack than ten networks that are."""
    one = calibration.fit([PacedRun(1.0, (), 1.2, "a")])
    same = calibration.fit([PacedRun(1.0, (), 1.2, "a")] * 10)
    ten = calibration.fit([PacedRun(1.0, (), 1.2, str(model)) for model in range(10)])
    assert 1.05 < one.scale < same.scale < ten.scale < 1.2


def test_a_launch_is_drawn_to_that_of_the_profile() -> None:
    points = [PacedRun(1.0, (), 1.2, "a"), PacedRun(2.0, (), 2.4, "b")]
    assert calibration.fit(points, 37e-6).launch == pytest.approx(37e-6)
    assert calibration.held_out(points, issue=37e-6)[0].launch == pytest.approx(37e-6)


def test_a_step_between_two_simulations_lies_on_the_line() -> None:
    point = _paced(0.1, 9000)
    assert point.step(3e-5) == pytest.approx(0.27)
    assert point.step(2e-4) == pytest.approx(1.8)
    assert PacedRun(0.1, (), 0.0, "").step(1.0) == 0.1
    assert Fit(2.0, 6e-5, 0.5, runs=1).apply(point) == pytest.approx(2 * 0.27 + 0.5)
    assert Fit().apply(point) == 0.1


def test_no_network_is_calibrated_on_itself() -> None:
    points = [PacedRun(1.0, (), 1.2, "a"), PacedRun(2.0, (), 2.4, "b"), PacedRun(3.0, (), 3.6, "c")]
    moved = [replace(points[0], measured=9.0), *points[1:]]
    assert calibration.held_out(points)[0] == calibration.held_out(moved)[0]
    assert calibration.held_out(points)[1] != calibration.held_out(moved)[1]
    assert calibration.held_out(points[:1]) == [Fit()]


def test_what_is_held_out_is_asked_for() -> None:
    points = [PacedRun(1.0, (), 1.2, "a"), PacedRun(2.0, (), 2.4, "b"), PacedRun(3.0, (), 3.6, "c")]
    assert calibration.held_out(points, hold_out="source") == [Fit()] * 3
    fits = calibration.held_out(points, hold_out="none")
    assert {one.runs for one in fits} == {3}
    assert {one.runs for one in calibration.held_out(points)} == {2}


def test_sources_count_alike_however_many_rows_they_have() -> None:
    rows = [row(f"a{i}", step_time_s="2.0") for i in range(4)] + [row("b", source="other", step_time_s="2.0")]
    rows += [row("c", source="other", step_time_s="")]
    scored = validate_runs(rows).scored
    found = over_sources(scored, lambda one: 0.1 if one.case.source.name == "mine" else 0.3)
    assert found.mape == pytest.approx(0.2)
    assert errors([None]) is None


def test_a_deterministic_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    free = load_profile("h100-sxm-80g")
    run = read_case(row(tp="4", dp="2", notes="deterministic=true", sharding="zero1"), MODELS)
    fixed = as_used(run.profile(), run.program(), run.network(), run.training)

    def took(kind: str, profile: HardwareProfile) -> float:
        return seconds(Work(kind, bytes=1e9, group=CommGroup(4, 4)), profile)

    parts = took("reduce_scatter", free) + took("all_gather", free)
    assert took("all_reduce", free) < took("all_reduce", fixed) == pytest.approx(parts, rel=0.05)
    assert took("all_gather", free) == took("all_gather", fixed)


def test_equal_rows_are_simulated_once_and_scored_each() -> None:
    scored = validate_runs([row("a"), row("b", step_time_s="6.0")]).scored
    assert scored[0].simulated is scored[1].simulated
    assert scored[0].raw_step_error != scored[1].raw_step_error
    assert not scored[0].out_of_sample


def test_the_passes_of_a_first_step_are_without_moments() -> None:
    megatron = {"sharding": "zero1", "stack": "megatron-lm", "tp": "2", "dp": "4", "recompute": "none"}
    told = row(**megatron, notes="largest max allocated of ranks 0 and 2 after iteration 1")
    first, later = (simulate_case(read_case(one, MODELS), paced=False) for one in (told, row(**megatron)))
    assert first.fullest == later.fullest == later.peak_memory
    on_host = read_case(row(**megatron, optimizer_offload="1", notes=told["notes"]), MODELS)
    assert simulate_case(on_host, paced=False).peak_memory > 0
    both = row(**megatron, notes="max allocated of the last pipeline stage after iteration 1")
    assert read_case(both, MODELS).program().reading.last_stage
    moments = 8 * 8.03e9 / 2 / 4
    assert later.peak_memory - first.peak_memory == pytest.approx(moments, rel=0.01)


def test_regret_compares_strategies_of_one_job() -> None:
    rows = [
        row("slow", recompute="full", step_time_s="4.0"),
        row("fast", recompute="full", sharding="zero2", step_time_s="3.0"),
    ]
    rows.append(row("else", seq_len="8192", step_time_s="9.0"))
    jobs = regrets(validate_runs(rows).scored)
    assert len(jobs) == 1
    assert jobs[0].best == "fast"
    assert jobs[0].slowdown in (0.0, pytest.approx(1 / 3))
    assert jobs[0].uncalibrated in (0.0, pytest.approx(1 / 3))


def test_capacity_counts_both_ways() -> None:
    rows = [row("ran"), row("out", micro_batch="64", global_batch="512", step_time_s="", fits="oom")]
    found = capacity(validate_runs(rows).scored)
    assert (found.ran, found.ran_right, found.ran_out, found.ran_out_right) == (1, 1, 1, 1)


def test_json_has_the_agreed_keys() -> None:
    refused = row("no", recompute="unknown")
    gemm = {
        "component": "gemm", "system": "x", "gpu": "h100-sxm-80g", "num_gpus": "1",
        "metric": "latency_s", "value": "1e-4",
        "params": '{"m": 4096, "n": 4096, "k": 4096, "precision": "bf16"}', "outcome": "ok",
    }  # fmt: skip
    strange = {**gemm, "component": "teapot"}
    found = to_json(validate_runs([row("a"), refused]), predict_components([gemm, strange]))
    json.dumps(found)
    run, other = found["runs"]
    assert run["status"] == "simulated"
    for quantity in ("step_time_s", "peak_memory_bytes"):
        assert {f"measured_{quantity}", f"predicted_{quantity}", f"{quantity}_error"} <= set(run)
    assert {"measured_fits", "predicted_fits", "run_id"} <= set(run)
    assert (other["status"], other["reason"]) == ("unsupported", "recompute: not stated by the source")
    assert found["components"][0]["error"] == pytest.approx(found["components"][0]["predicted"] / 1e-4 - 1)
    assert found["components"][1]["predicted"] is None
    for quantity in ("step_time_s", "peak_memory_bytes"):
        assert {"n", "mape", "median_ape", "bias", "max_ape"} <= set(found["summary"][quantity])
    assert {"n", "right"} <= set(found["summary"]["fits"])
    assert found["summary"]["unsupported"] == 1


def refuse(*_: object, **__: object) -> str:
    raise MopError("full")


def test_command_writes_json_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, or neither."""
    path, cases, out = tmp_path / "runs.csv", tmp_path / "cases.jsonl", tmp_path / "json"
    cells = row("a")
    path.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    write_cases(cases, [read_case(row("b"), MODELS)])
    command = f"validate --runs {path} --cases {cases} --json {out} --out {tmp_path / 'figures'} --jobs 1"
    options = "--stack torchtitan --hold-out source"
    result = CliRunner().invoke(app, f"{command} {options}".split())
    assert result.exit_code == 0, result.output
    found = {run["run_id"]: run for run in json.loads(out.read_text())["runs"]}
    assert set(found) == {"a", "b"}
    assert {run["stack"] for run in found.values()} == {"torchtitan"}
    assert found["a"]["predicted_step_time_s"] == found["a"]["uncalibrated_step_time_s"]
    assert (tmp_path / "figures" / "step_time_by_source.png").stat().st_size > 1000
    monkeypatch.setattr("mopsim.common.io.as_json", refuse)
    command = f"validate --cases {cases} --json {tmp_path / 'again'} --out {tmp_path / 'again-figures'}"
    assert "full" in str(CliRunner().invoke(app, command.split()).exception)
    assert not list(tmp_path.glob("again*"))


def test_traffic_of_a_kept_score_is_that_of_softmax_and_dropout() -> None:
    """Elements of two bytes, masks of one: softmax, dropout; dropout, softmax, which reads its result."""
    assert SCORE_BYTES == {"forward": 2 * 2 + (2 * 2 + 1), "backward": (2 * 2 + 1) + 3 * 2}


def test_an_interval_learns_from_what_the_hold_out_leaves() -> None:
    """Of networks of a source that are all twice as slow as simulated: nothing, if the source is left out;
    something, if the network is."""
    models = {"one": "llama3_8b", "two": "qwen3_8b", "three": "llama2_7b"}
    alone = validate_runs([row(name, model) for name, model in models.items()]).scored
    slow = [
        row(name, model, step_time_s=str(2 * one.simulated.step_time))
        for (name, model), one in zip(models.items(), alone, strict=True)
    ]
    held = validate_runs(slow).held
    (source, *_), (network, *_) = held["source"], held["model"]
    low, high = source.interval("step_time", 0.9)
    assert low < source.simulated.step_time < high < 2 * source.simulated.step_time * 1.2
    near, far = network.interval("step_time", 0.9)
    assert far / near < high / low
    assert near < (network.case.measured.step_time or 0.0) < far
    assert 0 <= source.p_fits <= 1
