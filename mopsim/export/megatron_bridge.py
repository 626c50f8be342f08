"""Megatron-Bridge: a YAML of overrides for a ConfigContainer; the network is a recipe's, or AutoBridge's."""

from collections.abc import Iterator
from typing import Any

from mopsim.common import io
from mopsim.export.gaps import Gap, Target, common, header, only
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy

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
MODULES = ("core_attn", "layernorm", "moe_act", "mla_up_proj", "mlp", "moe")


def instances(s: Strategy) -> int:
    """Copies of the sharded state: num_distributed_optimizer_instances."""
    return max(1, s.stage_ranks // (s.dense.tensor * s.dense.shard)) if s.dense.zero else 1


def gaps(plan: Plan) -> Iterator[Gap]:
    """Fields of a plan that Megatron-Bridge has no words for."""
    s, name = plan.strategy, "Megatron-Bridge"
    yield from common(plan, name)
    yield from only(("1f1b", "interleaved"), "pipeline.schedule", s.pipeline.schedule, f"is not in {name}")
    if s.vocabulary.loss == "full" and s.dense.tensor > 1:
        yield Gap("vocabulary.loss", "full", f"is not in {name} under tensor parallelism: it splits the head")
    if s.vocabulary.loss == "vocab_parallel" and s.vocabulary.degree != s.dense.tensor:
        yield Gap("vocabulary.degree", s.vocabulary.degree, "is not the tensor-parallel degree")
    if s.dense.zero and s.stage_ranks % (s.dense.tensor * s.dense.shard):
        yield Gap("dense.shard", s.dense.shard, "does not divide the data-parallel ranks")
    if s.dense.zero and s.experts.shard * instances(s) != s.expert_replicas:
        why = (
            f"is not the {s.expert_replicas // instances(s)} replicas of an expert in one optimizer instance"
        )
        yield Gap("experts.shard", s.experts.shard, why)
    if s.dense.zero == 3:
        yield from only((True,), "dense.reshard_after_forward", s.dense.reshard_after_forward,
                        f"with ZeRO-3 is not in {name}")  # fmt: skip
        yield from only((1,), "pipeline.degree", s.pipeline.degree, "with ZeRO-3 is not mapped")
    for module in s.activations.modules if s.activations.recompute == "selective" else ():
        if module not in MODULES:
            yield Gap("activations.modules", module, f"is not one of {', '.join(MODULES)}")
    if s.activations.boundary_tier == "host":
        if s.activations.recompute == "full":
            why = f"is not in {name}: it offloads activations of layers that it does not recompute"
            yield Gap("activations.boundary_tier", "host", why)
        yield from only((0,), "activations.host_budget", s.activations.host_budget, f"is not in {name}")
    yield from _state(s)


def _state(s: Strategy) -> Iterator[Gap]:
    p, name = s.precision, "Megatron-Bridge"
    for part, spec in (("dense", s.dense), ("experts", s.experts)):
        yield from only(("device",), f"{part}.param_tier", spec.param_tier, f"is not in {name}")
        yield from only(("device",), f"{part}.grad_tier", spec.grad_tier, f"is not in {name}")
    yield from only(("bfloat16",), "precision.compute", p.compute, "is not mapped: bf16 recipes only")
    yield from only(("bfloat16",), "precision.param", p.param, f"is not in {name}: weights are bf16")
    yield from only(("float32",), "precision.master", p.master, f"is not in {name}: masters are fp32")
    yield from only(("float32",), "precision.moments", p.moments, "is not mapped: moments are fp32")
    yield from only(tuple(MIXED), "precision.matmul", p.matmul, f"has no recipe in {name}")
    if p.reduce != p.grad:
        yield Gap("precision.reduce", p.reduce, f"differs from precision.grad: {name} has one dtype for both")


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
    if s.overlap.tensor and s.dense.tensor > 1:
        beside = {key: found["ddp"][key] for key in ("overlap_grad_reduce", "overlap_param_gather")}
        found["comm_overlap"] = {"tp_comm_overlap": True, **beside}
    if instances(s) > 1:
        found["ddp"]["num_distributed_optimizer_instances"] = instances(s)
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
    return found


def _model(plan: Plan) -> dict[str, Any]:
    s = plan.strategy
    found: dict[str, Any] = {
        "seq_length": plan.training.seq_len,
        "tensor_model_parallel_size": s.dense.tensor,
        "sequence_parallel": s.dense.tensor > 1 and s.dense.sequence_parallel,
        "pipeline_model_parallel_size": s.pipeline.degree,
        "virtual_pipeline_model_parallel_size": (
            s.pipeline.virtual_stages if s.pipeline.virtual_stages > 1 else None
        ),
        "context_parallel_size": s.attention.sequence,
    }
    if s.pipeline.layers:
        found["pipeline_model_parallel_layout"] = _layout(plan)
    if s.attention.sequence > 1:
        found["cp_comm_type"] = EXCHANGE[s.attention.exchange]
    if plan.model.num_local_experts:
        found |= {
            "expert_model_parallel_size": s.experts.degree,
            "expert_tensor_parallel_size": s.experts.tensor,
        }
        if s.experts.dispatch == "deduplicated":
            backend = "hybridep" if s.experts.mapped else "deepep"
            found |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
        else:
            found["moe_token_dispatcher_type"] = "alltoall"
    recompute = s.activations.recompute
    found["recompute_granularity"] = None if recompute == "none" else recompute
    if recompute == "full":
        found |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        found["recompute_modules"] = [name for name in s.activations.modules if name in MODULES]
    if s.activations.boundary_tier == "host" and recompute != "full":
        found |= {"fine_grained_activation_offloading": True, "offload_modules": ["attn_norm"]}
    if s.pipeline.degree > 1:
        found["overlap_p2p_comm"] = s.overlap.pipeline
    found["cross_entropy_loss_fusion"] = s.vocabulary.fused
    return found


def _layout(plan: Plan) -> str:
    """Parts in the network's order: E embedding, t decoder layer, m MTP layer, L loss."""
    parts = ["t" * count for count in plan.strategy.pipeline.layers]
    parts[0] = "E" + parts[0]
    parts[-1] += "m" * plan.model.num_nextn_predict_layers + "L"
    return "|".join(parts)


def render(plan: Plan, left_out: list[Gap]) -> str:
    """The YAML text."""
    lines = [f"# {line}" for line in header("Megatron-Bridge", CHECKED, plan, left_out)]
    lines.append(
        "# To be set: the network (a recipe, or AutoBridge of its Hugging Face config), data, train_iters"
    )
    return "\n".join(lines) + "\n" + io.to_yaml(sections(plan))


MEGATRON_BRIDGE = Target("megatron-bridge", CHECKED, gaps, render)
