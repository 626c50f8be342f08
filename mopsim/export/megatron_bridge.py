"""Megatron-Bridge: a YAML of overrides for a ConfigContainer; the network is a recipe's, or AutoBridge's."""

from collections.abc import Sequence
from typing import Any

from mopsim.common import io
from mopsim.common.errors import SpecError
from mopsim.export.target import Target, header, keys_of, unsaid
from mopsim.spec.categories import MODULES
from mopsim.spec.layout import even_parts
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan

CHECKED = (
    "Megatron-Bridge 0.7.0 in development (commit 067f987 of 2026-08-22) and its Megatron-LM (d98e8a64): "
    "docs/parallelisms.md, training/config.py, training/comm_overlap.py, training/mixed_precision.py"
)
LOADED = (
    "To load: process_config_with_overrides(config, config_filepath=THIS FILE) in Python, of "
    "megatron.bridge.training.utils.omegaconf_utils; config is a recipe's. Its scripts take no such file"
)

EXCHANGE = {"ulysses": "a2a", "ring": "p2p", "all_gather": "all_gather"}
SHARDING = {2: "optim_grads", 3: "optim_grads_params"}
MADE = "megatron.bridge.training"
"""A section with a class is made anew, whatever the recipe has there: a name, an object or nothing."""
KEYS = keys_of("megatron-bridge")


def sections(plan: Plan) -> dict[str, Any]:
    """Sections and keys of the ConfigContainer. What a recipe may have set is set, or cleared."""
    s, t = plan.strategy, plan.training
    sharded, whole = s.dense.zero >= 1, s.dense.zero == 3
    ddp: dict[str, Any] = {
        "use_distributed_optimizer": sharded,
        "grad_reduce_in_fp32": s.precision.reduce == "float32",
        "overlap_grad_reduce": s.overlap.grad_reduce or whole,
        "overlap_param_gather": s.overlap.param_gather or whole,
        "use_megatron_fsdp": s.dense.zero in SHARDING,
    }
    if sharded and s.dense_copies > 1:
        ddp["num_distributed_optimizer_instances"] = s.dense_copies
    found: dict[str, Any] = {
        "model": _model(plan),
        "train": {"global_batch_size": t.global_batch, "micro_batch_size": s.micro_batch},
        "dataset": {"seq_length": t.seq_len},
        "optimizer": _optimizer(plan),
        "ddp": ddp,
        "scheduler": {"lr_warmup_iters": t.warmup_steps},
        "rng": {"seed": t.seed},
        "rerun_state_machine": {"check_for_nan_in_loss": plan.stack.host.loss_read},
        "mixed_precision": {
            "_target_": f"{MADE}.mixed_precision.MixedPrecisionConfig",
            **KEYS["bf16"],
            **KEYS["mixed"].get(s.precision.matmul, {}),
            "grad_reduce_in_fp32": ddp["grad_reduce_in_fp32"],
        },
        "comm_overlap": _comm_overlap(plan, ddp),
    }
    if s.experts.token_dispatcher == "deepep":  # with them, one kernel makes the map of routes
        found["dist"] = {"enable_megatron_core_experimental": plan.stack.kernels.routes_map == "fused"}
    if s.dense.zero in SHARDING:
        ddp["data_parallel_sharding_strategy"] = SHARDING[s.dense.zero]
        found["model"]["gradient_accumulation_fusion"] = False
        found["checkpoint"] = {"ckpt_format": "fsdp_dtensor"}
    return found


def _optimizer(plan: Plan) -> dict[str, Any]:
    """Dtypes other than fp32 need the optimizer that is aware of them; Megatron-Core asserts it."""
    s, t = plan.strategy, plan.training
    on_host = s.optimizer.state_tier == "host" and s.optimizer.update_on == "host"
    aware = on_host and plan.stack.sharding.host_masters == "moved"
    return {
        "optimizer": "adam",
        "lr": t.learning_rate,
        "weight_decay": t.weight_decay,
        "adam_beta1": t.beta1,
        "adam_beta2": t.beta2,
        "adam_eps": t.eps,
        "clip_grad": t.clip_norm,
        "use_distributed_optimizer": s.dense.zero >= 1,
        "optimizer_cpu_offload": on_host,
        "optimizer_offload_fraction": s.optimizer.host_fraction if on_host else 0.0,
        "overlap_cpu_optimizer_d2h_h2d": on_host,
        "use_precision_aware_optimizer": aware,
        "main_grads_dtype": f"torch.{s.precision.grad if aware else 'float32'}",
        "main_params_dtype": "torch.float32",
        "exp_avg_dtype": "torch.float32",
        "exp_avg_sq_dtype": "torch.float32",
    }


def _comm_overlap(plan: Plan, ddp: dict[str, Any]) -> dict[str, Any]:
    """The section sets all overlaps of the others anew, so all are in it."""
    s = plan.strategy
    return {
        "_target_": f"{MADE}.comm_overlap.CommOverlapConfig",
        "tp_comm_overlap": bool(s.overlap.tensor) and s.dense.tensor_parallel > 1,
        "tp_comm_overlap_cfg": None,
        "overlap_p2p_comm": bool(s.overlap.pipeline),
        "batch_p2p_comm": not s.overlap.pipeline,
        "overlap_grad_reduce": ddp["overlap_grad_reduce"],
        "overlap_param_gather": ddp["overlap_param_gather"],
        "overlap_moe_expert_parallel_comm": _hides_experts(plan),
        "delay_wgrad_compute": _hides_experts(plan) and plan.stack.host.delayed_grads,
    }


def _hides_experts(plan: Plan) -> bool:
    """Whether exchanges of experts run beside another microbatch."""
    spread = plan.model.num_moe_layers > 0 and plan.strategy.experts.expert_parallel > 1
    return bool(plan.strategy.overlap.experts) and spread


def _model(plan: Plan) -> dict[str, Any]:
    s = plan.strategy
    found: dict[str, Any] = {
        "seq_length": plan.training.seq_len,
        "tensor_model_parallel_size": s.dense.tensor_parallel,
        "sequence_parallel": s.dense.tensor_parallel > 1 and s.dense.sequence_parallel,
        "pipeline_model_parallel_size": s.pipeline.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": (
            s.pipeline.virtual_stages if s.pipeline.virtual_stages > 1 else None
        ),
        "context_parallel_size": s.attention.context_parallel,
    }
    parts = s.pipeline.pipeline_parallel * s.pipeline.virtual_stages
    uneven = s.pipeline.layers or plan.model.num_hidden_layers % parts
    found |= {
        "pipeline_model_parallel_layout": _layout(plan, parts) if uneven else None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
    }
    if s.attention.context_parallel > 1:
        found["cp_comm_type"] = EXCHANGE[s.attention.cp_comm_type]
    if plan.model.num_local_experts:
        found |= {
            "expert_model_parallel_size": s.experts.expert_parallel,
            "expert_tensor_parallel_size": s.experts.expert_tensor_parallel,
            "moe_router_force_load_balancing": plan.training.routing == "forced",
        }
        if s.experts.sends_once:
            found |= {
                "moe_token_dispatcher_type": "flex",
                "moe_flex_dispatcher_backend": s.experts.token_dispatcher,
            }
        else:
            found["moe_token_dispatcher_type"] = s.experts.token_dispatcher
        if _hides_experts(plan) or s.experts.token_dispatcher != "alltoall":
            found["moe_shared_expert_overlap"] = False  # it refuses both
    found |= _apart(plan.model)
    recompute = s.activations.recompute
    full = recompute == "full"
    modules = [name for name in s.activations.modules if name in MODULES]
    offloads = s.activations.layer_inputs == "host" and not full
    found |= {
        "recompute_granularity": None if recompute == "none" else recompute,
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": 1 if full else None,
        "recompute_modules": modules if recompute == "selective" else None,  # null is core_attn there
        "fine_grained_activation_offloading": offloads,
        "offload_modules": ["attn_norm"] if offloads else [],
    }
    return found | _kernels(plan)


def _kernels(plan: Plan) -> dict[str, Any]:
    """Those that the times of the plan are of: by default Megatron-Core fuses no permutation, activation or
    rotary embedding (core_v0.14.0, megatron/core/transformer/transformer_config.py), AutoBridge asks for some
    networks, and a fused cross entropy is its own. MLA's embedding and clamped gates are left to it."""
    kernels, model = plan.stack.kernels, plan.model
    found: dict[str, Any] = {
        "cross_entropy_loss_fusion": kernels.loss in ("fused", "upcast", "native"),
        "cross_entropy_fusion_impl": "native" if kernels.loss == "native" else "te",
    }
    if model.attention != "mla":
        found["apply_rope_fusion"] = kernels.rotary in ("fused", "by_token")
    if model.ffn_matrices == 3 and not model.swiglu_limit:
        found["bias_activation_fusion"] = kernels.activation == "fused"
    if model.num_local_experts:
        found |= {"moe_grouped_gemm": True, "moe_permute_fusion": kernels.row_sums == "gathered"}
    return found


def _apart(model: ModelSpec) -> dict[str, Any]:
    """Layers that differ, whatever a recipe knows of them: 1 of each that has experts, 1 of each with a
    window, which counts the tokens before a query (megatron/core/transformer/transformer_config.py; a list
    needs one entry for each of num_layers). Nulls clear what AutoBridge gives every GPT-OSS, a window in each
    second layer (models/gpt_oss/gpt_oss_bridge.py)."""
    layers = range(model.num_hidden_layers)
    width, windowed = model.sliding_window, [int(model.window(layer) > 0) for layer in layers]
    found: dict[str, Any] = {
        "window_size": [width - 1, 0] if width else None,
        "window_attn_skip_freq": windowed if width else None,
    }
    if model.num_local_experts:
        routed = [int(model.is_moe_layer(layer)) for layer in layers]
        found["moe_layer_freq"] = 1 if all(routed) else routed
    return found


def _layout(plan: Plan, parts: int) -> str:
    """Parts in the network's order: E embedding, t decoder layer, m MTP layer, L loss. Without a layout
    Megatron-Core wants equal parts (core_v0.14.0, transformer_block.py: get_num_layers_to_build)."""
    layers = plan.strategy.pipeline.layers or even_parts(plan.model.num_hidden_layers, parts)
    found = ["t" * count for count in layers]
    found[0] = "E" + found[0]
    found[-1] += "m" * plan.model.num_nextn_predict_layers + "L"
    return "|".join(found)


def render(plan: Plan, left_out: Sequence[SpecError]) -> str:
    """The YAML text."""
    lines = header("Megatron-Bridge", CHECKED, plan, left_out, "megatron-bridge")
    found = unsaid(sections(plan), left_out, "megatron-bridge")
    lines.append(LOADED)
    lines.append(
        "To be set: the network (a recipe, or AutoBridge of its Hugging Face config), data, train_iters"
    )
    if found["model"].get("fine_grained_activation_offloading"):
        lines.append("In the environment: NVTE_CPU_OFFLOAD_V1=1, or Transformer Engine 2.10 and later stop")
    return "".join(f"# {line}\n" for line in lines) + io.to_yaml(found)


MEGATRON_BRIDGE = Target("megatron-bridge", CHECKED, render)
