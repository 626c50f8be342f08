"""Calibration on synthetic machines whose true corrections are known."""

import copy
import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mopsim.calibrate.fit import (
    KIN_PRIOR,
    SCALE_PRIOR,
    RunPoint,
    fit_family,
    fit_kind,
    fit_step,
    scatter,
)
from mopsim.calibrate.profile import calibrate
from mopsim.calibrate.runs import on_stack
from mopsim.commands import calibrate as command
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.intervals.spread import Facts
from mopsim.spec.hardware import COMPUTE_KINDS, Correction, HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, KindTiming, Measurement, Plan
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

PROFILE = load_profile("cpu-2core")
MODEL = ModelSpec(
    name="m",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    intermediate_size=128,
)
WORK = {
    "a": {
        "matmul": (0.08, 900),
        "memory_bound": (0.02, 3000),
        "all_gather": (0.01, 20),
        "attention": (0.01, 40),
    },
    "b": {
        "matmul": (0.11, 300),
        "memory_bound": (0.04, 1200),
        "all_gather": (0.02, 90),
        "attention": (0.02, 40),
    },
    "c": {
        "matmul": (0.05, 2000),
        "memory_bound": (0.03, 6000),
        "all_gather": (0.04, 60),
        "attention": (0.01, 80),
    },
}
"""Strategy -> kind -> (uncorrected seconds, ops) of a world where one stream runs everything."""


@dataclass
class World:
    """A simulator that adds up WORK with a profile's corrections."""

    step_time: float
    busy: dict[str, float]
    num_ops: dict[str, int]
    peak_memory: int = 10**9
    facts: Facts = field(default_factory=lambda: Facts("program", "machine", "bf16"))


def simulate(plan: Plan, profile: HardwareProfile) -> World:
    work = WORK[plan.strategy.name]
    fixes = {kind: profile.corrections.get(kind, Correction()) for kind in (*work, "step")}
    busy = {k: fixes[k].scale * base + fixes[k].overhead * ops for k, (base, ops) in work.items()}
    return World(sum(busy.values()) + fixes["step"].overhead, busy, {k: ops for k, (_, ops) in work.items()})


def measured(
    name: str,
    profile: HardwareProfile,
    per_op: float = 0.0,
    constant: float = 0.0,
    planned: str | None = None,
) -> Measurement:
    """A run of strategy `name` on a machine that `profile` describes truly, plus Python per compute op."""
    plan = Plan(
        model=MODEL,
        hardware=HardwareRef(
            name=PROFILE.name,
            digest=planned or io.digest(PROFILE),
            num_nodes=1,
            devices_per_node=2,
            memory_limit=10**9,
            host_limit=10**9,
        ),
        strategy=Strategy(name=name, world_size=2),
        stack=load_stack("mopexec-flat"),
        training=TrainSpec(seq_len=64, global_batch=2),
    )
    world = simulate(plan, profile)
    step = world.step_time + constant
    step += per_op * sum(world.num_ops.get(kind, 0) for kind in COMPUTE_KINDS)
    kinds = {
        kind: KindTiming(count=world.num_ops[kind], seconds=s, seconds_low=0.98 * s, seconds_high=1.02 * s)
        for kind, s in world.busy.items()
    }
    return Measurement(
        plan=plan,
        world_size=2,
        steps=11,
        warmup=2,
        step_times=tuple(step * (1 + 0.01 * (i % 3 - 1)) for i in range(9)),
        step_time_median=step,
        tokens_per_second=128 / step,
        kinds=kinds,
        peak_memory=int(1.2e9),
        memory_by_category={"params": int(1.2e9)},
        host_memory=0,
        first_loss=5.0,
        last_loss=4.0,
        environment={},
    )


TRUE = {
    "matmul": Correction(scale=1.7),
    "memory_bound": Correction(scale=0.6, overhead=4e-6),
    "all_gather": Correction(scale=2.5, overhead=1e-4),
    "attention": Correction(scale=1.2),
}
MACHINE = msgspec.structs.replace(PROFILE, corrections=TRUE)


def error_of(profile: HardwareProfile, run: Measurement) -> float:
    return abs(simulate(run.plan, profile).step_time / run.step_time_median - 1)


def test_recovers_a_known_machine() -> None:
    result = calibrate(PROFILE, [measured(name, MACHINE) for name in "abc"], simulate)
    for kind, true in TRUE.items():
        found = result.profile.corrections[kind]
        assert found.scale == pytest.approx(true.scale, rel=0.08), kind
        assert found.overhead == pytest.approx(true.overhead, abs=0.3 * true.overhead + 2e-6), kind
    assert max(abs(error) for error in result.step_errors("after")) < 0.03
    assert min(abs(error) for error in result.step_errors("before")) > 0.2
    assert max(abs(error) for error in result.step_errors("held_out")) < 0.1
    assert 1 < result.miss("after") < result.miss("held_out") < 1.1 < result.miss("before")


def test_two_runs_predict_a_third_with_python_between_the_ops() -> None:
    truth = {"per_op": 6e-6, "constant": 2e-3}
    result = calibrate(PROFILE, [measured(name, MACHINE, **truth) for name in "ab"], simulate)
    unseen = measured("c", MACHINE, **truth)
    assert error_of(PROFILE, unseen) > 0.3
    assert error_of(result.profile, unseen) < 0.1


def test_one_run_shares_the_rest_of_the_step_by_the_priors() -> None:
    result = calibrate(PROFILE, [measured("a", MACHINE, per_op=5e-6)], simulate)
    assert result.step_errors("after") == pytest.approx([0.0], abs=0.05)
    assert result.step_errors("held_out") == []
    assert result.miss("held_out") == 1.0
    assert result.profile.corrections["memory_bound"].overhead > 2e-6


def test_writes_a_new_profile_and_keeps_the_old_one() -> None:
    before = io.digest(PROFILE)
    result = calibrate(PROFILE, [measured("a", MACHINE)], simulate)
    assert io.digest(PROFILE) == before
    assert result.profile.name == f"{PROFILE.name}-calibrated"
    assert result.profile.calibrated_from == before
    correction = result.profile.corrections["matmul"]
    assert correction.tag == "calibrated"
    assert f"({result.runs[0]})" in correction.source, "beside its strategy's name"
    assert result.profile.framework_memory_scale == 1.0


def test_calibrating_a_calibrated_profile_starts_from_the_bare_curves() -> None:
    first = calibrate(PROFILE, [measured("a", MACHINE)], simulate).profile
    again = calibrate(
        first, [measured("a", MACHINE), measured("b", MACHINE, planned=io.digest(first))], simulate
    )
    once = calibrate(PROFILE, [measured("a", MACHINE), measured("b", MACHINE)], simulate)
    assert again.profile.name == first.name
    assert again.profile.calibrated_from == io.digest(PROFILE)
    for kind, correction in once.profile.corrections.items():
        assert again.profile.corrections[kind].scale == pytest.approx(correction.scale)
    assert again.step_errors("before") != once.step_errors("before")


def test_an_error_has_a_name() -> None:
    machine = msgspec.structs.replace(PROFILE, corrections={"all_gather": Correction(scale=4.0)})
    result = calibrate(PROFILE, [measured("a", machine), measured("b", machine)], simulate)
    worst = min(
        (row for row in result.residuals if row.kind != "step"), key=lambda row: row.error(row.before)
    )
    assert worst.kind == "all_gather"
    rows = result.to_json()["residuals"]
    assert {row["kind"] for row in rows} == {*WORK["a"], "step"}
    assert all(abs(row["after_error"]) < 0.05 for row in rows)


def test_a_kind_that_no_run_exercised_follows_its_kin() -> None:
    corrections = calibrate(PROFILE, [measured(name, MACHINE) for name in "ab"], simulate).profile.corrections
    known, unseen = (math.log(corrections[kind].scale) for kind in ("all_gather", "send_recv"))
    of_family = SCALE_PRIOR**2 / (SCALE_PRIOR**2 + KIN_PRIOR**2)  # what one kind says of its family
    assert unseen == pytest.approx(of_family * known, rel=0.01)
    assert corrections["grouped_matmul"].scale == pytest.approx(corrections["matmul"].scale)
    assert corrections["send_recv"].source.startswith("the kin")
    assert corrections["h2d"].scale == pytest.approx(1.0, abs=0.1)


def test_gpu_efficiency_never_passes_the_datasheet() -> None:
    gpu = load_profile("h100-sxm-80g")
    fast = msgspec.structs.replace(gpu, corrections={"matmul": Correction(scale=0.1)})
    run = measured("a", fast, planned=io.digest(gpu))
    result = calibrate(gpu, [run], simulate)
    efficiency = max(curve.efficiency for curve in gpu.device.matmul)
    assert result.profile.corrections["matmul"].scale >= efficiency
    assert result.profile.framework_memory_scale == pytest.approx(1.2)


def test_kind_fit_resists_one_bad_run() -> None:
    points = [RunPoint(0.1 * i, 10, 0.2 * i, 0.0) for i in (1, 1, 1, 1)] + [RunPoint(0.1, 10, 2.0, 0.0)]
    assert fit_kind(points, 1e-6, 0.02).scale == pytest.approx(2.0, rel=0.1)


def test_few_data_stay_near_no_correction() -> None:
    noisy = fit_kind([RunPoint(0.1, 10, 0.3, 1.0)], 1e-6, 0.02)
    sure = fit_kind([RunPoint(0.1, 10, 0.3, 0.0)], 1e-6, 0.02)
    assert 1.0 < noisy.scale < sure.scale < 3.0


def test_step_fit_gives_little_to_the_factor_where_ops_explain() -> None:
    fit = fit_step([RunPoint(0.1, 3000, 0.115, 0.02)], 5e-6)
    assert fit.per_op == pytest.approx(5e-6, rel=0.5)
    assert fit.factor == pytest.approx(1.0, abs=0.05)
    slower = fit_step([RunPoint(0.2, 1000, 0.15, 0.02)], 5e-6)
    assert slower.per_op < 1e-7
    assert slower.factor < 0.9


def test_each_runtime_has_a_constant_of_its_own() -> None:
    """Two runtimes that simulate alike and differ by 50 ms of Python between the ops."""
    runs = [RunPoint(0.4, 1000, 0.4, 0.01, "flat_units"), RunPoint(0.4, 1000, 0.45, 0.01, "fully_shard")]
    fit = fit_step(runs, 5e-6)
    for run in runs:
        predicted = fit.factor * run.simulated + fit.per_op * run.ops + fit.constants[run.runtime]
        assert predicted == pytest.approx(run.seconds, rel=0.03)
    assert fit.constants["fully_shard"] > fit.constants["flat_units"] + 0.02
    fields = {"step": Correction(overhead=0.02), "step_fully_shard": Correction(overhead=0.05)}
    profile = msgspec.structs.replace(PROFILE, corrections=fields)
    assert profile.step_overhead("fully_shard") == 0.05
    assert profile.step_overhead("flat_units") == 0.02


def test_a_run_is_simulated_with_the_routing_that_it_measured() -> None:
    seen = []

    def spy(plan: Plan, profile: HardwareProfile) -> Any:
        seen.append(plan.training.routing)
        return simulate(plan, profile)

    run = msgspec.structs.replace(measured("a", MACHINE), routing="zipf:1.0")
    calibrate(PROFILE, [run], spy)
    assert set(seen) == {"zipf:1.0"}


def test_a_measured_routing_is_of_the_models_experts() -> None:
    with pytest.raises(SpecError, match="routing: '70/9' has more hot experts"):
        msgspec.structs.replace(measured("a", MACHINE), routing="70/9")


def test_a_family_shares_what_its_noisy_kinds_say() -> None:
    """One bad measurement of one collective is corrected by its kin; clean ones keep their own scale."""
    kin = {kind: [RunPoint(0.1, 10, 0.2, 0.1)] * 2 for kind in ("all_gather", "all_reduce", "all_to_all")}
    floors, overheads = dict.fromkeys((*kin, "send_recv"), 0.02), dict.fromkeys((*kin, "send_recv"), 1e-6)
    common, fits = fit_family({**kin, "send_recv": [RunPoint(0.1, 10, 0.9, 1.0)]}, overheads, floors)
    assert common == pytest.approx(2.0, rel=0.1)
    assert fits["send_recv"].scale < 2.5
    clean = fit_family({**kin, "send_recv": [RunPoint(0.1, 10, 0.4, 0.05)] * 3}, overheads, floors)[1]
    assert clean["send_recv"].scale == pytest.approx(4.0, rel=0.1)


def test_a_run_whose_steps_scatter_counts_for_little() -> None:
    assert scatter([1.0, 1.1, 3.0, 3.2]) > 0.5
    assert scatter([1.0, 1.01, 1.02, 1.03]) < 0.02


def test_the_command_writes_a_profile_and_residuals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "__defaults__", (simulate,))
    given, out, report = (tmp_path / name for name in ("p.yaml", "p2.yaml", "r.json"))
    io.write_yaml(given, PROFILE)
    text = given.read_text()
    (tmp_path / "run").mkdir()
    io.write_yaml(tmp_path / "run" / "measurement.yaml", measured("a", MACHINE))
    run = str(tmp_path / "run")
    options: dict[str, Any] = {"profile": str(given), "measurements": [run], "more": None, "stack": None}
    with pytest.raises(MopError, match="it is kept"):
        command.run(**options, out=str(given), json=None)
    command.run(**options, out=str(out), json=str(report))
    found = json.loads(report.read_text())
    assert io.digest(load_profile(out)) == found["digest"]
    assert given.read_text() == text
    low, high = found["intervals"]["mopexec-flat"]
    assert low < 1 < high


def test_measured_runs_may_be_told_to_be_of_another_program() -> None:
    run = on_stack(measured("a", MACHINE), load_stack("deepspeed"))
    assert run.plan.stack == load_stack("deepspeed")
    assert run.plan.strategy.stack == "deepspeed"
    assert calibrate(PROFILE, [run], simulate).to_json()["stacks"] == ["deepspeed"]


def test_a_disturbed_run_counts_by_its_quiet_steps() -> None:
    """Two machines say different things of one kind: the result lies nearer to the undisturbed run."""
    slow = msgspec.structs.replace(PROFILE, corrections={**TRUE, "matmul": Correction(scale=3.0)})
    quiet, loud = measured("a", MACHINE), measured("b", slow)
    disturbed = msgspec.structs.replace(loud, steps=loud.steps + 27, disturbed=27, resumed=1)
    assert disturbed.quiet == 0.25

    def scale(*runs: Measurement) -> float:
        result = calibrate(PROFILE, runs, simulate)
        assert result.weights == tuple(run.quiet for run in runs)
        return result.profile.corrections["matmul"].scale

    assert scale(quiet) < scale(quiet, disturbed) < scale(quiet, loud) < scale(loud)
    beside = msgspec.structs.replace(loud, others=0.75)
    assert scale(quiet) < scale(quiet, beside) < scale(quiet, loud)
    said = command._apart(beside)
    assert "other programs had 75% of the cores: it counts as 0.25 runs" in said
    said = command._apart(disturbed)
    assert "27 of 36 steps were disturbed by other programs and are left out: it counts as 0.25 runs" in said
    assert "resumed: the steps of all its 2 launches count" in said


def test_a_step_is_the_sum_of_its_rows_and_another_routing_is_told() -> None:
    run = measured("a", MACHINE)
    result = calibrate(PROFILE, [run], simulate)
    rows = result.residuals
    kinds, step = [one for one in rows if one.kind != "step"], rows[-1]
    longer = dataclasses.replace(step, measured=1.0 + sum(one.measured for one in kinds))
    (rest,) = command._rest(longer, rows)
    assert rest.kind == "in no kind"
    assert rest.measured == pytest.approx(1.0)
    (never,) = [dataclasses.replace(one, measured=0.0) for one in kinds if one.kind == "matmul"]
    assert never.error(never.before) is None
    shown = command.residuals(dataclasses.replace(result, residuals=(never,)))
    assert [cell for column in shown.columns[2:] for cell in column.cells] == ["not measured", "", "", ""]
    assert command._rest(kinds[0], rows) == []
    uneven = copy.copy(run)
    msgspec.structs.force_setattr(uneven, "routing", "67/4")  # the network of these runs is dense
    said = command._routed(uneven, 10 << 20)
    assert "simulated with its own routing, 67/4, not the plan's, balanced" in said
    assert "against 10.00 MiB predicted" in said
