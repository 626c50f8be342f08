"""The host's time of the end of a step: as measured, for each parameter that a rank updates a part of."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.graph import host_costs, total_params
from mopsim.program import lower
from mopsim.program.workload import Op
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Overlap
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.software import changed

MEASURED = json.loads((Path(__file__).parents[2] / "reports/host/te_optimizer.json").read_text())
MODEL = load_model("qwen3_30b_a3b")
DENSE = load_model("llama3_8b")
TRAINING = TrainSpec(seq_len=4096, global_batch=8, routing="balanced")
LAYERS = MODEL.num_hidden_layers
COSTS = host_costs.UPDATES["transformer_engine"]


def update(stack: Stack, **given: Any) -> dict[str, Op]:
    """Ops on the compute stream of the end of a step on eight ranks."""
    strategy = replace(megatron(8, **given), stack="megatron-core")
    ops = lower(MODEL, strategy, TRAINING, 8, stack).programs[0].ops
    return {op.name: op for op in ops if op.component == "optimizer" and op.stream == "compute"}


def linears(op: Op) -> float:
    return sum(work.issued + work.host for work in op.work)


def test_the_constants_are_the_committed_measurement() -> None:
    parts = {
        "norm": ("gradients", "norm"), "clip": ("clip", "adam"), "parameters": ("parameters",),
        "zero": ("zero",),
    }  # fmt: skip
    for width, kind in (("wide", "fp32 gradients"), ("narrow", "bf16 gradients")):
        for part, names in parts.items():
            found = sum(MEASURED[kind][name]["each"] for name in names)
            assert COSTS[width][part] == pytest.approx(found, abs=0.1), (width, part)
    found = MEASURED["bf16 gradients"]
    aware = MEASURED["bf16 moments"]
    for part, names in parts.items():
        mine = COSTS["aware"][part] + COSTS["aware"]["update"] * (part == "clip")
        assert mine == pytest.approx(sum(aware[name]["each"] for name in names), abs=0.1), part
    every = sum(took["step"] for name, took in found.items() if name not in ("zeros", "parameters' norm"))
    assert pytest.approx(every, abs=5) == host_costs.UPDATE_STEP
    assert pytest.approx(found["zero all"]["each"], abs=0.01) == host_costs.UPDATE_MODEL
    for name, part in (("zeros", "zeros"), ("params_norm", "parameters' norm")):
        took = host_costs.UPDATE_LOGS[name][1]
        assert took == pytest.approx(MEASURED["fp32 gradients"][part]["each"], abs=0.15), name
    assert pytest.approx(MEASURED["collection"]["linears"], rel=0.1) == host_costs.COLLECTION


def test_no_rank_updates_parts_of_more_parameters_than_a_stage_has() -> None:
    """Of 70B on eight stages a tensor is larger than a bucket."""
    model, strategy = load_model("llama3_70b"), megatron(64, pipeline_parallel=8)
    strategy = replace(strategy, stack="megatron-core", overlap=Overlap(grad_reduce=True))
    programs = lower(model, strategy, TRAINING, 8, changed("megatron-core")).programs
    for program in programs:
        norm = next(op for op in program.ops if op.name == "norm" and op.stream == "compute")
        assert linears(norm) <= 62 * COSTS["wide"]["norm"]


def test_each_parameter_that_a_rank_updates_costs_the_host() -> None:
    """Two of each local expert; of the seven others of a layer an eighth, and where buckets end, of which
    there is one where reductions are not overlapped."""
    stack = changed("megatron-core")
    for ranks, overlaps in ((1, False), (8, False), (1, True), (8, True)):
        ops = update(stack, expert_parallel=ranks, overlap=Overlap(grad_reduce=overlaps))
        experts = 2 * MODEL.num_local_experts // ranks * LAYERS / (8 // ranks)
        others = 7 * LAYERS / 8
        buckets = (30e9 if ranks == 1 else 2e9) / 40e6 if overlaps else 1
        cost = COSTS["wide"]
        for part, name in (("norm", "norm"), ("clip", "clip"), ("parameters", "parameters cast")):
            count = linears(ops[name]) / cost[part]
            assert experts + others < count < 1.03 * (experts + others + buckets), (ranks, part, overlaps)
    waits = ops["parameters cast"].awaited
    assert waits, "the loop reads the loss scale"
    assert ops["parameters cast"].work[0].launches > experts, "parameters are copied one by one"
    cut = update(changed("megatron-core", host={"modules": False}), expert_parallel=8)
    assert cut["clip"].work[0].host == 0


def test_narrow_moments_are_widened_one_by_one_and_masters_are_what_parameters_lack() -> None:
    """32 bytes and six kernels a parameter beside AdamW; all moments of the experts in fp32 at once."""
    took, strategy = {}, replace(megatron(8, expert_parallel=8), stack="megatron-core")
    for moments in ("float32", "bfloat16"):
        given = replace(strategy, precision=replace(strategy.precision, moments=moments))
        workload = lower(MODEL, given, TRAINING, 8, changed("megatron-core"))
        took[moments] = {op.name: op for op in workload.programs[0].ops if op.component == "optimizer"}
    assert "parameters cast" not in took["bfloat16"], "AdamW writes the parameters"
    fused, casts = took["bfloat16"]["adamw"].work
    assert casts.bytes == pytest.approx(32 * fused.params)
    assert casts.launches == 6 * took["float32"]["parameters cast"].work[0].launches
    stack, precision = changed("megatron-core"), replace(strategy.precision, moments="bfloat16")
    assert [stack.own_master(one, 1, "device") for one in (strategy.precision, precision)] == [4, 2]
    assert changed("nemo").own_master(precision, 1, "device") == 4


def test_only_a_distributed_optimizer_on_the_device_widens_moments() -> None:
    """Not one that each rank has whole, or Megatron-FSDP's, whose masters stay of 4 bytes; nor the host's,
    whose moments are as wide as its masters."""
    for name, place, zero, left in (
        ("megatron-core", {}, 1, 6), ("megatron-core", {"optimizer_on_host": 1.0}, 1, 12),
        ("megatron-core", {}, 0, 8), ("megatron-fsdp", {}, 3, 8),
    ):  # fmt: skip
        took: dict[str, float] = {}
        strategy = replace(megatron(8, expert_parallel=8, **place), stack=name)
        strategy = replace(strategy, dense=replace(strategy.dense, zero=zero))
        for moments in ("float32", "bfloat16"):
            given = replace(strategy, precision=replace(strategy.precision, moments=moments))
            resident = lower(MODEL, given, TRAINING, 8, changed(name)).programs[0].resident
            took[moments] = sum(size for category, size in resident if category.endswith("optimizer"))
        assert took["bfloat16"] == pytest.approx(took["float32"] * left / 12), (name, place, zero)


def test_what_is_read_for_a_log_alone_is_read() -> None:
    plain = update(changed("megatron-core"))
    logs = update(changed("megatron-core", host={"logs": ("zeros", "params_norm")}))
    assert set(logs) - set(plain) == {"zeros", "params_norm"}
    for name, (step, each) in host_costs.UPDATE_LOGS.items():
        waits = logs[name].awaited
        assert waits
        tensors = (linears(logs[name]) - step) / each
        assert tensors == pytest.approx(linears(plain["clip"]) / COSTS["wide"]["clip"], rel=0.01)
    (counted,), (normed,), (cast,) = (logs[name].work for name in ("zeros", "params_norm", "parameters cast"))
    params = cast.bytes / (4 + 2)
    assert (counted.bytes, normed.bytes) == pytest.approx((params * (4 + 2), params * 4)), "masks of zeros"
    assert counted.launches == 4 * cast.launches


def test_a_mean_step_has_its_part_of_a_collection_of_garbage() -> None:
    profile, took = load_profile("h100-sxm-80g"), {}
    strategy = replace(megatron(8, expert_parallel=8), stack="megatron-core")
    for steps in (0, 5):
        stack = changed("megatron-core", host={"collections": steps})
        took[steps] = simulate(MODEL, profile, 1, strategy, TRAINING, stack).step_time
    unit = profile.host.cpu_launch_time.si
    assert took[5] - took[0] == pytest.approx(host_costs.COLLECTION / 5 * unit, rel=0.02)


def test_an_update_takes_what_its_state_is_wide() -> None:
    """In fp32 what profiles count; a number of 16 bits 3 of 4 bytes in torch's kernel, as it was timed, and 2
    operation by operation; a gradient is as wide as what is updated, or wider."""
    found: dict[str, list[float]] = {"fused": [], "foreach": [], "looped": []}
    for adamw, took in found.items():
        for param, grad, moments, master in (
            ("float32", "float32", "float32", "param"), ("bfloat16", "bfloat16", "bfloat16", "param"),
            ("float32", "float32", "bfloat16", "param"), ("bfloat16", "bfloat16", "float32", "float32"),
            ("bfloat16", "bfloat16", "bfloat16", "float32"), ("float32", "bfloat16", "float32", "param"),
        ):  # fmt: skip
            strategy = replace(megatron(1), stack="generic-fused")
            precision = replace(strategy.precision, param=param, grad=grad, moments=moments, master=master)
            stack = changed("generic-fused", kernels={"adamw": adamw})
            ops = lower(DENSE, replace(strategy, precision=precision), TRAINING, 8, stack).programs[0].ops
            work = next(op.work for op in ops if op.name == "adamw")[0]
            took.append(work.params / total_params(DENSE))
    apart = [1, 14 / 28, 20 / 28, 1, 20 / 28, 1]
    assert found["fused"] == pytest.approx([1, 21 / 28, 24 / 28, 1, 24 / 28, 1])
    assert found["foreach"] == found["looped"] == pytest.approx(apart)


def test_an_optimizer_without_masters_widens_moments_whatever_ranks_shard() -> None:
    """Transformer Engine's FusedAdam on one device: 32 bytes a parameter beside AdamW."""
    for adamw, beside in (("widened", 32), ("fused", 0)):
        strategy = replace(megatron(1), stack="generic-fused")
        precision = replace(strategy.precision, param="bfloat16", moments="bfloat16", master="param")
        stack = changed("generic-fused", kernels={"adamw": adamw})
        ops = lower(DENSE, replace(strategy, precision=precision), TRAINING, 8, stack).programs[0].ops
        works = next(op.work for op in ops if op.name == "adamw")
        assert sum(work.bytes for work in works[1:]) == beside * total_params(DENSE)
