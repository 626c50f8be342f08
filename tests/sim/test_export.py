"""Export: plans in other tools' words, key by key; what can't be said is refused, or listed."""

import json
import tomllib
from collections.abc import Callable
from typing import Literal

import msgspec
import pytest
import yaml

from mopsim.common.errors import MopError, SpecError
from mopsim.export import TARGETS, export
from mopsim.spec.plan import HardwareRef, Plan, Prediction
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload
from tests.plans import changed

replace = msgspec.structs.replace


def plan(strategy: Strategy, model: str = "qwen3_30b_a3b") -> Plan:
    hardware = HardwareRef(
        name="toy", digest="0", num_nodes=4, devices_per_node=8, memory_limit=1, host_limit=1
    )
    training = TrainSpec(seq_len=4096, global_batch=64, learning_rate=1e-4, warmup_steps=10)
    stack = load_stack(strategy.stack)
    return Plan(
        model=load_model(model),
        hardware=hardware,
        strategy=stack.resolve(strategy),
        training=training,
        stack=stack,
    )


def fsdp_context() -> Strategy:
    """FSDP2 on 32 ranks, context parallelism 2 by all-gather, HSDP over two nodes."""
    made = fsdp2(32, expert_parallel=8, context_parallel=2, fsdp=16)
    attention = replace(made.attention, cp_comm_type="all_gather")
    experts = replace(made.experts, expert_fsdp=2)
    return replace(made, stack="torchtitan", attention=attention, experts=experts)


def test_torchtitan_by_hand() -> None:
    """32 ranks = 2 replicas x 8 shards x 2 context; of 4 expert replicas 2 share a copy."""
    text, gaps = export(plan(fsdp_context()), "torchtitan")
    found = tomllib.loads(text)
    assert not gaps
    assert found["parallelism"] == {
        "data_parallel_replicate_degree": 2,
        "data_parallel_shard_degree": 8,
        "fsdp_reshard_after_forward": "always",
        "tensor_parallel_degree": 1,
        "disable_loss_parallel": True,
        "context_parallel_degree": 2,
        "context_parallel_rotate_method": "allgather",
        "expert_parallel_degree": 8,
        "expert_tensor_parallel_degree": 1,
        "expert_parallel_comm_backend": "standard",
        "pipeline_parallel_degree": 1,
    }
    assert found["model"] == {"name": "qwen3", "flavor": "30B-A3B"}
    assert found["training"]["local_batch_size"] == 1
    assert found["training"]["global_batch_size"] == 64
    assert found["training"]["mixed_precision_param"] == "bfloat16"
    assert found["activation_checkpoint"] == {"mode": "full"}
    assert "v0.2.2" in text.splitlines()[1]


@pytest.mark.parametrize(
    ("stack", "compiled"),
    [("torchtitan", False), ("torchtitan-compile", True), ("torchtitan-compile-2026", True)],
)
def test_torchtitan_compiles_what_the_stack_has_compiled(stack: str, compiled: bool) -> None:
    """Also where layers with experts are compiled module by module."""
    given = plan(replace(fsdp_context(), stack=stack))
    assert tomllib.loads(export(given, "torchtitan", lossy=True)[0])["compile"]["enable"] is compiled


def test_a_plan_that_compiles_nothing_says_why_its_file_does() -> None:
    flat = plan(mop(32, expert_parallel=8))
    text = export(flat, "torchtitan", lossy=True)[0]
    assert tomllib.loads(text)["compile"]["enable"] is True
    assert "# [compile] enable is true though the plan compiles nothing" in text
    own = plan(replace(fsdp_context(), stack="torchtitan-compile"))
    assert "though the plan" not in export(own, "torchtitan", lossy=True)[0]


def test_what_torchtitan_keeps_in_its_selective_mode() -> None:
    kept = load_stack("torchtitan").recompute.kept
    strategy = changed(fsdp_context(), activations={"recompute": "full", "save_ops": list(kept)})
    found = tomllib.loads(export(plan(strategy), "torchtitan")[0])
    assert found["activation_checkpoint"] == {"mode": "selective", "selective_ac_option": "op"}
    assert load_stack("torchtitan-compile").recompute.kept == kept[:-1]


@pytest.mark.parametrize(
    ("peak", "says"),
    [
        (3, "3.0 of 4.0 GiB a device; fits with probability 0.97"),
        (5, "5.0 of 4.0 GiB a device; does not fit: device"),
    ],
)
def test_the_header_says_what_memory_the_job_needs_and_whether_it_fits(peak: int, says: str) -> None:
    given = plan(fsdp_context())
    said = Prediction(
        step_time=1.0, tokens_per_second=1.0, peak_memory=peak * 1024**3, host_memory=0,
        memory_by_category={}, time_by_kind={}, p_fits=0.97,
    )  # fmt: skip
    given = replace(given, hardware=replace(given.hardware, memory_limit=4 * 1024**3), prediction=said)
    assert says in export(given, "torchtitan")[0]


def test_torchtitan_offloads_all_or_nothing() -> None:
    text, _ = export(plan(fsdp2(32, expert_parallel=8, offload=True)), "torchtitan")
    assert tomllib.loads(text)["training"]["enable_cpu_offload"] is True
    with pytest.raises(MopError, match=r"precision\.param"):
        export(plan(zero_offload(32, expert_parallel=8)), "torchtitan")


def test_megatron_bridge_by_hand() -> None:
    made = megatron(
        32,
        tensor_parallel=2,
        pipeline_parallel=2,
        virtual_stages=2,
        context_parallel=2,
        expert_parallel=8,
        recompute="selective",
    )
    made = replace(made, activations=replace(made.activations, modules=("core_attn", "moe_act")))
    text, gaps = export(plan(made), "megatron-bridge")
    found = yaml.safe_load(text)
    assert not gaps
    assert found["model"] == {
        "seq_length": 4096,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_model_parallel_layout": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "context_parallel_size": 2,
        "cp_comm_type": "p2p",
        "expert_model_parallel_size": 8,
        "expert_tensor_parallel_size": 1,
        "moe_router_force_load_balancing": False,
        "moe_token_dispatcher_type": "alltoall",
        "recompute_granularity": "selective",
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": ["core_attn", "moe_act"],
        "fine_grained_activation_offloading": False,
        "offload_modules": [],
        "cross_entropy_loss_fusion": False,
        "cross_entropy_fusion_impl": "te",
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "window_size": None,
        "window_attn_skip_freq": None,
        "moe_layer_freq": 1,
    }
    assert found["train"] == {"global_batch_size": 64, "micro_batch_size": 1}
    assert found["optimizer"]["use_distributed_optimizer"] is True
    assert found["ddp"]["grad_reduce_in_fp32"] is True


def test_megatron_bridge_is_told_where_it_recomputes_no_module() -> None:
    """Its null is core_attn beside `selective`."""
    for recompute, modules in (("selective", []), ("full", None), ("none", None)):
        made = megatron(8, recompute=recompute)
        made = replace(made, activations=replace(made.activations, modules=("attention",)))
        text, gaps = export(plan(made), "megatron-bridge", lossy=True)
        assert yaml.safe_load(text)["model"]["recompute_modules"] == modules
        assert bool(gaps) == (recompute == "selective")


def test_megatron_bridge_hides_the_exchanges_of_experts() -> None:
    """Beside what it demands: no recomputation across a dispatch, no overlap of shared experts; its section
    sets the other overlaps anew."""
    made = megatron(32, expert_parallel=8, recompute="selective")
    made = replace(
        made,
        overlap=replace(made.overlap, experts=True, grad_reduce=True),
        activations=replace(made.activations, modules=("core_attn", "moe_act")),
    )
    text, gaps = export(plan(made), "megatron-bridge")
    found = yaml.safe_load(text)
    assert not gaps
    assert found["comm_overlap"] == {
        "_target_": "megatron.bridge.training.comm_overlap.CommOverlapConfig",
        "tp_comm_overlap": False,
        "tp_comm_overlap_cfg": None,
        "overlap_p2p_comm": False,
        "batch_p2p_comm": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": found["ddp"]["overlap_param_gather"],
        "overlap_moe_expert_parallel_comm": True,
        "delay_wgrad_compute": False,
    }
    assert found["model"]["moe_shared_expert_overlap"] is False
    whole = replace(made, activations=replace(made.activations, recompute="full", modules=()))
    experts = replace(made, activations=replace(made.activations, modules=("moe",)))
    for one in (whole, experts):
        with pytest.raises(MopError, match=r"True is not simulated .* are recomputed\), only"):
            export(plan(one), "megatron-bridge")
    for target in ("torchtitan", "deepspeed"):
        _, gaps = export(plan(made), target, lossy=True)
        assert "strategy.overlap.experts" in [gap.field for gap in gaps]


def test_parts_of_a_pipeline_are_written_or_refused() -> None:
    made = megatron(32, pipeline_parallel=2, expert_parallel=8)
    made = replace(made, pipeline=replace(made.pipeline, layers=(26, 22)))
    text, _ = export(plan(made), "megatron-bridge")
    layout = yaml.safe_load(text)["model"]["pipeline_model_parallel_layout"]
    assert layout == "E" + 26 * "t" + "|" + 22 * "t" + "L"
    with pytest.raises(MopError, match=r"pipeline\.layers"):
        export(plan(made), "torchtitan")


def test_megatron_bridge_offloads_a_fraction_of_the_state() -> None:
    made = megatron(32, expert_parallel=8)
    host = replace(made.optimizer, state_tier="host", update_on="host", host_fraction=0.5)
    found = yaml.safe_load(export(plan(replace(made, optimizer=host)), "megatron-bridge")[0])
    assert found["optimizer"]["optimizer_cpu_offload"] is True
    assert found["optimizer"]["optimizer_offload_fraction"] == 0.5


def test_megatron_bridge_offloads_the_inputs_of_layers() -> None:
    def offloading(recompute: Literal["none", "full"]) -> tuple[str, list[SpecError]]:
        made = megatron(32, expert_parallel=8, recompute=recompute, offload_inputs=True)
        return export(plan(replace(made, stack="mopexec-split"), name), "megatron-bridge", lossy=True)

    name = "deepseek_v3"
    text, gaps = offloading("none")
    model = yaml.safe_load(text)["model"]
    assert model["fine_grained_activation_offloading"] is True
    assert model["offload_modules"] == ["attn_norm"]
    assert not [gap for gap in gaps if gap.field.startswith("strategy.activations")]
    text, gaps = offloading("full")
    assert "offload_modules" not in yaml.safe_load(text)["model"]
    assert "strategy.activations.layer_inputs" in [gap.field for gap in gaps]
    name = "qwen3_30b_a3b"  # whose input norm is in the kernel of linear_qkv: nothing would be offloaded
    text, gaps = offloading("none")
    assert "offload_modules" not in yaml.safe_load(text)["model"]
    assert "strategy.activations.layer_inputs" in [gap.field for gap in gaps]


def test_deepspeed_offloads_no_input_that_it_does_not_recompute_from() -> None:
    made = zero_offload(32, expert_parallel=8, offload_inputs=True)
    none = replace(made, activations=replace(made.activations, recompute="none"))
    with pytest.raises(MopError, match=r"activations\.layer_inputs"):
        export(plan(none), "deepspeed")


def test_deepspeed_by_hand() -> None:
    """64 sequences over 32 data groups of one sequence each: two microbatches."""
    text, gaps = export(plan(zero_offload(32, expert_parallel=8, offload_inputs=True)), "deepspeed")
    found = json.loads(text)
    assert not gaps
    assert found["train_batch_size"] == 64
    assert found["train_micro_batch_size_per_gpu"] == 1
    assert found["gradient_accumulation_steps"] == 2
    zero = found["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True, "ratio": 1.0}
    assert "offload_param" not in zero
    assert found["expert_parallel"] == {"enabled": True, "autoep_size": 8, "preset_model": "qwen3_moe"}
    assert found["activation_checkpointing"]["cpu_checkpointing"] is True
    assert found["bf16"] == {"enabled": True}
    assert found["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert found["scheduler"]["params"]["warmup_num_steps"] == 10


def test_deepspeed_ulysses_and_shards_over_fewer_ranks() -> None:
    found = json.loads(export(plan(zero_offload(32, context_parallel=4, fsdp=8)), "deepspeed")[0])
    assert found["sequence_parallel_size"] == 4
    assert found["gradient_accumulation_steps"] == 8
    assert found["zero_optimization"]["mics_shard_size"] == 8


REFUSED: list[tuple[Callable[[], Strategy], str, str]] = [
    (lambda: mop(32, expert_parallel=8, vocab_parallel=8), "deepspeed", "strategy.vocabulary.loss: 'ring'"),
    (lambda: mop(32, expert_parallel=8, vocab_parallel=8), "torchtitan", "strategy.vocabulary.loss: 'ring'"),
    (
        lambda: mop(32, expert_parallel=8, vocab_parallel=8),
        "megatron-bridge",
        "strategy.vocabulary.loss: 'ring'",
    ),
    (
        lambda: megatron(32, pipeline_parallel=2, expert_parallel=8),
        "deepspeed",
        "strategy.pipeline.pipeline_parallel: 2",
    ),
    (lambda: fsdp2(32, context_parallel=2), "torchtitan", "strategy.attention.cp_comm_type: 'ulysses'"),
    (lambda: fsdp2(32, loss="chunked"), "torchtitan", "strategy.vocabulary.loss: 'chunked'"),
    (
        lambda: zero_offload(32, context_parallel=2, expert_parallel=8),
        "deepspeed",
        "strategy.attention.context_parallel: 2",
    ),
    (lambda: megatron(32, tensor_parallel=2, expert_parallel=8), "torchtitan", "strategy.dense.zero: 1"),
    (lambda: fsdp2(32), "megatron-bridge", "strategy.precision.param: 'float32'"),
    (lambda: fsdp2(32), "deepspeed", "strategy.precision.param: 'float32'"),
]


@pytest.mark.parametrize(("make", "target", "says"), REFUSED)
def test_what_is_not_expressed_is_refused_unless_lossy(
    make: Callable[[], Strategy], target: str, says: str
) -> None:
    with pytest.raises(MopError) as refused:
        export(plan(make()), target)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
    text, gaps = export(plan(make()), target, lossy=True)
    assert str(gaps[0]).startswith(says)
    if target == "deepspeed":
        assert json.loads(text)["_not_expressed"] == [str(gap) for gap in gaps]
    else:
        assert sum(line.startswith("# NOT EXPRESSED: ") for line in text.splitlines()) == len(gaps)
        assert tomllib.loads(text) if target == "torchtitan" else yaml.safe_load(text)


def test_torchtitan_has_deepep_alone_and_not_beside_split_experts() -> None:
    """HybridEP was written as DeepEP."""
    base = replace(fsdp2(32, tensor_parallel=2, expert_parallel=8), stack="generic-fused")

    def sent(dispatcher: str, tensor: int = 1) -> list[str]:
        experts = replace(
            base.experts, token_dispatcher=dispatcher, expert_tensor_parallel=tensor, expert_fsdp=1
        )
        given = plan(replace(base, experts=experts), "deepseek_v3")
        text, gaps = export(given, "torchtitan", lossy=True)
        found = tomllib.loads(text)["parallelism"].get("expert_parallel_comm_backend", "none")
        return [found, *(str(gap) for gap in gaps if gap.field.endswith("token_dispatcher"))]

    assert sent("deepep") == ["deepep"]
    says = "strategy.experts.token_dispatcher: 'hybridep' is not in TorchTitan, only 'alltoall' or 'deepep'"
    assert sent("hybridep") == ["none", says]
    found, says = sent("deepep", tensor=2)
    assert found == "none"
    assert "only 'alltoall'" in says


def test_what_the_plans_own_stack_lacks_is_not_written() -> None:
    """Megatron-Bridge has rings and Ulysses; the Megatron of 2022 and TorchTitan do not."""
    made = replace(fsdp2(32, context_parallel=2, context_exchange="ulysses"), stack="torchtitan")
    says = "cp_comm_type: 'ulysses' is not simulated on the stack torchtitan, only 'ring' or 'all_gather'"
    with pytest.raises(MopError, match=says):
        export(plan(made), "deepspeed", lossy=True)
    old = replace(megatron(32, context_parallel=2), stack="megatron-lm-2022")
    with pytest.raises(MopError, match=r"context_parallel: 2 is not simulated .* only 1$"):
        export(plan(old), "megatron-bridge")


def test_an_unknown_model_has_no_flavor() -> None:
    with pytest.raises(
        MopError, match=r"^model\.name: 'mop_120b' has no flavor in TorchTitan that is written"
    ):
        export(plan(fsdp2(32), "mop_120b"), "torchtitan")
    assert "model" not in tomllib.loads(export(plan(fsdp2(32), "mop_120b"), "torchtitan", lossy=True)[0])


@pytest.mark.parametrize("target", TARGETS)
def test_every_file_says_what_its_keys_were_checked_against(target: str) -> None:
    text, _ = export(plan(mop(32, expert_parallel=8)), target, lossy=True)
    assert f"Keys checked against {TARGETS[target].checked}" in text
