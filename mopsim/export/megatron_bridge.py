"""Megatron-Bridge: a YAML of overrides for a ConfigContainer; the network is a recipe's, or AutoBridge's."""

from collections.abc import Sequence
from typing import Any

from mopsim.common import io
from mopsim.common.errors import SpecError
from mopsim.export.target import Target, header, unsaid
from mopsim.spec.categories import MODULES
from mopsim.spec.layout import even_parts
from mopsim.spec.plan import Plan

CHECKED = (
    "Megatron-Bridge 0.7.0 in development (commit 067f987 of 2026-08-22): "
    "docs/megatron-lm-to-megatron-bridge.md, docs/parallelisms.md, training/config.py, "
    "training/comm_overlap.py"
)

EXCHANGE = {"ulysses": "a2a", "ring": "p2p", "all_gather": "all_gather"}
SHARDING = {2: "optim_grads", 3: "optim_grads_params"}
MIXED = {
    "compute": "bf16_mixed",
    "bfloat16": "bf16_mixed",
    "fp8": "bf16_with_fp8_current_scaling_mixed",
    "mxfp8": "bf16_with_mxfp8_mixed",
    "nvfp4": "bf16_with_nvfp4_mixed",
}
KEYS = {
    "strategy.dense.sequence_parallel": ["model.sequence_parallel"],
    "strategy.attention.cp_comm_type": ["model.cp_comm_type"],
    "strategy.experts.token_dispatcher": [
        "model.moe_token_dispatcher_type",
        "model.moe_flex_dispatcher_backend",
    ],
    "strategy.overlap.experts": [
        "comm_overlap.overlap_moe_expert_parallel_comm",
        "comm_overlap.delay_wgrad_compute",
        "model.moe_shared_expert_overlap",
    ],
}
"""By field, what its recipe has the say of where the field is not expressed."""


def sections(plan: Plan) -> dict[str, Any]:
    """Sections and keys of the ConfigContainer."""
    s, t = plan.strategy, plan.training
    sharded = s.dense.zero >= 1
    found: dict[str, Any] = {
        "model": _model(plan),
        "train": {"global_batch_size": t.global_batch, "micro_batch_size": s.micro_batch},
        "dataset": {"seq_length": t.seq_len},
        "optimizer": {
            "optimizer": "adam",
            "lr": t.learning_rate,
            "weight_decay": t.weight_decay,
            "adam_beta1": t.beta1,
            "adam_beta2": t.beta2,
            "adam_eps": t.eps,
            "clip_grad": t.clip_norm,
            "use_distributed_optimizer": sharded,
        },
        "ddp": {
            "use_distributed_optimizer": sharded,
            "grad_reduce_in_fp32": s.precision.reduce == "float32",
            "overlap_grad_reduce": s.overlap.grad_reduce or s.dense.zero == 3,
            "overlap_param_gather": s.overlap.param_gather or s.dense.zero == 3,
        },
        "scheduler": {"lr_warmup_iters": t.warmup_steps},
        "rng": {"seed": t.seed},
        "mixed_precision": MIXED.get(s.precision.matmul, "bf16_mixed"),
    }
    found |= _comm_overlap(plan, found["ddp"])
    if sharded and s.dense_copies > 1:
        found["ddp"]["num_distributed_optimizer_instances"] = s.dense_copies
    if s.dense.zero in SHARDING:
        found["ddp"] |= {
            "use_megatron_fsdp": True,
            "data_parallel_sharding_strategy": SHARDING[s.dense.zero],
        }
        found["model"]["gradient_accumulation_fusion"] = False
        found["checkpoint"] = {"ckpt_format": "fsdp_dtensor"}
    if s.optimizer.state_tier == "host" and s.optimizer.update_on == "host":
        found["optimizer"] |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": s.optimizer.host_fraction,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
        if plan.stack.sharding.host_masters == "moved":
            found["optimizer"]["use_precision_aware_optimizer"] = True
    return found


def _comm_overlap(plan: Plan, ddp: dict[str, Any]) -> dict[str, Any]:
    """The section, where something is hidden by it: it sets all overlaps anew, so all are in it."""
    s = plan.strategy
    tensor = bool(s.overlap.tensor) and s.dense.tensor_parallel > 1
    experts = _hides_experts(plan)
    if not tensor and not experts:
        return {}
    found = {"tp_comm_overlap": tensor}
    found |= {key: ddp[key] for key in ("overlap_grad_reduce", "overlap_param_gather")}
    if s.pipeline.pipeline_parallel > 1:
        found |= {
            "overlap_p2p_comm": bool(s.overlap.pipeline),
            "batch_p2p_comm": not s.overlap.pipeline,
        }
    if experts:
        found |= {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": False}
    return {"comm_overlap": found}


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
    if s.pipeline.layers or plan.model.num_hidden_layers % parts:
        found["pipeline_model_parallel_layout"] = _layout(plan, parts)
    if s.attention.context_parallel > 1:
        found["cp_comm_type"] = EXCHANGE[s.attention.cp_comm_type]
    if plan.model.num_local_experts:
        found |= {
            "expert_model_parallel_size": s.experts.expert_parallel,
            "expert_tensor_parallel_size": s.experts.expert_tensor_parallel,
        }
        if s.experts.token_dispatcher != "alltoall":
            found |= {
                "moe_token_dispatcher_type": "flex",
                "moe_flex_dispatcher_backend": s.experts.token_dispatcher,
            }
        else:
            found["moe_token_dispatcher_type"] = "alltoall"
        if _hides_experts(plan):
            found["moe_shared_expert_overlap"] = False  # it refuses both
    recompute = s.activations.recompute
    found["recompute_granularity"] = None if recompute == "none" else recompute
    if recompute == "full":
        found |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        found["recompute_modules"] = [name for name in s.activations.modules if name in MODULES]
    if s.activations.layer_inputs == "host" and recompute != "full":
        found |= {"fine_grained_activation_offloading": True, "offload_modules": ["attn_norm"]}
    if s.pipeline.pipeline_parallel > 1:
        found["overlap_p2p_comm"] = s.overlap.pipeline
    found["cross_entropy_loss_fusion"] = plan.stack.kernels.loss in ("fused", "upcast")
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
    lines = header("Megatron-Bridge", CHECKED, plan, left_out)
    found = unsaid(sections(plan), left_out, KEYS)
    lines.append(
        "To be set: the network (a recipe, or AutoBridge of its Hugging Face config), data, train_iters"
    )
    if found["model"].get("fine_grained_activation_offloading"):
        lines.append("In the environment: NVTE_CPU_OFFLOAD_V1=1, or Transformer Engine 2.10 and later stop")
    return "".join(f"# {line}\n" for line in lines) + io.to_yaml(found)


MEGATRON_BRIDGE = Target("megatron-bridge", CHECKED, render)
