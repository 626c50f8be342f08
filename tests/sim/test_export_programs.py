"""Export: a file asks of its program only what that program does."""

import json
from typing import Any, Literal

import pytest
import yaml

import mopsim
from mopsim.common.errors import MopError
from mopsim.common.io import digest
from mopsim.export import export
from mopsim.spec.capability import Job, holds
from mopsim.spec.plan import Plan
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Dispatcher, Overlap
from mopsim.strategies import fsdp2, megatron, zero_offload
from tests.property.drawn import mixed
from tests.sim.test_export import plan, replace

AS_STACK = Overlap(grad_reduce=None, param_gather=None, pipeline=None, tensor=None, experts=None)
Recipe = Literal["fp8", "mxfp8", "nvfp4"]


@pytest.mark.parametrize(
    ("model", "stages", "virtual", "layout"),
    [
        ("qwen3_30b_a3b", 4, 1, ()),
        ("deepseek_v3", 4, 1, (16, 15, 15, 15)),
        ("deepseek_v3", 8, 2, (4,) * 13 + (3,) * 3),
    ],
)
def test_uneven_parts_are_written_for_megatron(
    model: str, stages: int, virtual: int, layout: tuple[int, ...]
) -> None:
    """Without a layout it wants equal parts; MTP layers are with the loss."""
    made = megatron(32, pipeline_parallel=stages, virtual_stages=virtual, expert_parallel=4)
    found = yaml.safe_load(export(plan(made, model), "megatron-bridge")[0])["model"]
    written = found["pipeline_model_parallel_layout"] or ""
    assert tuple(part.count("t") for part in written.split("|") if part) == layout
    if layout:
        assert written.startswith("Et")
        assert written.endswith("tmL")


def test_layers_in_an_order_of_their_own_are_written_for_megatron() -> None:
    """As its TransformerConfig reads them: 1 of each layer with experts, 1 of each with a window; the layout
    of a pipeline counts both kinds."""
    model = mixed(10)
    made = plan(megatron(32, pipeline_parallel=4, expert_parallel=4))
    made = replace(made, model=model)
    found = yaml.safe_load(export(made, "megatron-bridge")[0])["model"]
    assert found["moe_layer_freq"] == [0, 1] * 5
    assert found["window_attn_skip_freq"] == [0, 1, 1, 0, 1, 1, 0, 1, 1, 0]
    assert found["window_size"] == [1023, 0]
    assert found["pipeline_model_parallel_layout"].count("t") == 10
    leading = yaml.safe_load(export(plan(megatron(32), "deepseek_v3"), "megatron-bridge")[0])["model"]
    assert leading["moe_layer_freq"] == [0] * 3 + [1] * 58
    assert leading["window_size"] is None
    window = replace(load_model("qwen3_30b_a3b"), sliding_window=512, sliding_window_period=3)
    every = yaml.safe_load(export(replace(made, model=window), "megatron-bridge")[0])["model"]
    assert every["window_attn_skip_freq"] == [1, 0, 0] * 16
    assert (every["window_size"], every["moe_layer_freq"]) == ([511, 0], 1)


def test_a_recipe_keeps_no_windows_that_the_network_has_not() -> None:
    """AutoBridge gives every GPT-OSS windows, whatever its layer_types."""
    model = load_model("gpt_oss_20b")
    full = replace(model, **model.windowed_at([False] * model.num_hidden_layers))
    made = plan(megatron(32, expert_parallel=4), "gpt_oss_20b")
    for one, freq in ((model, [1, 0] * 12), (full, None)):
        found = yaml.safe_load(export(replace(made, model=one), "megatron-bridge")[0])["model"]
        assert found["window_attn_skip_freq"] == freq
        assert found["window_size"] == ([127, 0] if freq else None)


def test_a_network_that_is_no_flavor_is_refused_for_torchtitan() -> None:
    model = load_model("qwen3_30b_a3b")
    made = plan(fsdp2(32), "qwen3_30b_a3b")
    for fields in ({"mlp_only_layers": (4,)}, {"sliding_window": 64, "layer_types": mixed(48).layer_types}):
        other = replace(model, intermediate_size=6144, total_params=None, active_params=None, **fields)
        with pytest.raises(MopError, match=r"model\.\w+: .* is not in TorchTitan's flavor of qwen3_30b_a3b"):
            export(replace(made, model=other), "torchtitan")


def on(name: str, dispatcher: Dispatcher, stack: str = "megatron-core") -> Plan:
    """A plan on 32 devices of a shipped machine."""
    made = plan(replace(megatron(32, expert_parallel=4, token_dispatcher=dispatcher), stack=stack))
    profile = load_profile(name)
    return replace(made, hardware=replace(made.hardware, name=name, digest=digest(profile)))


@pytest.mark.parametrize(
    ("machine", "dispatcher", "stack", "says"),
    [
        ("h100-sxm-80g", "deepep", "megatron-core", ""),
        ("l40s-48g", "allgather", "megatron-core", ""),
        ("b200-sxm-192g", "deepep", "megatron-bridge", ""),
        (
            "a100-pcie-80g",
            "deepep",
            "megatron-core",
            r"\(devices have no nvlink\), only 'alltoall' or 'allgather'",
        ),
        (
            "l40s-48g",
            "hybridep",
            "megatron-core",
            r"\(devices have no nvlink\), only 'alltoall' or 'allgather'",
        ),
        (
            "mi300x-192g",
            "deepep",
            "megatron-core",
            r"\(devices have no nvlink\), only 'alltoall' or 'allgather'",
        ),
        (
            "gb200-186g",
            "deepep",
            "megatron-bridge",
            r"\(nvlink spans nodes\), only 'alltoall' or 'allgather' or 'hybridep'",
        ),
        ("gb200-186g", "hybridep", "megatron-bridge", ""),
    ],
)
def test_experts_are_reached_as_the_hardware_allows(
    machine: str, dispatcher: Dispatcher, stack: str, says: str
) -> None:
    """By name in a simulation and an export, and not in the space of a search."""
    given = on(machine, dispatcher, stack)
    nodes = 32 // load_profile(machine).devices_per_node
    job = {"model": given.model, "hardware": machine, "nodes": nodes, "seq_len": 4096, "global_batch": 64}
    if not says:
        text, gaps = export(given, "megatron-bridge")
        assert not gaps
        found = yaml.safe_load(text)["model"]
        assert found["moe_token_dispatcher_type"] == {"allgather": "allgather"}.get(dispatcher, "flex")
        assert found["moe_shared_expert_overlap"] is False  # Megatron-Core raises with allgather
        assert mopsim.simulate(**job, strategy=given.strategy, stack=stack).step_time_s
        return
    says = f"experts.token_dispatcher: '{dispatcher}' is not .* {says}"
    with pytest.raises(MopError, match=says):
        export(given, "megatron-bridge")
    with pytest.raises(MopError, match=says):
        mopsim.simulate(**job, strategy=given.strategy, stack=stack)


@pytest.mark.parametrize(("stack", "fused"), [("megatron-core", True), ("megatron-bridge", False)])
def test_a_job_makes_its_map_of_routes_as_its_times_are_of(stack: str, fused: bool) -> None:
    """Megatron-Core's kernel for it is one of its experimental features."""
    made = yaml.safe_load(export(on("h100-sxm-80g", "deepep", stack), "megatron-bridge")[0])
    assert made["dist"] == {"enable_megatron_core_experimental": fused}
    assert "dist" not in yaml.safe_load(export(on("h100-sxm-80g", "alltoall", stack), "megatron-bridge")[0])


@pytest.mark.parametrize(
    ("machine", "to_host", "there"), [("h100-sxm-96g", 380.0, True), ("l40s-48g", 10.0, False)]
)
def test_the_link_to_the_host_says_nothing_of_those_between_devices(
    machine: str, to_host: float, there: bool
) -> None:
    """GB/s. GH200's 450 between devices and 380 to the host were taken for PCIe."""
    made = load_profile(machine)
    link = replace(made.host.link_h2d, value=to_host, unit="GB/s")
    for hardware in (made, replace(made, host=replace(made.host, link_h2d=link))):
        job = Job(load_model("qwen3_30b_a3b"), megatron(8), hardware=hardware)
        assert holds("devices_have_no_nvlink")(job) != there


def test_a_target_is_held_to_the_stack_that_describes_it() -> None:
    """Megatron-Bridge refuses DeepEP on GB200, whatever Megatron-Core does."""
    with pytest.raises(MopError, match=r"deepep.*stack megatron-bridge in this case \(nvlink spans nodes\)"):
        export(on("gb200-186g", "deepep"), "megatron-bridge")
    latent = megatron(32, context_parallel=2, expert_parallel=4, context_exchange="all_gather")
    given = plan(replace(latent, stack="generic-fused"), "deepseek_v3")
    with pytest.raises(MopError, match=r"all_gather.* in Megatron-Bridge on .*latent to all\), only 'ring'"):
        export(given, "megatron-bridge")


def test_a_lossy_file_does_not_ask_for_what_it_says_it_does_not() -> None:
    """DeepEP on GB200, gathered keys of latent attention and hidden exchanges stood under NOT EXPRESSED."""
    latent = megatron(32, context_parallel=2, expert_parallel=4, context_exchange="all_gather")
    hidden = megatron(32, expert_parallel=4, recompute="full")
    hidden = replace(hidden, overlap=replace(hidden.overlap, experts=True))
    for given, field, keys in (
        (on("gb200-186g", "deepep"), "experts.token_dispatcher", ("moe_token_dispatcher_type", "deepep")),
        (plan(replace(latent, stack="generic-fused"), "deepseek_v3"), "attention.cp_comm_type", ("cp_comm",)),
        (plan(replace(hidden, stack="generic-fused")), "overlap.experts", ("overlap_moe", "moe_shared")),
    ):
        text, gaps = export(given, "megatron-bridge", lossy=True)
        assert f"strategy.{field}" in [gap.field for gap in gaps]
        asked = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        assert not [key for key in keys if key in asked]
        assert yaml.safe_load(text)["model"]["expert_model_parallel_size"] == 4


def bridged(stack: str = "megatron-bridge", **degrees: object) -> dict[str, Any]:
    """What Megatron-Bridge reads of a plan that leaves overlaps and dtypes to the stack."""
    made = megatron(32, expert_parallel=4, overlap=AS_STACK, **degrees)  # type: ignore[arg-type]
    blank = replace(made.precision, reduce="stack", grad="stack")
    text, gaps = export(plan(replace(made, stack=stack, precision=blank)), "megatron-bridge")
    assert not gaps
    assert "process_config_with_overrides(config, config_filepath=" in text
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.mark.parametrize("virtual", [1, 2])
def test_sends_are_overlapped_under_interleaving_alone(virtual: int) -> None:
    """Megatron-Core raises without it (schedules.py:2181), and where batches are asked for beside (:1086).
    The section was missing where no other overlap was in it, and CommOverlapConfig is made, not merged: a
    recipe may have none."""
    hides = virtual > 1
    for stack in ("megatron-bridge", "megatron-core"):
        found = bridged(stack=stack, pipeline_parallel=4, virtual_stages=virtual)["comm_overlap"]
        assert next(iter(found)) == "_target_"
        assert (found["overlap_p2p_comm"], found["batch_p2p_comm"]) == (hides, not hides)
    said = megatron(32, pipeline_parallel=4, virtual_stages=virtual, overlap=Overlap(pipeline=True))
    job = {"model": "qwen3_30b_a3b", "hardware": "h100-sxm-80g", "nodes": 4, "seq_len": 4096}
    if virtual > 1:
        assert mopsim.simulate(**job, global_batch=64, strategy=said, stack="megatron-core").step_time_s
    else:
        with pytest.raises(MopError, match=r"overlap\.pipeline: True is not .*\(one part a stage"):
            mopsim.simulate(**job, global_batch=64, strategy=said, stack="megatron-core")


@pytest.mark.parametrize(("stack", "wide"), [("megatron-bridge", False), ("megatron-core", True)])
def test_gradients_have_the_dtype_that_is_simulated(stack: str, wide: bool) -> None:
    """`mixed_precision: bf16_mixed` set ddp.grad_reduce_in_fp32, whatever the file said."""
    found = bridged(stack=stack)
    assert found["mixed_precision"]["grad_reduce_in_fp32"] is wide
    assert found["ddp"]["grad_reduce_in_fp32"] is wide
    assert found["mixed_precision"]["params_dtype"] == {"_target_": "torch.bfloat16", "_call_": False}


def test_a_file_asks_for_the_kernels_that_are_priced() -> None:
    """Megatron-Core fuses none of these unasked; megatron-lm is what it does then with a permutation. Rotary
    embedding of MLA and clamped gates are a recipe's."""
    keys = ("moe_permute_fusion", "apply_rope_fusion", "bias_activation_fusion")
    for stack, fuses in (("megatron-core", True), ("megatron-bridge", True), ("megatron-lm", False)):
        model = bridged(stack=stack)["model"]
        assert [model[key] for key in keys] == [fuses, True, True], stack
        reads = bridged(stack=stack)["rerun_state_machine"]["check_for_nan_in_loss"]
        assert reads == (stack != "megatron-bridge"), stack
    for name, missing in (("deepseek_v3", "apply_rope_fusion"), ("gpt_oss_20b", "bias_activation_fusion")):
        text, _ = export(replace(plan(megatron(32)), model=load_model(name)), "megatron-bridge", lossy=True)
        assert missing not in yaml.safe_load(text)["model"]


def test_what_a_recipe_may_have_set_is_cleared() -> None:
    found = bridged()
    model, optimizer = found["model"], found["optimizer"]
    assert {model[key] for key in CLEARED} <= {None, False}
    assert optimizer["use_precision_aware_optimizer"] is False
    dtypes = {optimizer[f"{name}_dtype"] for name in ("main_grads", "main_params", "exp_avg", "exp_avg_sq")}
    assert dtypes == {"torch.float32"}
    full = bridged(recompute="full")["model"]
    assert (full["recompute_method"], full["recompute_num_layers"]) == ("uniform", 1)


CLEARED = (
    "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split", "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage", "recompute_method", "recompute_num_layers", "recompute_modules",
)  # fmt: skip


@pytest.mark.parametrize("matmul", ["fp8", "mxfp8", "nvfp4"])
def test_every_layer_has_the_recipe_of_products_and_none_offloads_its_optimizer(matmul: Recipe) -> None:
    """The Bridge's recipe in 8 bits keeps the first and the last layer in bf16; Megatron-Core asserts that
    weights in 8 bits stay with their optimizer."""
    made = megatron(32, expert_parallel=4)
    made = replace(made, precision=replace(made.precision, matmul=matmul))
    found = yaml.safe_load(export(plan(made), "megatron-bridge")[0])["mixed_precision"]
    assert bool(found["fp8"]) == (matmul != "nvfp4")
    assert bool(found["fp4"]) == (matmul == "nvfp4")
    assert found["first_last_layers_bf16"] is False
    assert found["reuse_grad_buf_for_mxfp8_param_ag"] is (matmul == "mxfp8")
    away = replace(made, optimizer=replace(made.optimizer, state_tier="host", update_on="host"))
    with pytest.raises(MopError, match=rf"matmul: '{matmul}' is not .* \(state on host\), only 'compute'"):
        export(plan(away), "megatron-bridge")


def test_autoep_is_not_asked_for_what_it_has_no_preset_of() -> None:
    given = plan(zero_offload(32, expert_parallel=8), "gpt_oss_20b")
    text, gaps = export(given, "deepspeed", lossy=True)
    assert "strategy.experts.expert_parallel" in [gap.field for gap in gaps]
    assert "expert_parallel" not in json.loads(text)


def test_offloaded_inputs_name_the_variable_that_megatron_wants() -> None:
    for there in (True, False):
        made = megatron(32, expert_parallel=4, offload_inputs=there)
        text, _ = export(plan(made, "deepseek_v3"), "megatron-bridge")
        assert ("NVTE_CPU_OFFLOAD_V1=1" in text) == there


def test_offloaded_inputs_name_the_checkpoint_that_copies_them() -> None:
    """Hugging Face's own call leaves them on the device, whatever cpu_checkpointing says."""
    for there in (True, False):
        given = plan(zero_offload(32, expert_parallel=8, offload_inputs=there))
        found = json.loads(export(given, "deepspeed")[0])
        assert found["activation_checkpointing"]["cpu_checkpointing"] is there
        said = " ".join(found["_about"])
        assert ("_set_gradient_checkpointing(True, deepspeed.checkpointing.checkpoint)" in said) == there
        assert "gradient_checkpointing_enable" in said
