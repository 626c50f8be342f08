"""Every stack plays every family, or refuses it by name; what a strategy leaves to its stack is filled."""

from pathlib import Path

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common.errors import SpecError
from mopsim.engine import simulate
from mopsim.spec.capability import runnable
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import list_stacks, load_stack
from mopsim.spec.strategy import Activations, Overlap, Pipeline, Precision, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import AS_STACK, STACKS, fsdp2, megatron, mop, zero_offload
from tests.together import together

MODEL = replace(load_model("qwen3_30b_a3b"), num_hidden_layers=2, total_params=None, active_params=None)
FAMILIES: dict[str, Strategy] = {
    "mop": mop(8, expert_parallel=8, vocab_parallel=8),
    "fsdp2": fsdp2(8, expert_parallel=8),
    "fsdp2, experts sharded": fsdp2(8),
    "fsdp2, kept": fsdp2(8, expert_parallel=8, recompute="none", loss="chunked"),
    "zero_offload": zero_offload(8, expert_parallel=8),
    "megatron": megatron(8, tensor_parallel=2, expert_parallel=4),
    "megatron, pipeline": megatron(8, pipeline_parallel=2, expert_parallel=4, recompute="full"),
}
TRAINING = TrainSpec(seq_len=2048, global_batch=16)


@together(list_stacks())
def test_every_stack_plays_a_family_or_refuses_it_by_name(name: str) -> None:
    hardware, stack, played = load_profile("h200-sxm-141g"), load_stack(name), 0
    refused: dict[str, str] = {}
    for family, strategy in FAMILIES.items():
        try:
            result = simulate(MODEL, hardware, 1, strategy, TRAINING, stack)
        except SpecError as error:
            refused[family] = error.field
            continue
        played += 1
        assert (result.stack, result.strategy.stack) == (stack.on_kind(hardware.device_kind), name)
        assert result.provenance["stack"] == name
        again = simulate(MODEL, hardware, 1, result.strategy, TRAINING, stack)
        assert again.step_time == result.step_time
    assert played
    assert all(field.startswith(("strategy.", "stack.")) for field in refused.values()), refused


RUN = (mop(2), fsdp2(2), zero_offload(2), megatron(2, tensor_parallel=2))


@together(list_stacks())
def test_mopexec_runs_its_own_stacks_only(name: str) -> None:
    tiny = load_model("tiny")
    found = [runnable(one, tiny, stack=load_stack(name)) for one in RUN]
    own = name in ("mopexec-flat", "mopexec-flat-nested", "mopexec-fsdp2", "mopexec-split")
    assert (None in found) == own
    if not own:
        assert {error.field for error in found if error} == {"stack"}


def test_a_runtime_that_is_claimed_is_held_to_what_it_does() -> None:
    stack = load_stack("mopexec-fsdp2")
    faster = replace(stack, kernels=replace(stack.kernels, residual="fused"))
    refused = runnable(fsdp2(2), load_model("tiny"), stack=faster)
    assert refused.field == "stack.kernels.residual"


def test_kernels_that_fuse_are_faster_and_a_stack_changes_no_products() -> None:
    hardware = load_profile("h200-sxm-141g")
    eager, fused = (
        simulate(MODEL, hardware, 1, FAMILIES["fsdp2"], TRAINING, load_stack(name))
        for name in ("torchtitan", "torchtitan-compile")
    )
    assert fused.step_time < eager.step_time
    assert fused.peak_memory < eager.peak_memory
    assert fused.flops == pytest.approx(eager.flops)


def test_what_a_strategy_leaves_to_the_stack_is_filled_and_what_it_says_stays() -> None:
    blank = Precision(param="stack", reduce="stack", grad="stack", moments="stack", master="stack")
    strategy = replace(megatron(8), precision=blank, overlap=AS_STACK)
    bridge, titan = load_stack("megatron-bridge"), load_stack("torchtitan")
    found = bridge.resolve(strategy)
    assert (found.precision.param, found.precision.grad, found.precision.master) == (
        "bfloat16",
        "bfloat16",
        "float32",
    )
    assert found.overlap == Overlap(grad_reduce=True, param_gather=True, pipeline=False, tensor=True)
    interleaved = megatron(8, pipeline_parallel=2, virtual_stages=2, overlap=AS_STACK)
    assert bridge.resolve(interleaved).overlap.pipeline is True
    assert titan.resolve(strategy).precision == Precision(
        param="float32", reduce="float32", grad="float32", moments="float32", master="param"
    )
    said = replace(strategy, precision=Precision(grad="float32"), overlap=Overlap(pipeline=True))
    assert bridge.resolve(said) == said


def test_selective_recomputation_means_what_the_program_means() -> None:
    strategy = replace(fsdp2(8), activations=Activations(recompute="selective"))
    assert load_stack("megatron-core").resolve(strategy).activations.modules == ("core_attn",)
    kept = load_stack("torchtitan").resolve(strategy).activations
    assert (kept.recompute, kept.save_ops[0]) == ("full", "q_proj")
    split = replace(fsdp2(8, tensor_parallel=2), activations=Activations(recompute="selective"))
    assert load_stack("torchtitan").resolve(split).activations.modules == ("mlp", "moe")
    listed = replace(strategy, activations=Activations(recompute="selective", modules=("moe",)))
    assert load_stack("torchtitan").resolve(listed) == listed


def test_exchanges_are_hidden_where_a_pipeline_has_another_microbatch() -> None:
    graph = load_stack("megatron-bridge-graph")
    plain, interleaved = megatron(8, pipeline_parallel=2), megatron(8, pipeline_parallel=2, virtual_stages=2)
    assert not graph.resolve(plain).overlap.experts
    assert graph.resolve(interleaved).overlap.experts
    said = replace(plain, pipeline=Pipeline(), overlap=Overlap(experts=True))
    assert load_stack("megatron-core").resolve(said).overlap.experts


def test_search_and_plan_have_the_stack(tmp_path: Path) -> None:
    found = mopsim.search(
        MODEL, "h200-sxm-141g", seq_len=2048, global_batch=16, families="fsdp2", top=1, budget=4,
        stack="torchtitan-compile",
    )  # fmt: skip
    assert found["stack"] == "torchtitan-compile"
    assert found.best["stack"] == "torchtitan-compile"
    plan = found.best.plan()
    assert plan.stack == load_stack("torchtitan-compile")
    assert plan.strategy.stack == "torchtitan-compile"
    none = mopsim.search(
        MODEL, "h200-sxm-141g", seq_len=2048, global_batch=16, families="fsdp2", top=1, budget=2,
        stack="torchtitan-compile", runnable=True,
    )  # fmt: skip
    assert none.best is None
    assert any("mopexec does not run" in reason for reason in none["rejected"])


def test_a_familys_stack_is_shipped() -> None:
    for name in STACKS.values():
        assert load_stack(name).name == name
